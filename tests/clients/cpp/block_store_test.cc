// The block store by every way to a pool: what was stored comes back, whatever its form; what is wrong is
// said in the same words; leases end with the client that took them.
#include "clients/cpp/block_store.h"

#include <cmath>
#include <cstring>
#include <iostream>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using client::BlockForm;
using client::BlockStore;
using client::NamespaceSpec;

constexpr int kLayers = 3, kTokens = 16, kHeads = 2, kDim = 64;
constexpr size_t kBlockValues = size_t{kLayers} * 2 * kTokens * kHeads * kDim;

std::vector<std::string> Keys(int first, int count) {
  std::vector<std::string> keys;
  for (int i = 0; i < count; i++) keys.push_back(absl::StrCat("key ", first + i));
  return keys;
}
std::vector<std::string_view> Views(const std::vector<std::string>& keys) {
  return {keys.begin(), keys.end()};
}

NamespaceSpec Tensors(const std::string& pair, const std::string& salt = "") {
  NamespaceSpec spec;
  spec.model = "block store test";
  spec.block_tokens = kTokens;
  spec.content = client::TensorBlocks{kLayers, kHeads, kDim, kDim, pair};
  spec.salt = salt;
  return spec;
}

std::vector<uint16_t> Rows(int blocks, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> rows(kBlockValues * static_cast<size_t>(blocks));
  for (uint16_t& row : rows) row = F32ToF16(static_cast<float>(random() % 2000) / 1000 - 1);
  return rows;
}

class BlockStoreTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    pool_ = ways_.Open(GetParam());
    ASSERT_NE(pool_, nullptr);
  }
  std::unique_ptr<BlockStore> Open(const NamespaceSpec& spec) {
    auto store = BlockStore::Open(*pool_, spec);
    EXPECT_TRUE(store.ok()) << store.status();
    return store.ok() ? *std::move(store) : nullptr;
  }
  Ways ways_;
  std::unique_ptr<Pool> pool_;
};

TEST_P(BlockStoreTest, TensorsBytesAndStridesComeBack) {
  const auto store = Open(Tensors("", GetParam()));
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(store->pair(), "f16/f16");
  const std::vector<std::string> keys = Keys(0, 5);
  const std::vector<uint16_t> rows = Rows(5, 1);
  const auto stored = store->Store(Views(keys), std::as_bytes(std::span(rows)));
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ(stored->stored, 5);
  EXPECT_EQ(store->Store(Views(keys), std::as_bytes(std::span(rows)))->present, 5);
  std::vector<std::string> more = keys;
  more.push_back("not there");
  const auto found = store->Lookup(Views(more));
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->hits, 5);
  ASSERT_EQ(found->tiers.size(), 1u);
  EXPECT_EQ(found->tiers[0], (std::pair<std::string, int64_t>("host", 5)));
  EXPECT_EQ(found->lease_seconds, 30);
  std::vector<uint16_t> loaded(3 * kBlockValues);
  ASSERT_TRUE(store->Load(found->lease, 1, 3, std::as_writable_bytes(std::span(loaded))).ok());
  EXPECT_EQ(std::memcmp(loaded.data(), rows.data() + kBlockValues, loaded.size() * 2), 0);
  // [layers][2][blocks][heads][tokens][dim]
  client::PageLayout layout;
  layout.heads_first = true;
  layout.block_stride = kHeads * kTokens * kDim;
  layout.value_offset = 5 * layout.block_stride;
  layout.layer_stride = 2 * layout.value_offset;
  std::vector<uint16_t> planes(5 * kBlockValues);
  ASSERT_TRUE(
      store->Load(found->lease, 0, 5, std::as_writable_bytes(std::span(planes)), BlockForm::kTensors, layout)
          .ok());
  for (int block = 0; block < 5; block++)
    for (int layer = 0; layer < kLayers; layer++)
      for (int side = 0; side < 2; side++)
        for (int head = 0; head < kHeads; head++)
          for (int token = 0; token < kTokens; token++) {
            const size_t at =
                static_cast<size_t>((((layer * 2 + side) * 5 + block) * kHeads + head) * kTokens + token) *
                kDim;
            const size_t from =
                static_cast<size_t>((((block * kLayers + layer) * 2 + side) * kTokens + token) * kHeads +
                                    head) *
                kDim;
            ASSERT_EQ(std::memcmp(planes.data() + at, rows.data() + from, kDim * 2), 0);
          }
  std::vector<std::byte> bytes(static_cast<size_t>(store->block_bytes()));
  ASSERT_TRUE(store->Load(found->lease, 4, 1, bytes, BlockForm::kBytes).ok());
  EXPECT_TRUE(*store->Release(found->lease));
  EXPECT_FALSE(*store->Release(found->lease));
  const std::vector<std::string> copy = {"copy"};
  ASSERT_TRUE(store->Store(Views(copy), bytes, BlockForm::kBytes).ok());
  EXPECT_EQ(store->Lookup(Views(copy), -1)->lease, 0u);
  EXPECT_EQ(store->Lookup(Views(copy), 0, true)->hits, 1);
  EXPECT_EQ(*store->Delete(), 6);
  EXPECT_EQ(store->Lookup(Views(copy)).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(pool_->GetStats()->stored_bytes, 0);
}

TEST_P(BlockStoreTest, OpaqueBlocksOfAnySizeComeBack) {
  for (const int64_t bytes : {1, 100, 4096, 300'001}) {
    NamespaceSpec spec = Tensors("");
    spec.content = client::OpaqueBlocks{bytes, "test"};
    const auto store = Open(spec);
    ASSERT_NE(store, nullptr);
    EXPECT_EQ(store->pair(), "");
    std::vector<std::byte> payload(static_cast<size_t>(7 * bytes));
    std::mt19937 random(static_cast<uint32_t>(bytes));
    for (std::byte& byte : payload) byte = static_cast<std::byte>(random());
    const std::vector<std::string> keys = Keys(0, 7);
    ASSERT_TRUE(store->Store(Views(keys), payload).ok());
    const auto found = store->Lookup(Views(keys));
    ASSERT_EQ(found->hits, 7);
    std::vector<std::byte> loaded(payload.size());
    std::vector<int64_t> lost = {1};
    ASSERT_TRUE(store->Load(found->lease, 0, 7, loaded, BlockForm::kDefault, {}, &lost).ok());
    EXPECT_EQ(loaded, payload);
    EXPECT_TRUE(lost.empty());
    EXPECT_EQ(*store->Delete(), 7);
  }
}

TEST_P(BlockStoreTest, SaysWhatIsWrong) {
  const auto store = Open(Tensors("q8_0/turbo4"));
  ASSERT_NE(store, nullptr);
  const auto expect = [](const absl::Status& status, absl::StatusCode code, const std::string& part) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
  };
  const std::vector<uint16_t> rows = Rows(1, 1);
  const std::vector<std::string> two = Keys(0, 2), one = Keys(0, 1);
  expect(store->Store(Views(two), std::as_bytes(std::span(rows))).status(),
         absl::StatusCode::kInvalidArgument, "the payload of 2 blocks has");
  std::vector<std::byte> out(100);
  expect(store->Load(77, 0, 1, out), absl::StatusCode::kNotFound, "lease 77");
  ASSERT_TRUE(store->Store(Views(one), std::as_bytes(std::span(rows))).ok());
  const auto found = store->Lookup(Views(one));
  expect(store->Load(found->lease, 0, 2, out), absl::StatusCode::kOutOfRange, "1 blocks");
  expect(store->Load(found->lease, 0, 1, out), absl::StatusCode::kInvalidArgument,
         "the payload of 1 blocks has 100 bytes");
  expect(store->Lookup(Views(one), 601).status(), absl::StatusCode::kInvalidArgument, "at most 600");
  expect(store->Persist().status(), absl::StatusCode::kFailedPrecondition, "--disk");
  NamespaceSpec bad = Tensors("nonsense");
  expect(BlockStore::Open(*pool_, bad).status(), absl::StatusCode::kInvalidArgument, "nonsense");
  EXPECT_EQ(*store->Delete(), 1);
  expect(store->Load(found->lease, 0, 1, out), absl::StatusCode::kNotFound, "over");
}

// vLLM #35931 and its like, for clients that die.
TEST_P(BlockStoreTest, ASessionThatEndsGivesItsLeasesBack) {
  if (GetParam() == "embedded" || GetParam() == "grpc") return;  // no session
  const auto store = Open(Tensors(""));
  const std::vector<uint16_t> rows = Rows(1, 1);
  const std::vector<std::string> key = Keys(0, 1);
  ASSERT_TRUE(store->Store(Views(key), std::as_bytes(std::span(rows))).ok());
  auto other = ways_.Open(GetParam());
  const auto theirs = BlockStore::Open(*other, Tensors(""));
  EXPECT_TRUE((*theirs)->existed());
  const auto found = (*theirs)->Lookup(Views(key), 600);
  ASSERT_NE(found->lease, 0u);
  std::vector<uint16_t> loaded(kBlockValues);
  const auto load = [&] {
    return store->Load(found->lease, 0, 1, std::as_writable_bytes(std::span(loaded)));
  };
  EXPECT_TRUE(load().ok());
  other.reset();
  for (int i = 0; i < 500 && load().ok(); i++) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_EQ(load().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(*store->Delete(), 1);
}

TEST_P(BlockStoreTest, MemoryOfThePoolNeedsNoCopy) {
  const auto store = Open(Tensors("turbo4"));
  auto buffer = pool_->Allocate(4 * kBlockValues * 2);
  ASSERT_TRUE(buffer.ok()) << buffer.status();
  const std::vector<uint16_t> rows = Rows(4, 9);
  std::memcpy(buffer->data(), rows.data(), rows.size() * 2);
  const std::vector<std::string> keys = Keys(0, 4);
  ASSERT_TRUE(store->Store(Views(keys), std::span(buffer->data(), buffer->bytes())).ok());
  const auto found = store->Lookup(Views(keys));
  std::memset(buffer->data(), 0, buffer->bytes());
  ASSERT_TRUE(store->Load(found->lease, 0, 4, std::span(buffer->data(), buffer->bytes())).ok());
  double difference = 0, size = 0;
  for (size_t i = 0; i < rows.size(); i++) {
    const double value = F16ToF32(rows[i]);
    difference += std::pow(value - F16ToF32(buffer->As<uint16_t>()[i]), 2);
    size += value * value;
  }
  EXPECT_LT(std::sqrt(difference / size), 0.15);
  EXPECT_EQ(*store->Delete(), 4);
}

// Root of the mean square of what rows are off by, to that of what they should be.
double ErrorOf(std::span<const uint16_t> rows, std::span<const uint16_t> expected) {
  double off = 0, whole = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    const double value = F16ToF32(expected[i]);
    off += std::pow(value - F16ToF32(rows[i]), 2);
    whole += value * value;
  }
  return std::sqrt(off / whole);
}

TEST_P(BlockStoreTest, ANamespaceSaysWhatItsBlocksMayBecome) {
  NamespaceSpec spec = Tensors("q8_0", absl::StrCat("degrade ", GetParam()));
  const auto plain = Open(spec);
  spec.degrade = {"turbo4", "turbo3/turbo2"};
  const auto store = Open(spec), again = Open(spec);
  ASSERT_TRUE(plain != nullptr && store != nullptr && again != nullptr);
  EXPECT_NE(store->namespace_id(), plain->namespace_id());
  EXPECT_EQ(store->namespace_id(), again->namespace_id());
  EXPECT_TRUE(again->existed());
  const std::vector<std::string> keys = Keys(0, 3);
  const std::vector<uint16_t> rows = Rows(3, 4);
  ASSERT_TRUE(store->Store(Views(keys), std::as_bytes(std::span(rows))).ok());
  EXPECT_EQ(plain->Lookup(Views(keys), -1)->hits, 0);
  const auto found = store->Lookup(Views(keys));
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->hits, 3);
  EXPECT_TRUE(found->degraded.empty()) << "there is room";
  std::vector<uint16_t> loaded(rows.size());
  std::vector<int64_t> lost, degraded{7};
  ASSERT_TRUE(store
                  ->Load(found->lease, 0, 3, std::as_writable_bytes(std::span(loaded)), BlockForm::kDefault,
                         {}, &lost, &degraded)
                  .ok());
  EXPECT_TRUE(lost.empty() && degraded.empty());
  EXPECT_EQ(*store->Delete(), 3);
  EXPECT_EQ(*plain->Delete(), 0);
  const auto refused = [&](const NamespaceSpec& bad, const char* text) {
    const absl::Status status = BlockStore::Open(*pool_, bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), text)) << status;
  };
  spec.degrade = {"turbo4", "turbo9"};
  refused(spec, "namespace.degrade[1]");
  spec.degrade = {"turbo3", "turbo4"};
  refused(spec, "from the most bits to the fewest");
  spec.content = client::OpaqueBlocks{1000, "fp8"};
  spec.degrade = {"turbo3"};
  refused(spec, "opaque bytes cannot be recoded to fewer bits; leave it out");
}

// A pool of one size, with a ladder and without one, filled with several times what it holds.
TEST(EmbeddedBlockStore, PagesAreRecodedToFewerBitsBeforeTheyAreDropped) {
  client::PoolOptions options;
  options.embedded_config =
      R"({"device": "cpu", "device_memory": "1MiB", "host_memory": "4MiB", "compute_threads": 1})";
  constexpr int kStored = 1000;
  int64_t plain = 0;  // blocks that are there without a ladder
  for (const auto& [pair, ladder] :
       std::vector<std::pair<std::string, std::vector<std::string>>>{{"q8_0", {}},
                                                                     {"q8_0", {"turbo4", "turbo3"}},
                                                                     {"f16", {}},
                                                                     {"f16", {"q8_0", "turbo4", "turbo3"}}}) {
    const auto pool = Pool::Connect("embedded", options);
    ASSERT_TRUE(pool.ok()) << pool.status();
    NamespaceSpec spec = Tensors(pair);
    spec.degrade = ladder;
    const auto store = BlockStore::Open(**pool, spec);
    ASSERT_TRUE(store.ok()) << store.status();
    for (int key = 0; key < kStored; key++) {
      const std::vector<std::string> name = Keys(key, 1);
      const std::vector<uint16_t> rows = Rows(1, static_cast<uint32_t>(key));
      ASSERT_TRUE((*store)->Store(Views(name), std::as_bytes(std::span(rows))).ok());
    }
    int64_t there = 0, degraded = 0;
    double error = 0;
    for (int key = 0; key < kStored; key++) {
      const auto found = (*store)->Lookup(Views(Keys(key, 1)));
      ASSERT_TRUE(found.ok()) << found.status();
      if (found->hits == 0) continue;
      std::vector<uint16_t> loaded(kBlockValues);
      ASSERT_TRUE((*store)->Load(found->lease, 0, 1, std::as_writable_bytes(std::span(loaded))).ok());
      error += ErrorOf(loaded, Rows(1, static_cast<uint32_t>(key)));
      there++;
      degraded += static_cast<int64_t>(found->degraded.size());
      ASSERT_TRUE((*store)->Release(found->lease).ok());
    }
    error /= static_cast<double>(there);
    std::cout << pair << (ladder.empty() ? "" : " with " + absl::StrJoin(ladder, ", ")) << ": "
              << there * kTokens << " of " << kStored * kTokens << " tokens are there, " << degraded << " of "
              << there << " blocks of fewer bits, rows off by " << 100 * error << " %\n";
    if (ladder.empty()) {
      plain = there;
      EXPECT_EQ(degraded, 0);
      EXPECT_LT(error, 0.01);
    } else {
      EXPECT_GT(there, plain * 3 / 2);
      EXPECT_GT(degraded, there * 3 / 4);
      EXPECT_LT(error, 0.3);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, BlockStoreTest, ::testing::ValuesIn(kWays),
                         [](const auto& way) { return way.param; });

}  // namespace
}  // namespace kvtide::testing
