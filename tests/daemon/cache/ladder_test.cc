// Blocks that are recoded to fewer bits when their tier needs room. The shadow codes the same rows once more,
// so attention is compared to the bit as ever.
#include "daemon/cache/block/ladder.h"

#include <string>
#include <vector>

#include "daemon/cache/stepper.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using LadderTest = CacheTest;

size_t BlockBytes(const std::string& pair) {
  return BlockLayout(SmallModel().groups[0].shape, Pair(pair)).block_bytes();
}

SequenceOptions Degrading(const std::string& pair, const std::vector<std::string>& rungs,
                          ExactWindow window = {0, 0}) {
  SequenceOptions options = WithPair(pair, window);
  for (const std::string& rung : rungs) options.degrade.push_back(Pair(rung));
  return options;
}

TEST_F(LadderTest, ARungKnowsTheNextOneBelow) {
  const GroupShape shape{1, 1, 64, 64};
  const BlockLayout four(shape, Pair("turbo4")), three(shape, Pair("turbo3")), two(shape, Pair("turbo2"));
  const Ladder ladder{{&four, &three, &two}};
  EXPECT_EQ(ladder.Below(&four), &three);
  EXPECT_EQ(ladder.Below(&three), &two);
  EXPECT_EQ(ladder.Below(&two), nullptr);
  const BlockLayout other(shape, Pair("q8_0"));
  EXPECT_EQ(ladder.Below(&other), nullptr);
  EXPECT_TRUE(ladder.Has(&two));
  EXPECT_FALSE(ladder.Has(&other));
}

TEST_F(LadderTest, WhatMakesNoSenseIsRefusedWithWhatToDo) {
  Start();
  const ModelId model = Register(SmallModel());
  const auto refused = [&](const SequenceOptions& options, const std::string& part) {
    EXPECT_TRUE(
        IsError(cache_->CreateSequence(model, options).status(), absl::StatusCode::kInvalidArgument, part));
  };
  refused(Degrading("f16", {"turbo4"}), "never coded");
  refused(Degrading("turbo3", {"turbo4"}), "no fewer bytes than turbo3");
  refused(Degrading("turbo4", {"turbo2", "turbo3"}), "degrade[1]: turbo3");
  refused(Degrading("turbo4", {"turbo3", "turbo3"}), "not fewer than turbo3");
  refused(Degrading("q8_0", {"f16"}), "f16 is not of fewer bits");
  refused(Degrading("turbo4", {"tide3/turbo3"}), "cannot become tide3");
  SequenceOptions at_once = Degrading("turbo4", {"turbo3"});
  at_once.seal_at_once = true;
  refused(at_once, "evaluation");
}

TEST_F(LadderTest, AppendsThatNeedRoomRecodeWhatIsColdBeforeTheyDemote) {
  const size_t exact = BlockBytes("f16"), four = BlockBytes("turbo4"), three = BlockBytes("turbo3");
  Start(2 * exact + 20 * four, 8 * kMiB);
  Client cold(*cache_, SmallModel(), Degrading("turbo4", {"turbo3", "turbo2"}), random_);
  for (int i = 0; i < 16; i++) ASSERT_TRUE(cold.Append(64).ok());
  EXPECT_EQ(cold.info().degraded_blocks, 0u);
  clock_.Advance(absl::Seconds(10));
  Client hot(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  for (int i = 0; i < 8; i++) ASSERT_TRUE(hot.Step(64).ok());
  const SequenceInfo info = cold.info();
  EXPECT_EQ(info.blocks_by_tier[0], 16u) << "nothing was demoted";
  EXPECT_EQ(hot.info().blocks_by_tier[0], 8u);
  ASSERT_GT(info.degraded_blocks, 0u);
  ASSERT_FALSE(info.degraded.empty());
  EXPECT_EQ(info.degraded[0].first, 0) << "the coldest first";
  const TierStats tier = cache_->Stats().tiers[0];
  EXPECT_GE(tier.degraded_blocks, info.degraded_blocks);
  EXPECT_GE(tier.degraded_bytes, info.degraded_blocks * (four - three));
  EXPECT_EQ(tier.demoted_blocks, 0u);
  cold.Degrade();
  EXPECT_EQ(TotalBytes(cold.info()), cold.shadow().BytesAtRest());
  cold.CheckAllLayers();
  hot.CheckAllLayers();
  ASSERT_TRUE(cold.Append(100).ok());
  cold.Degrade();
  cold.CheckAllLayers();
}

TEST_F(LadderTest, AboveTheWatermarkIdleBlocksGoDownAllRungsBeforeTheyLeave) {
  options_.limits.high_watermark = 0.5;
  options_.limits.low_watermark = 0.45;
  const size_t four = BlockBytes("turbo4");
  Start(BlockBytes("f16") + 20 * four, 8 * kMiB);
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3", "turbo2"}), random_);
  for (int i = 0; i < 20; i++) ASSERT_TRUE(client.Append(64).ok());
  EXPECT_EQ(cache_->RunMovesOnce().degraded_blocks, 0u) << "hot";
  clock_.Advance(absl::Seconds(6));
  uint64_t degraded = 0;
  MoveReport report;
  for (int round = 0; round < 20; round++) {
    report = cache_->RunMovesOnce();
    degraded += report.degraded_blocks;
    EXPECT_TRUE(report.degraded_blocks == 0 || report.moved_blocks == 0);
    client.Degrade();
    client.CheckAllLayers();
    clock_.Advance(absl::Seconds(6));
  }
  EXPECT_EQ(report.degraded_blocks + report.moved_blocks, 0u) << "it is below the low watermark";
  EXPECT_GT(degraded, 0u);
  EXPECT_EQ(client.info().blocks_by_tier[0] + client.info().blocks_by_tier[1], 20u);
}

// Without a lower tier and without a permission to drop, what would have been refused fits.
TEST_F(LadderTest, ATierThatIsAloneTakesMoreTokensInFewerBits) {
  const size_t exact = BlockBytes("f16"), four = BlockBytes("turbo4"), two = BlockBytes("turbo2");
  const size_t room = 2 * exact + 100 * four;
  const auto fill = [&](const SequenceOptions& options) {
    Client client(*cache_, SmallModel(), options, random_);
    while (client.length() < 64 * 1000) {
      if (!client.Append(64).ok()) break;
    }
    const int64_t blocks = client.length() / 64;
    EXPECT_TRUE(client.Close().ok());
    return blocks;
  };
  Start(room, 0);
  const int64_t before = fill(WithPair("turbo4", {0, 0}));
  {
    Client full(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
    EXPECT_TRUE(IsError(full.Append(64 * 200), absl::StatusCode::kResourceExhausted, "fewer bits (degrade)"));
    EXPECT_TRUE(full.Close().ok());
  }
  const int64_t after = fill(Degrading("turbo4", {"turbo3", "turbo2"}));
  // Not all of it: free pieces that are smaller than any block stay.
  EXPECT_GE(after, before * static_cast<int64_t>(four) / static_cast<int64_t>(two) * 8 / 10) << before;
}

// What comes down leaves room to recode in.
TEST_F(LadderTest, TwoTiersThatAreFullTakeMoreTokensInFewerBits) {
  Start(2 * kMiB, 2 * kMiB);
  const auto fill = [&](const SequenceOptions& options) {
    Client client(*cache_, SmallModel(), options, random_);
    while (client.length() < 64 * 1000 && client.Append(64).ok()) {
    }
    const int64_t blocks = client.length() / 64;
    EXPECT_TRUE(client.Close().ok());
    return blocks;
  };
  const int64_t before = fill(WithPair("q8_0", {1, 2}));
  EXPECT_GE(fill(Degrading("q8_0", {"turbo4", "turbo3"}, {1, 2})), before * 4 / 3) << before;
}

TEST_F(LadderTest, BlocksThatMayBeDroppedAreRecodedFirst) {
  const size_t exact = BlockBytes("f16"), four = BlockBytes("turbo4");
  Start(2 * exact + 60 * four, 0);
  SequenceOptions options = Degrading("turbo4", {"turbo2"});
  options.allow_drop = true;
  Client client(*cache_, SmallModel(), options, random_);
  while (client.info().dropped_blocks == 0) ASSERT_TRUE(client.Append(64).ok());
  const SequenceInfo info = client.info();
  EXPECT_GE(info.degraded_blocks, info.blocks_by_tier[0] * 3 / 4);
}

TEST_F(LadderTest, ForksShareWhatIsRecodedAndReadersKeepWhatTheySaw) {
  options_.limits.high_watermark = 0.1;
  options_.limits.low_watermark = 0;
  Start(3 * BlockBytes("f16") + 10 * BlockBytes("turbo4"), 0);
  Client parent(*cache_, SmallModel(), Degrading("turbo4", {"turbo3"}), random_);
  for (int i = 0; i < 8; i++) ASSERT_TRUE(parent.Append(64).ok());
  Client child = parent.Fork();
  const SequenceId both[] = {parent.id(), child.id()};
  PinCall pin;
  pin.sequences = both;
  auto step = cache_->PinStep(pin);
  ASSERT_TRUE(step.ok()) << step.status();
  const uint64_t used = cache_->Stats().tiers[0].used_bytes;
  clock_.Advance(absl::Seconds(10));
  cache_->RunMovesOnce();
  LayerCall call(parent.model(), 0, parent.id(), 1, parent.length(), random_);
  EXPECT_TRUE(cache_->AttendPinned(**step, call.call()).ok());
  ExpectClose(parent.shadow().Attend(0, call.q, 1, parent.length()), call.out, call.lse, "what was pinned");
  (*step).reset();
  clock_.Advance(absl::Seconds(10));
  cache_->RunMovesOnce();
  EXPECT_EQ(parent.info().degraded_blocks, 8u);
  EXPECT_EQ(child.info().degraded_blocks, 8u);
  EXPECT_LT(cache_->Stats().tiers[0].used_bytes, used);
  parent.Degrade();
  child.Degrade();
  parent.CheckAllLayers();
  child.CheckAllLayers();
  ASSERT_TRUE(child.Step(70).ok());
  child.CheckAllLayers();
  parent.CheckAllLayers();
}

TEST_F(LadderTest, ACutIntoARecodedBlockKeepsTheValuesThatWereLeft) {
  options_.limits.high_watermark = 0.1;
  options_.limits.low_watermark = 0;
  Start(4 * BlockBytes("f16") + 10 * BlockBytes("turbo4"), 0);
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3"}), random_);
  for (int i = 0; i < 6; i++) ASSERT_TRUE(client.Append(64).ok());
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(cache_->RunMovesOnce().degraded_blocks, 6u);
  client.Degrade();
  ASSERT_TRUE(client.Truncate(64 * 3 + 20).ok());
  client.CheckAllLayers();
  ASSERT_TRUE(client.Step(130).ok());
  client.Degrade();
  client.CheckAllLayers();
  EXPECT_EQ(client.info().degraded_blocks, 3u);
}

TEST_F(LadderTest, ChecksumsFollowAndAFailedRecodingLeavesTheBlock) {
  options_.limits.high_watermark = 0.1;
  options_.limits.low_watermark = 0;
  options_.limits.promote_on_attend = false;  // what was attended would come up instead
  Start(8 * kMiB, BlockBytes("f16") + 40 * BlockBytes("turbo4"));
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3", "turbo2"}), random_);
  for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Append(64).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  clock_.Advance(absl::Seconds(6));
  host_->Fail(FaultyBackend::kRecode, 1);
  const MoveReport failed = cache_->RunMovesOnce();
  EXPECT_EQ(failed.degraded_blocks, 0u);
  EXPECT_EQ(failed.left_blocks, 12u);
  EXPECT_EQ(client.info().degraded_blocks, 0u);
  client.CheckAllLayers();
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(cache_->RunMovesOnce().degraded_blocks, 12u);
  EXPECT_EQ(cache_->RunMovesOnce().degraded_blocks, 12u);
  client.Degrade();
  client.CheckAllLayers();
  // The checksum of the recoded bytes is verified on the way up.
  ASSERT_TRUE(cache_->Prefetch({{client.id()}}).ok());
  EXPECT_EQ(cache_->Stats().checksum_failures, 0u);
  EXPECT_EQ(client.info().blocks_by_tier[0], 12u);
  client.CheckAllLayers();
}

TEST_F(LadderTest, ARestartGivesBackWhatWasMadeDurable) {
  options_.limits.high_watermark = 0.1;
  options_.limits.low_watermark = 0;
  StartWithDisk(BlockBytes("f16") + 40 * BlockBytes("turbo4"), 8 * kMiB, 8 * kMiB);
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3", "turbo2"}), random_);
  for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Append(64).ok());
  clock_.Advance(absl::Seconds(6));
  ASSERT_EQ(cache_->RunMovesOnce().degraded_blocks, 12u);
  client.Degrade();
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  Restart(true);
  client.Move(*cache_);
  EXPECT_EQ(client.info().degraded_blocks, 12u);
  EXPECT_EQ(client.info().options.degrade.size(), 2u);
  client.CheckAllLayers();
  ASSERT_TRUE(client.Step(70).ok());
  client.CheckAllLayers();
}

// What is durable goes down for nothing and comes back whole.
TEST_F(LadderTest, BlocksWithABackupAreNotRecoded) {
  options_.limits.high_watermark = 0.1;
  options_.limits.low_watermark = 0;
  StartWithDisk(BlockBytes("f16") + 40 * BlockBytes("turbo4"), 8 * kMiB, 8 * kMiB);
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3"}), random_);
  for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Append(64).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(cache_->RunMovesOnce().degraded_blocks, 0u);
  client.CheckAllLayers();
}

TEST_F(LadderTest, AnEngineThatAttendsByItselfIsToldThatItCannot) {
  Start();
  Client client(*cache_, SmallModel(), Degrading("turbo4", {"turbo3"}), random_);
  ASSERT_TRUE(client.Append(64).ok());
  const SequenceId ids[] = {client.id()};
  PinCall pin;
  pin.sequences = ids;
  pin.mapped = true;
  EXPECT_TRUE(IsError(cache_->PinStep(pin).status(), absl::StatusCode::kFailedPrecondition, "degrade"));
}

}  // namespace
}  // namespace kvtide::testing
