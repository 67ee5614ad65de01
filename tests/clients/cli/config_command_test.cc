#include "clients/cli/ops/config_command.h"

#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli/run_words.h"

namespace kvtide::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class ConfigCommand : public testing::Test {
 protected:
  Outcome Run(std::vector<std::string> words, const std::string& json) {
    std::ofstream(file_) << json;
    words.insert(words.begin(), "config");
    words.insert(words.begin() + 2, {"--config", file_});
    return RunWords(std::move(words), AddConfigCommand);
  }
  const std::string file_ = testing::TempDir() + "/kvtide_config_command.json";
};

TEST_F(ConfigCommand, ChecksAsKvtidedDoes) {
  const Outcome good = Run({"check"}, "{\"device\": \"cpu\"}");
  EXPECT_EQ(good.exit_code, 0);
  EXPECT_THAT(good.out, HasSubstr("good"));
  const Outcome unknown = Run({"check"}, "{\"devise\": \"cpu\"}");
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_THAT(unknown.err, AllOf(HasSubstr(file_), HasSubstr("did you mean \"device\"?")));
  // Not only the form: what a start would refuse.
  EXPECT_THAT(Run({"check"}, "{\"persist\": \"all\"}").err, HasSubstr("needs a disk tier"));
  EXPECT_THAT(Run({"check"}, "{\"listen\": [\"0.0.0.0:7600\"]}").err, HasSubstr("without TLS"));
  EXPECT_THAT(Run({"check", "--", "--devise", "cpu"}, "{}").err, HasSubstr("did you mean --device?"));
}

TEST_F(ConfigCommand, AnswersInJson) {
  const nlohmann::json bad =
      nlohmann::json::parse(Run({"check", "--output", "json"}, "{\"device\": \"x\"}").out);
  EXPECT_EQ(bad["ok"], false);
  EXPECT_EQ(bad["file"], file_);
  EXPECT_THAT(bad["error"].get<std::string>(), HasSubstr("use cpu"));
  const Outcome shown =
      Run({"show", "--output", "json", "--", "--host-memory", "3MiB"}, "{\"device\": \"cpu\"}");
  EXPECT_EQ(shown.exit_code, 0) << shown.err;
  const nlohmann::json json = nlohmann::json::parse(shown.out);
  const auto of = [&](const char* name) {
    for (const auto& setting : json["settings"])
      if (setting["name"] == name) return setting;
    return nlohmann::json();
  };
  EXPECT_EQ(of("device")["source"], "file");
  EXPECT_EQ(of("host_memory")["source"], "flag");
  EXPECT_EQ(of("host_memory")["value"], "3MiB");
  EXPECT_EQ(of("max_models")["source"], "default");
  EXPECT_EQ(of("max_models")["environment"], "KVTIDE_MAX_MODELS");
}

TEST_F(ConfigCommand, WarnsOfWhatIsProbablyNotMeant) {
  setenv("KVTIDE_DEVISE", "cpu", 1);
  setenv("KVTIDE_LOG_LEVEL", "debug", 1);
  const Outcome outcome =
      Run({"check"}, R"({"log_level": "info", "device_memory": "2MiB", "device_tier_bytes": 7000000})");
  unsetenv("KVTIDE_DEVISE");
  unsetenv("KVTIDE_LOG_LEVEL");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("did you mean KVTIDE_DEVICE?"),
                                 HasSubstr("log_level of the file is overridden by KVTIDE_LOG_LEVEL"),
                                 HasSubstr("device_memory stands beside device_tier_bytes")));
}

TEST_F(ConfigCommand, ShowsWhereValuesComeFrom) {
  const Outcome outcome = Run({"show", "--", "--log-level", "debug"}, "{\"device\": \"cpu\"}");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("setting"), HasSubstr(file_), HasSubstr("--log-level")));
  EXPECT_EQ(Run({"show"}, "[]").exit_code, 2);
}

}  // namespace
}  // namespace kvtide::cli
