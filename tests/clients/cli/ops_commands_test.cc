// The commands as main.cc runs them, without a daemon: they say so, quickly, and with the right exit code.
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "clients/cli/ops/doctor_command.h"
#include "clients/cli/ops/status_command.h"
#include "clients/cli/ops/top_command.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli/run_words.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;

Outcome RunOps(std::vector<std::string> words) {
  return RunWords(std::move(words), [](CLI::App& app, int* exit_code) {
    AddStatusCommand(app, exit_code);
    AddTopCommand(app, exit_code);
    AddDoctorCommand(app, exit_code);
  });
}

const char kNobody[] = "unix:/nonexistent/kvtided.sock";

TEST(OpsCommands, StatusWithoutADaemon) {
  const Outcome outcome = RunOps({"status", "--address", kNobody, "--timeout", "0.1"});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, HasSubstr("there is no socket /nonexistent/kvtided.sock"));
  EXPECT_THAT(outcome.err, HasSubstr("kvtide doctor"));
}

TEST(OpsCommands, TopWithoutADaemon) {
  const Outcome outcome = RunOps({"top", "--address", kNobody, "--timeout", "0.1"});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, HasSubstr("there is no socket"));
}

TEST(OpsCommands, DoctorWithoutADaemonStillChecksTheMachine) {
  const Outcome outcome = RunOps({"doctor", "--address", kNobody, "--timeout", "0.1", "--output", "json"});
  EXPECT_EQ(outcome.exit_code, 1);
  const nlohmann::json json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["ok"], false);
  std::vector<std::string> subjects;
  for (const nlohmann::json& finding : json["findings"]) subjects.push_back(finding["subject"]);
  EXPECT_THAT(subjects, testing::IsSupersetOf({"daemon", "GPU", "processor", "host memory", "huge pages",
                                               "locked memory", "disk"}));
  EXPECT_EQ(json["findings"][0]["verdict"], "fail");
}

TEST(OpsCommands, BadFlags) {
  EXPECT_EQ(RunOps({"status", "--output", "xml"}).exit_code, 2);
  EXPECT_EQ(RunOps({"top", "--interval", "0"}).exit_code, 2);
  EXPECT_EQ(RunOps({"doctor", "--timeout", "-1"}).exit_code, 2);
}

}  // namespace
}  // namespace kvtide::cli
