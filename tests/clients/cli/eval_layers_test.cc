#include "clients/cli/eval/eval_layers.h"

#include <cmath>

#include "gtest/gtest.h"
#include "tests/clients/cli/capture_files.h"

namespace kvtide::cli {
namespace {

constexpr WindowPolicy kAllCoded{{0, 0}, true};

LayerVectors RandomVectors(int tokens, int queries, const LayerShape& shape) {
  return {RandomTensor({queries, shape.query_heads, shape.head_dim_k}, 1).values,
          RandomTensor({tokens, shape.kv_heads, shape.head_dim_k}, 2).values,
          RandomTensor({tokens, shape.kv_heads, shape.head_dim_v}, 3).values,
          {}};
}

LayerError Measure(const LayerShape& shape, const LayerVectors& vectors, const std::string& pair,
                   const WindowPolicy& policy) {
  ThreadPool pool(2);
  const CachePair parsed = *ParseCachePair(pair);
  return LayerProbe(shape, vectors, pool)
      .Measure(parsed, DefaultProfileOptions(parsed.k, !policy.seal_at_once), policy, pool);
}

// The definition, straight down, for pairs whose keys stay exact enough to ignore: f16/turbo3.
TEST(LayerProbeTest, OutputErrorIsThatOfTheDefinition) {
  const LayerShape shape{2, 1, 32, 64, 0.2f, 0};
  const LayerVectors x = RandomVectors(130, 5, shape);
  const LayerError error = Measure(shape, x, "f16/turbo3", kAllCoded);
  // Errors of values add up like the values themselves where weights are spread: the same ratio, within a
  // third.
  EXPECT_NEAR(error.output, error.value, error.value / 3);
  EXPECT_NEAR(error.output_cosine, 1 - error.output * error.output / 2, 0.01);
  EXPECT_LT(error.weight_kld, 1e-6);
  EXPECT_EQ(error.weight_top1, 1);
}

TEST(LayerProbeTest, TokensOfTheExactWindowStayExact) {
  const LayerShape shape{4, 2, 64, 32, 0.125f, 0};
  const LayerVectors x = RandomVectors(64 * 3 + 10, 20, shape);
  const LayerError window =
      Measure(shape, x, "turbo2/turbo2", WindowPolicy{});  // 1 + 2 blocks and the tail: all
  EXPECT_EQ(window.output, 0);
  EXPECT_EQ(window.weight_kld, 0);
  EXPECT_NEAR(window.output_cosine, 1, 1e-6);
  EXPECT_GT(window.key, 0.2);  // what coding would do
  const LayerError narrow = Measure(shape, x, "turbo2/turbo2", WindowPolicy{{1, 0}, false});
  const LayerError none = Measure(shape, x, "turbo2/turbo2", kAllCoded);
  EXPECT_GT(narrow.output, 0.01);
  EXPECT_GT(none.output, narrow.output);
  EXPECT_EQ(none.key, narrow.key);
}

TEST(LayerProbeTest, ASlidingWindowAndSinksTakeWeightAway) {
  LayerShape shape{2, 2, 32, 32, 0.2f, 0};
  LayerVectors x = RandomVectors(200, 10, shape);
  // Without the first tokens only late ones are seen; a window that holds nothing coded has no error.
  shape.sliding_window = 5;
  EXPECT_EQ(Measure(shape, x, "turbo2/turbo2", WindowPolicy{{0, 2}, false}).output, 0);
  shape.sliding_window = 0;
  const LayerError without = Measure(shape, x, "turbo2/f16", kAllCoded);
  x.sinks = {20, 20};  // takes nearly all weight
  const LayerError with = Measure(shape, x, "turbo2/f16", kAllCoded);
  EXPECT_LT(with.weight_kld, without.weight_kld / 10);
}

// A soft-cap flattens large logits, exact and coded alike: what coding does to them shrinks.
TEST(LayerProbeTest, ASoftCapIsPartOfTheLogits) {
  LayerShape shape{2, 2, 32, 32, 3.0f, 0};
  const LayerVectors x = RandomVectors(200, 10, shape);
  const LayerError plain = Measure(shape, x, "turbo3/f16", kAllCoded);
  shape.softcap = 1e6f;  // does nothing
  const LayerError wide = Measure(shape, x, "turbo3/f16", kAllCoded);
  EXPECT_NEAR(wide.weight_kld, plain.weight_kld, 0.01 * plain.weight_kld);
  EXPECT_NEAR(wide.logit, plain.logit, 0.01 * plain.logit);
  shape.softcap = 2.0f;
  const LayerError capped = Measure(shape, x, "turbo3/f16", kAllCoded);
  EXPECT_LT(capped.weight_kld, plain.weight_kld / 4);
  EXPECT_GT(capped.weight_kld, 0);
  EXPECT_EQ(capped.key, plain.key);
}

// Keys far from zero are coded much better around their mean.
TEST(LayerProbeTest, ACalibratedMeanIsTakenOff) {
  const LayerShape shape{4, 2, 64, 64, 0.125f, 0};
  LayerVectors x = RandomVectors(300, 10, shape);
  std::vector<float> mean(2 * 64);
  for (size_t i = 0; i < mean.size(); ++i) mean[i] = i % 3 == 0 ? 6.0f : -1.0f;
  for (size_t i = 0; i < x.k.size(); ++i) x.k[i] += mean[i % mean.size()];
  ThreadPool pool(2);
  const LayerProbe probe(shape, x, pool);
  const CachePair pair = *ParseCachePair("turbo3/f16");
  const LayerError without = probe.Measure(pair, {}, kAllCoded, pool);
  std::vector<HeadProfile> heads(2);
  for (size_t h = 0; h < 2; ++h)
    heads[h].mean.assign(mean.begin() + static_cast<std::ptrdiff_t>(64 * h),
                         mean.begin() + static_cast<std::ptrdiff_t>(64 * h + 64));
  const LayerError with = probe.Measure(pair, {}, kAllCoded, pool, heads);
  EXPECT_LT(with.logit, without.logit / 2);
  EXPECT_LT(with.weight_kld, without.weight_kld / 4);
}

TEST(LayerProbeTest, MeansAreOverLayers) {
  const LayerError a{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7}, b{0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9};
  const LayerError both[] = {a, b};
  const LayerError mean = MeanError(both);
  EXPECT_DOUBLE_EQ(mean.key, 0.2);
  EXPECT_DOUBLE_EQ(mean.output_cosine, 0.6);
  EXPECT_DOUBLE_EQ(mean.weight_top1, 0.8);
}

}  // namespace
}  // namespace kvtide::cli
