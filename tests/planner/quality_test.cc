#include "planner/plan/quality.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

QualityRow Row(const std::string& model, TypePair pair, const std::string& window, int64_t context,
               double change) {
  QualityRow row;
  row.model = model;
  row.pair = std::move(pair);
  row.window_policy = window;
  row.context = context;
  row.ppl_change_percent = change;
  return row;
}

const TypePair kTurbo3{"turbo3", "turbo3"};

TEST(Quality, TheYardstickHasNoHarm) {
  const Harm harm = FindHarm({}, {"f16", "f16"}, "m", "default", 4096, false);
  EXPECT_TRUE(harm.measured);
  EXPECT_EQ(harm.ppl_change_percent, 0);
}

TEST(Quality, UnmeasuredPairsAreUnmeasured) {
  EXPECT_FALSE(FindHarm({}, kTurbo3, "m", "default", 4096, true).measured);
  const std::vector<QualityRow> rows = {Row("m", kTurbo3, "none", 4096, 4)};
  EXPECT_FALSE(FindHarm(rows, kTurbo3, "m", "default", 4096, true).measured);  // another window policy
  EXPECT_FALSE(FindHarm(rows, {"turbo3", "turbo4"}, "m", "none", 4096, true).measured);
}

TEST(Quality, OwnModelAndNearestContextWin) {
  const std::vector<QualityRow> rows = {Row("m", kTurbo3, "none", 4096, 4),
                                        Row("m", kTurbo3, "none", 32768, 5),
                                        Row("other", kTurbo3, "none", 4096, 9)};
  EXPECT_EQ(FindHarm(rows, kTurbo3, "m", "none", 8192, true).ppl_change_percent, 4);
  EXPECT_EQ(FindHarm(rows, kTurbo3, "m", "none", 131072, true).ppl_change_percent, 5);
  EXPECT_FALSE(FindHarm(rows, kTurbo3, "m", "none", 8192, true).proxy);
}

TEST(Quality, ProxiesAreTheWorstOfOtherModelsAndCanBeRefused) {
  const std::vector<QualityRow> rows = {Row("a", kTurbo3, "none", 4096, 2),
                                        Row("b", kTurbo3, "none", 4096, 3),
                                        Row("b", kTurbo3, "none", 131072, 30)};
  const Harm harm = FindHarm(rows, kTurbo3, "m", "none", 4096, true);
  EXPECT_TRUE(harm.proxy);
  EXPECT_EQ(harm.ppl_change_percent, 3);
  EXPECT_EQ(harm.model, "b");
  EXPECT_FALSE(FindHarm(rows, kTurbo3, "m", "none", 4096, false).measured);
}

TEST(Quality, OtherNamesOfATypeShareItsMeasurements) {
  const std::vector<QualityRow> rows = {Row("m", {"q8_0", "planar4"}, "none", 4096, 0.5)};
  EXPECT_EQ(FindHarm(rows, {"q8_0", "pq4"}, "m", "none", 4096, true).ppl_change_percent, 0.5);
  EXPECT_FALSE(FindHarm(rows, {"q8_0", "pq3"}, "m", "none", 4096, true).measured);
}

TEST(Quality, ChangesBelowZeroAreNoGain) {
  const std::vector<QualityRow> rows = {Row("m", {"q8_0", "q8_0"}, "none", 4096, -0.01)};
  EXPECT_EQ(FindHarm(rows, {"q8_0", "q8_0"}, "m", "none", 4096, true).ppl_change_percent, 0);
}

TEST(Quality, CsvRoundTripAndErrors) {
  const std::string header =
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,kld_mean,kld_p99,top1_"
      "agreement,bits_per_value,version,date\n";
  const auto rows = ParseQualityCsv(
      header +
          "tidelm-7m,wikitext2,98304,4096,q8_0,turbo4,default,0.05,0.001,0.01,0.98,6.4,0.1.0,2026-11-22\n",
      "q.csv");
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)[0].pair.Name(), "q8_0/turbo4");
  EXPECT_DOUBLE_EQ((*rows)[0].ppl_change_percent, 0.05);
  const auto spelled = ParseQualityCsv(header + "m,t,1,1,q8_0,turbo4,1+2,0.1,,,,,,\n", "q.csv");
  ASSERT_TRUE(spelled.ok()) << spelled.status();
  EXPECT_EQ((*spelled)[0].window_policy, "default");
  EXPECT_THAT(
      std::string(ParseQualityCsv(header + "m,t,1,1,q8_0,turbo4,none,,,,,,,\n", "q.csv").status().message()),
      HasSubstr("q.csv line 2"));
  EXPECT_THAT(std::string(ParseQualityCsv("model\n", "q.csv").status().message()), HasSubstr("pair_k"));
}

TEST(Quality, BuiltInRowsAndClaimsParse) {
  for (const QualityRow& row : BuiltInQuality()) EXPECT_FALSE(row.version.empty()) << row.pair.Name();
  EXPECT_GE(PublishedClaims().size(), 5u);
  for (const Claim& claim : PublishedClaims()) EXPECT_FALSE(claim.source.empty());
}

}  // namespace
}  // namespace kvtide::planner
