#include "kernels/format/exact_window.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>

namespace kvtide {
namespace {

// The same cases in every run, unless RC_PARAMS says otherwise; rapidcheck prints the seed.
[[maybe_unused]] const int kSeedIsFixed = setenv("RC_PARAMS", "seed=20240607", 0);

TEST(ExactWindow, CountsByHand) {
  const ExactWindow window;  // 1 and 2
  EXPECT_EQ(CountBlocks(0, window).exact, 0);
  EXPECT_EQ(CountBlocks(1, window).exact, 1);    // the tail
  EXPECT_EQ(CountBlocks(192, window).exact, 3);  // first and last two, nothing coded
  EXPECT_EQ(CountBlocks(192, window).coded, 0);
  EXPECT_EQ(CountBlocks(256, window).coded, 1);
  EXPECT_EQ(CountBlocks(257, window).exact, 4);
  EXPECT_EQ(CountBlocks(32768, window).exact, 3);
  EXPECT_EQ(CountBlocks(32768, window).coded, 509);
  EXPECT_EQ(CountBlocks(6400, {0, 0}).coded, 100);
}

RC_GTEST_PROP(ExactWindow, CountsAreTheSumOverBlocks, ()) {
  const auto tokens = *rc::gen::inRange<int64_t>(0, 5000);
  const ExactWindow exact{*rc::gen::inRange(0, 6), *rc::gen::inRange(0, 6)};
  const auto window = *rc::gen::oneOf(rc::gen::just<int64_t>(0), rc::gen::inRange<int64_t>(1, 6000));
  const int64_t full = tokens / kBlockTokens, first_live = FirstLiveBlock(tokens, window);
  BlockCounts expected;
  for (int64_t b = first_live; b < full; b++)
    (IsExactBlock(b, full, exact) ? expected.exact : expected.coded)++;
  if (tokens % kBlockTokens != 0) expected.exact++;
  const BlockCounts counts = CountLiveBlocks(tokens, exact, window);
  RC_ASSERT(counts.exact == expected.exact);
  RC_ASSERT(counts.coded == expected.coded);
  if (window == 0) {
    RC_ASSERT(CountBlocks(tokens, exact).exact == expected.exact);
    RC_ASSERT(CountBlocks(tokens, exact).coded == expected.coded);
  }
}

RC_GTEST_PROP(ExactWindow, EveryVisibleTokenIsHeldAndDeadBlocksAreNot, ()) {
  const auto tokens = *rc::gen::inRange<int64_t>(0, 5000);
  const auto window = *rc::gen::inRange<int64_t>(1, 3000);
  const int64_t first_live = FirstLiveBlock(tokens, window);
  const int64_t first_visible =
      std::max<int64_t>(0, tokens - window + 1);  // to the query at position `tokens`
  RC_ASSERT(first_live * kBlockTokens <= first_visible);
  RC_ASSERT((first_live + 1) * kBlockTokens > first_visible);
}

RC_GTEST_PROP(ExactWindow, ABlockOnceCodedStaysCodedWhileTheSequenceGrows, ()) {
  const ExactWindow exact{*rc::gen::inRange(0, 6), *rc::gen::inRange(0, 6)};
  const auto block = *rc::gen::inRange<int64_t>(0, 100), full = *rc::gen::inRange<int64_t>(1, 100);
  RC_PRE(block < full);
  if (!IsExactBlock(block, full, exact)) RC_ASSERT(!IsExactBlock(block, full + 1, exact));
  RC_ASSERT(CountBlocks(64 * full + 64, exact).coded >= CountBlocks(64 * full, exact).coded);
}

}  // namespace
}  // namespace kvtide
