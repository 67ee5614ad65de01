// Blocks on their way between tiers: eviction, prefetch, pressure, watermarks, failures. Whatever moves,
// attention stays equal to the shadow's.
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using MovesTest = CacheTest;
constexpr size_t kBlock = 65536;  // an f16 block of SmallModel

TEST_F(MovesTest, EvictedSequencesAreAttendedInPlaceAndComeBackOnPrefetch) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {1, 1}), random_);
  ASSERT_TRUE(client.Append(64 * 20 + 7).ok());
  const uint64_t bytes = TotalBytes(client.info());
  const MoveReport down = *cache_->Evict({{client.id()}}, 1);
  EXPECT_EQ(down.moved_blocks, 21u);
  EXPECT_EQ(down.moved_bytes, bytes);
  EXPECT_EQ(down.left_blocks, 0u);
  EXPECT_EQ(client.info().bytes_by_tier[1], bytes);
  EXPECT_EQ(cache_->Stats().tiers[0].used_bytes, 0u);
  EXPECT_EQ(cache_->Stats().tiers[0].demoted_blocks, 21u);
  client.CheckAllLayers();
  const MoveReport up = *cache_->Prefetch({{client.id()}});
  EXPECT_EQ(up.moved_blocks, 21u);
  EXPECT_EQ(client.info().bytes_by_tier[0], bytes);
  EXPECT_EQ(cache_->Stats().tiers[0].promoted_blocks, 21u);
  client.CheckAllLayers();
  EXPECT_EQ(cache_->Stats().moved_bytes, 2 * bytes);
  ASSERT_TRUE(client.Step(100).ok());
  client.CheckAllLayers();
}

TEST_F(MovesTest, AnAppendToAParkedSequenceGoesOnWhereItsTailLies) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  ASSERT_TRUE(client.Append(100).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  for (int i = 0; i < 5; i++) ASSERT_TRUE(client.Step(20).ok());
  client.CheckAllLayers();
  EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
}

TEST_F(MovesTest, UnderPressureTheColdestGoDown) {
  Start(10 * kBlock, 40 * kBlock);
  Client cold(*cache_, SmallModel(), WithPair("f16"), random_),
      hot(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(cold.Append(256).ok());
  ASSERT_TRUE(hot.Append(256).ok());
  ASSERT_TRUE(cold.CheckAttention(0).ok());
  ASSERT_TRUE(hot.CheckAttention(0).ok());
  ASSERT_TRUE(hot.Append(5 * 64).ok());
  EXPECT_EQ(hot.info().blocks_by_tier[0], 9u);
  EXPECT_EQ(cold.info().blocks_by_tier[1], 3u);
  cold.CheckAllLayers();
  hot.CheckAllLayers();
  ASSERT_TRUE(hot.Append(20 * 64).ok());  // more than the device: its own oldest go down too
  EXPECT_EQ(hot.info().blocks_by_tier[0] + cold.info().blocks_by_tier[0], 10u);
  cold.CheckAllLayers();
  hot.CheckAllLayers();
  cache_->CheckInvariants();
}

TEST_F(MovesTest, PrefetchMakesRoomFromOthersButNotFromItself) {
  Start(8 * kBlock, 40 * kBlock);
  Client a(*cache_, SmallModel(), WithPair("f16"), random_),
      b(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(a.Append(6 * 64).ok());
  ASSERT_TRUE(cache_->Evict({{a.id()}}, 1).ok());
  ASSERT_TRUE(b.Append(7 * 64).ok());
  MoveReport report = *cache_->Prefetch({{a.id()}});
  EXPECT_EQ(report.moved_blocks, 6u);
  EXPECT_EQ(a.info().blocks_by_tier[0], 6u);
  EXPECT_EQ(b.info().blocks_by_tier[0], 2u);
  ASSERT_TRUE(cache_->Evict({{a.id()}}, 1).ok());
  ASSERT_TRUE(a.Append(6 * 64).ok());  // 12 blocks now, the device has room for 8
  report = *cache_->Prefetch({{a.id()}});
  EXPECT_EQ(a.info().blocks_by_tier[0], 8u);
  EXPECT_EQ(report.left_blocks, 4u);
  a.CheckAllLayers();
  b.CheckAllLayers();
}

TEST_F(MovesTest, ParkingABranchLeavesSharedBlocksToTheOther) {
  Start();
  Client a(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(a.Append(200).ok());
  Client b = a.Fork();
  ASSERT_TRUE(b.Append(100).ok());
  const MoveReport report = *cache_->Evict({{b.id()}}, 1);
  EXPECT_EQ(report.shared_blocks, 3u);
  EXPECT_EQ(report.moved_blocks, 2u);
  EXPECT_EQ(a.info().blocks_by_tier[1], 0u);
  const SequenceId both[] = {a.id(), b.id()};
  EXPECT_EQ(cache_->Evict(both, 1)->shared_blocks, 0u);
  EXPECT_EQ(cache_->Stats().tiers[0].used_bytes, 0u);
  a.CheckAllLayers();
  b.CheckAllLayers();
}

TEST_F(MovesTest, OnlySequencesThatAllowItLoseBlocksAndSaySo) {
  Start(4 * kBlock, 4 * kBlock);
  SequenceOptions droppable = WithPair("f16");
  droppable.allow_drop = true;
  Client a(*cache_, SmallModel(), droppable, random_), b(*cache_, SmallModel(), WithPair("f16"), random_);
  for (int i = 0; i < 5; i++) ASSERT_TRUE(a.Append(64).ok());
  for (int i = 0; i < 5; i++) ASSERT_TRUE(b.Append(64).ok());
  EXPECT_EQ(a.info().dropped_blocks, 2u);
  EXPECT_TRUE(IsError(a.CheckAttention(0), absl::StatusCode::kDataLoss, "tokens 0 to 127 were dropped"));
  b.CheckAllLayers();
  ASSERT_TRUE(b.Append(3 * 64).ok());
  EXPECT_EQ(a.info().dropped_blocks, 5u);
  EXPECT_TRUE(IsError(b.Append(1), absl::StatusCode::kResourceExhausted, "tier 'host' has 0 of"));
  EXPECT_TRUE(IsError(cache_->Evict({{b.id()}}, kDropTier).status(), absl::StatusCode::kFailedPrecondition,
                      "allow_drop"));
  b.CheckAllLayers();
  ASSERT_TRUE(a.Truncate(0).ok());
  ASSERT_TRUE(b.Truncate(64).ok());
  ASSERT_TRUE(a.Step(70).ok());
  a.CheckAllLayers();
  EXPECT_EQ(cache_->Evict({{a.id()}}, kDropTier)->dropped_blocks, 2u);
  EXPECT_TRUE(
      IsError(a.Append(1), absl::StatusCode::kDataLoss, "tokens 64 to 127 were dropped; truncate to 64"));
  EXPECT_EQ(cache_->Stats().dropped_blocks, 7u);
}

TEST_F(MovesTest, IdleBlocksAboveTheWatermarkAreDemotedInTheBackground) {
  options_.limits.high_watermark = 0.5;
  options_.limits.low_watermark = 0.25;
  Start(8 * kBlock, 8 * kBlock);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(6 * 64).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u) << "hot";
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 4u);
  EXPECT_EQ(client.info().blocks_by_tier[1], 4u);
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u);
  client.CheckAllLayers();
}

TEST_F(MovesTest, PinnedSequencesStayForTheirTime) {
  options_.limits.high_watermark = 0.5;
  options_.limits.low_watermark = 0.25;
  Start(8 * kBlock, 16 * kBlock);
  Client cold(*cache_, SmallModel(), WithPair("f16"), random_),
      hot(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(cold.Append(4 * 64).ok());
  ASSERT_TRUE(cache_->Pin({{cold.id()}}, absl::Minutes(1)).ok());
  EXPECT_EQ(cache_->Stats().pinned_sequences, 1u);
  // Neither another one's need for room nor the policy moves it, though it is the coldest and used no more.
  clock_.Advance(absl::Seconds(10));
  ASSERT_TRUE(hot.Append(8 * 64).ok());
  cache_->RunMovesOnce();
  EXPECT_EQ(cold.info().blocks_by_tier[0], 4u);
  EXPECT_LE(hot.info().blocks_by_tier[0], 4u);
  // A fork shares what is pinned; the record that both have by then is.
  const SequenceId fork = *cache_->ForkSequence(cold.id());
  clock_.Advance(absl::Seconds(10));
  ASSERT_TRUE(hot.Append(2 * 64).ok());
  cache_->RunMovesOnce();
  EXPECT_EQ(cold.info().blocks_by_tier[0], 4u);
  EXPECT_EQ(cache_->Stats().pinned_sequences, 1u) << "the fork is not";
  cache_->CheckInvariants();
  // Its time is over.
  clock_.Advance(absl::Minutes(1));
  cache_->RunMovesOnce();
  EXPECT_EQ(cache_->Stats().pinned_sequences, 0u);
  cache_->RunMovesOnce();
  EXPECT_LT(cold.info().blocks_by_tier[0], 4u);
  // A call that names it moves it all the same, and 0 ends a pin.
  ASSERT_TRUE(cache_->Prefetch({{cold.id(), fork}}).ok());
  ASSERT_TRUE(cache_->Pin({{cold.id(), fork}}, absl::Hours(1)).ok());
  EXPECT_EQ(cache_->Evict({{cold.id(), fork}}, 1)->moved_blocks, 4u);
  ASSERT_TRUE(cache_->Pin({{cold.id()}}, absl::ZeroDuration()).ok());
  EXPECT_EQ(cache_->Stats().pinned_sequences, 1u);
  ASSERT_TRUE(cache_->CloseSequence(fork).ok());
  EXPECT_EQ(cache_->Stats().pinned_sequences, 0u);
  EXPECT_TRUE(
      IsError(cache_->Pin({{cold.id()}}, absl::Hours(25)), absl::StatusCode::kInvalidArgument, "24h"));
  EXPECT_TRUE(IsError(cache_->Pin({{fork}}, absl::Hours(1)), absl::StatusCode::kNotFound, ""));
  cold.CheckAllLayers();
  hot.CheckAllLayers();
  cache_->CheckInvariants();
}

TEST_F(MovesTest, WatermarksMayChangeWhileItRuns) {
  Start(8 * kBlock, 8 * kBlock);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(6 * 64).ok());
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u) << "six of eight are below the watermark";
  LiveLimits limits = cache_->limits();
  limits.high_watermark = 0.5;
  limits.low_watermark = 0.25;
  limits.max_sequences = 1;
  ASSERT_TRUE(cache_->SetLimits(limits).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 4u);
  EXPECT_TRUE(IsError(cache_->ForkSequence(client.id()).status(), absl::StatusCode::kResourceExhausted,
                      "max_sequences"));
  EXPECT_EQ(cache_->Stats().max_sequences, 1u);
  limits.low_watermark = 0.75;
  EXPECT_EQ(cache_->SetLimits(limits).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(cache_->limits().low_watermark, 0.25);
  client.CheckAllLayers();
}

TEST_F(MovesTest, AttentionPromotesWhatItReadsBelowWhenThereIsRoom) {
  options_.limits.promote_below = 0.5;
  Start(8 * kBlock, 8 * kBlock);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(6 * 64).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u) << "nobody reads it";
  ASSERT_TRUE(client.CheckAttention(0).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 4u);
  EXPECT_EQ(client.info().blocks_by_tier[0], 4u);
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u);
  client.CheckAllLayers();
}

// Between promote_below and the high watermark nothing else would move: attention would stay below forever.
TEST_F(MovesTest, IdleBlocksMakeWayForWhatAttentionWants) {
  Start(10 * kBlock, 10 * kBlock);
  Client idle(*cache_, SmallModel(), WithPair("f16"), random_),
      wanted(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(wanted.Append(3 * 64).ok());
  ASSERT_TRUE(cache_->Evict({{wanted.id()}}, 1).ok());
  ASSERT_TRUE(idle.Append(8 * 64).ok());
  ASSERT_TRUE(wanted.CheckAttention(0).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u) << "nobody is idle";
  clock_.Advance(absl::Seconds(10));
  ASSERT_TRUE(wanted.CheckAttention(0).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 6u);
  EXPECT_EQ(wanted.info().blocks_by_tier[0], 3u);
  EXPECT_EQ(idle.info().blocks_by_tier[0], 5u);
  ASSERT_TRUE(wanted.CheckAttention(0).ok());
  EXPECT_EQ(cache_->RunMovesOnce().moved_blocks, 0u);
  idle.CheckAllLayers();
  wanted.CheckAllLayers();
}

// Blocks in the host tier are attended there or brought home first, by what either is predicted to take.
class LowerTierTest : public CacheTest {
 protected:
  // A sequence of 40 blocks that lies in the host tier.
  void Park() {
    Start();
    client_ = std::make_unique<Client>(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(client_->Append(40 * 64).ok());
    ASSERT_TRUE(cache_->Evict({{client_->id()}}, 1).ok());
  }
  uint64_t AtHome() { return client_->info().blocks_by_tier[0]; }
  TierStats Host() { return cache_->Stats().tiers[1]; }
  std::unique_ptr<Client> client_;
};

TEST_F(LowerTierTest, OneMemoryIsAttendedInPlace) {
  Park();
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 0u);
  EXPECT_EQ(Host().attended_in_place, 1u);
  EXPECT_EQ(Host().promoted_first, 0u);
  EXPECT_EQ(Host().attend_rate, cache_->Stats().tiers[0].attend_rate);
}

TEST_F(LowerTierTest, SlowMemoryBehindAFastBusIsLeftFirst) {
  host_attend_rate_ = 1e8;
  host_promote_rate_ = 1e10;
  Park();
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 40u);
  EXPECT_EQ(Host().promoted_first, 1u);
  EXPECT_EQ(Host().attended_in_place, 0u);
  client_->CheckAllLayers();
  EXPECT_EQ(Host().promoted_first, 1u) << "they are at home";
}

TEST_F(LowerTierTest, WhatIsReadAgainIsWorthACopy) {
  host_attend_rate_ = 4e9;  // the device: 1e10
  host_promote_rate_ = 3e9;
  Park();
  for (int reads = 1; reads <= 2; reads++) {
    ASSERT_TRUE(client_->CheckAttention(0).ok());
    EXPECT_EQ(AtHome(), 0u) << reads;
  }
  clock_.Advance(absl::Minutes(1));  // after a pause nobody knows
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 0u);
  for (int reads = 2; reads <= 3; reads++) ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 40u);
  EXPECT_EQ(Host().attended_in_place, 4u);
}

TEST_F(LowerTierTest, ARuleMayBeForced) {
  options_.attend_lower_tiers = AttendLowerTiers::kPromoteFirst;
  Park();
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 40u);
  Renew();
  options_.attend_lower_tiers = AttendLowerTiers::kInPlace;
  host_attend_rate_ = 1;
  Park();
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 0u);
}

// What in-place attention could serve does not fail because of it.
TEST_F(LowerTierTest, WithoutRoomOrWhenTheCopyFailsItIsInPlace) {
  options_.attend_lower_tiers = AttendLowerTiers::kPromoteFirst;
  options_.limits.promote_below = 0.2;  // 25 blocks of 40
  Park();
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 0u) << "all of them or none";
  EXPECT_EQ(Host().attended_in_place, 1u);
  Renew();
  options_.attend_lower_tiers = AttendLowerTiers::kPromoteFirst;
  Park();
  device_->Fail(FaultyBackend::kStartCopy, 1000);
  ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 0u);
  EXPECT_EQ(cache_->Stats().failed_moves, 40u);
  device_->Fail(FaultyBackend::kStartCopy, 0);
  client_->CheckAllLayers();
}

TEST_F(LowerTierTest, RatesAreMeasured) {
  host_attend_rate_ = 1e12;
  Park();
  host_->SetHook([&](FaultyBackend::Call call) {
    if (call == FaultyBackend::kAttend) clock_.Advance(absl::Milliseconds(100));
  });
  int attentions = 0;
  for (; AtHome() == 0 && attentions < 100; attentions++) ASSERT_TRUE(client_->CheckAttention(0).ok());
  EXPECT_EQ(AtHome(), 40u);
  EXPECT_GT(attentions, 3);
  EXPECT_LT(Host().attend_rate, 2e10) << "it was said to be a hundred times as fast";
  EXPECT_EQ(Host().attended_in_place, static_cast<uint64_t>(attentions - 1));
}

TEST_F(MovesTest, AFailedCopyLosesNothing) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(300).ok());
  for (const auto leg : {FaultyBackend::kStartCopy, FaultyBackend::kPoll}) {
    device_->Fail(leg, 2);
    MoveReport report = *cache_->Evict({{client.id()}}, 1);
    EXPECT_EQ(report.left_blocks, 2u);
    EXPECT_EQ(report.moved_blocks, 3u);
    cache_->CheckInvariants();
    client.CheckAllLayers();
    device_->Fail(leg, 1);
    report = *cache_->Prefetch({{client.id()}});
    EXPECT_EQ(report.moved_blocks, 2u);
    EXPECT_EQ(report.left_blocks, 1u);
    client.CheckAllLayers();
    ASSERT_TRUE(cache_->Prefetch({{client.id()}}).ok());
    EXPECT_EQ(client.info().blocks_by_tier[0], 5u);
  }
  EXPECT_EQ(cache_->Stats().failed_moves, 6u);
}

TEST_F(MovesTest, AWriterThatMeetsAMovingBlockWaitsAsLongAsRoomWaitAndNoLonger) {
  options_.room_wait = absl::ZeroDuration();
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  int calls = 0;
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kStartCopy) return;
    calls++;
    EXPECT_TRUE(IsError(client.Append(1), absl::StatusCode::kAborted, "a block is being moved"));
    client.CheckAllLayers();
  });
  EXPECT_EQ(cache_->Evict({{client.id()}}, 1)->moved_blocks, 2u);
  EXPECT_EQ(calls, 2);
  device_->SetHook(nullptr);
  ASSERT_TRUE(client.Append(1).ok());
  client.CheckAllLayers();
}

// Copies of a round run side by side. One that fails, at its start or later, does not end the call while the
// bytes of others are on their way.
TEST_F(MovesTest, ACopyThatFailsWaitsForTheOthers) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(500).ok());
  int polls = 0;
  for (FaultyBackend* backend : {device_.get(), host_.get()})
    backend->DelayCopies([&] { return ++polls % 5; });  // each another time
  for (const auto leg : {FaultyBackend::kStartCopy, FaultyBackend::kPoll})
    for (const int after : {0, 2, 5}) {
      device_->FailAfter(leg, after);
      MoveReport report = *cache_->Evict({{client.id()}}, 1);
      EXPECT_EQ(report.left_blocks, 1u);
      EXPECT_EQ(report.moved_blocks, 7u);
      EXPECT_EQ(device_->copies_running(), 0u)
          << "bytes are still on their way to places that others may get";
      ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
      client.CheckAllLayers();
      device_->FailAfter(leg, after);
      report = *cache_->Prefetch({{client.id()}});
      EXPECT_EQ(report.left_blocks, 1u);
      EXPECT_EQ(device_->copies_running(), 0u);
      ASSERT_TRUE(cache_->Prefetch({{client.id()}}).ok());
      client.CheckAllLayers();
    }
  for (FaultyBackend* backend : {device_.get(), host_.get()}) backend->DelayCopies(nullptr);
}

TEST_F(MovesTest, CallsThatNobodyWantsAnyMoreStopBetweenRoundsAndSayWhatMoved) {
  options_.max_moves_in_flight = 2;
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(8 * 64).ok());
  const SequenceId id = client.id();
  const auto stop_in_round = [&](int round, const std::function<void()>& stop) {
    device_->SetHook([this, stop, left = 2 * round](FaultyBackend::Call call) mutable {
      if (call == FaultyBackend::kStartCopy && --left == 0) stop();
    });
  };
  const auto verbs = {
      std::function([&](const CallContext& context) {
        return cache_->Evict({&id, 1}, 1, context).status();
      }),
      std::function([&](const CallContext& context) { return cache_->EvictAll(1, context).status(); }),
      std::function([&](const CallContext& context) {
        return cache_->Prefetch({&id, 1}, context).status();
      })};
  int verb = 0;
  for (const auto& call : verbs) {
    const bool up = ++verb == 3;
    ASSERT_TRUE((up ? cache_->Evict({&id, 1}, 1) : cache_->Prefetch({&id, 1})).ok());
    Cancellation cancellation;
    CallContext context;
    context.cancellation = &cancellation;
    stop_in_round(2, [&] { cancellation.Cancel(); });
    EXPECT_TRUE(IsError(call(context), absl::StatusCode::kCancelled, "it had moved 4 blocks"));
    EXPECT_EQ(client.info().blocks_by_tier[up ? 0 : 1], 4u) << "what has moved stays moved";
    EXPECT_TRUE(IsError(call(context), absl::StatusCode::kCancelled, "it had moved 0 blocks"));
    CallContext late;
    late.deadline = clock_.function()() + absl::Seconds(3);
    stop_in_round(1, [&] { clock_.Advance(absl::Seconds(3)); });
    EXPECT_TRUE(IsError(call(late), absl::StatusCode::kDeadlineExceeded, "it had moved 2 blocks"));
    device_->SetHook(nullptr);
    client.CheckAllLayers();
  }
}

TEST_F(MovesTest, AnIdThatIsNamedAHundredThousandTimesCountsOnce) {
  options_.max_sequences = 100'000;
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(300).ok());
  std::vector<SequenceId> ids(100'000, client.id());
  EXPECT_EQ(cache_->Evict(ids, 1)->moved_blocks, 5u);
  EXPECT_EQ(cache_->Prefetch(ids)->moved_blocks, 5u);
  ids.push_back(client.id());
  EXPECT_TRUE(IsError(cache_->Evict(ids, 1).status(), absl::StatusCode::kInvalidArgument, "max_sequences"));
  EXPECT_TRUE(IsError(cache_->Prefetch(ids).status(), absl::StatusCode::kInvalidArgument, "max_sequences"));
}

// An eviction of half a million table entries, of which nothing has to move, is a row of slices: attention
// goes on between them.
TEST_F(MovesTest, AttentionGoesOnBetweenTheSlicesOfAnEviction) {
  static thread_local bool evicting = false;
  std::atomic<int> slices{0};
  options_.clock = [&, now = clock_.function()] {
    if (evicting) slices++;  // an eviction asks for the time in each slice
    return now();
  };
  Start();
  Client bystander(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(bystander.Append(10).ok());
  Client parked(*cache_, UniformModel("one", {1, 1, 64, 64}, 1), WithPair("f16"), random_);
  ASSERT_TRUE(parked.Append(64 * 64).ok());
  std::vector<SequenceId> ids = {parked.id()};
  ASSERT_EQ(cache_->Evict(ids, 1)->moved_blocks, 64u);
  for (int i = 0; i < 4000; i++) ids.push_back(cache_->ForkSequence(parked.id()).value());
  std::atomic<bool> done{false};
  std::thread eviction([&] {
    evicting = true;
    EXPECT_EQ(cache_->Evict(ids, 1)->moved_blocks, 0u);
    done = true;
  });
  int between = 0;
  while (!done) {
    const bool begun = slices > 0;
    ASSERT_TRUE(bystander.CheckAttention(0).ok());
    if (begun && !done) between++;
  }
  eviction.join();
  EXPECT_GT(slices, 400);
  EXPECT_GT(between, 0) << "the eviction has kept the mutex from its first slice to its last";
}

// What was planned for a block that is gone meanwhile does not happen to one that came after it.
TEST_F(MovesTest, AMovePlannedForABlockThatIsGoneTouchesNoOther) {
  options_.max_moves_in_flight = 1;
  Start(8 * kBlock, 8 * kBlock);
  Client old(*cache_, SmallModel(), WithPair("f16"), random_),
      fresh(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(old.Append(4 * 64).ok());
  ASSERT_TRUE(cache_->Evict({{old.id()}}, 1).ok());
  ASSERT_TRUE(old.CheckAttention(0).ok());  // wants its blocks promoted
  bool done = false;
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kStartCopy || done) return;
    done = true;
    ASSERT_TRUE(old.Close().ok());
    ASSERT_TRUE(fresh.Append(4 * 64).ok());
    ASSERT_TRUE(cache_->Evict({{fresh.id()}}, 1).ok());
  });
  cache_->RunMovesOnce();
  device_->SetHook(nullptr);
  EXPECT_TRUE(done);
  EXPECT_EQ(fresh.info().blocks_by_tier[1], 4u) << "nobody read them";
  fresh.CheckAllLayers();
}

// A host tier that others can write to: the fixture's has checksums on.
TEST_F(MovesTest, ABlockThatChangedWhileParkedIsDataLossNotWrongTokens) {
  // The slab of the host tier, to damage it.
  class Peek : public FaultyBackend {
   public:
    using FaultyBackend::FaultyBackend;
    absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces,
                                         CopyDirection direction) override {
      if (direction == CopyDirection::kToHost) last_target = pieces.front().target;
      return FaultyBackend::StartCopy(pieces, direction);
    }
    std::byte* last_target = nullptr;
  };
  auto owned = std::make_unique<Peek>(MakeCpuBackend({}));
  Peek* peek = owned.get();
  device_ = std::move(owned);
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  ASSERT_EQ(cache_->Evict({{client.id()}}, 1)->moved_blocks, 2u);
  peek->last_target[17] ^= std::byte{4};  // of the second block
  const MoveReport report = *cache_->Prefetch({{client.id()}});
  EXPECT_EQ(report.moved_blocks, 1u);
  EXPECT_EQ(report.left_blocks, 1u);
  EXPECT_EQ(cache_->Stats().checksum_failures, 1u);
  EXPECT_TRUE(IsError(client.CheckAttention(0), absl::StatusCode::kDataLoss, "tokens 64 to 99 were dropped"));
  ASSERT_TRUE(client.Truncate(64).ok());
  client.CheckAllLayers();
}

TEST_F(MovesTest, TiersAndSequencesThatDoNotExistAreRefused) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  EXPECT_TRUE(IsError(cache_->Evict({{client.id()}}, 2).status(), absl::StatusCode::kInvalidArgument,
                      "there are tiers 0 to 1"));
  EXPECT_TRUE(
      IsError(cache_->Evict({{client.id() + 1}}, 1).status(), absl::StatusCode::kNotFound, "does not exist"));
  EXPECT_TRUE(
      IsError(cache_->Prefetch({{client.id() + 1}}).status(), absl::StatusCode::kNotFound, "does not exist"));
}

TEST_F(MovesTest, ThreeTiersPassBlocksDownOneByOne) {
  CpuBackendOptions cpu;
  cpu.threads = 1;
  FaultyBackend third(MakeCpuBackend(cpu));
  options_.tiers = {{"device", device_.get(), 3 * kBlock, false},
                    {"host", host_.get(), 3 * kBlock, true},
                    {"far", &third, 30 * kBlock, true}};
  cache_ = KvCache::Create(options_).value();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Step(64).ok());
  const SequenceInfo info = client.info();
  EXPECT_EQ(info.blocks_by_tier, (std::vector<uint64_t>{3, 3, 6}));
  client.CheckAllLayers();
  EXPECT_EQ(cache_->EvictAll(2)->moved_blocks, 6u);
  client.CheckAllLayers();
  EXPECT_EQ(cache_->Prefetch({{client.id()}})->moved_blocks, 3u);
  client.CheckAllLayers();
  ASSERT_TRUE(client.Close().ok());
  cache_.reset();  // before the third backend
}

// Coded blocks at the bottom and f16 blocks at the top: after a long churn of two coded sizes, most of the
// free room is one extent.
TEST_F(MovesTest, ChurnDoesNotFragmentTheTier) {
  Start(64 * kBlock, 0);
  std::vector<Client> clients;
  for (int round = 0; round < 60; round++) {
    clients.emplace_back(*cache_, SmallModel(), WithPair(round % 2 == 0 ? "turbo4" : "q8_0/turbo3", {1, 1}),
                         random_);
    ASSERT_TRUE(clients.back().Append(64 * (4 + random_() % 8)).ok());
    if (clients.size() > 6) {
      const size_t victim = random_() % clients.size();
      ASSERT_TRUE(clients[victim].Close().ok());
      clients.erase(clients.begin() + static_cast<std::ptrdiff_t>(victim));
    }
  }
  const TierStats tier = cache_->Stats().tiers[0];
  EXPECT_GT(tier.largest_free_extent_bytes * 2, tier.free_bytes) << tier.free_bytes;
}

}  // namespace
}  // namespace kvtide::testing
