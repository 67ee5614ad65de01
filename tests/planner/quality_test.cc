#include "planner/plan/quality.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/engines/engine.h"
#include "planner/model/catalogue.h"

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

// For a model of which nothing but the name is known.
Harm FindHarm(const std::vector<QualityRow>& rows, const TypePair& pair, const std::string& model,
              const std::string& window, int64_t context, bool accept_proxy) {
  ModelGeometry geometry;
  geometry.name = model;
  return HarmTable(rows, geometry, window, accept_proxy).Find(pair, context);
}

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

// Rows as `kvtide eval` writes them, of models that differ in norm, biases and heads.
std::vector<QualityRow> Measured(const std::string& lines) {
  const auto rows = ParseQualityCsv(
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,version\n" + lines, "q.csv");
  EXPECT_TRUE(rows.ok()) << rows.status();
  return *rows;
}

TEST(Quality, TheWorstOfTheModelsThatResembleTheAskedOneCounts) {
  const std::vector<QualityRow> rows = Measured(
      "tidelm-7m,t,1,4096,turbo3,turbo3,none,4,v\n"
      "smollm2-135m-q4_1.gguf,t,1,4096,turbo3,turbo3,none,23,v\n"
      "SmolLM2-135M-Instruct,held_out,1,4096,turbo3,turbo3,none,35,v\n"
      "gemma3-270m,t,1,4096,turbo3,turbo3,none,2,v\n");
  const auto find = [&](const char* model) {
    return HarmTable(rows, *FindModel(model), "none", true).Find(kTurbo3, 4096);
  };
  const Harm llama = find("llama-3.1-8b");  // no norm, no biases: as tidelm and SmolLM2, the worse text of it
  EXPECT_EQ(llama.model, "SmolLM2-135M");
  EXPECT_EQ(llama.ppl_change_percent, 35);
  EXPECT_TRUE(llama.proxy);
  EXPECT_TRUE(llama.resembles);
  EXPECT_EQ(find("qwen3-8b").model, "Gemma3-270M");  // keys with a norm
  EXPECT_FALSE(find("smollm2-135m").proxy);
  // Biases: none of them is like it, so the worst of all, and the answer says what is different.
  const HarmTable qwen(rows, *FindModel("qwen2.5-7b"), "none", true);
  EXPECT_EQ(qwen.Find(kTurbo3, 4096).model, "SmolLM2-135M");
  EXPECT_FALSE(qwen.Find(kTurbo3, 4096).resembles);
  EXPECT_THAT(qwen.differences(), HasSubstr("keys with biases"));
  EXPECT_EQ(HarmTable(rows, *FindModel("llama-3.1-8b"), "none", true).differences(), "");
}

// A pair that only the tolerant model measured is not taken for better than one that both did.
TEST(Quality, PairsMeasuredOnFewerModelsAreComparedByWhatTheOthersTake) {
  const std::vector<QualityRow> rows = Measured(
      "tidelm-7m,t,1,4096,turbo4,turbo4,none,1,v\n"
      "tidelm-7m,t,1,4096,turbo3,turbo3,none,4,v\n"
      "tidelm-7m,t,1,4096,q4_0,q4_0,none,1.5,v\n"
      "smollm2-135m,t,1,4096,turbo4,turbo4,none,6,v\n"
      "smollm2-135m,t,1,4096,turbo3,turbo3,none,24,v\n");
  const HarmTable harms(rows, *FindModel("llama-3.1-8b"), "none", true);
  const Harm q4 = harms.Find({"q4_0", "q4_0"}, 4096);
  EXPECT_EQ(q4.ppl_change_percent, 1.5);
  EXPECT_EQ(q4.model, "tidelm-7m");
  EXPECT_EQ(q4.expected_percent, 9);  // six times as much
  EXPECT_EQ(q4.expected_of, "SmolLM2-135M");
  EXPECT_EQ(harms.Find({"turbo4", "turbo4"}, 4096).expected_percent, 6);
  // For the model itself too: its own row first, without one what it takes of other pairs.
  const HarmTable own(rows, *FindModel("smollm2-135m"), "none", true);
  EXPECT_EQ(own.Find({"q4_0", "q4_0"}, 4096).expected_percent, 9);
  EXPECT_TRUE(own.Find({"q4_0", "q4_0"}, 4096).proxy);
}

// Keys that are coded by a profile have rows of their own; other rows of such pairs do not count then.
TEST(Quality, RowsWithAProfileCountForCalibratedKeysOnly) {
  const auto rows = ParseQualityCsv(
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,version,key_profile\n"
      "smollm2-135m,a,1,4096,turbo4,turbo4,none,6,v,\n"
      "smollm2-135m,a,1,4096,turbo4,turbo4,none,3,v,manuals\n"
      "smollm2-135m,b,7,4096,turbo4,turbo4,none,4,v,wiki\n"
      "smollm2-135m,a,1,4096,tide3,turbo3,none,8,v,manuals\n"
      "smollm2-135m,a,1,4096,tide3,turbo3,none,9,v,manuals@after-rope\n"
      "smollm2-135m,a,1,4096,q8_0,q8_0,none,0.1,v,\n"
      "tidelm-7m,a,1,4096,turbo4,turbo4,none,1,v,\n",
      "q.csv");
  ASSERT_TRUE(rows.ok()) << rows.status();
  const TypePair turbo4{"turbo4", "turbo4"}, tide3{"tide3", "turbo3"}, q8{"q8_0", "q8_0"};
  const HarmTable plain(*rows, *FindModel("llama-3.1-8b"), "none", true);
  EXPECT_EQ(plain.Find(turbo4, 4096).ppl_change_percent, 6);
  EXPECT_FALSE(plain.Find(turbo4, 4096).calibrated);
  EXPECT_FALSE(plain.Find(tide3, 4096).measured);
  CalibratedKeys keys{"m.profile", "t", 1, true};
  const HarmTable calibrated(*rows, *FindModel("llama-3.1-8b"), "none", true, &keys);
  const Harm harm = calibrated.Find(turbo4, 4096);
  EXPECT_EQ(harm.ppl_change_percent, 4);  // the worse text
  EXPECT_TRUE(harm.calibrated);
  EXPECT_EQ(harm.text, "b");
  EXPECT_EQ(harm.tokens, 7);
  EXPECT_EQ(harm.key_profile, "wiki");
  EXPECT_EQ(calibrated.Find(tide3, 4096).ppl_change_percent, 8);
  EXPECT_EQ(calibrated.Find(q8, 4096).ppl_change_percent, 0.1);  // nobody measured it with one
  EXPECT_FALSE(calibrated.Find(q8, 4096).calibrated);
  EXPECT_FALSE(calibrated.Find(tide3, 4096).after_rope);
  // A profile of keys after RoPE: calibrated types count as they were measured so, others as ever.
  keys.after_rope = true;
  const HarmTable after(*rows, *FindModel("llama-3.1-8b"), "none", true, &keys);
  EXPECT_EQ(after.Find(tide3, 4096).ppl_change_percent, 9);
  EXPECT_EQ(after.Find(tide3, 4096).key_profile, "manuals");
  EXPECT_TRUE(after.Find(tide3, 4096).after_rope);
  EXPECT_EQ(after.Find(turbo4, 4096).ppl_change_percent, 4);
  // One that serves calibrated types alone: others are coded as without a profile.
  keys.after_rope = keys.means = false;
  const HarmTable alone(*rows, *FindModel("llama-3.1-8b"), "none", true, &keys);
  EXPECT_EQ(alone.Find(tide3, 4096).ppl_change_percent, 8);
  EXPECT_EQ(alone.Find(turbo4, 4096).ppl_change_percent, 6);
  EXPECT_FALSE(alone.Find(turbo4, 4096).calibrated);
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
