// Forks share blocks until somebody writes; truncation cuts anywhere, also inside coded blocks. All attention
// is compared with the shadows, which share nothing.
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using ForkTest = CacheTest;
using TruncateTest = CacheTest;

TEST_F(ForkTest, SharesEveryBlockAndCopiesTheTailOnTheFirstWrite) {
  Start();
  Client parent(*cache_, SmallModel(), WithPair("turbo4", {1, 1}), random_);
  ASSERT_TRUE(parent.Step(64 * 5 + 10).ok());
  const uint64_t used = UsedBytes(cache_->Stats());
  Client child = parent.Fork();
  EXPECT_EQ(child.info().forked_from, parent.id());
  EXPECT_EQ(UsedBytes(cache_->Stats()), used) << "a fork takes no memory";
  EXPECT_EQ(cache_->Stats().shared_blocks, 6u);
  child.CheckAllLayers();

  ASSERT_TRUE(child.Step(1).ok());
  EXPECT_EQ(UsedBytes(cache_->Stats()), used + 65536);
  EXPECT_EQ(cache_->Stats().copied_on_write_blocks, 1u);
  ASSERT_TRUE(parent.Step(1).ok());  // now the only owner of its tail
  EXPECT_EQ(cache_->Stats().copied_on_write_blocks, 1u);
  for (int i = 0; i < 4; i++) {
    ASSERT_TRUE(child.Step(50).ok());
    ASSERT_TRUE(parent.Step(33).ok());
  }
  parent.CheckAllLayers();
  child.CheckAllLayers();
  cache_->CheckInvariants();
  ASSERT_TRUE(parent.Close().ok());
  child.CheckAllLayers();
  cache_->CheckInvariants();
}

TEST_F(ForkTest, ForksOfForksAtABlockBoundaryNeedNoCopy) {
  Start();
  Client a(*cache_, MixedModel(), WithPair("q8_0", {0, 0}), random_);
  ASSERT_TRUE(a.Step(128).ok());
  Client b = a.Fork();
  Client c = b.Fork();
  for (Client* client : {&a, &b, &c}) ASSERT_TRUE(client->Step(30).ok());
  EXPECT_EQ(cache_->Stats().copied_on_write_blocks, 0u);
  for (Client* client : {&c, &a, &b}) client->CheckAllLayers();
}

TEST_F(ForkTest, AForkThatDoesNotFitLeavesTheSequenceAsItWas) {
  Start(2 * 65536, 0);
  Client parent(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(parent.Append(100).ok());
  Client child = parent.Fork();
  EXPECT_TRUE(IsError(child.Append(1), absl::StatusCode::kResourceExhausted, "no room"));
  cache_->CheckInvariants();
  child.CheckAllLayers();
  parent.CheckAllLayers();
  ASSERT_TRUE(parent.Close().ok());
  ASSERT_TRUE(child.Append(1).ok());
}

TEST_F(TruncateTest, CutsAnywhereAndGoesOn) {
  Start();
  for (const char* pair : {"f16", "turbo4", "q4_0/turbo3"})
    for (const int64_t cut : {0, 1, 63, 64, 65, 100, 128, 256, 319, 320}) {
      Client client(*cache_, SmallModel(), WithPair(pair, {1, 1}), random_);
      ASSERT_TRUE(client.Step(320).ok());
      ASSERT_TRUE(client.Truncate(cut).ok());
      cache_->CheckInvariants();
      EXPECT_EQ(client.info().tokens, cut);
      if (cut > 0) client.CheckAllLayers();
      EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
      ASSERT_TRUE(client.Step(90).ok()) << pair << " cut at " << cut;
      ASSERT_TRUE(client.Step(64).ok());
      client.CheckAllLayers();
      EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
      ASSERT_TRUE(client.Close().ok());
    }
}

TEST_F(TruncateTest, BeyondTheLengthIsOutOfRange) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(10).ok());
  EXPECT_TRUE(
      IsError(client.Truncate(11), absl::StatusCode::kOutOfRange, "has 10 tokens, it cannot keep 11"));
  EXPECT_TRUE(IsError(client.Truncate(-1), absl::StatusCode::kInvalidArgument, "-1 is negative"));
  EXPECT_TRUE(client.Truncate(10).ok());
}

TEST_F(TruncateTest, TokensThatLeftTheSlidingWindowDoNotComeBack) {
  Start();
  Client client(*cache_, MixedModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Step(400).ok());
  EXPECT_TRUE(
      IsError(client.Truncate(300), absl::StatusCode::kOutOfRange, "have left its sliding window of 100"));
  client.CheckAllLayers();
  ASSERT_TRUE(client.Truncate(380).ok());
  client.CheckAllLayers();
  ASSERT_TRUE(client.Truncate(0).ok());
  ASSERT_TRUE(client.Step(70).ok());
  client.CheckAllLayers();
}

TEST_F(TruncateTest, OneBranchIsCutInsideASharedBlockAndTheOtherDoesNotNotice) {
  Start();
  for (const char* pair : {"f16", "turbo4"}) {
    Client a(*cache_, SmallModel(), WithPair(pair, {0, 0}), random_);
    ASSERT_TRUE(a.Step(200).ok());
    Client b = a.Fork();
    ASSERT_TRUE(b.Truncate(70).ok());
    ASSERT_TRUE(b.Step(100).ok());
    a.CheckAllLayers();
    b.CheckAllLayers();
    ASSERT_TRUE(a.Truncate(195).ok());
    ASSERT_TRUE(a.Step(3).ok());
    a.CheckAllLayers();
    b.CheckAllLayers();
    ASSERT_TRUE(a.Close().ok());
    ASSERT_TRUE(b.Close().ok());
  }
}

TEST_F(TruncateTest, LayersThatRanAheadAreCutToTheLength) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  std::vector<float> rows(80 * 128, 1.0f);
  const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
  AppendCall call;
  call.sequence = client.id();
  call.start_position = 100;
  call.tokens = 80;
  call.layers = {&kv, 1};
  ASSERT_TRUE(cache_->Append(call).ok());
  EXPECT_EQ(client.info().tokens, 100);
  EXPECT_EQ(client.info().max_layer_tokens, 180);
  ASSERT_TRUE(client.Truncate(100).ok());
  EXPECT_EQ(client.info().max_layer_tokens, 100);
  ASSERT_TRUE(client.Step(20).ok());
  client.CheckAllLayers();
}

TEST_F(TruncateTest, AFailureChangesNothing) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Step(256).ok());
  const uint64_t used = UsedBytes(cache_->Stats());
  device_->Fail(FaultyBackend::kDecode);
  EXPECT_TRUE(IsError(client.Truncate(70), absl::StatusCode::kInternal, "planted"));
  EXPECT_EQ(client.info().tokens, 256);
  EXPECT_EQ(UsedBytes(cache_->Stats()), used);
  cache_->CheckInvariants();
  client.CheckAllLayers();
}

}  // namespace
}  // namespace kvtide::testing
