// Attend: positions, masks, sinks, batches, tiers. What it must refuse it refuses with words that help.
#include <cmath>
#include <limits>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using AttendTest = CacheTest;

TEST_F(AttendTest, AnEmptySequenceGivesTheEmptyState) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  std::vector<float> q(4 * 64, 1.0f), out(4 * 64, 7.0f), lse(4, 7.0f);
  AttendRequest item;
  item.sequence = client.id();
  item.q = {q.data(), DataType::kF32};
  item.queries = 1;
  item.out = out.data();
  item.lse = lse.data();
  AttendCall call;
  call.items = {&item, 1};
  ASSERT_TRUE(cache_->Attend(call).ok());
  for (const float x : out) EXPECT_EQ(x, 0.0f);
  for (const float x : lse) EXPECT_EQ(x, -INFINITY);
  const std::vector<float> sinks(4, 2.5f);
  call.sinks = sinks.data();
  ASSERT_TRUE(cache_->Attend(call).ok());
  for (const float x : lse) EXPECT_EQ(x, 2.5f);
}

TEST_F(AttendTest, QueriesAnywhereSeeWhatIsBeforeThem) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(200).ok());
  const std::vector<float> q = RandomRows(random_, 3 * 4 * 64);
  for (const int64_t first : {0, 1, 62, 63, 64, 130, 197, 199, 500}) {
    std::vector<float> out(3 * 4 * 64), lse(3 * 4);
    AttendRequest item;
    item.sequence = client.id();
    item.q = {q.data(), DataType::kF32};
    item.queries = 3;
    item.first_query_position = first;
    item.out = out.data();
    item.lse = lse.data();
    AttendCall call;
    call.layer = 1;
    call.items = {&item, 1};
    ASSERT_TRUE(cache_->Attend(call).ok());
    ExpectClose(client.shadow().Attend(1, q, 3, first), out, lse, "causal at " + std::to_string(first));
    call.window = 70;
    ASSERT_TRUE(cache_->Attend(call).ok());
    ExpectClose(client.shadow().Attend(1, q, 3, first, true, 70), out, lse,
                "window at " + std::to_string(first));
    call.window.reset();
    call.causal = false;
    ASSERT_TRUE(cache_->Attend(call).ok());
    ExpectClose(client.shadow().Attend(1, q, 3, first, false), out, lse,
                "not causal at " + std::to_string(first));
  }
}

TEST_F(AttendTest, BlocksOnBothTiersAndSinksMergeToOneState) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {1, 1}), random_);
  ASSERT_TRUE(client.Append(500).ok());
  ASSERT_EQ(cache_->Evict({{client.id()}}, 1)->moved_blocks, 8u);
  ASSERT_TRUE(client.Append(300).ok());  // the new blocks lie in tier 0 again
  const SequenceInfo info = client.info();
  EXPECT_GT(info.blocks_by_tier[0], 0u);
  EXPECT_GT(info.blocks_by_tier[1], 0u);
  const std::vector<float> sinks = {3.0f, -1.0f, 40.0f, 0.0f};
  for (const int layer : {0, 1}) {
    EXPECT_TRUE(client.CheckAttention(layer, 5).ok());
    EXPECT_TRUE(client.CheckAttention(layer, 2, sinks.data()).ok());
  }
  EXPECT_GT(cache_->Stats().attended_blocks_below_tier0, 0u);
}

TEST_F(AttendTest, HalfPrecisionQueriesAreTaken) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(80).ok());
  std::vector<float> q = RandomRows(random_, 4 * 64), out(4 * 64), lse(4);
  std::vector<uint16_t> f16(q.size()), bf16(q.size());
  for (const DataType type : {DataType::kF16, DataType::kBf16}) {
    std::vector<float> rounded(q.size());
    for (size_t i = 0; i < q.size(); i++) {
      f16[i] = type == DataType::kF16 ? F32ToF16(q[i]) : F32ToBf16(q[i]);
      rounded[i] = type == DataType::kF16 ? F16ToF32(f16[i]) : Bf16ToF32(f16[i]);
    }
    AttendRequest item;
    item.sequence = client.id();
    item.q = {f16.data(), type};
    item.queries = 1;
    item.first_query_position = 79;
    item.out = out.data();
    AttendCall call;
    call.items = {&item, 1};
    ASSERT_TRUE(cache_->Attend(call).ok());
    const AttentionResult expected = client.shadow().Attend(0, rounded, 1, 79);
    ExpectClose(expected, out, expected.lse, DataTypeName(type));
  }
}

TEST_F(AttendTest, ABatchServesManySequencesOfOneModel) {
  Start();
  std::vector<Client> clients;
  for (const int64_t tokens : {1, 64, 300, 130}) {
    clients.emplace_back(*cache_, SmallModel(), WithPair(tokens > 100 ? "turbo3" : "f16", {0, 0}), random_);
    ASSERT_TRUE(clients.back().Append(tokens).ok());
  }
  const std::vector<float> q = RandomRows(random_, 4 * 64);
  std::vector<std::vector<float>> out(4, std::vector<float>(4 * 64)), lse(4, std::vector<float>(4));
  std::vector<AttendRequest> items(4);
  for (size_t i = 0; i < 4; i++) {
    items[i].sequence = clients[i].id();
    items[i].q = {q.data(), DataType::kF32};
    items[i].queries = 1;
    items[i].first_query_position = clients[i].length() - 1;
    items[i].out = out[i].data();
    items[i].lse = lse[i].data();
  }
  AttendCall call;
  call.items = items;
  ASSERT_TRUE(cache_->Attend(call).ok());
  for (size_t i = 0; i < 4; i++)
    ExpectClose(clients[i].shadow().Attend(0, q, 1, clients[i].length() - 1), out[i], lse[i],
                "item " + std::to_string(i));

  Client other(*cache_, MixedModel(), WithPair("f16"), random_);
  items[2].sequence = other.id();
  EXPECT_TRUE(IsError(cache_->Attend(call), absl::StatusCode::kInvalidArgument, "a call serves one model"));
  items[2].sequence = 99;
  EXPECT_TRUE(
      IsError(cache_->Attend(call), absl::StatusCode::kNotFound, "item 2: sequence 99 does not exist"));
}

TEST_F(AttendTest, BadCallsAreRefusedWithTheItem) {
  options_.max_batch_items = 3;
  options_.max_queries_per_item = 5;
  Start();
  Client client(*cache_, MixedModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(300).ok());
  std::vector<float> q(6 * 4 * 64, 0.1f), out(6 * 4 * 64);
  AttendRequest item;
  item.sequence = client.id();
  item.q = {q.data(), DataType::kF32};
  item.queries = 1;
  item.first_query_position = 299;
  item.out = out.data();
  const auto attend = [&](auto change_item, auto change_call) {
    AttendRequest changed = item;
    change_item(changed);
    AttendCall call;
    call.items = {&changed, 1};
    change_call(call);
    return cache_->Attend(call);
  };
  const auto same_item = [](AttendRequest&) {};
  const auto same_call = [](AttendCall&) {};
  ASSERT_TRUE(attend(same_item, same_call).ok());
  const auto bad = absl::StatusCode::kInvalidArgument;
  EXPECT_TRUE(
      IsError(attend([](AttendRequest& i) { i.queries = 6; }, same_call), bad, "6 queries: must be 1 to 5"));
  EXPECT_TRUE(IsError(attend([](AttendRequest& i) { i.q_elements = 3; }, same_call), bad,
                      "q of layer 0 has 3 values"));
  EXPECT_TRUE(IsError(attend([](AttendRequest& i) { i.first_query_position = -1; }, same_call), bad,
                      "-1 is negative"));
  EXPECT_TRUE(
      IsError(attend([](AttendRequest& i) { i.first_query_position = std::numeric_limits<int64_t>::max(); },
                     same_call),
              bad, "is beyond 2^48"));
  EXPECT_TRUE(IsError(attend([](AttendRequest& i) { i.out = nullptr; }, same_call), bad, "missing"));
  EXPECT_TRUE(IsError(attend(same_item, [](AttendCall& c) { c.layer = 3; }), bad, "layers 0 to 2"));
  EXPECT_TRUE(IsError(attend(same_item, [](AttendCall& c) { c.scale = 0.0f; }), bad, "scale 0"));
  EXPECT_TRUE(IsError(attend(same_item, [](AttendCall& c) { c.softcap = -1.0f; }), bad, "softcap -1"));
  EXPECT_TRUE(IsError(attend(same_item, [](AttendCall& c) { c.window = 101; }), bad, "may only narrow it"));
  EXPECT_TRUE(IsError(attend(same_item, [](AttendCall& c) { c.items = {}; }), bad, "without items"));
  q[70] = INFINITY;
  EXPECT_TRUE(
      IsError(attend(same_item, same_call), bad, "q has an infinity at layer 0, token 299, head 1, index 6"));
  q[70] = 0;
  EXPECT_TRUE(
      IsError(attend([](AttendRequest& i) { i.first_query_position = 150; }, same_call),
              absl::StatusCode::kOutOfRange,
              "sees tokens from 51 on, but those before 192 have left the sliding window of layer 0"));
  const std::vector<AttendRequest> many(4, item);
  AttendCall call;
  call.items = many;
  EXPECT_TRUE(IsError(cache_->Attend(call), bad, "the limit is 3"));
}

}  // namespace
}  // namespace kvtide::testing
