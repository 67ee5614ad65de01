// Append and AppendAttend: what is stored is what was given, sealing follows the exact window, every error
// leaves the sequence as it was. Every attention is compared with the shadow.
#include <cmath>
#include <limits>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using AppendTest = CacheTest;

TEST_F(AppendTest, AttendsOverWhatWasAppendedAtEveryLengthAroundABlock) {
  Start();
  for (const int64_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 400}) {
    Client client(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(client.Append(tokens).ok());
    client.CheckAllLayers();
    EXPECT_EQ(cache_->GetSequence(client.id())->tokens, tokens);
    ASSERT_TRUE(client.Close().ok());
  }
}

TEST_F(AppendTest, OneByOneEqualsBulk) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("q8_0/turbo4", {0, 1}), random_);
  for (int i = 0; i < 70; i++) ASSERT_TRUE(client.Step(1).ok());
  ASSERT_TRUE(client.Append(200).ok());
  for (int i = 0; i < 5; i++) ASSERT_TRUE(client.Step(7).ok());
  client.CheckAllLayers();
  EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
}

TEST_F(AppendTest, SealsWhatLeftTheExactWindowAndNothingElse) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo3", {1, 2}), random_);
  for (int64_t step = 0; step < 12; step++) {
    ASSERT_TRUE(client.Step(64).ok());
    EXPECT_EQ(cache_->Stats().sealed_blocks, static_cast<uint64_t>(std::max<int64_t>(0, step + 1 - 3)));
    EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
  }
  client.CheckAllLayers();
}

TEST_F(AppendTest, AttendsOverTypesThatWantAProfile) {
  Start();
  for (const char* pair :
       {"planar3/turbo4", "q4_0", "iso4/turbo2", "turbo4/f16", "f16/turbo3", "bf16/bf16"}) {
    Client client(*cache_, SmallModel(), WithPair(pair, {1, 0}), random_);
    ASSERT_TRUE(client.Append(64).ok());
    ASSERT_TRUE(client.Step(200).ok()) << pair;
    client.CheckAllLayers();
    EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest()) << pair;
    ASSERT_TRUE(client.Close().ok());
  }
}

TEST_F(AppendTest, LayerGroupsOfOtherShapesAndWindowsKeepTheirOwnBlocks) {
  Start();
  for (const char* pair : {"f16", "turbo4", "q8_0/turbo3"}) {
    Client client(*cache_, MixedModel(), WithPair(pair, {1, 1}), random_);
    for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Step(50).ok());
    client.CheckAllLayers();
    EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest()) << pair;
    EXPECT_GT(cache_->Stats().window_freed_blocks, 0u);
    ASSERT_TRUE(client.Close().ok());
  }
}

TEST_F(AppendTest, EachLayerGroupMayHaveItsOwnPair) {
  Start();
  SequenceOptions options = WithPair("f16", {0, 1});
  options.group_pairs = {Pair("turbo4"), Pair("q8_0")};
  Client client(*cache_, MixedModel(), options, random_);
  ASSERT_TRUE(client.Step(300).ok());
  client.CheckAllLayers();
  EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
  options.group_pairs.pop_back();
  EXPECT_TRUE(IsError(cache_->CreateSequence(1, options).status(), absl::StatusCode::kInvalidArgument,
                      "2 layer groups"));
}

TEST_F(AppendTest, TakesF16AndBf16AndRejectsWhatF16CannotHold) {
  Start();
  const ModelSpec model = SmallModel();
  const SequenceId id = *cache_->CreateSequence(Register(model), WithPair("f16"));
  const size_t row = 2 * 64;
  std::vector<uint16_t> half(3 * row, F32ToF16(0.5f));
  std::vector<float> single(3 * row, 0.25f);
  const auto append = [&](TensorView k, TensorView v, int64_t start) {
    const LayerKv kv{1, k, v, 3 * row, 3 * row};
    AppendCall call;
    call.sequence = id;
    call.start_position = start;
    call.tokens = 3;
    call.layers = {&kv, 1};
    return cache_->Append(call);
  };
  const TensorView good{single.data(), DataType::kF32};
  ASSERT_TRUE(append({half.data(), DataType::kF16}, good, 0).ok());
  std::vector<uint16_t> brain(3 * row, F32ToBf16(-2.0f));
  ASSERT_TRUE(append({brain.data(), DataType::kBf16}, good, 3).ok());

  std::vector<float> bad = single;
  bad[2 * row + 64 + 5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(IsError(append({bad.data(), DataType::kF32}, good, 6), absl::StatusCode::kInvalidArgument,
                      "K has NaN at layer 1, token 8, head 1, index 5"));
  bad = single;
  bad[row] = -std::numeric_limits<float>::infinity();
  EXPECT_TRUE(IsError(append(good, {bad.data(), DataType::kF32}, 6), absl::StatusCode::kInvalidArgument,
                      "V has an infinity at layer 1, token 7, head 0, index 0"));
  bad[row] = 65505.0f;
  EXPECT_TRUE(IsError(append(good, {bad.data(), DataType::kF32}, 6), absl::StatusCode::kInvalidArgument,
                      "65505 at layer 1"));
  bad[row] = 65504.0f;
  EXPECT_TRUE(append(good, {bad.data(), DataType::kF32}, 6).ok());
  half[0] = 0x7c00;
  EXPECT_TRUE(IsError(append({half.data(), DataType::kF16}, good, 9), absl::StatusCode::kInvalidArgument,
                      "K has an infinity"));
  brain[1] = 0x4780;  // 65536
  EXPECT_TRUE(IsError(append({brain.data(), DataType::kBf16}, good, 9), absl::StatusCode::kInvalidArgument,
                      "K has 65536"));
  EXPECT_EQ(*cache_->LayerLength(id, 1), 9);
  EXPECT_EQ(*cache_->LayerLength(id, 0), 0);
  EXPECT_EQ(cache_->GetSequence(id)->tokens, 0);
}

TEST_F(AppendTest, ShapesAndLimitsAreNamed) {
  options_.max_tokens_per_append = 100;
  options_.max_tokens_per_sequence = 120;
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  EXPECT_TRUE(IsError(client.Append(101), absl::StatusCode::kInvalidArgument, "must be 1 to 100"));
  EXPECT_TRUE(IsError(client.Append(0), absl::StatusCode::kInvalidArgument, "must be 1 to 100"));
  ASSERT_TRUE(client.Append(100).ok());
  EXPECT_TRUE(IsError(client.Append(21), absl::StatusCode::kResourceExhausted, "limit of 120"));
  std::vector<float> rows(128);
  LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 127, 128};
  AppendCall call;
  call.sequence = client.id();
  call.start_position = 100;
  call.tokens = 1;
  call.layers = {&kv, 1};
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kInvalidArgument,
                      "K of layer 0 has 127 values, needs [1][2][64] = 128"));
  kv.k_elements = 128;
  kv.layer = 2;
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kInvalidArgument, "layers 0 to 1"));
  kv.layer = 0;
  kv.v.data = nullptr;
  EXPECT_TRUE(
      IsError(cache_->Append(call), absl::StatusCode::kInvalidArgument, "K or V of layer 0 is missing"));
  kv.v = kv.k;
  const LayerKv twice[2] = {{0, kv.k, kv.v, 128, 128}, {0, kv.k, kv.v, 128, 128}};
  call.layers = twice;
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kInvalidArgument, "layer 0 is there twice"));
  EXPECT_EQ(client.info().max_layer_tokens, 100);
}

TEST_F(AppendTest, StartPositionMustBeTheLengthButARepeatedAppendSucceeds) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(10).ok());
  std::vector<float> rows(64 * 128, 9.0f);
  const auto append = [&](int64_t start, int64_t tokens) {
    const LayerKv kv[2] = {{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0},
                           {1, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0}};
    AppendCall call;
    call.sequence = client.id();
    call.start_position = start;
    call.tokens = tokens;
    call.layers = kv;
    return cache_->Append(call);
  };
  ASSERT_TRUE(append(10, 5).ok());
  for (int layer : {0, 1})
    client.shadow().Append(layer, std::vector<float>(5 * 128, 9.0f), std::vector<float>(5 * 128, 9.0f), 5);
  EXPECT_TRUE(append(10, 5).ok());  // the answer was lost: nothing is written
  EXPECT_TRUE(IsError(append(10, 4), absl::StatusCode::kOutOfRange,
                      "start position 10 is not the layer's length 15"));
  EXPECT_TRUE(IsError(append(0, 10), absl::StatusCode::kOutOfRange, "length 15"));
  EXPECT_TRUE(IsError(append(16, 1), absl::StatusCode::kOutOfRange, "length 15"));
  EXPECT_TRUE(
      IsError(append(std::numeric_limits<int64_t>::max(), 64), absl::StatusCode::kOutOfRange, "length 15"));
  EXPECT_EQ(client.info().max_layer_tokens, 15);
  client.CheckAllLayers();
}

// The second of two writers at one place must learn that its tokens are not there.
TEST_F(AppendTest, OtherValuesAtTheSamePlaceAreAborted) {
  Start();
  const SequenceId id = *cache_->CreateSequence(Register(SmallModel()), WithPair("f16"));
  std::vector<float> rows(2 * 128, 0.5f), q(4 * 64, 0.1f), out(4 * 64);
  const auto append = [&] {
    const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
    AppendCall call;
    call.sequence = id;
    call.tokens = 2;
    call.layers = {&kv, 1};
    return cache_->Append(call);
  };
  const auto append_attend = [&] {
    AttendRequest item;
    item.sequence = id;
    item.q = {q.data(), DataType::kF32};
    item.queries = 1;
    item.out = out.data();
    item.new_tokens = 2;
    item.k = item.v = {rows.data(), DataType::kF32};
    AttendCall call;
    call.items = {&item, 1};
    return cache_->AppendAttend(call);
  };
  ASSERT_TRUE(append().ok());
  EXPECT_TRUE(append().ok());
  EXPECT_TRUE(append_attend().ok()) << "the same values";
  rows[200] = 0.25f;
  EXPECT_TRUE(
      IsError(append(), absl::StatusCode::kAborted, "tokens 0 to 1 are there already with other values"));
  EXPECT_TRUE(IsError(append_attend(), absl::StatusCode::kAborted, "other values"));
  EXPECT_EQ(*cache_->LayerLength(id, 0), 2);
}

TEST_F(AppendTest, ANegativePositionIsNoRepeat) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  std::vector<float> rows(64 * 128, 1.0f), q(4 * 64, 0.1f), out(4 * 64);
  const auto append = [&](int64_t start, int64_t tokens) {
    const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
    AppendCall call;
    call.sequence = client.id();
    call.start_position = start;
    call.tokens = tokens;
    call.layers = {&kv, 1};
    return cache_->Append(call);
  };
  EXPECT_TRUE(IsError(append(-1, 1), absl::StatusCode::kInvalidArgument, "start position -1 is negative"));
  ASSERT_TRUE(client.Append(20).ok());
  ASSERT_TRUE(client.Truncate(9).ok());
  EXPECT_TRUE(IsError(append(-1, 10), absl::StatusCode::kInvalidArgument, "negative"));
  AttendRequest item;
  item.sequence = client.id();
  item.q = {q.data(), DataType::kF32};
  item.queries = 1;
  item.out = out.data();
  item.new_tokens = 10;
  item.start_position = -1;
  item.k = item.v = {rows.data(), DataType::kF32};
  AttendCall call;
  call.items = {&item, 1};
  EXPECT_TRUE(IsError(cache_->AppendAttend(call), absl::StatusCode::kInvalidArgument, "negative"));
  EXPECT_TRUE(
      IsError(cache_->TruncateSequence(client.id(), -1), absl::StatusCode::kInvalidArgument, "negative"));
  EXPECT_EQ(client.info().max_layer_tokens, 9);
  client.CheckAllLayers();
}

TEST_F(AppendTest, WhenNothingFitsTheNumbersAreNamedAndNothingChanges) {
  Start(3 * 65536, 65536);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(130).ok());
  const uint64_t used = UsedBytes(cache_->Stats());
  EXPECT_TRUE(IsError(client.Append(200), absl::StatusCode::kResourceExhausted,
                      "no room for 65536 bytes: tier 'device' has"));
  cache_->CheckInvariants();
  EXPECT_EQ(client.info().tokens, 130);
  EXPECT_EQ(client.info().max_layer_tokens, 130);
  EXPECT_EQ(UsedBytes(cache_->Stats()), used);
  EXPECT_EQ(cache_->Stats().exhausted, 1u);
  ASSERT_TRUE(client.Append(100).ok());  // what fits still goes
  client.CheckAllLayers();
}

TEST_F(AppendTest, AFailedWriteLeavesTheLengthAndFreesWhatItReserved) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Step(100).ok());
  const uint64_t used = UsedBytes(cache_->Stats());
  device_->Fail(FaultyBackend::kAppend);
  EXPECT_TRUE(IsError(client.Append(300), absl::StatusCode::kInternal, "writing new tokens: planted"));
  EXPECT_EQ(client.info().max_layer_tokens, 100);
  EXPECT_EQ(UsedBytes(cache_->Stats()), used);
  device_->Fail(FaultyBackend::kAttend);
  EXPECT_TRUE(IsError(client.Step(300), absl::StatusCode::kInternal, "attention in tier 'device': planted"));
  EXPECT_EQ(client.info().max_layer_tokens, 100);
  EXPECT_EQ(UsedBytes(cache_->Stats()), used);
  ASSERT_TRUE(client.Step(300).ok());
  client.CheckAllLayers();
}

// The blocks of a request are coded together.
TEST_F(AppendTest, TheSealsOfABatchAreOneRecode) {
  Start();
  std::vector<Client> clients;
  for (int i = 0; i < 5; i++) {
    clients.emplace_back(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
    ASSERT_TRUE(clients.back().Append(63).ok());
  }
  std::vector<float> rows(128, 0.5f), q(4 * 64, 0.1f), out(5 * 4 * 64);
  const int before = device_->calls(FaultyBackend::kRecode), appends = device_->calls(FaultyBackend::kAppend);
  for (int layer = 0; layer < 2; layer++) {
    std::vector<AttendRequest> items(5);
    for (size_t i = 0; i < items.size(); i++) {
      items[i].sequence = clients[i].id();
      items[i].q = {q.data(), DataType::kF32};
      items[i].queries = 1;
      items[i].out = out.data() + i * 4 * 64;
      items[i].new_tokens = 1;
      items[i].k = items[i].v = {rows.data(), DataType::kF32};
      items[i].start_position = items[i].first_query_position = 63;
    }
    AttendCall call;
    call.layer = layer;
    call.items = items;
    ASSERT_TRUE(cache_->AppendAttend(call).ok());
    for (Client& client : clients) client.shadow().Append(layer, rows, rows, 1);
  }
  EXPECT_EQ(device_->calls(FaultyBackend::kAppend) - appends, 2) << "one write for each layer";
  EXPECT_EQ(device_->calls(FaultyBackend::kRecode) - before, 1);
  EXPECT_EQ(cache_->Stats().sealed_blocks, 5u);
  for (Client& client : clients) {
    client.shadow().Settle();
    client.CheckAllLayers();
  }
}

TEST_F(AppendTest, AFailedSealKeepsTheBlocksExactAndTheNextAppendTriesAgain) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  device_->Fail(FaultyBackend::kRecode, 1);
  ASSERT_TRUE(client.Append(128).ok());
  EXPECT_EQ(cache_->Stats().sealed_blocks, 0u);
  EXPECT_EQ(cache_->Stats().failed_seals, 2u);
  EXPECT_GT(TotalBytes(client.info()), client.shadow().BytesAtRest());
  ASSERT_TRUE(client.Append(1).ok());
  EXPECT_EQ(cache_->Stats().sealed_blocks, 2u);
  EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
  client.CheckAllLayers();
}

TEST_F(AppendTest, ASealWithoutRoomWaitsForTheNextAppendAndIsCounted) {
  Start(3 * 65536, 0);
  std::vector<Client> others;
  for (int i = 0; i < 2; i++) {
    others.emplace_back(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(others.back().Append(64).ok());
  }
  Client client(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  ASSERT_TRUE(client.Append(64).ok());
  EXPECT_EQ(cache_->Stats().sealed_blocks, 0u);
  EXPECT_EQ(cache_->Stats().deferred_seals, 1u);
  EXPECT_EQ(cache_->Stats().failed_seals, 0u);
  ASSERT_EQ(client.info().deferred.size(), 1u);
  EXPECT_EQ(client.info().deferred[0].first, 0);
  EXPECT_EQ(client.info().deferred[0].end, 1);
  EXPECT_EQ(TotalBytes(client.info()), 65536u);
  for (Client& other : others) {
    EXPECT_TRUE(other.info().deferred.empty());
    ASSERT_TRUE(other.Close().ok());
  }
  ASSERT_TRUE(client.Append(1).ok());
  EXPECT_EQ(cache_->Stats().sealed_blocks, 1u);
  EXPECT_EQ(cache_->Stats().deferred_seals, 1u);
  EXPECT_TRUE(client.info().deferred.empty());
  EXPECT_EQ(TotalBytes(client.info()), client.shadow().BytesAtRest());
  client.CheckAllLayers();
}

// A call that is given up while it writes or codes ends after the round at hand.
TEST_F(AppendTest, ACancelledAppendStopsBetweenRounds) {
  Start(64 * kMiB);
  Client client(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  const NewRows rows(client.model(), 0, 64 * 600, random_);
  const LayerKv layer = rows.Kv();
  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  AppendCall call;
  call.sequence = client.id();
  call.tokens = rows.tokens;
  call.layers = {&layer, 1};
  call.context = &context;
  device_->SetHook([&](FaultyBackend::Call kind) {
    if (kind == FaultyBackend::kAppend) cancellation.Cancel();
  });
  const int before = device_->calls(FaultyBackend::kAppend);
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kCancelled, "nothing was written"));
  EXPECT_EQ(device_->calls(FaultyBackend::kAppend) - before, 1) << "of three rounds";
  device_->SetHook(nullptr);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
  EXPECT_EQ(*cache_->LayerLength(client.id(), 0), 0);
}

TEST_F(AppendTest, ACancelledAppendLeavesSealsToTheNextOne) {
  Start(32 * kMiB);
  Client client(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  const NewRows rows[2] = {{client.model(), 0, 64 * 50, random_}, {client.model(), 1, 64 * 50, random_}};
  const LayerKv layers[2] = {rows[0].Kv(), rows[1].Kv()};
  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  AppendCall call;
  call.sequence = client.id();
  call.tokens = rows[0].tokens;
  call.layers = layers;
  call.context = &context;
  device_->SetHook([&](FaultyBackend::Call kind) {
    if (kind == FaultyBackend::kRecode) cancellation.Cancel();
  });
  ASSERT_TRUE(cache_->Append(call).ok()) << "the tokens are there";
  device_->SetHook(nullptr);
  const uint64_t sealed = cache_->Stats().sealed_blocks;
  EXPECT_GT(sealed, 0u);
  EXPECT_LT(sealed, 50u);
  for (const NewRows& row : rows) client.shadow().Append(row.layer, row.k, row.v, row.tokens);
  client.shadow().Settle();
  ASSERT_TRUE(client.Append(1).ok());
  EXPECT_EQ(cache_->Stats().sealed_blocks, 50u);
  client.CheckAllLayers();
}

TEST_F(AppendTest, CancelledCallsChangeNothing) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  Cancellation cancellation;
  cancellation.Cancel();
  CallContext context;
  context.cancellation = &cancellation;
  std::vector<float> rows(128);
  const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
  AppendCall call;
  call.sequence = client.id();
  call.tokens = 1;
  call.layers = {&kv, 1};
  call.context = &context;
  EXPECT_EQ(cache_->Append(call).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(AppendTest, ABatchIsAllOrNothing) {
  Start();
  Client a(*cache_, SmallModel(), WithPair("f16"), random_),
      b(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(a.Append(10).ok());
  ASSERT_TRUE(b.Append(20).ok());
  std::vector<float> rows(128, 0.5f), q(4 * 64, 0.1f), out(2 * 4 * 64);
  AttendRequest items[2];
  const SequenceId ids[2] = {a.id(), b.id()};
  for (int i = 0; i < 2; i++) {
    items[i].sequence = ids[i];
    items[i].q = {q.data(), DataType::kF32};
    items[i].queries = 1;
    items[i].out = out.data() + i * 4 * 64;
    items[i].new_tokens = 1;
    items[i].k = items[i].v = {rows.data(), DataType::kF32};
    items[i].start_position = items[i].first_query_position = i == 0 ? 10 : 21;  // b's is wrong
  }
  AttendCall call;
  call.items = items;
  EXPECT_TRUE(IsError(cache_->AppendAttend(call), absl::StatusCode::kOutOfRange,
                      "start position 21 is not the layer's length 20"));
  EXPECT_EQ(*cache_->LayerLength(a.id(), 0), 10);
  items[1].start_position = 20;
  items[1].sequence = a.id();
  EXPECT_TRUE(IsError(cache_->AppendAttend(call), absl::StatusCode::kInvalidArgument, "appended to twice"));
  items[1].sequence = b.id();
  EXPECT_TRUE(cache_->AppendAttend(call).ok());
  EXPECT_EQ(*cache_->LayerLength(a.id(), 0), 11);
  EXPECT_EQ(*cache_->LayerLength(b.id(), 0), 21);
  EXPECT_TRUE(cache_->AppendAttend(call).ok()) << "a repeated call attends again and writes nothing";
  EXPECT_EQ(*cache_->LayerLength(b.id(), 0), 21);
}

}  // namespace
}  // namespace kvtide::testing
