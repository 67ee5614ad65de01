// What `kvtide connect` prints: the pair, the words of each engine's command line, and that a shell reads
// them back.
#include "clients/cli/connect/connect_plan.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "clients/cli/connect/connect_command.h"
#include "clients/cli/terminal/shell_words.h"
#include "clients/cli/terminal/terminal.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli/run_words.h"

namespace kvtide::cli {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsSupersetOf;
using testing::Not;

constexpr int64_t kGiB = int64_t{1} << 30;

planner::Candidate Pair(const std::string& name, int64_t bytes, double harm, bool fits = true) {
  planner::Candidate candidate;
  candidate.asked = {name.substr(0, name.find('/')), name.substr(name.find('/') + 1)};
  candidate.kv_bytes = bytes;
  candidate.fits = fits;
  candidate.harm.measured = harm >= 0;
  candidate.harm.ppl_change_percent = candidate.harm.expected_percent = harm;
  candidate.harm.model = harm > 0 ? "tidelm-7m" : "";
  candidate.ratio_to_f16 = 16.0 * kGiB / static_cast<double>(bytes);
  return candidate;
}

ConnectRequest Request(ServingEngine engine) {
  ConnectRequest request;
  request.engine = engine;
  request.model = "my model";
  request.address = "unix:/run/kvtide/kvtided.sock";
  request.context = 32768;
  request.sequences = 4;
  request.host_bytes = 64 * kGiB;
  planner::ContextPlan context;
  context.context = 32768;
  context.candidates = {Pair("f16/f16", 16 * kGiB, 0, false), Pair("turbo4/turbo4", 4 * kGiB, 0.95),
                        Pair("q8_0/turbo4", 6 * kGiB, 0.25, false), Pair("turbo3/turbo3", 3 * kGiB, 3.7),
                        Pair("iso4/iso4", 4 * kGiB, -1)};
  request.plan.contexts = {context};
  request.llama_arguments = "-c 32768 -np 4 -ngl 999 -ctk q8_0 -ctv q8_0 -fa on\n";
  return request;
}

std::string ChosenFor(int64_t host_bytes) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.host_bytes = host_bytes;
  return ChoosePair(request)->pair;
}

TEST(ConnectPlan, TheLeastHarmThatFitsTheHostTierElseTheSmallestBelowAPercent) {
  EXPECT_EQ(ChosenFor(16 * kGiB), "f16/f16");
  EXPECT_EQ(ChosenFor(16 * kGiB - 1), "q8_0/turbo4");
  EXPECT_EQ(ChosenFor(4 * kGiB), "turbo4/turbo4");
  EXPECT_EQ(ChosenFor(kGiB), "turbo4/turbo4") << "turbo3 harms too much, iso4 was not measured";
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.host_bytes = kGiB;
  EXPECT_THAT(ChoosePair(request)->reason,
              AllOf(HasSubstr("smallest pair below 1 % harm"), HasSubstr("+0.95 %")));
  request.gpus = 2;
  request.host_bytes = 12 * kGiB;
  EXPECT_EQ(ChoosePair(request)->pair, "q8_0/turbo4") << "every GPU has its share";
}

TEST(ConnectPlan, PagesOfTheEngineHaveToFitTheDevice) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.way = Way::kPages;
  EXPECT_EQ(ChoosePair(request)->pair, "turbo4/turbo4");
}

TEST(ConnectPlan, APairThatIsAskedForIsTakenAndDescribed) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.pair = "turbo3/turbo3";
  EXPECT_EQ(ChoosePair(request)->reason, "as asked, +3.70 % perplexity on tidelm-7m");
  request.pair = "pq4/pq4";
  EXPECT_EQ(ChoosePair(request).status().code(), absl::StatusCode::kNotFound);
}

TEST(ConnectPlan, NothingMeasuredSaysWhatToDo) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.plan.contexts.front().candidates = {Pair("iso4/iso4", 4 * kGiB, -1)};
  const absl::Status status = ChoosePair(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--pair"));
}

TEST(ConnectPlan, VllmWithBlocksInTheDaemon) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.gpus = 2;
  const Connection connection = *MakeConnection(request);
  EXPECT_EQ(connection.settings["kv_connector"], "KvtideConnector");
  EXPECT_EQ(connection.settings["kv_connector_module_path"], "kvtide.vllm.connector");
  EXPECT_EQ(connection.settings["kv_load_failure_policy"], "recompute");
  EXPECT_EQ(connection.settings["kv_connector_extra_config"]["address"], request.address);
  EXPECT_EQ(connection.settings["kv_connector_extra_config"]["pair"], connection.choice.pair);
  EXPECT_THAT(connection.command, IsSupersetOf({"my model", "--tensor-parallel-size", "2",
                                                "--kv-transfer-config", connection.settings.dump().c_str()}));
  EXPECT_TRUE(connection.environment.empty());
  EXPECT_THAT(connection.daemon, IsSupersetOf({request.address.c_str(), "65536MiB"}));
}

TEST(ConnectPlan, VllmOnKvtidesPages) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.way = Way::kPages;
  const Connection pages = *MakeConnection(request);
  EXPECT_TRUE(pages.settings.is_null());
  EXPECT_TRUE(pages.daemon.empty());
  EXPECT_THAT(pages.environment, ElementsAre(testing::Pair("KVTIDE_PAIR", "turbo4/turbo4")));
  EXPECT_THAT(pages.command, Contains("--attention-backend"));
  request.gpu = false;
  EXPECT_THAT(MakeConnection(request)->command, Not(Contains("--attention-backend")));
  request.engine = ServingEngine::kSglang;
  EXPECT_EQ(MakeConnection(request).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ConnectPlan, KeysByAProfile) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.profile = "/profiles/my model";
  request.plan.contexts.front().candidates.push_back(Pair("tide3/turbo3", 3 * kGiB, 0.2));
  EXPECT_THAT(std::string(MakeConnection(request).status().message()), HasSubstr("--way pages"));
  request.way = Way::kBoth;
  EXPECT_EQ(MakeConnection(request).status().code(), absl::StatusCode::kInvalidArgument);
  request.way = Way::kPages;
  EXPECT_THAT(MakeConnection(request)->environment,
              ElementsAre(testing::Pair("KVTIDE_PAIR", "turbo4/turbo4"),
                          testing::Pair("KVTIDE_PROFILE", "/profiles/my model")))
      << "whether the profile is of keys after RoPE is not known here";
  request.pair = "tide3/turbo3";
  EXPECT_THAT(MakeConnection(request)->environment,
              ElementsAre(testing::Pair("KVTIDE_PAIR", "tide3/turbo3"),
                          testing::Pair("KVTIDE_PROFILE", "/profiles/my model")));
  request.profile.clear();
  EXPECT_THAT(std::string(MakeConnection(request).status().message()),
              HasSubstr("kvtide calibrate --keys after-rope"));
  request.profile = "/profiles/my model";
  request.pair = "auto";
  request.engine = ServingEngine::kTransformers;
  request.way = Way::kCache;
  request.host_bytes = 3 * kGiB;
  EXPECT_THAT(MakeConnection(request)->code,
              Contains(HasSubstr("pair=\"tide3/turbo3\", profile=\"/profiles/my model\")")));
  request.engine = ServingEngine::kSglang;
  EXPECT_EQ(MakeConnection(request).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ConnectPlan, VllmOnKvtidesPagesThatRestInTheDaemonToo) {
  ConnectRequest request = Request(ServingEngine::kVllm);
  request.way = Way::kBoth;
  const Connection both = *MakeConnection(request);
  EXPECT_EQ(both.choice.pair, "turbo4/turbo4") << "what fits the device";
  EXPECT_THAT(both.environment, ElementsAre(testing::Pair("KVTIDE_PAIR", "turbo4/turbo4")));
  EXPECT_THAT(both.command, IsSupersetOf({"--attention-backend", "CUSTOM", "--kv-transfer-config"}));
  EXPECT_THAT(both.daemon, Contains("--host-memory"));
  EXPECT_EQ(both.settings["kv_connector_extra_config"]["pair"], "turbo4/turbo4");
  EXPECT_EQ(both.verify.front(), "kvtide doctor --engine vllm --address unix:/run/kvtide/kvtided.sock");
  request.engine = ServingEngine::kTransformers;
  EXPECT_EQ(MakeConnection(request).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ConnectPlan, SglangTransformersAndLlamaCpp) {
  const Connection sglang = *MakeConnection(Request(ServingEngine::kSglang));
  EXPECT_EQ(sglang.settings["interface_v1"], 1);
  EXPECT_EQ(sglang.settings["allocator"], "shm");
  EXPECT_THAT(sglang.command, IsSupersetOf({"dynamic", "page_first", "64", sglang.settings.dump().c_str()}));

  const Connection transformers = *MakeConnection(Request(ServingEngine::kTransformers));
  EXPECT_THAT(transformers.code, Contains("name = \"my model\""));
  EXPECT_THAT(transformers.daemon, IsSupersetOf({"--device-memory", "65536MiB", "--host-memory", "0"}));

  const Connection llama = *MakeConnection(Request(ServingEngine::kLlamaCpp));
  EXPECT_THAT(llama.command,
              ElementsAre("llama-server", "-m", "my model", "-c", "32768", "-np", "4", "-ngl", "999", "-ctk",
                          "q8_0", "-ctv", "q8_0", "-fa", "on", "--slot-save-path", "slots/"));
}

TEST(ConnectPlan, TextCanBePasted) {
  const std::string text = RenderConnection(*MakeConnection(Request(ServingEngine::kVllm)));
  EXPECT_THAT(text, HasSubstr("vllm serve 'my model' --max-model-len 32768"));
  EXPECT_THAT(text, HasSubstr("--kv-transfer-config '{\"kv_connector\""));
  EXPECT_THAT(text, HasSubstr("\nkvtided --listen unix:/run/kvtide/kvtided.sock"));
  EXPECT_THAT(text, HasSubstr("\nkvtide doctor --engine vllm"));
}

TEST(ConnectPlan, JsonHasTheSameWords) {
  const Connection connection = *MakeConnection(Request(ServingEngine::kSglang));
  const nlohmann::json json = nlohmann::json::parse(RenderConnectionJson(connection));
  EXPECT_EQ(json["command"].get<std::vector<std::string>>(), connection.command);
  EXPECT_EQ(json["settings"], connection.settings);
  EXPECT_EQ(json["pair"], connection.choice.pair);
}

TEST(ShellWords, AShellReadsEveryWordBack) {
  const std::vector<std::string> words = {"plain",
                                          "two words",
                                          "it's",
                                          "\"quoted\"",
                                          "$HOME `id` \\",
                                          "",
                                          "a\nb",
                                          "*",
                                          "-e\x1b[2J\x01\x32'\\%s\xc2\x9b\xff\n\n",
                                          "\n"};
  const std::string line = "printf '%s|' " + ShellLine(words);
  EXPECT_EQ(Printable(ShellQuoted("a\nb\x1b")), ShellQuoted("a\nb\x1b")) << "a control character is shown";
  FILE* pipe = popen(line.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::array<char, 256> buffer{};
  const size_t read = fread(buffer.data(), 1, buffer.size(), pipe);
  EXPECT_EQ(pclose(pipe), 0);
  std::string wanted;
  for (const std::string& word : words) wanted += word + "|";
  EXPECT_EQ(std::string(buffer.data(), read), wanted);
}

Outcome RunConnect(std::vector<std::string> words) { return RunWords(std::move(words), AddConnectCommand); }

TEST(ConnectCommand, UsesThePlannersModels) {
  const Outcome outcome =
      RunConnect({"connect", "vllm", "--model", "llama-3.1-8b", "--context", "8K", "--host-memory", "64GiB",
                  "--output", "json", "--address", "unix:/tmp/x.sock"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const nlohmann::json json = nlohmann::json::parse(outcome.out);
  // 64 sequences of 8K f16 tokens take 64 GiB; all blocks of the store are coded, and the harm is that of no
  // exact window.
  EXPECT_EQ(json["pair"], "f16/f16");
  const Outcome smaller = RunConnect({"connect", "vllm", "--model", "llama-3.1-8b", "--context", "8K",
                                      "--host-memory", "60GiB", "--output", "json"});
  EXPECT_EQ(nlohmann::json::parse(smaller.out)["pair"], "q8_0/q8_0");
}

TEST(ConnectCommand, BadWordsAreRefusedWithWhatIsKnown) {
  EXPECT_THAT(RunConnect({"connect", "ollama", "--model", "llama-3.1-8b"}).err,
              HasSubstr("known: vllm, sglang, transformers, llama.cpp"));
  EXPECT_EQ(RunConnect({"connect", "vllm"}).exit_code, 2);
  EXPECT_EQ(RunConnect({"connect", "vllm", "--model", "llama-3.1-8b", "--context", "4K,8K"}).exit_code, 2);
  EXPECT_THAT(RunConnect({"connect", "vllm", "--model", "llama-3.1-8b", "--pair", "x/y"}).err,
              HasSubstr("'x'"));
  EXPECT_THAT(RunConnect({"connect", "sglang", "--model", "llama-3.1-8b", "--way", "pages"}).err,
              HasSubstr("only vLLM"));
}

}  // namespace
}  // namespace kvtide::cli
