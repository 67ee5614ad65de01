#include "clients/cli/eval/eval_report.h"

#include <cmath>

#include "clients/cli/demo/demo_report.h"
#include "clients/cli/eval/eval_run.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "planner/plan/quality.h"

namespace kvtide::cli {
namespace {

using nlohmann::json;
using testing::HasSubstr;

EvalReport Example() {
  EvalReport report;
  report.model = "tiny, quoted";
  report.text = "a <text>.txt";
  report.tokens = 8192;
  report.windows = 2;
  report.context = 4096;
  report.window_policy = "default";
  report.key_centring = report.key_equalising = "default";
  report.version = "0.1.0";
  report.date = "2026-11-22";
  report.rows = {{"turbo3/turbo3", 16.4, 3.7, 0.02, 0.3, 0.93, 3.125, false, {}, {}},
                 {"f16/f16", 15.8, 0, 0, 0, 1, 16, false, {}, {}},
                 {"planar3/planar3", 17.9, 13.1, 0.09, 0.9, 0.85, 3.125, false, {{0.1, 0.2, 0.3}}, {}},
                 {"q8_0/q8_0", 15.8004, 0.003, 1e-5, 1e-4, 0.999, 8.5, false, {}, {{0.5, 4, 3, -1.25}}}};
  SortAndMark(&report.rows);
  return report;
}

TEST(EvalReportTest, SortsByBitsAndMarksTheParetoFront) {
  const EvalReport report = Example();
  std::vector<std::string> order;
  for (const EvalRow& row : report.rows) order.push_back(row.pair + (row.pareto ? "*" : ""));
  EXPECT_THAT(order, testing::ElementsAre("f16/f16*", "q8_0/q8_0*", "turbo3/turbo3*", "planar3/planar3"));
}

TEST(EvalReportTest, JsonHasEveryNumber) {
  const json parsed = json::parse(RenderJson(Example()));
  EXPECT_EQ(parsed["windows"], 2);
  ASSERT_EQ(parsed["results"].size(), 4u);
  const json& q8 = parsed["results"][1];
  EXPECT_EQ(q8["pair"], "q8_0/q8_0");
  EXPECT_DOUBLE_EQ(q8["perplexity"], 15.8004);
  EXPECT_DOUBLE_EQ(q8["change_percent"], 0.003);
  EXPECT_DOUBLE_EQ(q8["bits_per_value"], 8.5);
  EXPECT_EQ(q8["needles"][0]["found"], 3);
  EXPECT_DOUBLE_EQ(parsed["results"][3]["layers"][0]["logit_error"], 0.3);
}

TEST(EvalReportTest, CsvIsWhatThePlannerReads) {
  const auto rows = planner::ParseQualityCsv(RenderCsv(Example()), "eval.csv");
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 3u);
  EXPECT_EQ((*rows)[0].model, "tiny, quoted");
  EXPECT_EQ((*rows)[0].pair.Name(), "q8_0/q8_0");
  EXPECT_DOUBLE_EQ((*rows)[0].ppl_change_percent, 0.003);
  EXPECT_EQ((*rows)[1].tokens, 8192);
  EXPECT_EQ((*rows)[1].window_policy, "default");
  EXPECT_DOUBLE_EQ((*rows)[1].kld_mean, 0.02);
  EXPECT_EQ((*rows)[1].key_profile, "");
}

TEST(EvalReportTest, CsvNamesTheProfileOfCodedKeys) {
  EvalReport report = Example();
  report.key_profile = "manuals.txt";
  report.rows = {{"f16/turbo4", 15.9, 0.1, 0.01, 0.1, 0.99, 10, false, {}, {}},
                 {"turbo4/turbo4", 16, 0.5, 0.02, 0.2, 0.98, 4, false, {}, {}}};
  const auto rows = planner::ParseQualityCsv(RenderCsv(report), "eval.csv");
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)[0].key_profile, "");  // nothing of it is coded
  EXPECT_EQ((*rows)[1].key_profile, "manuals.txt");
  // Of a profile after RoPE the rows of calibrated types say so.
  report.after_rope = true;
  report.rows.push_back({"tide3/turbo3", 16, 0.5, 0.02, 0.2, 0.98, 4, false, {}, {}});
  const auto after = planner::ParseQualityCsv(RenderCsv(report), "eval.csv");
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_FALSE((*after)[1].after_rope);
  EXPECT_TRUE((*after)[2].after_rope);
  EXPECT_EQ((*after)[2].key_profile, "manuals.txt");
}

// The name that plan and calibrate have for it, too.
TEST(EvalReportTest, JsonSaysWhetherKeysWereCodedAfterRope) {
  EvalReport report = Example();
  EXPECT_FALSE(json::parse(RenderJson(report)).contains("after_rope"));
  report.key_profile = "manuals.txt";
  report.after_rope = true;
  EXPECT_EQ(json::parse(RenderJson(report))["after_rope"], true);
}

TEST(EvalReportTest, TableAndPlotNameEveryPair) {
  const EvalReport report = Example();
  const std::string table = RenderTable(report, Terminal(false, false, 100)), svg = RenderSvg(report);
  for (const char* pair : {"q8_0/q8_0", "turbo3/turbo3", "planar3/planar3"}) {
    EXPECT_THAT(table, HasSubstr(pair));
    EXPECT_THAT(svg, HasSubstr(pair));
  }
  EXPECT_THAT(table, HasSubstr("+13.100 %"));
  EXPECT_THAT(table, HasSubstr("3/4"));
  EXPECT_THAT(table, testing::Not(HasSubstr("\x1b")));
  EXPECT_THAT(RenderTable(report, Terminal(true, true, 100)), HasSubstr("\x1b["));
  EXPECT_THAT(svg, HasSubstr("a &lt;text&gt;.txt"));
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
}

TEST(WindowPolicyTest, ReadsTheThreeForms) {
  EXPECT_FALSE(ParseWindowPolicy("default")->seal_at_once);
  EXPECT_EQ(ParseWindowPolicy("default")->window, ExactWindow());
  EXPECT_TRUE(ParseWindowPolicy("none")->seal_at_once);
  EXPECT_EQ(ParseWindowPolicy("2+4")->window, (ExactWindow{2, 4}));
  for (const char* bad : {"", "1", "1+", "-1+2", "a+b", "1+2+3"})
    EXPECT_FALSE(ParseWindowPolicy(bad).ok()) << bad;
}

TEST(DemoReportTest, SaysWhenAContinuationDiffers) {
  DemoReport report;
  report.model = "m";
  report.pair = "q8_0/turbo4";
  report.f16_bytes_per_token = 6144;
  report.stored_bytes = 4000 * 2500;
  report.stored_tokens = 4000;
  report.generated = "cut \xe6\x97";
  report.steps = {{"park", "moved", 3, 300, true, true}};
  EXPECT_TRUE(json::parse(RenderDemoJson(report))["same_tokens"]);
  EXPECT_THAT(RenderDemoTable(report, Terminal(false, false, 100)),
              HasSubstr("2500 of 6144 in f16: 2.46x smaller"));
  report.steps.push_back({"resume", "back", 3, 300, true, false});
  EXPECT_FALSE(json::parse(RenderDemoJson(report))["same_tokens"]);
  EXPECT_THAT(RenderDemoTable(report, Terminal(false, false, 100)), HasSubstr("DIFFERS"));
}

}  // namespace
}  // namespace kvtide::cli
