// ReadTokens: what comes out is what is stored, in every type, tier and range, while the sequence goes on.
#include <cmath>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using ReadTest = CacheTest;

struct Read {
  std::vector<uint32_t> k, v;  // room for any type
  DataType type = DataType::kF32;
  std::vector<LayerRead> layers;
  ReadCall call;

  Read(SequenceId sequence, int layer, const GroupShape& shape, int64_t first, int64_t tokens,
       DataType of_type)
      : k(static_cast<size_t>(tokens * shape.kv_heads * shape.head_dim_k)),
        v(static_cast<size_t>(tokens * shape.kv_heads * shape.head_dim_v)),
        type(of_type) {
    layers.push_back({layer, {k.data(), type}, {v.data(), type}});
    call.sequence = sequence;
    call.first_token = first;
    call.tokens = tokens;
    call.layers = layers;
  }
};

void ExpectRows(const std::vector<float>& expected, const std::vector<uint32_t>& rows, DataType type,
                const std::string& what) {
  ASSERT_EQ(expected.size(), rows.size());
  const TensorView view{rows.data(), type};
  const float unit = type == DataType::kBf16 ? 1.0f / 128 : 1.0f / 1024;
  for (size_t i = 0; i < expected.size(); i++)
    ASSERT_NEAR(view.At(i), expected[i], unit * std::abs(expected[i]) + 2e-4f) << what << ", value " << i;
}

TEST_F(ReadTest, RandomRangesOfEveryLayerAreWhatIsStored) {
  Start();
  for (const char* pair : {"f16", "turbo4", "q8_0/turbo3"}) {
    Client client(*cache_, MixedModel(), WithPair(pair, {1, 1}), random_);
    ASSERT_TRUE(client.Append(64 * 6 + 17).ok());
    if (random_() % 2 == 0) {
      ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
    }
    ASSERT_TRUE(client.Append(70).ok());
    for (int round = 0; round < 30; round++) {
      const int layer = static_cast<int>(random_() % 3);
      const LayerGroupSpec& group =
          client.model().groups[static_cast<size_t>(client.model().layers[static_cast<size_t>(layer)].group)];
      const int64_t length = client.length(), live = client.shadow().FirstLiveToken(layer);
      const int64_t first = live + static_cast<int64_t>(random_() % static_cast<uint64_t>(length - live));
      const int64_t tokens = 1 + static_cast<int64_t>(random_() % static_cast<uint64_t>(length - first));
      const DataType type = static_cast<DataType>(random_() % 3);
      Read read(client.id(), layer, group.shape, first, tokens, type);
      ASSERT_TRUE(cache_->ReadTokens(read.call).ok());
      const std::string what = absl::StrCat(pair, ", layer ", layer, ", ", tokens, " tokens from ", first);
      ExpectRows(client.shadow().Keys(layer, first, tokens), read.k, type, what);
      ExpectRows(client.shadow().Values(layer, first, tokens), read.v, type, what);
    }
    ASSERT_TRUE(client.Close().ok());
  }
}

TEST_F(ReadTest, WhatIsNotThereIsAnErrorWithTheRange) {
  Start();
  SequenceOptions options = WithPair("f16");
  options.allow_drop = true;
  Client client(*cache_, MixedModel(), options, random_);
  ASSERT_TRUE(client.Append(300).ok());
  const GroupShape full = client.model().groups[0].shape, sliding = client.model().groups[1].shape;
  const auto read = [&](int layer, const GroupShape& shape, int64_t first, int64_t tokens) {
    return cache_->ReadTokens(Read(client.id(), layer, shape, first, tokens, DataType::kF16).call);
  };
  EXPECT_TRUE(
      IsError(read(1, full, 200, 101), absl::StatusCode::kOutOfRange, "has 300 tokens, not up to 301"));
  EXPECT_TRUE(IsError(read(1, full, -1, 1), absl::StatusCode::kInvalidArgument, "first token -1"));
  EXPECT_TRUE(IsError(read(0, sliding, 100, 10), absl::StatusCode::kOutOfRange, "left the sliding window"));
  EXPECT_TRUE(IsError(read(3, full, 0, 1), absl::StatusCode::kInvalidArgument, "layers 0 to 2"));
  EXPECT_TRUE(read(0, sliding, 200, 100).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDropTier).ok());
  EXPECT_TRUE(IsError(read(1, full, 10, 100), absl::StatusCode::kDataLoss, "tokens 10 to 109 were dropped"));
  Read nothing(client.id(), 1, full, 0, 1, DataType::kF32);
  nothing.layers[0].k = nothing.layers[0].v = {};
  EXPECT_TRUE(
      IsError(cache_->ReadTokens(nothing.call), absl::StatusCode::kInvalidArgument, "neither K nor V"));
}

TEST_F(ReadTest, AReadSeesOneMomentAndStopsWhenItIsNotWanted) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(64 * 8).ok());
  const ShadowSequence before = client.shadow();
  Read read(client.id(), 1, SmallModel().groups[0].shape, 0, 64 * 8, DataType::kF32);
  bool done = false;
  device_->SetHook([&](FaultyBackend::Call call) {  // the sequence changes while its rows are read
    if (call != FaultyBackend::kDecode || done) return;
    done = true;
    ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
    ASSERT_TRUE(client.Truncate(100).ok());
    ASSERT_TRUE(client.Append(100).ok());
  });
  ASSERT_TRUE(cache_->ReadTokens(read.call).ok());
  EXPECT_TRUE(done);
  ExpectRows(before.Keys(1, 0, 64 * 8), read.k, DataType::kF32, "before the cut");
  device_->SetHook(nullptr);

  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  Read unwanted(client.id(), 0, SmallModel().groups[0].shape, 0, 200, DataType::kF32);
  unwanted.call.context = &context;
  cancellation.Cancel();
  EXPECT_EQ(cache_->ReadTokens(unwanted.call).code(), absl::StatusCode::kCancelled);
  client.CheckAllLayers();
}

}  // namespace
}  // namespace kvtide::testing
