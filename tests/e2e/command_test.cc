// The `kvtide` command as a process: exit codes, words for people on stderr and data on stdout, and the main
// job.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "clients/cpp/block_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Outcome {
  int exit_code = -1;
  std::string output;  // stdout and stderr
};

Outcome Kvtide(std::vector<std::string> arguments) {
  const std::string folder = MakeFolder();
  arguments.insert(arguments.begin(), Program("kvtide"));
  Outcome run;
  setenv("KVTIDE_DEVICE", TestDevice().c_str(), 1);  // of the daemons that the command starts
  run.exit_code = WaitForExit(StartProgram(arguments, folder + "/log"), 240);
  unsetenv("KVTIDE_DEVICE");
  run.output = ReadWhole(folder + "/log");
  std::filesystem::remove_all(folder);
  return run;
}

TEST(Command, ExplainsItselfAndRefusesWhatItDoesNotKnow) {
  const Outcome help = Kvtide({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* name : {"demo", "plan", "fleet", "eval", "capture", "status", "top", "doctor"}) {
    EXPECT_THAT(help.output, HasSubstr(name));
    const Outcome of_command = Kvtide({name, "--help"});
    EXPECT_EQ(of_command.exit_code, 0) << name;
    EXPECT_THAT(of_command.output, HasSubstr("Example")) << name;
  }
  EXPECT_EQ(Kvtide({"--version"}).exit_code, 0);
  EXPECT_EQ(Kvtide({}).exit_code, 2);
  EXPECT_EQ(Kvtide({"nonsense"}).exit_code, 2);
  EXPECT_EQ(Kvtide({"status", "--nonsense"}).exit_code, 2);
  const auto mistyped = Kvtide({"plan", "--contxt", "8192"});
  EXPECT_EQ(mistyped.exit_code, 2);
  EXPECT_THAT(mistyped.output, HasSubstr("no option --contxt; did you mean --context?"));
  EXPECT_THAT(Kvtide({"capture", "--output", "x", "--tokens", "-5"}).output,
              HasSubstr("--tokens: '-5' is not a number above 0"));
  EXPECT_THAT(Kvtide({"evl"}).output, HasSubstr("'evl' was not expected; did you mean eval?"));
}

TEST(Command, StatusOfADaemonThatIsThereAndOfOneThatIsNot) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "f16/f16"});
  ASSERT_TRUE(sequence.ok());
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 100).layers).ok());
  const Outcome table = Kvtide({"status", "--address", daemon->address()});
  EXPECT_EQ(table.exit_code, 0) << table.output;
  EXPECT_THAT(table.output,
              AllOf(HasSubstr("device"), HasSubstr("host"), HasSubstr("small"), Not(HasSubstr("\x1b["))));
  const Outcome json = Kvtide({"status", "--address", daemon->address(), "--output", "json"});
  EXPECT_EQ(json.exit_code, 0);
  EXPECT_THAT(json.output, HasSubstr("\"bits_per_value\""));
  const Outcome none = Kvtide({"status", "--address", daemon->address() + "x", "--timeout", "60"});
  EXPECT_EQ(none.exit_code, 1);
  // It says so at once, not after a minute.
  EXPECT_THAT(none.output, AllOf(HasSubstr("is kvtided running?"), Not(HasSubstr("within"))));
}

// A prediction beside what a daemon with a sequence of that length says it holds.
TEST(Command, SequencesAreListedShownForkedMovedAndClosed) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "f16/f16", .tenant = "evil\x1b[2J"});
  ASSERT_TRUE(sequence.ok());
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 100).layers).ok());
  const std::string id = std::to_string(*sequence);
  const auto seq = [&](std::vector<std::string> words) {
    words.insert(words.begin(), "seq");
    words.insert(words.end(), {"--address", daemon->address()});
    return Kvtide(words);
  };
  const Outcome list = seq({"list"});
  EXPECT_EQ(list.exit_code, 0);
  EXPECT_THAT(list.output, AllOf(HasSubstr(id), HasSubstr("evil\\x1b[2J"), Not(HasSubstr("\x1b"))));
  EXPECT_THAT(seq({"list", "--tenant", "nobody"}).output, HasSubstr("no sequences"));
  EXPECT_THAT(seq({"show", id}).output, AllOf(HasSubstr("tokens     100"), HasSubstr("2 blocks")));
  EXPECT_THAT(seq({"evict", id}).output, HasSubstr("moved 2 blocks"));
  EXPECT_THAT(seq({"prefetch", id}).output, HasSubstr("moved 2 blocks"));
  EXPECT_EQ(seq({"pin", id, "--ttl", "90s"}).output, "pinned 1 for 1m30s\n");
  EXPECT_NEAR(client->ListSequences()->front().pinned_seconds, 90, 60);
  EXPECT_EQ(seq({"pin", id, "--ttl", "0"}).output, "ended the pins of 1\n");
  EXPECT_EQ(client->ListSequences()->front().pinned_seconds, 0);
  EXPECT_EQ(seq({"pin", id, "--ttl", "25h"}).exit_code, 2);
  EXPECT_EQ(seq({"pin", "12345"}).exit_code, 2);
  const Outcome fork = seq({"fork", id});
  EXPECT_EQ(fork.exit_code, 0);
  EXPECT_EQ(client->ListSequences()->size(), 2u);
  EXPECT_THAT(seq({"show", "12345"}).output, HasSubstr("holds no sequence 12345"));
  EXPECT_EQ(seq({"close", id, std::to_string(std::stoull(fork.output))}).output, "closed 2\n");
  EXPECT_TRUE(client->ListSequences()->empty());
  EXPECT_NE(seq({"close", id}).exit_code, 0) << "it is closed already";
  EXPECT_EQ(Kvtide({"health", "--address", daemon->address()}).exit_code, 0);
  EXPECT_EQ(Kvtide({"health", "--address", daemon->address() + "2"}).exit_code, 1);
}

// The scripts are run by the shells that they are for, where those are there.
TEST(Command, CompletesCommandsAndOptions) {
  const Outcome bash = Kvtide({"completion", "bash"});
  ASSERT_EQ(bash.exit_code, 0);
  const std::string folder = MakeFolder();
  std::ofstream(folder + "/kvtide.bash") << bash.output;
  const auto complete = [&](const std::string& words) {
    const std::string command =
        "source " + folder + "/kvtide.bash; COMP_WORDS=(" + words +
        "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _kvtide; echo \"[${COMPREPLY[*]}]\"";
    const std::string log = folder + "/log";
    std::filesystem::remove(log);
    EXPECT_EQ(WaitForExit(StartProgram({"/bin/bash", "-c", command}, log), 60), 0);
    return ReadWhole(log);
  };
  EXPECT_EQ(complete("kvtide fl"), "[fleet]\n");
  EXPECT_EQ(complete("kvtide seq li"), "[list]\n");
  EXPECT_EQ(complete("kvtide seq list --ten"), "[--tenant]\n");
  EXPECT_EQ(complete("kvtide --vers"), "[--version]\n");
  EXPECT_THAT(complete("kvtide status --tls"), HasSubstr("--tls-ca --tls-cert --tls-key"));
  EXPECT_THAT(Kvtide({"completion", "zsh"}).output, HasSubstr("#compdef kvtide"));
  EXPECT_THAT(Kvtide({"completion", "fish"}).output, HasSubstr("complete -c kvtide"));
  EXPECT_EQ(Kvtide({"completion", "csh"}).exit_code, 2);
  std::ofstream(folder + "/kvtide.bash") << Kvtide({"completion", "bash", "kvtided"}).output;
  std::filesystem::remove(folder + "/log");
  EXPECT_EQ(
      WaitForExit(StartProgram({"/bin/bash", "-c",
                                "source " + folder +
                                    "/kvtide.bash; COMP_WORDS=(kvtided --host); COMP_CWORD=1; _kvtided; "
                                    "echo \"[${COMPREPLY[*]}]\""},
                               folder + "/log"),
                  60),
      0);
  EXPECT_EQ(ReadWhole(folder + "/log"), "[--host-memory --host-sharing --host-checksum]\n");
  std::filesystem::remove_all(folder);
}

// The pages have every command and option, and the formatter finds no fault where there is one.
TEST(Command, ReplaysWhatADaemonHasRecorded) {
  const std::string folder = MakeFolder(), trace = folder + "/trace";
  {
    const auto daemon = TestDaemon::Start({"--record-trace", trace + ":1MiB"});
    const auto client = daemon->Connect();
    client::NamespaceSpec spec;
    spec.model = "a very secret model";
    spec.block_tokens = 16;
    spec.content = client::OpaqueBlocks{10'000, "pages"};
    const auto store = client::BlockStore::Open(*client, spec).value();
    const std::vector<std::string_view> keys = {"key 1", "key 2", "key 3"};
    EXPECT_EQ(store->Lookup(keys)->hits, 0);
    EXPECT_EQ(store->Store(keys, std::vector<std::byte>(30'000))->stored, 3);
    EXPECT_EQ(store->Lookup(keys)->hits, 3);
    EXPECT_EQ(daemon->Stop(), 0);
    EXPECT_THAT(daemon->Log(), HasSubstr("recorded events=3 left_out=0"));
  }
  EXPECT_THAT(ReadWhole(trace), AllOf(Not(HasSubstr("secret")), Not(HasSubstr("key 1"))));
  const Outcome replay =
      Kvtide({"fleet", "replay", "--trace", trace, "--host-memory", "1MiB", "--output", "json"});
  EXPECT_EQ(replay.exit_code, 0) << replay.output;
  EXPECT_THAT(replay.output, AllOf(HasSubstr("\"requests\": 2"), HasSubstr("\"asked_blocks\": 6"),
                                   HasSubstr("\"hit_blocks\": 3"), HasSubstr("\"hit_tokens\": 48")));
  EXPECT_EQ(Kvtide({"fleet", "replay", "--trace", Program("kvtide")}).exit_code, 2) << "no recording";
  EXPECT_THAT(Kvtide({"fleet", "replay", "--help"}).output, HasSubstr("Example"));
  std::filesystem::remove_all(folder);
}

TEST(Command, HasManualPages) {
  const std::string folder = MakeFolder();
  for (const char* program : {"kvtide", "kvtided"}) {
    const Outcome page = Kvtide({"manual", program});
    ASSERT_EQ(page.exit_code, 0);
    for (const char* section : {".SH NAME", ".SH SYNOPSIS", ".SH OPTIONS", ".SH EXAMPLES", ".SH EXIT STATUS"})
      EXPECT_THAT(page.output, HasSubstr(section)) << program;
    std::ofstream(folder + "/page") << page.output;
    if (std::filesystem::exists("/usr/bin/groff")) {
      std::filesystem::remove(folder + "/log");
      EXPECT_EQ(WaitForExit(StartProgram({"/usr/bin/groff", "-man", "-ww", "-Wbreak", "-z", "-Tutf8",
                                          folder + "/page"},
                                         folder + "/log"),
                            60),
                0);
      EXPECT_EQ(ReadWhole(folder + "/log"), "") << program;
    }
  }
  EXPECT_THAT(Kvtide({"manual", "kvtide"}).output,
              AllOf(HasSubstr(".SS seq list"), HasSubstr(".SS config show"), HasSubstr("\\-\\-tls\\-ca")));
  EXPECT_THAT(Kvtide({"manual", "kvtided"}).output,
              AllOf(HasSubstr("\\-\\-max\\-queued\\-calls"), HasSubstr("KVTIDE_QUOTA")));
  std::filesystem::remove_all(folder);
}

// From a plan to a daemon: what the planner writes is what kvtided reads.
TEST(Command, APlanIsAConfiguration) {
  if (TestDevice() != "cpu") GTEST_SKIP() << "the plan is for a card of 2 GiB";
  const std::string folder = MakeFolder(), file = folder + "/plan.json";
  for (const char* host : {"0", "4MiB"}) {
    const Outcome plan = Kvtide({"plan", "--model", "SmolLM2-135M", "--device", "vram=2GiB,bandwidth=100GB/s",
                                 "--host-memory", host, "--context", "1024", "--output", "kvtided-config"});
    ASSERT_EQ(plan.exit_code, 0) << plan.output;
    std::ofstream(file) << plan.output;
    const Outcome check = Kvtide({"config", "check", "--config", file});
    EXPECT_EQ(check.exit_code, 0) << check.output;
    const auto daemon = TestDaemon::Start({"--config", file, "--device-memory", "", "--host-memory", ""});
    const auto info = daemon->Connect()->GetServerInfo();
    ASSERT_TRUE(info.ok());
    EXPECT_EQ(info->tiers.size(), std::string(host) == "0" ? 1u : 2u);
  }
  std::filesystem::remove_all(folder);
}

TEST(Command, VerifiesAPlanAgainstARunningDaemon) {
  const auto daemon = TestDaemon::Start({"--metrics-address", "127.0.0.1:0"});
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "q8_0/turbo4"});
  ASSERT_TRUE(sequence.ok());
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 1000).layers).ok());
  const std::string folder = MakeFolder();
  std::ofstream(folder + "/config.json")
      << R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256,
             "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 4096})";
  const std::string url = "http://" + daemon->metrics_address() + "/metrics";
  const auto verify = [&](const std::string& context) {
    return Kvtide({"plan", "verify", "--metrics", url, "--model", folder, "--engine", "kvtide", "--device",
                   "vram=4GiB,bandwidth=100GB/s", "--pairs", "q8_0/turbo4", "--context", context});
  };
  const Outcome exact = verify("1000");
  EXPECT_EQ(exact.exit_code, 0) << exact.output;
  EXPECT_THAT(exact.output, AllOf(HasSubstr("kvtided metrics"), HasSubstr("kv"), HasSubstr("+0.0%")))
      << exact.output;
  const Outcome wrong = verify("2000");
  EXPECT_EQ(wrong.exit_code, 0) << wrong.output;
  EXPECT_THAT(wrong.output, Not(HasSubstr("+0.0%")));
  const Outcome gone =
      Kvtide({"plan", "verify", "--metrics", "http://127.0.0.1:1/metrics", "--model", folder, "--device",
              "vram=4GiB,bandwidth=100GB/s", "--pairs", "f16", "--context", "1000"});
  EXPECT_NE(gone.exit_code, 0);
  EXPECT_THAT(gone.output, HasSubstr("127.0.0.1:1"));
  std::filesystem::remove_all(folder);
}

// The main job: plan, generate, fork, park, resume, evict; the continuation is the same from every tier.
TEST(Command, DemoDoesTheMainJobWithEveryKindOfPair) {
  for (const char* type : {"f16", "turbo4"}) {
    const Outcome demo =
        Kvtide({"demo", "--context", "700", "--cache-type-k", type, "--generate", "16", "--no-progress",
                "--output", "json", "--kvtided", Program("kvtided"), "--threads", "2"});
    EXPECT_EQ(demo.exit_code, 0) << demo.output;
    EXPECT_THAT(demo.output,
                AllOf(HasSubstr("\"same_tokens\": true"), Not(HasSubstr("\"same_tokens\": false"))));
    EXPECT_THAT(demo.output, HasSubstr(std::string("\"pair\": \"") + type + "/" + type));
  }
  const Outcome bad = Kvtide({"demo", "--model", "/nowhere", "--kvtided", Program("kvtided")});
  EXPECT_EQ(bad.exit_code, 2) << bad.output;
  EXPECT_THAT(bad.output, HasSubstr("/nowhere"));
}

}  // namespace
}  // namespace kvtide::e2e
