// A first tier on two devices: where sequences live, that everything of theirs happens there, and that lower
// tiers are shared. Also a model in two shards, one on each device.
#include <algorithm>
#include <thread>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

constexpr size_t kBlock = 65536;  // an f16 block of SmallModel

class DevicesTest : public CacheTest {
 protected:
  void StartTwo(size_t device_bytes = 8 * kMiB, size_t host_bytes = 8 * kMiB) {
    StartOn(2, device_bytes, host_bytes);
  }
  Client On(const std::string& device, const std::string& pair = "f16", ExactWindow window = {}) {
    SequenceOptions options = WithPair(pair, window);
    options.device = device;
    return Client(*cache_, SmallModel(), options, random_);
  }
  uint64_t Used(size_t tier) const { return cache_->Stats().tiers[tier].used_bytes; }
};

TEST_F(DevicesTest, NewSequencesSpreadByRoom) {
  StartTwo();
  std::vector<Client> clients;
  for (int i = 0; i < 4; i++) clients.emplace_back(*cache_, SmallModel(), WithPair("f16"), random_);
  std::vector<std::string> homes;
  for (const Client& client : clients) homes.push_back(client.info().device);
  EXPECT_EQ(homes, (std::vector<std::string>{"first", "second", "first", "second"}))
      << "nobody has tokens yet";
  for (Client& client : clients) ASSERT_TRUE(client.Append(64).ok());
  ASSERT_TRUE(clients[0].Append(640).ok());
  EXPECT_EQ(Used(0), 12 * kBlock);
  EXPECT_EQ(Used(1), 2 * kBlock);
  EXPECT_EQ(On("").info().device, "second");
  EXPECT_EQ(On("first").info().device, "first") << "asked for";
  SequenceOptions options = WithPair("f16");
  options.device = "third";
  EXPECT_TRUE(IsError(cache_->CreateSequence(1, options).status(), absl::StatusCode::kInvalidArgument,
                      "known: first, second"));
  EXPECT_EQ(cache_->Stats().tiers[1].device, "second");
  EXPECT_EQ(cache_->Stats().tiers[1].name, "device");
}

TEST_F(DevicesTest, ASequenceAndItsForksStayOnTheirDevice) {
  StartTwo();
  Client parent = On("second", "turbo4", {1, 1});
  ASSERT_TRUE(parent.Append(64 * 6 + 10).ok());
  Client fork = parent.Fork();
  EXPECT_EQ(fork.info().device, "second");
  ASSERT_TRUE(fork.Step(70).ok());
  ASSERT_TRUE(fork.Truncate(64 * 3 + 5).ok());  // reopens a coded block
  ASSERT_TRUE(fork.Step(3).ok());
  EXPECT_EQ(Used(0), 0u);
  EXPECT_EQ(Used(2), 0u);
  for (const FaultyBackend::Call call :
       {FaultyBackend::kAppend, FaultyBackend::kRecode, FaultyBackend::kAttend}) {
    EXPECT_EQ(device_->calls(call), 0);
    EXPECT_GT(second_->calls(call), 0);
  }
  parent.CheckAllLayers();
  fork.CheckAllLayers();
}

TEST_F(DevicesTest, ABatchIsSplitByDeviceAndRunsAtOnce) {
  StartTwo();
  std::vector<Client> clients = {On("first", "turbo4", {0, 0}), On("second", "turbo4", {0, 0}), On("first"),
                                 On("second")};
  for (size_t i = 0; i < clients.size(); i++)
    ASSERT_TRUE(clients[i].Append(100 + static_cast<int64_t>(i) * 40).ok());
  ASSERT_TRUE(cache_->Evict({{clients[3].id()}}, 2).ok());  // one lies in the host tier
  std::vector<std::vector<float>> q, out, lse;
  std::vector<AttendRequest> items;
  for (Client& client : clients) {
    q.push_back(RandomRows(random_, 4 * 64));
    out.emplace_back(4 * 64);
    lse.emplace_back(4);
    AttendRequest& item = items.emplace_back();
    item.sequence = client.id();
    item.queries = 1;
    item.first_query_position = client.length() - 1;
  }
  for (size_t i = 0; i < items.size(); i++) {
    items[i].q = {q[i].data(), DataType::kF32};
    items[i].out = out[i].data();
    items[i].lse = lse[i].data();
  }
  AttendCall call;
  call.layer = 1;
  call.items = items;
  device_->Close(FaultyBackend::kAttend);
  second_->Close(FaultyBackend::kAttend);
  absl::Status status;
  std::thread attend([&] { status = cache_->Attend(call); });
  device_->WaitForEntry(FaultyBackend::kAttend);
  second_->WaitForEntry(FaultyBackend::kAttend);  // both are inside: nobody waits for the other
  device_->Open(FaultyBackend::kAttend);
  second_->Open(FaultyBackend::kAttend);
  attend.join();
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < items.size(); i++)
    ExpectClose(clients[i].shadow().Attend(1, q[i], 1, clients[i].length() - 1), out[i], lse[i],
                "item " + std::to_string(i));
  second_->Fail(FaultyBackend::kAttend);
  EXPECT_TRUE(IsError(cache_->Attend(call), absl::StatusCode::kInternal, "tier 'device' on second"));
  call.items = std::span<const AttendRequest>(items).first(1);
  second_->Fail(FaultyBackend::kAttend);
  EXPECT_TRUE(cache_->Attend(call).ok()) << "the other device is not asked";
  second_->Fail(FaultyBackend::kAttend, 0);
}

TEST_F(DevicesTest, PressureOnOneDeviceLeavesTheOtherAlone) {
  StartTwo(10 * kBlock, 40 * kBlock);
  Client calm = On("first"), cold = On("second"), hot = On("second");
  ASSERT_TRUE(calm.Append(256).ok());
  ASSERT_TRUE(cold.Append(256).ok());
  ASSERT_TRUE(hot.Append(9 * 64).ok());
  EXPECT_EQ(calm.info().blocks_by_tier, (std::vector<uint64_t>{4, 0, 0}));
  EXPECT_EQ(cold.info().blocks_by_tier, (std::vector<uint64_t>{0, 1, 3}));
  EXPECT_EQ(hot.info().blocks_by_tier, (std::vector<uint64_t>{0, 9, 0}));
  for (Client* client : {&calm, &cold, &hot}) client->CheckAllLayers();
  ASSERT_TRUE(hot.Close().ok());
  EXPECT_GT(cache_->RunMovesOnce().moved_blocks, 0u) << "what attention saw in the host tier comes back";
  EXPECT_EQ(cold.info().blocks_by_tier, (std::vector<uint64_t>{0, 4, 0}));
  cold.CheckAllLayers();
}

TEST_F(DevicesTest, EvictedSequencesShareTheHostTierAndComeHome) {
  StartTwo();
  Client a = On("first", "turbo4", {1, 1}), b = On("second", "turbo4", {1, 1});
  ASSERT_TRUE(a.Append(500).ok());
  ASSERT_TRUE(b.Append(300).ok());
  EXPECT_EQ(cache_->EvictAll(1)->moved_blocks, 0u) << "no device is below another";
  EXPECT_EQ(cache_->EvictAll(2)->moved_blocks, 13u);
  EXPECT_EQ(Used(0) + Used(1), 0u);
  a.CheckAllLayers();
  b.CheckAllLayers();
  EXPECT_EQ(cache_->Prefetch({{a.id(), b.id()}})->moved_blocks, 13u);
  EXPECT_EQ(a.info().blocks_by_tier, (std::vector<uint64_t>{8, 0, 0}));
  EXPECT_EQ(b.info().blocks_by_tier, (std::vector<uint64_t>{0, 5, 0}));
  EXPECT_EQ(cache_->Stats().tiers[0].promoted_blocks, 8u);
  EXPECT_EQ(cache_->Stats().tiers[1].demoted_blocks, 5u);
  a.CheckAllLayers();
  b.CheckAllLayers();
}

TEST_F(DevicesTest, WithoutALowerTierAFullDeviceSaysWhatTheOtherHas) {
  StartTwo(4 * kBlock, 0);
  Client client = On("second");
  EXPECT_TRUE(IsError(client.Append(5 * 64), absl::StatusCode::kResourceExhausted,
                      "tier 'device' on first has 262144 of 262144"));
  ASSERT_TRUE(client.Append(4 * 64).ok());
  client.CheckAllLayers();
}

// Heads do not see each other: a shard of a model is a model with some of its heads, and its outputs are
// those heads'.
TEST_F(DevicesTest, AModelInTwoShardsGivesTheHeadsOfTheWhole) {
  StartTwo();
  const ModelSpec whole = SmallModel(), shard[2] = {UniformModel("small/0", {2, 1, 64, 64}, 2),
                                                    UniformModel("small/1", {2, 1, 64, 64}, 2)};
  const int64_t tokens = 150;
  const std::vector<float> k = RandomRows(random_, tokens * 2 * 64), v = RandomRows(random_, tokens * 2 * 64),
                           q = RandomRows(random_, 4 * 64);
  // Heads [from, from + count) of rows of `heads` heads.
  const auto part = [](const std::vector<float>& rows, size_t heads, size_t from, size_t count) {
    std::vector<float> out;
    for (size_t row = 0; row < rows.size() / (heads * 64); row++) {
      const auto begin = rows.begin() + static_cast<std::ptrdiff_t>((row * heads + from) * 64);
      out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(count * 64));
    }
    return out;
  };
  const auto run = [&](const ModelSpec& model, const std::string& device, const std::vector<float>& keys,
                       const std::vector<float>& values, const std::vector<float>& queries) {
    SequenceOptions options = WithPair("q8_0/turbo4", {0, 0});
    options.device = device;
    const SequenceId id = cache_->CreateSequence(Register(model), options).value();
    std::vector<LayerKv> layers(2);
    for (int l = 0; l < 2; l++) {
      layers[static_cast<size_t>(l)].layer = l;
      layers[static_cast<size_t>(l)].k = {keys.data(), DataType::kF32};
      layers[static_cast<size_t>(l)].v = {values.data(), DataType::kF32};
    }
    AppendCall append;
    append.sequence = id;
    append.tokens = tokens;
    append.layers = layers;
    EXPECT_TRUE(cache_->Append(append).ok());
    std::vector<float> out(queries.size());
    AttendRequest item;
    item.sequence = id;
    item.q = {queries.data(), DataType::kF32};
    item.queries = 1;
    item.first_query_position = tokens - 1;
    item.out = out.data();
    AttendCall attend;
    attend.layer = 1;
    attend.items = {&item, 1};
    EXPECT_TRUE(cache_->Attend(attend).ok());
    EXPECT_EQ(cache_->GetSequence(id)->device, device);
    return out;
  };
  const std::vector<float> expected = run(whole, "first", k, v, q);
  for (size_t s = 0; s < 2; s++) {
    const std::vector<float> out =
        run(shard[s], s == 0 ? "first" : "second", part(k, 2, s, 1), part(v, 2, s, 1), part(q, 4, 2 * s, 2));
    const std::vector<float> heads = part(expected, 4, 2 * s, 2);
    for (size_t i = 0; i < out.size(); i++) ASSERT_NEAR(out[i], heads[i], 1e-5) << "shard " << s << ", " << i;
  }
}

}  // namespace
}  // namespace kvtide::testing
