// `kvtide capture` and `kvtide eval --captured` as processes: the file of a model gives the layer errors that
// the model gives, and what is wrong with a file or the flags is said in words.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::nlohmann::json;
using ::testing::HasSubstr;

class Capture : public ::testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove_all(folder_); }

  // The exit code; `said` has what the program wrote.
  int Kvtide(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), Program("kvtide"));
    const int exit_code = WaitForExit(StartProgram(arguments, folder_ + "/log"), 240);
    said_ = ReadWhole(folder_ + "/log");
    return exit_code;
  }
  json ReadJson(const std::string& name) { return json::parse(ReadWhole(folder_ + "/" + name)); }

  const std::string folder_ = MakeFolder();
  const std::string file_ = folder_ + "/text.safetensors";
  std::string said_;
};

TEST_F(Capture, GivesTheLayerErrorsOfTheModel) {
  ASSERT_EQ(Kvtide({"capture", "--tokens", "512", "--output", file_, "--no-progress"}), 0) << said_;
  EXPECT_THAT(said_, HasSubstr("512 tokens"));
  ASSERT_EQ(Kvtide({"eval", "--captured", file_, "--pairs", "turbo3/turbo3,q8_0/planar3", "--output", "json",
                    "--out", folder_ + "/captured.json", "--plot", folder_ + "/plot.svg", "--no-progress"}),
            0)
      << said_;
  ASSERT_EQ(Kvtide({"eval", "--windows", "1", "--context", "512", "--pairs", "turbo3/turbo3,q8_0/planar3",
                    "--output", "json", "--out", folder_ + "/model.json", "--kvtided", Program("kvtided"),
                    "--no-progress"}),
            0)
      << said_;
  const json captured = ReadJson("captured.json"), model = ReadJson("model.json");
  EXPECT_EQ(captured["model"], "tidelm-7m");
  int compared = 0;
  for (const json& of_file : captured["results"]) {
    for (const json& of_model : model["results"]) {
      if (of_file["pair"] != of_model["pair"]) continue;
      EXPECT_EQ(of_file["layers"], of_model["layers"]) << of_file["pair"];
      // The daemon says how many bytes it holds; the file's bits are computed.
      EXPECT_NEAR(of_file["bits_per_value"], of_model["bits_per_value"], 1e-4) << of_file["pair"];
      ++compared;
    }
  }
  EXPECT_EQ(compared, 2);
  EXPECT_THAT(ReadWhole(folder_ + "/plot.svg"), HasSubstr("turbo3/turbo3"));
}

TEST_F(Capture, SaysWhatIsWrong) {
  EXPECT_EQ(Kvtide({"capture"}), 2);
  EXPECT_THAT(said_, HasSubstr("--output"));
  EXPECT_EQ(Kvtide({"capture", "--tokens", "100000000", "--output", file_, "--no-progress"}), 2);
  EXPECT_THAT(said_, HasSubstr("fewer than --tokens"));
  EXPECT_EQ(Kvtide({"capture", "--tokens", "10", "--output", "/nowhere/x", "--no-progress"}), 2);
  EXPECT_THAT(said_, HasSubstr("/nowhere/x"));
  EXPECT_FALSE(std::filesystem::exists(file_));
  EXPECT_EQ(Kvtide({"eval", "--captured", file_}), 2);
  EXPECT_THAT(said_, HasSubstr("cannot open"));
  std::ofstream(file_) << "this is no tensor file";
  EXPECT_EQ(Kvtide({"eval", "--captured", file_}), 2);
  EXPECT_THAT(said_, HasSubstr("not a safetensors file"));
  EXPECT_EQ(Kvtide({"eval", "--captured", file_, "--windows", "2"}), 2);
  EXPECT_THAT(said_, HasSubstr("--windows"));
}

}  // namespace
}  // namespace kvtide::e2e
