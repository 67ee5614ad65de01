// The extremes of what may come from outside; the suite runs under UndefinedBehaviorSanitizer in CI.
#include "kernels/attend_args.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace kvtide {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();

// One item of one run of one block, all of it right.
struct Arguments {
  BlockLayout layout{{2, 2, 64, 64}, ExactPair()};
  std::byte* block = nullptr;
  BlockRun run;
  float q[4 * 64] = {}, out[4 * 64] = {}, lse[4] = {};
  AttendItem item;
  AttendArgs args;

  Arguments() {
    run.layout = &layout;
    run.blocks = {&block, 1};
    run.tokens = 64;
    item.queries = 1;
    item.first_query_position = 63;
    item.q = q;
    item.out = out;
    item.lse = lse;
    args.heads = 4;
    args.scale = 1;
  }
  // The same through both doors: their answers are equal.
  absl::Status Check() {
    item.runs = {&run, 1};
    args.items = {&item, 1};
    const absl::Status whole = CheckAttendArgs(args).status();
    PlanItem planned{item.runs, item.queries, item.first_query_position};
    AttendPlanArgs plan{args.heads, args.causal, args.window, {&planned, 1}};
    const absl::StatusOr<AttendShape> shape = CheckAttendPlan(plan);
    LayerItem tensors{{item.q, DataType::kF32}, {item.out, DataType::kF32}, item.lse};
    AttendLayerArgs layer;
    layer.layer = args.layer;
    layer.scale = args.scale;
    layer.softcap = args.softcap;
    layer.sinks = args.sinks;
    layer.items = {&tensors, 1};
    const absl::Status parts = shape.ok() ? CheckAttendLayer(layer, *shape) : shape.status();
    EXPECT_EQ(whole.code(), parts.code()) << whole << "\n" << parts;
    EXPECT_TRUE(whole.ok() || absl::IsInvalidArgument(whole)) << whole;
    return whole;
  }
};

TEST(AttendArgs, AcceptsTheUsualAndTheLargest) {
  Arguments a;
  EXPECT_TRUE(a.Check().ok());
  a.args.window = kMost;
  a.run.first_position = kMostPosition - 64;
  a.item.first_query_position = kMostPosition - 1;
  EXPECT_TRUE(a.Check().ok());
}

TEST(AttendArgs, RefusesPositionsOutsideTheirRange) {
  for (const int64_t position : {int64_t{-1}, kLeast, kMost, kMostPosition, kMostPosition - 63}) {
    SCOPED_TRACE(position);
    Arguments a;
    a.run.first_position = position;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("item 0, run 0: 64 tokens from position"));
  }
  for (const int64_t position : {int64_t{-1}, kLeast, kMost, kMostPosition}) {
    SCOPED_TRACE(position);
    Arguments a;
    a.item.first_query_position = position;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("item 0: 1 queries from position"));
  }
}

TEST(AttendArgs, RefusesCountsThatDoNotFit) {
  for (const int64_t tokens : {int64_t{65}, int64_t{-1}, kMost, kLeast, kMost - 63}) {
    SCOPED_TRACE(tokens);
    Arguments a;
    a.run.tokens = tokens;
    EXPECT_FALSE(a.Check().ok());
  }
  for (const int queries : {-1, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    Arguments a;
    a.item.queries = queries;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("send them in pieces"));
  }
  for (const int heads : {0, -2, 3, std::numeric_limits<int>::min()}) {
    Arguments a;
    a.args.heads = heads;
    EXPECT_FALSE(a.Check().ok());
  }
  for (const int64_t window : {int64_t{-1}, kLeast}) {
    Arguments a;
    a.args.window = window;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("window"));
  }
  for (const int layer : {-1, 2, std::numeric_limits<int>::max()}) {
    Arguments a;
    a.args.layer = layer;
    EXPECT_FALSE(a.Check().ok());
  }
}

TEST(AttendArgs, RefusesNumbersThatMakeNoLogit) {
  for (const float scale : {NAN, INFINITY, -INFINITY}) {
    Arguments a;
    a.args.scale = scale;
    EXPECT_FALSE(a.Check().ok());
  }
  for (const float softcap : {NAN, INFINITY, -1.0f, 3e38f}) {
    Arguments a;
    a.args.softcap = softcap;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("soft-cap"));
  }
  for (const float sink : {NAN, INFINITY}) {
    const float sinks[] = {0, -INFINITY, sink, 0};
    Arguments a;
    a.args.sinks = sinks;
    EXPECT_THAT(std::string(a.Check().message()), HasSubstr("head 2"));
  }
}

TEST(AttendArgs, RefusesTensorsThatAreMissing) {
  Arguments a;
  a.item.q = nullptr;
  EXPECT_FALSE(a.Check().ok());
  a.item.queries = 0;
  EXPECT_TRUE(a.Check().ok());
}

TEST(AttendArgs, RefusesRunsThatOverlapOrGoBack) {
  Arguments a;
  BlockRun runs[] = {a.run, a.run, a.run};
  runs[1].first_position = 64;
  runs[2].first_position = 128;
  a.item.first_query_position = 191;
  a.item.runs = runs;
  a.args.items = {&a.item, 1};
  EXPECT_TRUE(CheckAttendArgs(a.args).ok());
  runs[2].first_position = 127;
  EXPECT_THAT(std::string(CheckAttendArgs(a.args).status().message()), HasSubstr("item 0, run 2"));
  runs[2].first_position = 0;
  EXPECT_FALSE(CheckAttendArgs(a.args).ok());
  runs[2].tokens = 0;  // nothing to overlap
  EXPECT_TRUE(CheckAttendArgs(a.args).ok());
}

TEST(AttendArgs, RefusesShapesThatDiffer) {
  Arguments a;
  const BlockLayout other({2, 1, 64, 64}, ExactPair());
  BlockRun runs[] = {a.run, a.run};
  runs[1].layout = &other;
  runs[1].first_position = 64;
  a.item.runs = runs;
  a.args.items = {&a.item, 1};
  EXPECT_FALSE(CheckAttendArgs(a.args).ok());
  runs[1].layout = nullptr;
  EXPECT_FALSE(CheckAttendArgs(a.args).ok());
}

TEST(AttendArgs, KnowsThatNoItemsAreNoError) {
  EXPECT_TRUE(CheckAttendArgs({}).ok());
  const absl::StatusOr<AttendShape> shape = CheckAttendPlan({});
  ASSERT_TRUE(shape.ok());
  EXPECT_TRUE(CheckAttendLayer({}, *shape).ok());
  AttendItem empty;
  AttendArgs args;
  args.items = {&empty, 1};
  EXPECT_THAT(std::string(CheckAttendArgs(args).status().message()), HasSubstr("pass one of 0 tokens"));
}

TEST(VisiblePositions, DoesNotOverflow) {
  for (const int64_t position : {int64_t{0}, int64_t{100}, kMostPosition - 1})
    for (const int64_t window : {int64_t{0}, int64_t{1}, int64_t{64}, kMostPosition, kMost - 1, kMost})
      for (const bool causal : {false, true}) {
        const PositionRange range = VisiblePositions(position, causal, window);
        EXPECT_EQ(range.end, causal ? position + 1 : kMostPosition);
        EXPECT_EQ(range.begin, window == 0 || window > position ? 0 : position - window + 1);
      }
}

}  // namespace
}  // namespace kvtide
