// The evaluation mode: every token is coded before anything attends over it, the tail included.
#include <thread>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using SealAtOnceTest = CacheTest;

SequenceOptions AtOnce(const std::string& pair) {
  SequenceOptions options = WithPair(pair);
  options.seal_at_once = true;
  return options;
}

TEST_F(SealAtOnceTest, EveryTokenIsCodedBeforeItIsAttended) {
  Start();
  for (const char* pair : {"turbo3", "q8_0/turbo4", "planar3/q4_0", "f16", "f16/turbo3"})
    for (const ModelSpec& model : {SmallModel(), MixedModel()}) {
      Client client(*cache_, model, AtOnce(pair), random_);
      for (const int64_t tokens : {100, 1, 27, 1, 200, 63}) {
        ASSERT_TRUE(client.Step(tokens).ok());
        EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest()) << pair << " " << client.length();
      }
      client.CheckAllLayers();
      cache_->CheckInvariants();
      ASSERT_TRUE(client.Close().ok());
    }
}

TEST_F(SealAtOnceTest, WorksAcrossForksMovesAndCuts) {
  Start();
  Client client(*cache_, SmallModel(), AtOnce("turbo4"), random_);
  ASSERT_TRUE(client.Step(150).ok());
  Client fork = client.Fork();
  ASSERT_TRUE(fork.Step(10).ok());
  ASSERT_TRUE(client.Step(50).ok());
  ASSERT_TRUE(cache_->EvictAll(1).ok());
  client.CheckAllLayers();
  fork.CheckAllLayers();
  ASSERT_TRUE(fork.Step(40).ok());
  ASSERT_TRUE(cache_->Prefetch({{client.id()}}).ok());  // the coded tail goes up, its f16 twin stays below
  ASSERT_TRUE(client.Step(5).ok());
  ASSERT_TRUE(client.Truncate(128).ok());
  ASSERT_TRUE(client.Step(30).ok());
  client.CheckAllLayers();
  fork.CheckAllLayers();
  ASSERT_TRUE(client.Truncate(0).ok());
  ASSERT_TRUE(client.Step(70).ok());
  client.CheckAllLayers();
  cache_->CheckInvariants();
}

TEST_F(SealAtOnceTest, ACutInsideABlockKeepsCodedValues) {
  Start();
  Client client(*cache_, SmallModel(), AtOnce("q8_0"), random_);
  ASSERT_TRUE(client.Step(128).ok());
  ASSERT_TRUE(client.Truncate(100).ok());
  client.CheckAllLayers();
  EXPECT_EQ(client.info().tokens, 100);
}

TEST_F(SealAtOnceTest, OneCallAtATime) {
  Start();
  Client client(*cache_, SmallModel(), AtOnce("turbo4"), random_);
  ASSERT_TRUE(client.Step(10).ok());
  device_->Close(FaultyBackend::kAttend);
  std::thread reader([&] { EXPECT_TRUE(client.CheckAttention(0).ok()); });
  device_->WaitForEntry(FaultyBackend::kAttend);
  std::mt19937 random(1);
  std::vector<float> rows(128);
  const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
  AppendCall call;
  call.sequence = client.id();
  call.start_position = 10;
  call.tokens = 1;
  call.layers = {&kv, 1};
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kAborted, "one call at a time"));
  device_->Open(FaultyBackend::kAttend);
  reader.join();
  EXPECT_TRUE(cache_->Append(call).ok());
}

}  // namespace
}  // namespace kvtide::testing
