#include "clients/cli/eval/eval_captured.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli/capture_files.h"

namespace kvtide::cli {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

class EvalCapturedTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "/kvtide_eval_captured_" + std::to_string(getpid());
    std::filesystem::create_directories(folder_);
    options_.file = folder_ + "/small.safetensors";
    std::ofstream(options_.file, std::ios::binary)
        << FileBytes(SmallCapture(), {{"model", "tiny, quoted"}, {"text", "a <text>.txt"}});
    options_.pairs = {"turbo2/turbo2", "q8_0/q8_0", "f16/f16", "q8_0/turbo4"};
    options_.window_policy = "none";
    options_.show_progress = false;
    options_.threads = 2;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  absl::StatusOr<CapturedReport> Run() { return RunEvalCaptured(options_, stop_); }

  std::string folder_;
  CapturedOptions options_;
  std::atomic<bool> stop_{false};
};

TEST_F(EvalCapturedTest, SortsByBitsAndMarksTheFront) {
  const auto report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  std::vector<std::string> order;
  for (const CapturedRow& row : report->rows) order.push_back(row.pair + (row.pareto ? "*" : ""));
  EXPECT_THAT(order, ElementsAre("f16/f16*", "q8_0/q8_0*", "q8_0/turbo4*", "turbo2/turbo2*"));
  // 200 tokens take 4 blocks; 8.5 bits and padding of scale planes.
  EXPECT_NEAR(report->rows[1].bits_per_value, 8.5 * 256 / 200, 0.7);
  EXPECT_EQ(report->rows[0].layers.size(), 2u);
  EXPECT_LT(report->rows[1].mean.output, report->rows[3].mean.output);
  EXPECT_EQ(report->model, "tiny, quoted");
  EXPECT_EQ(report->queries, 64);
}

TEST_F(EvalCapturedTest, EveryFormHasEveryPair) {
  const auto report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  const json parsed = json::parse(RenderJson(*report));
  ASSERT_EQ(parsed["results"].size(), 4u);
  EXPECT_EQ(parsed["results"][3]["pair"], "turbo2/turbo2");
  EXPECT_EQ(parsed["results"][3]["layers"].size(), 2u);
  EXPECT_NEAR(parsed["results"][3]["layers"][1]["output_error"], report->rows[3].layers[1].output, 1e-4);
  const std::string csv = RenderCsv(*report), table = RenderTable(*report, Terminal(false, false, 100)),
                    svg = RenderSvg(*report);
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 1 + 4 * 3);
  EXPECT_THAT(csv, HasSubstr("\"tiny, quoted\",a <text>.txt,200,all,q8_0,turbo4,none,"));
  for (const char* pair : {"q8_0/q8_0", "q8_0/turbo4", "turbo2/turbo2"}) {
    EXPECT_THAT(table, HasSubstr(pair));
    EXPECT_THAT(svg, HasSubstr(pair));
  }
  EXPECT_THAT(svg, HasSubstr("a &lt;text&gt;.txt"));
  EXPECT_EQ(svg.find("nan"), std::string::npos);
}

TEST_F(EvalCapturedTest, AllMeansEveryTypeOnBothSidesAndAfterQ8) {
  options_.pairs.clear();
  const auto report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->rows.size(), static_cast<size_t>(kCodecTypes + kCodecTypes - 3));
}

TEST_F(EvalCapturedTest, GoesOnFromTheStateAndRefusesThatOfAnotherRun) {
  options_.state_file = folder_ + "/state.json";
  options_.pairs = {"q8_0/q8_0"};
  ASSERT_TRUE(Run().ok());
  // A mark in the state shows that it is used: one layer's error is replaced.
  json state = json::parse(std::ifstream(options_.state_file));
  state["results"][0]["error"][0] = 0.123;
  std::ofstream(options_.state_file) << state.dump();
  options_.pairs = {"q8_0/q8_0", "turbo4/turbo4"};
  const auto more = Run();
  ASSERT_TRUE(more.ok()) << more.status();
  EXPECT_EQ(more->rows[0].layers[0].key, 0.123);
  EXPECT_GT(more->rows[1].layers[0].key, 0);
  options_.window_policy = "default";
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kFailedPrecondition);
  std::ofstream(options_.state_file) << "{\"run\": 1}";
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EvalCapturedTest, StopsWhenAskedAndRefusesUnknownPairs) {
  stop_ = true;
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kCancelled);
  stop_ = false;
  options_.pairs = {"q8_0/turbo9"};
  EXPECT_THAT(std::string(Run().status().message()), HasSubstr("turbo9"));
  options_.pairs = {"tide3/turbo3"};
  EXPECT_THAT(std::string(Run().status().message()), HasSubstr("tide3 needs a profile"));
}

}  // namespace
}  // namespace kvtide::cli
