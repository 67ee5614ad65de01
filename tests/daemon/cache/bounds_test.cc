// Whatever number comes from outside, the answer is an error with a reason: no arithmetic wraps around and
// nothing is silently empty.
#include <cmath>
#include <limits>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using BoundsTest = CacheTest;
constexpr int64_t kExtremes[] = {std::numeric_limits<int64_t>::min(),
                                 std::numeric_limits<int64_t>::min() + 1,
                                 -1,
                                 (int64_t{1} << 48) - 1,
                                 int64_t{1} << 48,
                                 std::numeric_limits<int64_t>::max() - 63,
                                 std::numeric_limits<int64_t>::max()};

struct Query {
  std::vector<float> q = std::vector<float>(4 * 64, 0.5f), out = std::vector<float>(4 * 64),
                     lse = std::vector<float>(4);
  AttendRequest item;
  AttendCall call;
  explicit Query(SequenceId sequence, int64_t position) {
    item.sequence = sequence;
    item.q = {q.data(), DataType::kF32};
    item.queries = 1;
    item.first_query_position = position;
    item.out = out.data();
    item.lse = lse.data();
    call.items = {&item, 1};
  }
};

TEST_F(BoundsTest, ExtremePositionsAndSizesAreRefusedOrMeanWhatTheySay) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(100).ok());
  std::vector<float> rows(64 * 128, 1.0f);
  for (const int64_t extreme : kExtremes) {
    EXPECT_FALSE(cache_->TruncateSequence(client.id(), extreme).ok());
    LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
    AppendCall append;
    append.sequence = client.id();
    append.layers = {&kv, 1};
    append.tokens = 64;
    append.start_position = extreme;
    EXPECT_FALSE(cache_->Append(append).ok());
    rows[5] = std::nanf("");  // the error names a position
    EXPECT_FALSE(cache_->Append(append).ok());
    rows[5] = 1.0f;
    append.start_position = 100;
    append.tokens = extreme;
    EXPECT_FALSE(cache_->Append(append).ok());

    Query query(client.id(), extreme);
    absl::Status status = cache_->Attend(query.call);
    EXPECT_TRUE(status.ok() == (extreme == (int64_t{1} << 48) - 1)) << extreme << ": " << status;
    query.item.first_query_position = 99;
    query.item.queries = extreme;
    EXPECT_FALSE(cache_->Attend(query.call).ok());
    query.item.queries = 1;
    query.item.new_tokens = extreme;
    EXPECT_FALSE(cache_->AppendAttend(query.call).ok());
    query.item.new_tokens = 0;
    query.call.window = extreme;
    EXPECT_EQ(cache_->Attend(query.call).ok(), extreme > 0) << extreme;

    std::vector<float> read(2 * 128);
    const LayerRead layer{0, read.data(), {}};
    ReadCall call;
    call.sequence = client.id();
    call.layers = {&layer, 1};
    call.first_token = extreme;
    call.tokens = 2;
    EXPECT_FALSE(cache_->ReadTokens(call).ok());
    call.first_token = 1;
    call.tokens = extreme;
    EXPECT_FALSE(cache_->ReadTokens(call).ok());
    EXPECT_EQ(KvCache::Predict(SmallModel(), WithPair("turbo4"), extreme).ok(),
              extreme > 0 && extreme <= int64_t{1} << 48);
  }
  EXPECT_EQ(client.info().tokens, 100);
  client.CheckAllLayers();
}

TEST_F(BoundsTest, AWindowAsLargeAsNumbersGoIsNoWindow) {
  Start();
  ModelSpec model = SmallModel("endless");
  model.groups[0].window = std::numeric_limits<int64_t>::max();
  Client client(*cache_, model, WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(200).ok());
  Client plain(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(plain.Append(200).ok());
  Query query(plain.id(), 199), wide(plain.id(), 199);
  ASSERT_TRUE(cache_->Attend(query.call).ok());
  wide.call.window = std::numeric_limits<int64_t>::max() - 1;
  ASSERT_TRUE(cache_->Attend(wide.call).ok());
  EXPECT_EQ(query.out, wide.out);
  Query endless(client.id(), 199);
  EXPECT_TRUE(cache_->Attend(endless.call).ok());
}

// Finite queries and a finite scale whose products are beyond f32 must not look like nothing to see.
TEST_F(BoundsTest, LogitsBeyondF32AreAnErrorAndNotSilence) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  Query query(client.id(), 99);
  for (float& x : query.q) x = 1e30f;
  query.call.scale = 1e30f;
  EXPECT_TRUE(IsError(cache_->Attend(query.call), absl::StatusCode::kInternal, "f32"));
  query.item.new_tokens = 1;
  query.item.start_position = query.item.first_query_position = 100;
  std::vector<float> rows(128, 1.0f);
  query.item.k = query.item.v = {rows.data(), DataType::kF32};
  EXPECT_EQ(cache_->AppendAttend(query.call).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(*cache_->LayerLength(client.id(), 0), 100) << "all or nothing";
  // A soft-cap that large is none, or refused: never an empty answer.
  Query capped(client.id(), 99);
  capped.call.softcap = 3e38f;
  if (cache_->Attend(capped.call).ok()) {
    EXPECT_TRUE(std::isfinite(capped.lse[0]));
  }
  // Where nothing is visible the empty state is right.
  Client empty(*cache_, SmallModel(), WithPair("f16"), random_);
  Query nothing(empty.id(), 0);
  ASSERT_TRUE(cache_->Attend(nothing.call).ok());
  EXPECT_EQ(nothing.lse[0], -std::numeric_limits<float>::infinity());
}

TEST_F(BoundsTest, TheWorkOfOneAttentionHasALimit) {
  options_.max_attend_work = 2 * 4 * 100;
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(201).ok());
  Query query(client.id(), 199);
  EXPECT_TRUE(cache_->Attend(query.call).ok());
  query.item.first_query_position = 200;
  EXPECT_TRUE(IsError(cache_->Attend(query.call), absl::StatusCode::kResourceExhausted,
                      "804 products of queries, tokens and heads, the limit is 800 (max_attend_work)"));
  CallContext context;
  context.max_attend_work = 804;
  query.call.context = &context;
  EXPECT_TRUE(cache_->Attend(query.call).ok()) << "the caller's own limit";
}

TEST_F(BoundsTest, AnAttentionThatIsCancelledOnItsWayHasWrittenNothing) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call == FaultyBackend::kAttend) cancellation.Cancel();
  });
  Query query(client.id(), 100);
  std::vector<float> rows(128, 1.0f);
  query.item.new_tokens = 1;
  query.item.start_position = 100;
  query.item.k = query.item.v = {rows.data(), DataType::kF32};
  query.call.context = &context;
  EXPECT_EQ(cache_->AppendAttend(query.call).code(), absl::StatusCode::kCancelled);
  device_->SetHook(nullptr);
  EXPECT_EQ(*cache_->LayerLength(client.id(), 0), 100);
  context.cancellation = nullptr;
  context.deadline = clock_.function()();
  EXPECT_EQ(cache_->AppendAttend(query.call).code(), absl::StatusCode::kDeadlineExceeded);
  client.CheckAllLayers();
}

TEST_F(BoundsTest, AModelOfTooManyLayersIsRefusedBeforeAnyWork) {
  Start();
  ModelSpec model = SmallModel();
  model.layers.assign(100'000, {0, 0});
  EXPECT_TRUE(IsError(cache_->RegisterModel(model).status(), absl::StatusCode::kInvalidArgument,
                      "must have at most 4096"));
}

}  // namespace
}  // namespace kvtide::testing
