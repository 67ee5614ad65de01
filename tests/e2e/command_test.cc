// The `kvtide` command as a process: exit codes, words for people on stderr and data on stdout, and the main
// job.
#include <cstdlib>
#include <filesystem>

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
  arguments.insert(arguments.begin(), KVTIDE_PROGRAM);
  Outcome run;
  run.exit_code = WaitForExit(StartProgram(arguments, folder + "/log"), 240);
  run.output = ReadWhole(folder + "/log");
  std::filesystem::remove_all(folder);
  return run;
}

TEST(Command, ExplainsItselfAndRefusesWhatItDoesNotKnow) {
  const Outcome help = Kvtide({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* name : {"demo", "plan", "fleet", "eval", "status", "top", "doctor"}) {
    EXPECT_THAT(help.output, HasSubstr(name));
    const Outcome of_command = Kvtide({name, "--help"});
    EXPECT_EQ(of_command.exit_code, 0) << name;
    EXPECT_THAT(of_command.output, HasSubstr("Example")) << name;
  }
  EXPECT_EQ(Kvtide({"--version"}).exit_code, 0);
  EXPECT_EQ(Kvtide({}).exit_code, 2);
  EXPECT_EQ(Kvtide({"nonsense"}).exit_code, 2);
  EXPECT_EQ(Kvtide({"status", "--nonsense"}).exit_code, 2);
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
  const Outcome none = Kvtide({"status", "--address", daemon->address() + "x", "--timeout", "0.1"});
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_THAT(none.output, HasSubstr("is kvtided running?"));
}

// The main job: plan, generate, fork, park, resume, evict; the continuation is the same from every tier.
TEST(Command, DemoDoesTheMainJobWithEveryKindOfPair) {
  for (const char* type : {"f16", "turbo4"}) {
    const Outcome demo =
        Kvtide({"demo", "--context", "700", "--cache-type-k", type, "--generate", "16", "--no-progress",
                "--output", "json", "--kvtided", KVTIDED_PROGRAM, "--threads", "2"});
    EXPECT_EQ(demo.exit_code, 0) << demo.output;
    EXPECT_THAT(demo.output,
                AllOf(HasSubstr("\"same_tokens\": true"), Not(HasSubstr("\"same_tokens\": false"))));
    EXPECT_THAT(demo.output, HasSubstr(std::string("\"pair\": \"") + type + "/" + type));
  }
  const Outcome bad = Kvtide({"demo", "--model", "/nowhere", "--kvtided", KVTIDED_PROGRAM});
  EXPECT_EQ(bad.exit_code, 2) << bad.output;
  EXPECT_THAT(bad.output, HasSubstr("/nowhere"));
}

}  // namespace
}  // namespace kvtide::e2e
