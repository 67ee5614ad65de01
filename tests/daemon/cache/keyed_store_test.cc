// The block store: blocks come back as they were stored, whatever their form, layout and tier; lookups count
// what can be read; leases keep blocks and end; keys of different namespaces never meet; what is deleted or
// damaged is never served.
#include "daemon/cache/reuse/keyed_store.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "daemon/cache/persist/keyed_manifest.h"
#include "kernels/base/float16.h"
#include "tests/daemon/cache/cache_fixture.h"
#include "tests/daemon/cache/keyed_rungs.h"
#include "tests/source_path.h"

namespace kvtide::testing {
namespace {

constexpr size_t kOpaqueBytes = 3000;

NamespaceSpec Tensors(int layers, int tokens, int heads, int dim_k, int dim_v, const std::string& pair) {
  NamespaceSpec spec;
  spec.model = "test";
  spec.block_tokens = tokens;
  spec.tensors = TensorContent{layers, heads, dim_k, dim_v, Pair(pair)};
  return spec;
}

NamespaceSpec Opaque(uint64_t bytes = kOpaqueBytes, const std::string& model = "test") {
  NamespaceSpec spec;
  spec.model = model;
  spec.block_tokens = 16;
  spec.opaque = OpaqueContent{bytes, "test"};
  return spec;
}

class KeyedStoreTest : public CacheTest {
 protected:
  NamespaceId Open(const NamespaceSpec& spec, Persistence persistence = Persistence::kNone) {
    const absl::StatusOr<NamespaceInfo> info = cache_->OpenNamespace(spec, persistence);
    EXPECT_TRUE(info.ok()) << info.status();
    return info.ok() ? info->id : 0;
  }
  static std::vector<std::string> Keys(int first, int count) {
    std::vector<std::string> keys;
    for (int i = first; i < first + count; i++) keys.push_back(absl::StrCat("key ", i));
    return keys;
  }
  static std::vector<std::string_view> Views(const std::vector<std::string>& keys) {
    return {keys.begin(), keys.end()};
  }
  absl::StatusOr<StoreReport> Store(NamespaceId space, const std::vector<std::string>& keys,
                                    std::span<const std::byte> payload,
                                    BlockPayload form = BlockPayload::kBytes, const PageLayout& layout = {}) {
    const std::vector<std::string_view> views = Views(keys);
    StoreCall call;
    call.name_space = space;
    call.keys = views;
    call.form = form;
    call.layout = layout;
    call.payload = payload;
    return cache_->StoreBlocks(call);
  }
  absl::StatusOr<LookupReport> Lookup(NamespaceId space, const std::vector<std::string>& keys,
                                      absl::Duration lease = absl::Seconds(30)) {
    const std::vector<std::string_view> views = Views(keys);
    LookupCall call;
    call.name_space = space;
    call.keys = views;
    call.lease = lease;
    return cache_->LookupBlocks(call);
  }
  uint64_t Hits(NamespaceId space, const std::vector<std::string>& keys) {
    const absl::StatusOr<LookupReport> report = Lookup(space, keys, absl::ZeroDuration());
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? report->hits : 0;
  }
  absl::StatusOr<LoadReport> Load(LeaseId lease, uint64_t first, uint64_t blocks,
                                  std::span<std::byte> payload, BlockPayload form = BlockPayload::kBytes,
                                  const PageLayout& layout = {}, bool allow_lost = false) {
    LoadCall call;
    call.lease = lease;
    call.first = first;
    call.blocks = blocks;
    call.form = form;
    call.layout = layout;
    call.payload = payload;
    call.allow_lost = allow_lost;
    return cache_->LoadBlocks(call);
  }
  absl::StatusOr<LoadReport> LoadInPlace(LeaseId lease, uint64_t first, uint64_t blocks, int tier = 1,
                                         bool allow_lost = false) {
    LoadCall call;
    call.lease = lease;
    call.first = first;
    call.blocks = blocks;
    call.form = BlockPayload::kBytes;
    call.in_place = tier;
    call.allow_lost = allow_lost;
    return cache_->LoadBlocks(call);
  }
  // What lies at the places of a load in place, block after block.
  std::vector<std::byte> AtPlaces(const LoadReport& report, size_t bytes, int tier = 1) {
    std::vector<std::byte> got;
    const std::byte* const slab = cache_->SlabOf(tier)->data();
    for (const int64_t offset : report.offsets) {
      if (offset >= 0) got.insert(got.end(), slab + offset, slab + offset + bytes);
    }
    return got;
  }
  // Bytes that say which key they belong to.
  static std::vector<std::byte> Stamped(int first, int count, size_t bytes = kOpaqueBytes) {
    std::vector<std::byte> payload(static_cast<size_t>(count) * bytes);
    for (int i = 0; i < count; i++) {
      std::mt19937 random(static_cast<unsigned>(first + i));
      for (size_t b = 0; b < bytes; b++)
        payload[static_cast<size_t>(i) * bytes + b] = static_cast<std::byte>(random());
    }
    return payload;
  }
  // The blocks of keys first to first + count - 1 are those that were stored.
  void ExpectStamped(NamespaceId space, int first, int count, size_t bytes = kOpaqueBytes) {
    const absl::StatusOr<LookupReport> found = Lookup(space, Keys(first, count));
    ASSERT_TRUE(found.ok()) << found.status();
    ASSERT_EQ(found->hits, static_cast<uint64_t>(count));
    std::vector<std::byte> payload(static_cast<size_t>(count) * bytes);
    const absl::StatusOr<LoadReport> report = Load(found->lease, 0, found->hits, payload);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(payload, Stamped(first, count, bytes)) << first;
    EXPECT_TRUE(cache_->ReleaseLease(found->lease));
  }
  NamespaceInfo Info(NamespaceId space) {
    for (const NamespaceInfo& info : cache_->ListNamespaces())
      if (info.id == space) return info;
    return {};
  }
  void TearDown() override {
    if (cache_ != nullptr) {
      cache_->CheckInvariants();
      for (const NamespaceInfo& info : cache_->ListNamespaces()) {
        EXPECT_EQ(info.leases, 0u) << "a test has left leases";
        EXPECT_TRUE(cache_->DeleteNamespace(info.id).ok());
      }
      EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
    }
    CacheTest::TearDown();
  }
};

std::span<const std::byte> BytesOf(const std::vector<uint16_t>& values) {
  return std::as_bytes(std::span<const uint16_t>(values));
}
std::span<std::byte> BytesOf(std::vector<uint16_t>& values) {
  return std::as_writable_bytes(std::span<uint16_t>(values));
}

struct Geometry {
  int layers, tokens, heads, dim_k, dim_v;
};

TEST_F(KeyedStoreTest, HalfPagesComeBackBitForBitInEveryLayout) {
  Start();
  const Geometry geometries[] = {
      {2, 16, 2, 64, 64}, {3, 64, 1, 128, 64}, {5, 1, 2, 16, 32}, {2, 100, 2, 64, 64}, {1, 256, 1, 64, 64}};
  constexpr int kBlocks = 3;
  for (const Geometry& g : geometries) {
    const NamespaceId space = Open(Tensors(g.layers, g.tokens, g.heads, g.dim_k, g.dim_v, "f16"));
    const int64_t page_k = int64_t{g.tokens} * g.heads * g.dim_k,
                  page_v = int64_t{g.tokens} * g.heads * g.dim_v;
    PageLayout hnd;
    hnd.order = PageOrder::kHnd;
    PageLayout planes;  // [K of all blocks and layers][V of all blocks and layers], layers outermost
    planes.block_stride = std::max(page_k, page_v);
    planes.layer_stride = kBlocks * planes.block_stride;
    planes.value_offset = g.layers * planes.layer_stride;
    PageLayout padded;  // rows with a gap between heads and between tokens
    padded.head_stride_k = g.dim_k + 8;
    padded.head_stride_v = g.dim_v + 16;
    padded.token_stride_k = g.heads * padded.head_stride_k + 8;
    int number = 0;
    for (const PageLayout& layout : {PageLayout{}, hnd, planes, padded}) {
      number++;
      const ResolvedPages pages =
          ResolvedPages::Make(layout, {g.layers, g.tokens, g.heads, g.dim_k, g.dim_v}, kBlocks).value();
      std::vector<uint16_t> stored(static_cast<size_t>(pages.elements()));
      for (uint16_t& value : stored) value = F32ToF16(static_cast<float>(random_() % 2000) / 1000 - 1);
      const std::vector<std::string> keys = Keys(1000 * number, kBlocks);
      const absl::StatusOr<StoreReport> report =
          Store(space, keys, BytesOf(stored), BlockPayload::kTensors, layout);
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_EQ(report->stored, 3u);
      const absl::StatusOr<LookupReport> found = Lookup(space, keys);
      ASSERT_TRUE(found.ok()) << found.status();
      ASSERT_EQ(found->hits, 3u);
      // Every layout reads what any of them has written.
      for (const PageLayout& other : {PageLayout{}, hnd, planes, padded}) {
        const ResolvedPages to =
            ResolvedPages::Make(other, {g.layers, g.tokens, g.heads, g.dim_k, g.dim_v}, kBlocks).value();
        std::vector<uint16_t> loaded(static_cast<size_t>(to.elements()), 0xabcd);
        const absl::StatusOr<LoadReport> load =
            Load(found->lease, 0, 3, BytesOf(loaded), BlockPayload::kTensors, other);
        ASSERT_TRUE(load.ok()) << load.status();
        size_t rows = 0;
        for (int b = 0; b < kBlocks; b++)
          for (int l = 0; l < g.layers; l++)
            for (int t = 0; t < g.tokens; t++)
              for (int h = 0; h < g.heads; h++)
                for (const bool value : {false, true}) {
                  const int dim = value ? g.dim_v : g.dim_k;
                  const auto from = static_cast<size_t>(pages.At(value ? pages.v() : pages.k(), b, l, t, h));
                  const auto at = static_cast<size_t>(to.At(value ? to.v() : to.k(), b, l, t, h));
                  ASSERT_TRUE(std::equal(loaded.begin() + static_cast<int64_t>(at),
                                         loaded.begin() + static_cast<int64_t>(at) + dim,
                                         stored.begin() + static_cast<int64_t>(from)))
                      << "block " << b << " layer " << l << " token " << t << " head " << h << " V " << value;
                  rows += static_cast<size_t>(dim);
                }
        // What lies between the rows stays.
        EXPECT_GE(std::count(loaded.begin(), loaded.end(), 0xabcd),
                  static_cast<int64_t>(loaded.size() - rows));
      }
      EXPECT_TRUE(cache_->ReleaseLease(found->lease));
    }
  }
}

TEST_F(KeyedStoreTest, CodedBlocksTakeWhatThePairTakesAndKeepTheirValues) {
  Start();
  for (const auto& [pair, error] :
       std::map<std::string, double>{{"q8_0", 0.01}, {"q8_0/turbo4", 0.12}, {"turbo3", 0.25}}) {
    for (const int tokens : {16, 64, 20}) {
      const NamespaceSpec spec = Tensors(4, tokens, 2, 64, 64, pair);
      const NamespaceId space = Open(spec);
      const absl::StatusOr<NamespaceInfo> info = cache_->OpenNamespace(spec, Persistence::kNone);
      EXPECT_TRUE(info->existed);
      EXPECT_EQ(info->block_bytes, BlockLayout(spec.stored_shape(), Pair(pair)).block_bytes());
      const size_t values = static_cast<size_t>(4 * tokens * 2 * 64) * 2;
      const std::vector<float> rows = RandomRows(random_, 2 * values);
      PageLayout layout;
      layout.type = DataType::kF32;
      ASSERT_TRUE(
          Store(space, Keys(0, 2), std::as_bytes(std::span(rows)), BlockPayload::kTensors, layout).ok());
      const LookupReport found = Lookup(space, Keys(0, 2)).value();
      std::vector<float> loaded(rows.size());
      ASSERT_TRUE(
          Load(found.lease, 0, 2, std::as_writable_bytes(std::span(loaded)), BlockPayload::kTensors, layout)
              .ok());
      double difference = 0, size = 0;
      for (size_t i = 0; i < rows.size(); i++) {
        difference += std::pow(rows[i] - loaded[i], 2);
        size += std::pow(rows[i], 2);
      }
      EXPECT_LT(std::sqrt(difference / size), error) << pair << " " << tokens;
      // As they rest, and back under another key.
      std::vector<std::byte> coded(2 * info->block_bytes);
      ASSERT_TRUE(Load(found.lease, 0, 2, coded).ok());
      EXPECT_TRUE(cache_->ReleaseLease(found.lease));
      ASSERT_TRUE(Store(space, Keys(10, 2), coded).ok());
      const LookupReport copies = Lookup(space, Keys(10, 2)).value();
      std::vector<float> again(rows.size());
      ASSERT_TRUE(
          Load(copies.lease, 0, 2, std::as_writable_bytes(std::span(again)), BlockPayload::kTensors, layout)
              .ok());
      EXPECT_EQ(again, loaded);
      EXPECT_TRUE(cache_->ReleaseLease(copies.lease));
    }
  }
}

TEST_F(KeyedStoreTest, LookupsCountFromTheStartAndASecondStoreIsNone) {
  Start();
  const NamespaceId space = Open(Opaque());
  ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4)).ok());
  ASSERT_TRUE(Store(space, Keys(6, 2), Stamped(6, 2)).ok());
  EXPECT_EQ(Hits(space, Keys(0, 8)), 4u);
  EXPECT_EQ(Hits(space, Keys(4, 4)), 0u);
  EXPECT_EQ(Hits(space, {}), 0u);
  // Other bytes under a key that is there change nothing.
  const absl::StatusOr<StoreReport> second = Store(space, Keys(2, 4), Stamped(102, 4));
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->present, 2u);
  EXPECT_EQ(second->stored, 2u);
  ExpectStamped(space, 0, 4);
  // Twice in one call is once.
  EXPECT_EQ(Store(space, {"a", "b", "a"}, Stamped(0, 3))->present, 1u);
  const NamespaceInfo info = Info(space);
  EXPECT_EQ(info.blocks, 10u);
  EXPECT_EQ(info.stored_blocks, 10u);
  EXPECT_EQ(info.present_blocks, 3u);
  EXPECT_EQ(info.hits, 8u);
  EXPECT_EQ(info.misses, 8u);
  EXPECT_EQ(info.loaded_blocks, 4u);
  EXPECT_EQ(cache_->Stats().tiers[1].pairs.at("opaque").blocks, 10u) << "below the device";
}

// PegaFlow #367: a namespace without the layout and the number of pipeline ranks in it mixed them up.
TEST_F(KeyedStoreTest, PegaFlow367NamespacesThatDifferInOneFieldShareNothing) {
  Start();
  const NamespaceSpec base = Tensors(2, 16, 2, 64, 64, "q8_0/turbo4");
  std::vector<NamespaceSpec> specs = {base};
  const auto add = [&](auto change) {
    NamespaceSpec spec = base;
    change(spec);
    specs.push_back(spec);
  };
  add([](NamespaceSpec& spec) { spec.model = "test tp=2 rank=1"; });
  add([](NamespaceSpec& spec) { spec.salt = "salt"; });
  add([](NamespaceSpec& spec) { spec.block_tokens = 32; });
  add([](NamespaceSpec& spec) { spec.tensors->layers = 3; });
  add([](NamespaceSpec& spec) { spec.tensors->layers = 1, spec.block_tokens = 32; });  // as many rows
  add([](NamespaceSpec& spec) { spec.tensors->kv_heads = 4; });
  add([](NamespaceSpec& spec) { spec.tensors->head_dim_k = 128; });
  add([](NamespaceSpec& spec) { spec.tensors->head_dim_v = 128; });
  add([](NamespaceSpec& spec) { spec.tensors->pair = Pair("q8_0/turbo3"); });
  add([](NamespaceSpec& spec) { spec.tensors->pair = Pair("q5_0/turbo4"); });
  add([](NamespaceSpec& spec) { spec.tensors.reset(), spec.opaque = OpaqueContent{4096, ""}; });
  add([](NamespaceSpec& spec) { spec.tensors.reset(), spec.opaque = OpaqueContent{4096, "mla"}; });
  add([](NamespaceSpec& spec) { spec.tensors.reset(), spec.opaque = OpaqueContent{4097, ""}; });
  std::set<NamespaceId> ids;
  for (const NamespaceSpec& spec : specs) {
    const NamespaceInfo info = cache_->OpenNamespace(spec, Persistence::kNone).value();
    EXPECT_TRUE(ids.insert(info.id).second);
    EXPECT_EQ(Hits(info.id, Keys(0, 1)), 0u);
    const std::vector<std::byte> payload(info.block_bytes);
    ASSERT_TRUE(Store(info.id, Keys(0, 1), payload).ok());
  }
  EXPECT_EQ(cache_->ListNamespaces().size(), specs.size());
}

TEST_F(KeyedStoreTest, BadCallsSayWhatIsWrongAndStoreNothing) {
  Start();
  const NamespaceId space = Open(Tensors(2, 16, 2, 64, 64, "q8_0"));
  const NamespaceId opaque = Open(Opaque());
  std::vector<float> rows(2 * 2 * 16 * 2 * 64 * 2, 1.0f);
  PageLayout layout;
  layout.type = DataType::kF32;
  const auto store = [&](const std::vector<std::string>& keys) {
    return Store(space, keys, std::as_bytes(std::span(rows)), BlockPayload::kTensors, layout).status();
  };
  EXPECT_TRUE(IsError(store({"a", ""}), absl::StatusCode::kInvalidArgument, "keys[1] has 0 bytes"));
  EXPECT_TRUE(
      IsError(store({std::string(65, 'a'), "b"}), absl::StatusCode::kInvalidArgument, "has 65 bytes"));
  EXPECT_TRUE(IsError(store({}), absl::StatusCode::kInvalidArgument, "without keys"));
  EXPECT_TRUE(IsError(store({"a"}), absl::StatusCode::kInvalidArgument,
                      "payload of 1 blocks has 65536 bytes, must have 32768"));
  rows[5000] = std::nanf("");
  EXPECT_TRUE(IsError(store({"a", "b"}), absl::StatusCode::kInvalidArgument,
                      "block 0: K has NaN at layer 1, token 7"));
  layout.order = PageOrder::kHnd;
  EXPECT_TRUE(IsError(store({"a", "b"}), absl::StatusCode::kInvalidArgument,
                      "block 0, KV head 0: K has NaN at layer 1, token 14"));
  rows[5000] = 1e6f;
  EXPECT_TRUE(IsError(store({"a", "b"}), absl::StatusCode::kInvalidArgument, "within +-65504"));
  layout.layer_stride = -1;
  EXPECT_TRUE(IsError(store({"a", "b"}), absl::StatusCode::kInvalidArgument, "layer_stride -1 is negative"));
  layout.layer_stride = int64_t{1} << 61;
  EXPECT_TRUE(IsError(store({"a", "b"}), absl::StatusCode::kInvalidArgument, "2^62"));
  EXPECT_TRUE(IsError(Store(opaque, {"a"}, Stamped(0, 1), BlockPayload::kTensors).status(),
                      absl::StatusCode::kInvalidArgument, "opaque"));
  EXPECT_TRUE(
      IsError(Store(12345, {"a"}, Stamped(0, 1)).status(), absl::StatusCode::kNotFound, "OpenNamespace"));
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
  NamespaceSpec bad = Opaque();
  bad.model.clear();
  EXPECT_TRUE(IsError(cache_->OpenNamespace(bad, Persistence::kNone).status(),
                      absl::StatusCode::kInvalidArgument, "model"));
  bad = Tensors(2, 4097, 2, 64, 64, "q8_0");
  EXPECT_TRUE(IsError(cache_->OpenNamespace(bad, Persistence::kNone).status(),
                      absl::StatusCode::kInvalidArgument, "block_tokens"));
  bad = Tensors(1000, 100, 2, 64, 64, "q8_0");
  EXPECT_TRUE(IsError(cache_->OpenNamespace(bad, Persistence::kNone).status(),
                      absl::StatusCode::kInvalidArgument, "65536"));
  bad = Tensors(1, 16, 2, 63, 64, "q8_0");
  EXPECT_TRUE(IsError(cache_->OpenNamespace(bad, Persistence::kNone).status(),
                      absl::StatusCode::kInvalidArgument, "head dims"));
}

// Mooncake #2286 and the rule of every cache: what is old makes way, and what a call stores does not make way
// for its rest.
TEST_F(KeyedStoreTest, TheColdestMakeWayAndACallNeverEvictsItself) {
  Start(1 * kMiB, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096));
  for (int i = 0; i < 40; i += 4) {
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(Store(space, Keys(i, 4), Stamped(i, 4, 4096)).ok());
    cache_->CheckInvariants();
  }
  // The host tier holds 16 of them; there is no tier below, and the device takes what is new instead.
  EXPECT_EQ(Hits(space, Keys(36, 4)), 4u);
  ExpectStamped(space, 36, 4, 4096);
  // More than all tiers have: the first ones are stored.
  const absl::StatusOr<StoreReport> report = Store(space, Keys(1000, 400), Stamped(1000, 400, 4096));
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_GT(report->left_out, 0u);
  EXPECT_EQ(report->stored + report->left_out, 400u);
  EXPECT_THAT(report->problem, ::testing::HasSubstr("no room"));
  EXPECT_EQ(Hits(space, Keys(1000, 400)), report->stored);
  ExpectStamped(space, 1000, static_cast<int>(report->stored), 4096);
}

TEST_F(KeyedStoreTest, TheEndOfAPrefixIsDroppedBeforeItsBeginning) {
  options_.max_keyed_blocks = 8;
  Start();
  const NamespaceId space = Open(Opaque());
  ASSERT_TRUE(Store(space, Keys(0, 8), Stamped(0, 8)).ok());
  clock_.Advance(absl::Seconds(5));
  ASSERT_TRUE(Store(space, Keys(100, 3), Stamped(100, 3)).ok());
  EXPECT_EQ(Hits(space, Keys(0, 8)), 5u);
  EXPECT_EQ(Hits(space, Keys(100, 3)), 3u);
  EXPECT_EQ(Info(space).dropped_blocks, 3u);
  // What was looked up stays longer.
  clock_.Advance(absl::Seconds(5));
  EXPECT_EQ(Hits(space, Keys(0, 2)), 2u);
  ASSERT_TRUE(Store(space, Keys(200, 6), Stamped(200, 6)).ok());
  EXPECT_EQ(Hits(space, Keys(0, 2)), 2u);
}

TEST_F(KeyedStoreTest, LowerPrioritiesAreDroppedFirst) {
  options_.max_keyed_blocks = 8;
  Start();
  const auto open = [&](const char* salt, Priority priority) {
    NamespaceSpec spec = Opaque();
    spec.salt = salt;
    return cache_->OpenNamespace(spec, Persistence::kNone, priority)->id;
  };
  const auto store = [&](NamespaceId space, int first, int count, std::optional<Priority> priority) {
    const std::vector<std::string> keys = Keys(first, count);
    const std::vector<std::string_view> views = Views(keys);
    const std::vector<std::byte> payload = Stamped(first, count);
    StoreCall call;
    call.name_space = space;
    call.keys = views;
    call.form = BlockPayload::kBytes;
    call.payload = payload;
    call.priority = priority;
    clock_.Advance(absl::Seconds(5));
    return cache_->StoreBlocks(call);
  };
  const auto found = [&](NamespaceId space, int first) { return Hits(space, Keys(first, 1)); };
  const NamespaceId high = open("high", Priority::kHigh), low = open("low", Priority::kLow);
  EXPECT_EQ(Info(high).priority, Priority::kHigh);
  ASSERT_TRUE(store(high, 0, 2, {}).ok());
  ASSERT_TRUE(store(low, 0, 2, {}).ok());
  ASSERT_TRUE(store(low, 10, 2, Priority::kHigh).ok());
  ASSERT_TRUE(store(high, 20, 2, Priority::kNormal).ok());
  ASSERT_TRUE(store(high, 30, 2, {}).ok());
  EXPECT_EQ(found(low, 0) + found(low, 1), 0u) << "low, and not the oldest";
  ASSERT_TRUE(store(high, 40, 1, {}).ok());
  EXPECT_EQ(found(high, 20) + found(high, 21), 1u) << "normal ones next";
  EXPECT_EQ(found(high, 0) + found(low, 10), 2u);
  // A store of what is there raises it; a lookup changes nothing about priorities.
  ASSERT_TRUE(store(high, 20, 1, Priority::kHigh).ok());
  // The namespace has another one: so have its blocks that had its former one.
  EXPECT_EQ(open("high", Priority::kLow), high);
  EXPECT_EQ(Info(high).priority, Priority::kLow);
  EXPECT_EQ(cache_->Stats().tiers[1].high_priority_blocks, 2u)
      << "those that were stored as high into the other";
  ASSERT_TRUE(store(low, 50, 3, Priority::kNormal).ok());
  EXPECT_EQ(found(low, 10) + found(low, 11) + found(low, 50), 3u);
  cache_->CheckInvariants();
}

// PegaFlow #434: leased blocks fell out of the index under pressure.
TEST_F(KeyedStoreTest, PegaFlow434LeasedBlocksStayUnderPressure) {
  Start(64 * 1024, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096));
  ASSERT_TRUE(Store(space, Keys(0, 8), Stamped(0, 8, 4096)).ok());
  const LookupReport leased = Lookup(space, Keys(0, 8)).value();
  for (int i = 100; i < 300; i++) {
    clock_.Advance(absl::Milliseconds(50));
    ASSERT_TRUE(Store(space, Keys(i, 1), Stamped(i, 1, 4096)).ok());
  }
  EXPECT_EQ(Hits(space, Keys(0, 8)), 8u);
  std::vector<std::byte> payload(8 * 4096);
  ASSERT_TRUE(Load(leased.lease, 0, 8, payload).ok());
  EXPECT_EQ(payload, Stamped(0, 8, 4096));
  EXPECT_TRUE(cache_->ReleaseLease(leased.lease));
  EXPECT_FALSE(cache_->ReleaseLease(leased.lease));
  for (int i = 300; i < 500; i++) {
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(Store(space, Keys(i, 1), Stamped(i, 1, 4096)).ok());
  }
  EXPECT_EQ(Hits(space, Keys(0, 8)), 0u);
}

// vLLM #35931, FlexKV #236, PegaFlow #399: lookups whose requester went away kept the pool full for good.
TEST_F(KeyedStoreTest, Vllm35931AbandonedLeasesEnd) {
  options_.max_leases = 3;
  Start(64 * 1024, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096));
  ASSERT_TRUE(Store(space, Keys(0, 32), Stamped(0, 32, 4096)).ok());
  const LookupReport first = Lookup(space, Keys(0, 32), absl::Seconds(10)).value();
  EXPECT_TRUE(IsError(Store(space, Keys(100, 1), Stamped(100, 1, 4096)).status(),
                      absl::StatusCode::kResourceExhausted, "no room"));
  ASSERT_TRUE(Lookup(space, Keys(0, 1), absl::Seconds(10)).ok());
  ASSERT_TRUE(Lookup(space, Keys(0, 1), absl::Seconds(20)).ok());
  EXPECT_TRUE(
      IsError(Lookup(space, Keys(0, 1)).status(), absl::StatusCode::kResourceExhausted, "max_leases"));
  EXPECT_EQ(Hits(space, Keys(0, 40)), 32u) << "the question alone needs no lease";
  clock_.Advance(absl::Seconds(10));
  std::vector<std::byte> payload(4096);
  EXPECT_TRUE(IsError(Load(first.lease, 0, 1, payload).status(), absl::StatusCode::kNotFound,
                      "look the keys up again"));
  EXPECT_EQ(Info(space).leases, 1u);
  ASSERT_TRUE(Store(space, Keys(100, 8), Stamped(100, 8, 4096)).ok());
  clock_.Advance(absl::Seconds(10));
  cache_->RunMovesOnce();
  EXPECT_EQ(cache_->Stats().leases, 0u);
  EXPECT_EQ(cache_->Stats().leases_expired, 3u);
}

// Mooncake #2799, #3160: a store that was under way brought back what was deleted.
TEST_F(KeyedStoreTest, Mooncake3160ADeletedNamespaceWinsOverAStoreThatRuns) {
  Start();
  const NamespaceSpec spec = Opaque();
  const NamespaceId space = Open(spec);
  host_->Close(FaultyBackend::kStartCopy);
  absl::Status stored;
  std::thread store([&] { stored = Store(space, Keys(0, 4), Stamped(0, 4)).status(); });
  host_->WaitForEntry(FaultyBackend::kStartCopy);
  EXPECT_EQ(Hits(space, Keys(0, 4)), 0u) << "what is being stored does not count";
  EXPECT_TRUE(cache_->DeleteNamespace(space).ok());
  EXPECT_EQ(Open(spec), space);
  host_->Open(FaultyBackend::kStartCopy);
  store.join();
  EXPECT_TRUE(IsError(stored, absl::StatusCode::kNotFound, "deleted meanwhile"));
  EXPECT_EQ(Hits(space, Keys(0, 4)), 0u);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(KeyedStoreTest, DeletingEndsLeasesAndLoadsThatRun) {
  Start();
  const NamespaceId space = Open(Opaque());
  ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4)).ok());
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  host_->Close(FaultyBackend::kStartCopy);
  std::vector<std::byte> payload(4 * kOpaqueBytes);
  absl::Status loaded;
  std::thread load([&] { loaded = Load(found.lease, 0, 4, payload).status(); });
  host_->WaitForEntry(FaultyBackend::kStartCopy);
  EXPECT_EQ(*cache_->DeleteNamespace(space), 4u);
  host_->Open(FaultyBackend::kStartCopy);
  load.join();
  // Bytes that it was reading were there until it was done.
  EXPECT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(payload, Stamped(0, 4));
  EXPECT_TRUE(IsError(Load(found.lease, 0, 4, payload).status(), absl::StatusCode::kNotFound, "over"));
  EXPECT_TRUE(IsError(cache_->DeleteNamespace(space).status(), absl::StatusCode::kNotFound, "unknown"));
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

// vLLM #52360: blocks were given to others while they were still being read.
TEST_F(KeyedStoreTest, Vllm52360WhatIsReadIsNotReused) {
  Start(64 * 1024, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096)), other = Open(Opaque(4096, "other"));
  ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4, 4096)).ok());
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  std::vector<std::byte> payload(4 * 4096);
  bool once = true;
  host_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kStartCopy || !std::exchange(once, false)) return;
    EXPECT_TRUE(cache_->DeleteNamespace(space).ok());
    for (int i = 0; i < 64; i++) EXPECT_TRUE(Store(other, Keys(500 + i, 1), Stamped(500 + i, 1, 4096)).ok());
  });
  ASSERT_TRUE(Load(found.lease, 0, 4, payload).ok());
  host_->SetHook(nullptr);
  EXPECT_EQ(payload, Stamped(0, 4, 4096));
}

// Dynamo #15079: a transfer that failed counted as done, and another request's bytes were served.
TEST_F(KeyedStoreTest, Dynamo15079AFailedCopyIsNeverCalledLoadedOrStored) {
  Start();
  const NamespaceId space = Open(Opaque());
  host_->FailAfter(FaultyBackend::kStartCopy, 2);
  EXPECT_TRUE(
      IsError(Store(space, Keys(0, 4), Stamped(0, 4)).status(), absl::StatusCode::kInternal, "planted"));
  EXPECT_EQ(Hits(space, Keys(0, 4)), 2u) << "the third one is not there";
  ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4)).ok());
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  std::vector<std::byte> payload(4 * kOpaqueBytes);
  for (const FaultyBackend::Call call : {FaultyBackend::kStartCopy, FaultyBackend::kPoll}) {
    host_->Fail(call);
    EXPECT_TRUE(IsError(Load(found.lease, 0, 4, payload).status(), absl::StatusCode::kInternal, "planted"));
  }
  ASSERT_TRUE(Load(found.lease, 0, 4, payload).ok());
  EXPECT_EQ(payload, Stamped(0, 4));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  const NamespaceId tensors = Open(Tensors(2, 16, 2, 64, 64, "q8_0"));
  const std::vector<uint16_t> rows(2 * 2 * 16 * 2 * 64);
  for (const FaultyBackend::Call call : {FaultyBackend::kAppend, FaultyBackend::kRecode}) {
    host_->Fail(call);
    EXPECT_TRUE(IsError(Store(tensors, Keys(0, 1), BytesOf(rows), BlockPayload::kTensors).status(),
                        absl::StatusCode::kInternal, "planted"));
    EXPECT_EQ(Hits(tensors, Keys(0, 1)), 0u);
  }
}

// Blocks that are worth several threads.
class LargeBlocks : public KeyedStoreTest {
 protected:
  static constexpr size_t kBytes = (size_t{1} << 20) - 131;  // no multiple of anything
  static constexpr int kBlocks = 20;                         // more than a round
  void SetUp() override {
    KeyedStoreTest::SetUp();
    Start(64 * 1024, 64 * kMiB);
    space_ = Open(Opaque(kBytes));
    payload_ = Stamped(0, kBlocks, kBytes);
  }
  // Runs `then` once, when the n-th copy of the host tier begins. Copies begin on several threads.
  void AtCopy(int n, std::function<void()> then) {
    host_->SetHook([this, n, then = std::move(then)](FaultyBackend::Call call) {
      if (call == FaultyBackend::kStartCopy && copies_.fetch_add(1) + 1 == n) then();
    });
  }
  absl::StatusOr<StoreReport> StoreAll(const CallContext& context) {
    const std::vector<std::string> keys = Keys(0, kBlocks);
    const std::vector<std::string_view> views = Views(keys);
    StoreCall call;
    call.name_space = space_;
    call.keys = views;
    call.form = BlockPayload::kBytes;
    call.payload = payload_;
    call.context = &context;
    return cache_->StoreBlocks(call);
  }
  absl::StatusOr<LoadReport> LoadAll(LeaseId lease, std::span<std::byte> payload,
                                     const CallContext& context) {
    LoadCall call;
    call.lease = lease;
    call.blocks = kBlocks;
    call.form = BlockPayload::kBytes;
    call.payload = payload;
    call.context = &context;
    return cache_->LoadBlocks(call);
  }
  void ExpectAllThere() {
    host_->SetHook(nullptr);
    ExpectStamped(space_, 0, kBlocks, kBytes);
  }

  NamespaceId space_ = 0;
  std::vector<std::byte> payload_;
  std::atomic<int> copies_ = 0;
};

TEST_F(LargeBlocks, AreCopiedByAFewThreadsAtOnce) {
  const int most = static_cast<int>(
      std::min<size_t>(options_.max_copy_threads, std::max(1u, std::thread::hardware_concurrency())));
  host_->Close(FaultyBackend::kStartCopy);
  std::thread store([&] { EXPECT_EQ(StoreAll({})->stored, static_cast<uint64_t>(kBlocks)); });
  while (host_->held(FaultyBackend::kStartCopy) < most) std::this_thread::yield();
  EXPECT_EQ(host_->held(FaultyBackend::kStartCopy), most);
  host_->Open(FaultyBackend::kStartCopy);
  store.join();
  ExpectAllThere();
}

TEST_F(LargeBlocks, ACancelledStoreKeepsWholeBlocksOnly) {
  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  AtCopy(18, [&] { cancellation.Cancel(); });  // each block is copied in several slices
  EXPECT_TRUE(IsError(StoreAll(context).status(), absl::StatusCode::kCancelled, "cancelled"));
  host_->SetHook(nullptr);
  EXPECT_LT(Hits(space_, Keys(0, kBlocks)), 16u);
  EXPECT_EQ(StoreAll({})->left_out, 0u);
  ExpectAllThere();
}

TEST_F(LargeBlocks, AStoreEndsAtItsDeadline) {
  CallContext context;
  context.deadline = clock_.function()() + absl::Seconds(5);
  AtCopy(3, [&] { clock_.Advance(absl::Seconds(6)); });
  EXPECT_TRUE(IsError(StoreAll(context).status(), absl::StatusCode::kDeadlineExceeded, "the store"));
  host_->SetHook(nullptr);
  EXPECT_EQ(Hits(space_, Keys(0, kBlocks)), options_.max_moves_in_flight) << "the first round";
  EXPECT_EQ(StoreAll({})->present, options_.max_moves_in_flight);
  ExpectAllThere();
}

TEST_F(LargeBlocks, ALoadStopsWhenItIsCancelledOrTooLate) {
  ASSERT_TRUE(StoreAll({}).ok());
  const LookupReport found = Lookup(space_, Keys(0, kBlocks)).value();
  std::vector<std::byte> payload(payload_.size());
  Cancellation cancellation;
  CallContext context;
  context.cancellation = &cancellation;
  AtCopy(2, [&] { cancellation.Cancel(); });
  EXPECT_TRUE(
      IsError(LoadAll(found.lease, payload, context).status(), absl::StatusCode::kCancelled, "cancelled"));
  context.cancellation = nullptr;
  context.deadline = clock_.function()() + absl::Seconds(5);
  copies_ = 0;
  AtCopy(2, [&] { clock_.Advance(absl::Seconds(6)); });
  EXPECT_TRUE(IsError(LoadAll(found.lease, payload, context).status(), absl::StatusCode::kDeadlineExceeded,
                      "the load"));
  host_->SetHook(nullptr);
  EXPECT_EQ(LoadAll(found.lease, payload, {})->blocks, static_cast<uint64_t>(kBlocks));
  EXPECT_EQ(payload, payload_);
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
}

TEST_F(LargeBlocks, WhatIsReadBySeveralThreadsIsNotReused) {
  ASSERT_TRUE(StoreAll({}).ok());
  const LookupReport found = Lookup(space_, Keys(0, kBlocks)).value();
  const NamespaceId other = Open(Opaque(kBytes, "other"));
  std::vector<std::byte> payload(16 * kBytes);
  AtCopy(5, [&] {
    EXPECT_TRUE(cache_->DeleteNamespace(space_).ok());
    for (int i = 0; i < 60; i += 4)
      EXPECT_TRUE(Store(other, Keys(500 + i, 4), Stamped(500 + i, 4, kBytes)).ok());
  });
  ASSERT_TRUE(Load(found.lease, 0, 16, payload).ok());  // one round: it reads on
  host_->SetHook(nullptr);
  EXPECT_TRUE(std::equal(payload.begin(), payload.end(), payload_.begin()));
}

TEST_F(LargeBlocks, OneFailureOfManyCopiesIsTheFailureOfTheCall) {
  host_->FailAfter(FaultyBackend::kStartCopy, 17);
  EXPECT_TRUE(IsError(StoreAll({}).status(), absl::StatusCode::kInternal, "planted"));
  EXPECT_EQ(StoreAll({})->left_out, 0u);
  const LookupReport found = Lookup(space_, Keys(0, kBlocks)).value();
  ASSERT_EQ(found.hits, static_cast<uint64_t>(kBlocks));
  std::vector<std::byte> payload(payload_.size());
  host_->FailAfter(FaultyBackend::kStartCopy, 30);
  EXPECT_TRUE(IsError(LoadAll(found.lease, payload, {}).status(), absl::StatusCode::kInternal, "planted"));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  ExpectAllThere();
}

// What a client reads where it lies keeps its bytes, whatever becomes of lease, block and namespace, and is
// room again when the client is done.
TEST_F(KeyedStoreTest, WhatIsReadInPlaceStaysUntilItIsGivenBack) {
  Start(64 * 1024, 16 * 4096);
  const NamespaceId space = Open(Opaque(4096));
  ASSERT_TRUE(Store(space, Keys(0, 6), Stamped(0, 6, 4096)).ok());
  const LookupReport found = Lookup(space, Keys(0, 6)).value();
  const LoadReport held = LoadInPlace(found.lease, 1, 5).value();
  ASSERT_NE(held.places, 0u);
  EXPECT_EQ(AtPlaces(held, 4096), Stamped(1, 5, 4096));
  EXPECT_EQ(cache_->Stats().keyed_held, 5u);
  EXPECT_EQ(cache_->Stats().keyed_held_bytes, 5u * 4096);
  EXPECT_EQ(cache_->Stats().keyed_in_place, 5u);
  EXPECT_EQ(cache_->Stats().keyed_loaded, 5u);
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  // Blocks of others take all the room that there is.
  for (int i = 100; i < 200; i++) {
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(Store(space, Keys(i, 1), Stamped(i, 1, 4096)).ok());
    cache_->CheckInvariants();
  }
  EXPECT_EQ(AtPlaces(held, 4096), Stamped(1, 5, 4096));
  ASSERT_TRUE(cache_->DeleteNamespace(space).ok());
  EXPECT_EQ(UsedBytes(cache_->Stats()), 5u * 4096);
  const NamespaceId other = Open(Opaque(4096, "other"));
  const StoreReport crowded = Store(other, Keys(0, 32), Stamped(500, 32, 4096)).value();
  EXPECT_GT(crowded.left_out, 0u);
  EXPECT_EQ(AtPlaces(held, 4096), Stamped(1, 5, 4096));
  EXPECT_TRUE(cache_->ReleasePlaces(held.places));
  EXPECT_FALSE(cache_->ReleasePlaces(held.places));
  EXPECT_EQ(cache_->Stats().keyed_held, 0u);
  EXPECT_EQ(cache_->Stats().keyed_held_bytes, 0u);
  const StoreReport roomy = Store(other, Keys(0, 32), Stamped(500, 32, 4096)).value();
  EXPECT_EQ(roomy.stored, 5u) << "the room of what was held";
}

TEST_F(KeyedStoreTest, ALoadInPlaceSaysWhatIsNotThere) {
  Start(64 * 1024, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096));
  ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4, 4096)).ok());
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  // Of a tier where the blocks do not lie.
  const LoadReport elsewhere = LoadInPlace(found.lease, 0, 4, 0).value();
  EXPECT_EQ(elsewhere.offsets, std::vector<int64_t>(4, -1));
  EXPECT_EQ(elsewhere.places, 0u);
  EXPECT_EQ(cache_->Stats().keyed_loaded, 0u);
  // The host tier of these tests has checksums: changed bytes are lost, never shown.
  const std::vector<std::byte> third = Stamped(2, 1, 4096);
  const std::span<const std::byte> slab(cache_->SlabOf(1)->data(), 64 * 1024);
  const auto at = std::search(slab.begin(), slab.end(), third.begin(), third.end());
  ASSERT_NE(at, slab.end());
  const_cast<std::byte&>(at[77]) ^= std::byte{1};
  EXPECT_TRUE(
      IsError(LoadInPlace(found.lease, 0, 4).status(), absl::StatusCode::kDataLoss, "the first is 2"));
  EXPECT_EQ(cache_->Stats().keyed_held, 0u);
  const LoadReport damaged = LoadInPlace(found.lease, 0, 4, 1, true).value();
  EXPECT_EQ(damaged.lost, std::vector<uint64_t>{2});
  EXPECT_EQ(damaged.offsets[2], -1);
  EXPECT_EQ(cache_->Stats().keyed_held, 3u);
  EXPECT_TRUE(cache_->ReleasePlaces(damaged.places));
  EXPECT_EQ(Hits(space, Keys(0, 4)), 2u);
  // A block is compared once for as long as it lies there; a load through the caller's memory compares it.
  const_cast<std::byte*>(cache_->SlabOf(1)->data())[damaged.offsets[1] + 77] ^= std::byte{1};
  const LoadReport again = LoadInPlace(found.lease, 0, 2).value();
  EXPECT_EQ(again.offsets[1], damaged.offsets[1]);
  EXPECT_TRUE(cache_->ReleasePlaces(again.places));
  std::vector<std::byte> copied(2 * 4096);
  EXPECT_TRUE(
      IsError(Load(found.lease, 0, 2, copied).status(), absl::StatusCode::kDataLoss, "the first is 1"));

  LoadCall rows;
  rows.lease = found.lease;
  rows.blocks = 1;
  rows.in_place = 1;
  EXPECT_TRUE(
      IsError(cache_->LoadBlocks(rows).status(), absl::StatusCode::kInvalidArgument, "BLOCK_FORM_BYTES"));
  EXPECT_TRUE(IsError(LoadInPlace(found.lease, 0, 5).status(), absl::StatusCode::kOutOfRange, "lease of 4"));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  EXPECT_TRUE(
      IsError(LoadInPlace(found.lease, 0, 1).status(), absl::StatusCode::kNotFound, "look the keys up"));
}

TEST_F(KeyedStoreTest, LoadsInPlaceThatAreNeverGivenBackAreBounded) {
  options_.max_leases = 3;
  Start(64 * 1024, 64 * 1024);
  const NamespaceId space = Open(Opaque(4096));
  ASSERT_TRUE(Store(space, Keys(0, 1), Stamped(0, 1, 4096)).ok());
  const LookupReport found = Lookup(space, Keys(0, 1)).value();
  std::vector<PlacesId> held;
  for (int i = 0; i < 3; i++) held.push_back(LoadInPlace(found.lease, 0, 1)->places);
  EXPECT_TRUE(IsError(LoadInPlace(found.lease, 0, 1).status(), absl::StatusCode::kResourceExhausted,
                      "not given back"));
  for (const PlacesId id : held) EXPECT_TRUE(cache_->ReleasePlaces(id));
  EXPECT_TRUE(cache_->ReleasePlaces(LoadInPlace(found.lease, 0, 1)->places));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
}

class KeyedDiskTest : public KeyedStoreTest {
 protected:
  static constexpr size_t kBytes = 8192;
  static constexpr size_t kExtent = kBytes + kDiskPage;
  void StartTiers(size_t host_blocks, size_t disk_blocks) {
    StartWithDisk(64 * 1024, host_blocks * kBytes, disk_blocks * kExtent * 130 / 128 + 40 * kDiskPage);
  }
  NamespaceId OpenOpaque(Persistence persistence = Persistence::kNone) {
    return Open(Opaque(kBytes), persistence);
  }
};

TEST_F(KeyedDiskTest, WhatIsCrowdedOutGoesToTheDiskAndComesBack) {
  StartTiers(8, 100);
  const NamespaceId space = OpenOpaque();
  for (int i = 0; i < 60; i += 4) {
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(Store(space, Keys(i, 4), Stamped(i, 4, kBytes)).ok());
  }
  cache_->CheckInvariants();
  EXPECT_EQ(Hits(space, Keys(0, 60)), 60u);
  const LookupReport found = Lookup(space, Keys(0, 60)).value();
  EXPECT_EQ(found.tiers.front().tier, 2);
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  for (int i = 0; i < 60; i += 4) ExpectStamped(space, i, 4, kBytes);
  EXPECT_EQ(cache_->Stats().tiers[0].blocks, 0u) << "nothing of it belongs on the device";
}

// A block on the disk is brought into host memory and read there; what is held leaves less room for the next.
TEST_F(KeyedDiskTest, WhatIsReadInPlaceIsBroughtInFirst) {
  StartTiers(8, 100);
  const NamespaceId space = OpenOpaque();
  for (int i = 0; i < 40; i += 4) {
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(Store(space, Keys(i, 4), Stamped(i, 4, kBytes)).ok());
  }
  const LookupReport found = Lookup(space, Keys(0, 40)).value();
  ASSERT_EQ(found.hits, 40u);
  std::vector<PlacesId> held;
  for (uint64_t first = 0; first < 40; first += 4) {
    const absl::StatusOr<LoadReport> report = LoadInPlace(found.lease, first, 4);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(AtPlaces(*report, kBytes), Stamped(static_cast<int>(first), 4, kBytes)) << first;
    held.push_back(report->places);
    if (held.size() > 1) {
      EXPECT_TRUE(cache_->ReleasePlaces(held.front()));
      held.erase(held.begin());
    }
    cache_->CheckInvariants();
  }
  EXPECT_TRUE(cache_->ReleasePlaces(held.front()));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
}

// LMCache #4385: the disk tier gave other requests' bytes back. LMCache #5151: long prefixes came back wrong.
// Bytes that changed in host memory are not lost while the disk keeps the block: loads and moves take it
// from there.
TEST_F(KeyedDiskTest, WhatIsDamagedInMemoryIsReadFromItsDurableCopy) {
  for (const bool move : {false, true}) {
    StartTiers(4, 100);
    const NamespaceId space = OpenOpaque();
    ASSERT_TRUE(Store(space, Keys(0, 4), Stamped(0, 4, kBytes)).ok());
    ASSERT_TRUE(cache_->PersistNamespace(space).ok());
    const LookupReport found = Lookup(space, Keys(0, 4)).value();
    ExpectStamped(space, 0, 4, kBytes);
    const LoadReport here = LoadInPlace(found.lease, 0, 4).value();
    ASSERT_GE(here.offsets[2], 0);
    const_cast<std::byte*>(cache_->SlabOf(1)->data())[here.offsets[2] + 77] ^= std::byte{1};
    EXPECT_TRUE(cache_->ReleasePlaces(here.places));
    // To make room for others, they go to the disk, where they are already; or are copied and looked at.
    if (move) {
      ASSERT_TRUE(Store(space, Keys(10, 4), Stamped(10, 4, kBytes)).ok());
    }
    ExpectStamped(space, 0, 4, kBytes);
    EXPECT_EQ(cache_->Stats().checksum_failures, move ? 0u : 1u);
    EXPECT_EQ(cache_->Stats().lost_blocks, 0u);
    EXPECT_TRUE(cache_->ReleaseLease(found.lease));
    cache_->CheckInvariants();
    cache_.reset();
    disk_.reset();
    files_ = std::make_unique<FaultFileSystem>();
  }
}

TEST_F(KeyedDiskTest, Lmcache4385And5151EveryLengthComesBackFromTheDisk) {
  StartTiers(16, 600);
  const NamespaceId space = OpenOpaque(), other = Open(Opaque(kBytes, "other"));
  constexpr int kBlocks = 256;
  for (int i = 0; i < kBlocks; i += 8) {
    ASSERT_TRUE(Store(space, Keys(i, 8), Stamped(i, 8, kBytes)).ok());
    ASSERT_TRUE(Store(other, Keys(i, 8), Stamped(5000 + i, 8, kBytes)).ok());
  }
  for (const int count : {1, 2, 3, 7, 8, 15, 16}) {
    for (int first = 0; first + count <= kBlocks; first += 37) ExpectStamped(space, first, count, kBytes);
  }
  // A lease may be longer than what fits above the disk: it is loaded in pieces.
  const LookupReport found = Lookup(other, Keys(0, kBlocks)).value();
  ASSERT_EQ(found.hits, static_cast<uint64_t>(kBlocks));
  for (int first = 0; first < kBlocks; first += 8) {
    std::vector<std::byte> payload(8 * kBytes);
    ASSERT_TRUE(Load(found.lease, static_cast<uint64_t>(first), 8, payload).ok());
    EXPECT_EQ(payload, Stamped(5000 + first, 8, kBytes)) << first;
  }
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
}

TEST_F(KeyedDiskTest, ABlockThatTheDiskLostIsNamedAndAMissFromThenOn) {
  StartTiers(4, 100);
  const NamespaceId space = OpenOpaque();
  ASSERT_TRUE(Store(space, Keys(0, 16), Stamped(0, 16, kBytes)).ok());
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  ASSERT_EQ(found.hits, 4u);
  const LookupReport on_disk = Lookup(space, Keys(0, 16)).value();
  ASSERT_EQ(on_disk.hits, 16u);
  EXPECT_TRUE(cache_->ReleaseLease(on_disk.lease));
  for (const std::string& path : files_->Paths()) {
    if (!path.ends_with("segment-0")) continue;
    for (const size_t extent : {0, 2, 5})
      EXPECT_TRUE(files_->Damage(path, extent * kExtent + kDiskPage + 100));
  }
  std::vector<std::byte> payload(4 * kBytes);
  uint64_t lost = 0;
  for (int i = 0; i < 16; i++) {
    const LookupReport one = Lookup(space, Keys(i, 1)).value();
    if (one.hits == 0) continue;
    std::vector<std::byte> block(kBytes);
    const absl::StatusOr<LoadReport> report = Load(one.lease, 0, 1, block);
    if (!report.ok()) {
      EXPECT_TRUE(IsError(report.status(), absl::StatusCode::kDataLoss, "cannot be read any more"));
      EXPECT_EQ(Hits(space, Keys(i, 1)), 0u);
      lost++;
      const absl::StatusOr<LoadReport> again = Load(one.lease, 0, 1, block, BlockPayload::kBytes, {}, true);
      ASSERT_TRUE(again.ok());
      EXPECT_EQ(again->lost, std::vector<uint64_t>{0});
    } else {
      EXPECT_EQ(block, Stamped(i, 1, kBytes));
    }
    cache_->ReleaseLease(one.lease);
  }
  EXPECT_GT(lost, 0u);
  EXPECT_EQ(cache_->Stats().lost_blocks, lost);
  cache_->ReleaseLease(found.lease);
}

TEST_F(KeyedDiskTest, BlocksOutliveStopsAndCrashes) {
  for (const bool crash : {false, true}) {
    for (const Persistence persistence : {Persistence::kNone, Persistence::kAll}) {
      StartTiers(30, 100);
      const NamespaceId space = OpenOpaque(persistence);
      const NamespaceSpec coded_spec = Tensors(4, 16, 2, 64, 64, "turbo4");
      const NamespaceId coded = Open(coded_spec, persistence);
      ASSERT_TRUE(Store(space, Keys(0, 20), Stamped(0, 20, kBytes)).ok());
      std::vector<uint16_t> rows(4 * 2 * 16 * 2 * 64 * 2);
      for (uint16_t& row : rows) row = F32ToF16(static_cast<float>(random_() % 1000) / 500 - 1);
      ASSERT_TRUE(Store(coded, Keys(0, 2), BytesOf(rows), BlockPayload::kTensors).ok());
      std::vector<uint16_t> before(rows.size()), after(rows.size());
      LookupReport found = Lookup(coded, Keys(0, 2)).value();
      ASSERT_TRUE(Load(found.lease, 0, 2, BytesOf(before), BlockPayload::kTensors).ok());
      cache_->ReleaseLease(found.lease);
      if (persistence == Persistence::kAll) {
        cache_->PersistChanged();
      } else {
        const absl::StatusOr<NamespacePersistReport> report = cache_->PersistNamespace(space);
        ASSERT_TRUE(report.ok()) << report.status();
        EXPECT_EQ(report->blocks, 20u);
        EXPECT_EQ(report->durable_blocks, 20u);
        ASSERT_TRUE(cache_->PersistNamespace(coded).ok());
      }
      cache_->CheckInvariants();
      Restart(crash);
      EXPECT_EQ(cache_->restored().namespaces, 2u);
      EXPECT_EQ(cache_->restored().keyed_blocks, 22u);
      EXPECT_THAT(cache_->restored().lost, ::testing::IsEmpty());
      EXPECT_EQ(OpenOpaque(persistence), space) << "the id is the same";
      ExpectStamped(space, 0, 20, kBytes);
      EXPECT_EQ(Hits(space, Keys(0, 21)), 20u);
      found = Lookup(coded, Keys(0, 2)).value();
      ASSERT_EQ(found.hits, 2u);
      ASSERT_TRUE(Load(found.lease, 0, 2, BytesOf(after), BlockPayload::kTensors).ok());
      cache_->ReleaseLease(found.lease);
      EXPECT_EQ(before, after);
      // It goes on: what comes now is durable too, and what was stays so.
      ASSERT_TRUE(Store(space, Keys(20, 5), Stamped(20, 5, kBytes)).ok());
      ASSERT_TRUE(cache_->PersistNamespace(space).ok());
      Restart(true);
      ExpectStamped(space, 0, 25, kBytes);
      ASSERT_TRUE(cache_->DeleteNamespace(coded).ok());
      ASSERT_TRUE(cache_->DeleteNamespace(space).ok());
      cache_.reset();
      disk_.reset();
    }
  }
}

// Mooncake #2676: RemoveAll left the disk tier.
TEST_F(KeyedDiskTest, Mooncake2676WhatIsDeletedDoesNotComeBack) {
  StartTiers(8, 100);
  const NamespaceId space = OpenOpaque(), other = Open(Opaque(kBytes, "other"));
  ASSERT_TRUE(Store(space, Keys(0, 30), Stamped(0, 30, kBytes)).ok());
  ASSERT_TRUE(Store(other, Keys(0, 5), Stamped(700, 5, kBytes)).ok());
  ASSERT_TRUE(cache_->PersistNamespace(space).ok());
  ASSERT_TRUE(cache_->PersistNamespace(other).ok());
  EXPECT_EQ(*cache_->DeleteNamespace(space), 30u);
  Restart(true);
  EXPECT_EQ(cache_->restored().keyed_blocks, 5u);
  EXPECT_EQ(OpenOpaque(), space);
  EXPECT_EQ(Hits(space, Keys(0, 30)), 0u);
  EXPECT_EQ(Hits(other, Keys(0, 6)), 5u);
}

TEST_F(KeyedDiskTest, WhatTheDiskDidNotEraseIsErasedLater) {
  for (const bool later : {false, true}) {
    SCOPED_TRACE(later);
    StartTiers(8, 100);
    const NamespaceId space = OpenOpaque();
    ASSERT_TRUE(Store(space, Keys(0, 5), Stamped(0, 5, kBytes)).ok());
    ASSERT_TRUE(cache_->PersistNamespace(space).ok());
    files_->Fail(FaultFileSystem::kWrite, 0, 1000, absl::ResourceExhaustedError("No space left on device"));
    EXPECT_TRUE(IsError(cache_->DeleteNamespace(space).status(), absl::StatusCode::kResourceExhausted,
                        "may be there again after a restart"));
    files_->ClearFaults();
    if (later) cache_->PersistChanged();
    Restart(true);
    EXPECT_EQ(cache_->restored().namespaces, later ? 0u : 1u);
    cache_.reset();
    disk_.reset();
    files_ = std::make_unique<FaultFileSystem>();
  }
}

// Mooncake #2799: an index that was written before its bytes were dropped named the bytes of others.
TEST_F(KeyedDiskTest, Mooncake2799AListOfOldNeverNamesTheBytesOfOthers) {
  StartTiers(4, 24);
  const NamespaceId space = OpenOpaque();
  std::map<int, bool> durable;
  for (int round = 0; round < 6; round++) {
    for (int i = 0; i < 12; i += 4) {
      clock_.Advance(absl::Seconds(2));
      const int first = 100 * round + i;
      ASSERT_TRUE(Store(space, Keys(first, 4), Stamped(first, 4, kBytes)).ok());
    }
    if (round % 2 == 0) {
      const absl::StatusOr<NamespacePersistReport> report = cache_->PersistNamespace(space);
      ASSERT_TRUE(report.ok() || absl::IsResourceExhausted(report.status())) << report.status();
    }
    Restart(true);
    cache_->CheckInvariants();
    uint64_t found = 0;
    for (int key = 0; key < 100 * (round + 1); key++) {
      const LookupReport one = Lookup(space, Keys(key, 1)).value();
      if (one.hits == 0) continue;
      found++;
      std::vector<std::byte> block(kBytes);
      const absl::StatusOr<LoadReport> report = Load(one.lease, 0, 1, block);
      // Bytes of others may have come under an old label before the crash: that is a loss, never an answer.
      if (report.ok()) {
        EXPECT_EQ(block, Stamped(key, 1, kBytes)) << key;
      } else {
        EXPECT_TRUE(IsError(report.status(), absl::StatusCode::kDataLoss, "cannot be read"));
        EXPECT_EQ(Hits(space, Keys(key, 1)), 0u);
      }
      cache_->ReleaseLease(one.lease);
    }
    EXPECT_GT(found, 0u);
  }
}

// Mooncake #3254, #3421: state that came back again and again until it broke the start.
TEST_F(KeyedDiskTest, Mooncake3254ManyRestartsChangeNothing) {
  StartTiers(8, 60);
  const NamespaceId space = OpenOpaque();
  ASSERT_TRUE(Store(space, Keys(0, 12), Stamped(0, 12, kBytes)).ok());
  ASSERT_TRUE(cache_->PersistNamespace(space).ok());
  for (int i = 0; i < 8; i++) {
    const LookupReport left = Lookup(space, Keys(0, 3)).value();  // a client that goes away
    EXPECT_EQ(left.hits, 3u);
    cache_->ReleaseLease(left.lease);
    Restart(i % 2 == 0);
    cache_->CheckInvariants();
    EXPECT_EQ(cache_->restored().keyed_blocks, 12u);
    ExpectStamped(space, 0, 12, kBytes);
  }
}

TEST_F(KeyedDiskTest, WithoutADurableTierPersistSaysSo) {
  Start();
  const NamespaceId space = Open(Opaque());
  EXPECT_TRUE(
      IsError(cache_->PersistNamespace(space).status(), absl::StatusCode::kFailedPrecondition, "--disk"));
}

// A sequence's manifest took the place of a list of durable blocks, whose name a later life drew for it.
TEST_F(KeyedStoreTest, SequencesOfLaterLivesLeaveListsOfDurableBlocksAlone) {
  StartWithDisk(kMiB, kMiB, 6 * kMiB);
  const NamespaceId space = Open(Opaque());
  ASSERT_TRUE(Store(space, Keys(0, 3), Stamped(0, 3)).ok());
  ASSERT_TRUE(cache_->PersistNamespace(space).ok());
  Restart(true);
  // The lists were named by the first few numbers that the seed gives.
  for (int i = 0; i < 8; i++) {
    Client client(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(client.Append(10).ok());
    ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  }
  Restart(true);
  EXPECT_EQ(cache_->restored().sequences, 8u);
  for (const SequenceInfo& info : cache_->ListSequences()) ASSERT_TRUE(cache_->CloseSequence(info.id).ok());
  ExpectStamped(Open(Opaque()), 0, 3);
}

// A list of durable blocks took the place of another namespace's, because a later life drew its name again.
TEST_F(KeyedStoreTest, ListsOfDurableBlocksOfSeveralLivesStayApart) {
  StartWithDisk(kMiB, kMiB, 4 * kMiB);
  for (int life = 0; life < 4; life++) {
    const NamespaceId space = Open(Opaque(kOpaqueBytes, absl::StrCat("of life ", life)));
    ASSERT_TRUE(Store(space, Keys(life, 3), Stamped(life, 3)).ok());
    ASSERT_TRUE(cache_->PersistNamespace(space).ok());
    Restart(true);
  }
  for (int life = 0; life < 4; life++)
    ExpectStamped(Open(Opaque(kOpaqueBytes, absl::StrCat("of life ", life))), life, 3);
}

// Blocks that are recoded to fewer bits when their tier needs room.
class KeyedLadderTest : public KeyedStoreTest {
 protected:
  static constexpr auto kTensors = BlockPayload::kTensors;

  static NamespaceSpec Degrading(const std::string& pair, const std::vector<std::string>& rungs,
                                 int tokens = 16, int layers = 3) {
    NamespaceSpec spec = Tensors(layers, tokens, 2, 64, 64, pair);
    for (const std::string& rung : rungs) spec.degrade.push_back(Pair(rung));
    return spec;
  }
  static size_t BytesAs(const NamespaceSpec& spec, const std::string& pair) {
    return BlockLayout(spec.stored_shape(), Pair(pair)).block_bytes();
  }
  static size_t RowBytes(const NamespaceSpec& spec) {
    const PageShape pages = spec.pages();
    return static_cast<size_t>(spec.rows() * pages.kv_heads * (pages.head_dim_k + pages.head_dim_v)) * 2;
  }
  // Rows of f16 that say which key they belong to.
  static std::vector<std::byte> RowsOf(const NamespaceSpec& spec, int first, int count) {
    std::vector<std::byte> rows;
    for (int key = first; key < first + count; key++) {
      std::mt19937 random(static_cast<unsigned>(key));
      for (size_t i = 0; i < RowBytes(spec) / 2; i++) {
        const uint16_t half = F32ToF16(static_cast<float>(random() % 2000) / 1000 - 1);
        rows.push_back(static_cast<std::byte>(half & 0xff));
        rows.push_back(static_cast<std::byte>(half >> 8));
      }
    }
    return rows;
  }
  std::vector<std::byte> Block(const NamespaceSpec& spec, int key, size_t rungs) const {
    return AfterRungs(spec, RowsOf(spec, key, 1), std::span(spec.degrade).first(rungs));
  }
  absl::StatusOr<StoreReport> StoreRows(NamespaceId space, const NamespaceSpec& spec, int first, int count) {
    return Store(space, Keys(first, count), RowsOf(spec, first, count), kTensors);
  }
  // Each block of keys first to first + count - 1 has these bits (0: the pair's), and answers say so.
  void ExpectRungs(NamespaceId space, const NamespaceSpec& spec, int first,
                   const std::vector<size_t>& rungs) {
    const size_t bytes = RowBytes(spec), count = rungs.size();
    const absl::StatusOr<LookupReport> found = Lookup(space, Keys(first, static_cast<int>(count)));
    ASSERT_TRUE(found.ok()) << found.status();
    ASSERT_EQ(found->hits, count);
    std::vector<std::byte> payload(count * bytes);
    const absl::StatusOr<LoadReport> report = Load(found->lease, 0, count, payload, kTensors);
    ASSERT_TRUE(report.ok()) << report.status();
    std::vector<uint64_t> degraded;
    for (size_t i = 0; i < count; i++) {
      if (rungs[i] > 0) degraded.push_back(i);
      const std::vector<std::byte> wanted = Block(spec, first + static_cast<int>(i), rungs[i]);
      EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), payload.begin() + static_cast<int64_t>(i * bytes)))
          << "key " << first + static_cast<int>(i) << " after " << rungs[i] << " rungs";
    }
    EXPECT_EQ(found->degraded, degraded);
    EXPECT_EQ(report->degraded, degraded);
    EXPECT_TRUE(cache_->ReleaseLease(found->lease));
  }
  // Idle blocks go down a rung above a watermark of nothing.
  void StartIdle(size_t host_bytes = 8 * kMiB, size_t disk_bytes = 0) {
    options_.limits.high_watermark = 0.0001;
    options_.limits.low_watermark = 0;
    if (disk_bytes > 0) {
      StartWithDisk(64 << 10, host_bytes, disk_bytes);
    } else {
      Start(64 << 10, host_bytes);
    }
  }
  uint64_t RecodeIdle() {
    clock_.Advance(absl::Seconds(10));
    return cache_->RunMovesOnce().degraded_blocks;
  }
};

TEST_F(KeyedLadderTest, WhatMakesNoSenseIsRefusedWithWhatToDo) {
  Start();
  const auto refused = [&](const NamespaceSpec& spec, const char* text) {
    EXPECT_TRUE(IsError(cache_->OpenNamespace(spec, Persistence::kNone).status(),
                        absl::StatusCode::kInvalidArgument, text));
  };
  NamespaceSpec opaque = Opaque();
  opaque.degrade = {Pair("turbo3")};
  refused(opaque, "opaque bytes cannot be recoded to fewer bits; leave it out, or store K and V as tensors");
  refused(Degrading("turbo3", {"turbo4"}), "no fewer bytes than turbo3");
  refused(Degrading("q8_0", {"turbo3", "turbo4"}), "degrade[1]: turbo4");
  refused(Degrading("q8_0", {"f16"}), "f16 is not of fewer bits");
  refused(Degrading("q8_0", {"tide3/turbo3"}), "cannot become tide3");
}

// Whoever opens a namespace knows what its loads may give.
TEST_F(KeyedLadderTest, AnotherLadderIsAnotherNamespace) {
  Start();
  const NamespaceSpec whole = Degrading("q8_0", {}), one = Degrading("q8_0", {"turbo4"}),
                      two = Degrading("q8_0", {"turbo4", "turbo3"});
  const std::set<NamespaceId> ids{Open(whole), Open(one), Open(two)};
  EXPECT_EQ(ids.size(), 3u);
  EXPECT_EQ(Open(two), *ids.find(Open(two)));
  ASSERT_TRUE(StoreRows(Open(two), two, 0, 4).ok());
  EXPECT_EQ(Hits(Open(one), Keys(0, 4)), 0u);
  EXPECT_EQ(Hits(Open(two), Keys(0, 4)), 4u);
  EXPECT_EQ(Info(Open(two)).spec.degrade, two.degrade);
}

TEST_F(KeyedLadderTest, PagesBecomeFewerBitsInsteadOfBeingDropped) {
  for (const auto& [pair, rungs] : std::map<std::string, std::vector<std::string>>{
           {"q8_0", {"turbo4", "turbo3"}}, {"f16", {"q8_0", "turbo4", "turbo3"}}, {"f16/q8_0", {"q4_0"}}})
    for (const int tokens : {16, 64, 20}) {
      SCOPED_TRACE(absl::StrCat(pair, " ", tokens));
      const NamespaceSpec spec = Degrading(pair, rungs, tokens), plain = Degrading(pair, {}, tokens);
      const size_t bytes = BytesAs(spec, pair), least = BytesAs(spec, rungs.back());
      Start(4096, 30 * bytes);
      const auto fill = [&](const NamespaceSpec& of) {
        const NamespaceId space = Open(of);
        uint64_t most = 0;
        for (int i = 0; i < 200; i++) {
          const absl::StatusOr<StoreReport> report = StoreRows(space, of, i, 1);
          EXPECT_TRUE(report.ok() && report->stored == 1) << report.status();
          most = std::max(most, Info(space).blocks);
        }
        return most;
      };
      EXPECT_LE(fill(plain), 30u);
      ASSERT_TRUE(cache_->DeleteNamespace(Open(plain)).ok());
      const uint64_t most = fill(spec);
      EXPECT_GE(most, 30 * bytes / least * 3 / 4);
      const NamespaceInfo info = Info(Open(spec));
      EXPECT_GE(info.degraded_blocks, info.blocks * 3 / 4);
      EXPECT_EQ(cache_->Stats().degraded_keyed_blocks, info.degraded_blocks);
      EXPECT_LE(cache_->Stats().keyed_bytes, 30 * bytes);
      cache_->CheckInvariants();
      // What is there is what was stored, recoded down the rungs, and says so.
      size_t seen = 0;
      for (int key = 0; key < 200; key++) {
        const absl::StatusOr<LookupReport> found = Lookup(Open(spec), Keys(key, 1));
        ASSERT_TRUE(found.ok());
        if (found->hits == 0) continue;
        std::vector<std::byte> payload(RowBytes(spec));
        ASSERT_TRUE(Load(found->lease, 0, 1, payload, kTensors).ok());
        size_t rung = 0;
        while (rung <= rungs.size() && payload != Block(spec, key, rung)) rung++;
        EXPECT_LE(rung, rungs.size()) << "key " << key;
        EXPECT_EQ(found->degraded.size(), rung > 0 ? 1u : 0u);
        EXPECT_TRUE(cache_->ReleaseLease(found->lease));
        seen++;
      }
      EXPECT_EQ(seen, info.blocks);
      ASSERT_TRUE(cache_->DeleteNamespace(Open(spec)).ok());
    }
}

TEST_F(KeyedLadderTest, LoadsGiveWhatIsLeftInTheCallersLayoutTypeAndForm) {
  StartIdle();
  const NamespaceSpec spec = Degrading("q8_0", {"turbo4", "turbo3"}, 20);
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 3).ok());
  ExpectRungs(space, spec, 0, {0, 0, 0});
  EXPECT_EQ(RecodeIdle(), 3u);
  ExpectRungs(space, spec, 0, {1, 1, 1});
  ASSERT_TRUE(StoreRows(space, spec, 3, 1).ok());
  ExpectRungs(space, spec, 0, {1, 1, 1, 0});
  // A key that is there stays as it is.
  EXPECT_EQ(StoreRows(space, spec, 0, 2)->present, 2u);
  ExpectRungs(space, spec, 0, {1, 1, 1, 0});
  const LookupReport found = Lookup(space, Keys(0, 4)).value();
  PageLayout layout;
  layout.type = DataType::kF32;
  layout.order = PageOrder::kHnd;
  std::vector<float> rows(2 * RowBytes(spec));
  const absl::StatusOr<LoadReport> strided =
      Load(found.lease, 0, 4, std::as_writable_bytes(std::span(rows)), kTensors, layout);
  ASSERT_TRUE(strided.ok()) << strided.status();
  EXPECT_EQ(strided->degraded, (std::vector<uint64_t>{0, 1, 2}));
  const std::vector<std::byte> wanted = Block(spec, 1, 1);
  const auto of_block = static_cast<size_t>(spec.rows() * 2 * 128);
  for (int layer = 0; layer < 3; layer++)
    for (int side = 0; side < 2; side++)
      for (int token = 0; token < 20; token++)
        for (int head = 0; head < 2; head++)
          for (int d = 0; d < 64; d++) {
            const int page = (layer * 2 + side) * 20 * 2 * 64;
            uint16_t half = 0;
            std::memcpy(&half, &wanted[static_cast<size_t>(page + (token * 2 + head) * 64 + d) * 2], 2);
            ASSERT_EQ(F32ToF16(rows[of_block + static_cast<size_t>(page + (head * 20 + token) * 64 + d)]),
                      half);
          }
  // As bytes: coded in the namespace's pair once more, as if the rows that are left had been stored.
  std::vector<std::byte> coded(4 * BytesAs(spec, "q8_0"));
  const absl::StatusOr<LoadReport> bytes = Load(found.lease, 0, 4, coded);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(bytes->degraded, (std::vector<uint64_t>{0, 1, 2}));
  // In place: only what is of the namespace's pair.
  const absl::StatusOr<LoadReport> in_place = LoadInPlace(found.lease, 0, 4);
  ASSERT_TRUE(in_place.ok()) << in_place.status();
  EXPECT_EQ(in_place->degraded, (std::vector<uint64_t>{0, 1, 2}));
  EXPECT_EQ(std::vector<int64_t>(in_place->offsets.begin(), in_place->offsets.begin() + 3),
            (std::vector<int64_t>{-1, -1, -1}));
  EXPECT_GE(in_place->offsets[3], 0);
  EXPECT_TRUE(cache_->ReleasePlaces(in_place->places));
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  const NamespaceSpec plain = Degrading("q8_0", {}, 20);
  const NamespaceId other = Open(plain);
  ASSERT_TRUE(Store(other, Keys(0, 4), coded).ok());
  const LookupReport copies = Lookup(other, Keys(0, 4)).value();
  std::vector<std::byte> again(4 * RowBytes(spec));
  ASSERT_TRUE(Load(copies.lease, 0, 4, again, kTensors).ok());
  EXPECT_TRUE(cache_->ReleaseLease(copies.lease));
  const std::vector<CachePair> back{Pair("turbo4"), Pair("q8_0")};
  for (int key = 0; key < 4; key++) {
    const std::vector<std::byte> expected =
        key < 3 ? AfterRungs(spec, RowsOf(spec, key, 1), back) : Block(spec, key, 0);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(),
                           again.begin() + static_cast<int64_t>(static_cast<size_t>(key) * RowBytes(spec))))
        << key;
  }
}

// Who has a lease was told what its blocks are.
TEST_F(KeyedLadderTest, LeasedBlocksKeepTheirBits) {
  StartIdle();
  const NamespaceSpec spec = Degrading("q8_0", {"turbo4"});
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 6).ok());
  const LookupReport held = Lookup(space, Keys(0, 2), absl::Seconds(300)).value();
  EXPECT_EQ(RecodeIdle(), 4u);
  EXPECT_EQ(RecodeIdle(), 0u);
  ExpectRungs(space, spec, 0, {0, 0, 1, 1, 1, 1});
  EXPECT_TRUE(cache_->ReleaseLease(held.lease));
  EXPECT_EQ(RecodeIdle(), 2u);
  ExpectRungs(space, spec, 0, {1, 1, 1, 1, 1, 1});
}

TEST_F(KeyedLadderTest, ABlockThatIsLeasedWhileItIsRecodedKeepsItsBits) {
  StartIdle();
  const NamespaceSpec spec = Degrading("q8_0", {"turbo4"});
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 4).ok());
  LookupReport found;
  std::vector<std::byte> loaded(2 * RowBytes(spec));
  bool inside = false;
  host_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kRecode || inside) return;
    inside = true;
    found = Lookup(space, Keys(0, 2)).value();
    EXPECT_TRUE(Load(found.lease, 0, 2, loaded, kTensors).ok());
  });
  EXPECT_EQ(RecodeIdle(), 2u);
  host_->SetHook(nullptr);
  EXPECT_TRUE(inside);
  EXPECT_TRUE(found.degraded.empty());
  std::vector<std::byte> wanted = Block(spec, 0, 0), second = Block(spec, 1, 0);
  wanted.insert(wanted.end(), second.begin(), second.end());
  EXPECT_EQ(loaded, wanted);
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  ExpectRungs(space, spec, 0, {0, 0, 1, 1});
}

TEST_F(KeyedLadderTest, WhatIsReadWhileTheLeaseEndsIsNotRecodedUnderTheReader) {
  StartIdle();
  const NamespaceSpec spec = Degrading("q8_0", {"turbo4"});
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 2).ok());
  const LookupReport found = Lookup(space, Keys(0, 2)).value();
  uint64_t recoded = 0;
  bool inside = false;
  host_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kDecode || inside) return;
    inside = true;
    EXPECT_TRUE(cache_->ReleaseLease(found.lease));
    recoded += RecodeIdle();
  });
  std::vector<std::byte> loaded(2 * RowBytes(spec));
  ASSERT_TRUE(Load(found.lease, 0, 2, loaded, kTensors).ok());
  host_->SetHook(nullptr);
  EXPECT_TRUE(inside);
  EXPECT_EQ(recoded, 0u);
  std::vector<std::byte> wanted = Block(spec, 0, 0), second = Block(spec, 1, 0);
  wanted.insert(wanted.end(), second.begin(), second.end());
  EXPECT_EQ(loaded, wanted);
  EXPECT_EQ(RecodeIdle(), 2u);
}

TEST_F(KeyedLadderTest, AFailedRecodingLeavesTheBlockAndADamagedOneIsLost) {
  StartIdle();
  const NamespaceSpec spec = Degrading("f16", {"q8_0", "turbo4"});
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 3).ok());
  host_->Fail(FaultyBackend::kRecode, 1);
  EXPECT_EQ(RecodeIdle(), 0u);
  ExpectRungs(space, spec, 0, {0, 0, 0});
  EXPECT_EQ(RecodeIdle(), 3u);
  ExpectRungs(space, spec, 0, {1, 1, 1});
  const LookupReport found = Lookup(space, Keys(0, 3)).value();
  host_->Fail(FaultyBackend::kDecode, 1);
  std::vector<std::byte> rows(3 * RowBytes(spec)), bytes(3 * BytesAs(spec, "f16"));
  EXPECT_EQ(Load(found.lease, 0, 3, rows, kTensors).status().code(), absl::StatusCode::kInternal);
  host_->Fail(FaultyBackend::kRecode, 1);
  EXPECT_EQ(Load(found.lease, 0, 3, bytes).status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(Load(found.lease, 0, 3, bytes).ok());
  EXPECT_TRUE(cache_->ReleaseLease(found.lease));
  EXPECT_EQ(RecodeIdle(), 3u);
  EXPECT_EQ(RecodeIdle(), 0u) << "the last rung";
  EXPECT_EQ(cache_->DeleteNamespace(space).value(), 3u);
  EXPECT_EQ(cache_->Stats().degraded_keyed_blocks, 0u);
}

// They move, rest on the disk and come back with the bits that they have.
TEST_F(KeyedLadderTest, RecodedBlocksGoToTheDiskAndOutliveARestart) {
  StartIdle(1 << 20, 4 << 20);
  const NamespaceSpec spec = Degrading("f16", {"q8_0", "turbo4"}, 64);
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 2).ok());
  ASSERT_TRUE(cache_->PersistNamespace(space).ok());  // whole, and they stay so
  ASSERT_TRUE(StoreRows(space, spec, 2, 3).ok());
  EXPECT_EQ(RecodeIdle(), 3u);
  ExpectRungs(space, spec, 0, {0, 0, 1, 1, 1});
  ASSERT_TRUE(cache_->PersistNamespace(space).ok());
  EXPECT_EQ(Info(space).durable_blocks, 5u);
  EXPECT_EQ(RecodeIdle(), 0u) << "durable";
  ExpectRungs(space, spec, 0, {0, 0, 1, 1, 1});
  ASSERT_TRUE(StoreRows(space, spec, 5, 1).ok());  // not durable
  Restart(true);
  EXPECT_EQ(Info(space).blocks, 5u);
  EXPECT_EQ(Info(space).degraded_blocks, 3u);
  EXPECT_EQ(Info(space).spec.degrade, spec.degrade);
  ExpectRungs(space, spec, 0, {0, 0, 1, 1, 1});
  EXPECT_EQ(Open(spec), space);
  cache_->CheckInvariants();
  for (int round = 0; round < 6; round++) RecodeIdle();
  ExpectRungs(space, spec, 0, {0, 0, 1, 1, 1});
  EXPECT_EQ(cache_->Stats().checksum_failures, 0u);
}

TEST_F(KeyedLadderTest, LookupsThatDoNotLeaseSayWhatIsDegraded) {
  StartIdle();
  const NamespaceSpec spec = Degrading("q8_0", {"turbo4"});
  const NamespaceId space = Open(spec);
  ASSERT_TRUE(StoreRows(space, spec, 0, 2).ok());
  EXPECT_EQ(RecodeIdle(), 2u);
  ASSERT_TRUE(StoreRows(space, spec, 2, 1).ok());
  const absl::StatusOr<LookupReport> found = Lookup(space, Keys(0, 4), absl::ZeroDuration());
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->hits, 3u);
  EXPECT_EQ(found->degraded, (std::vector<uint64_t>{0, 1}));
}

// The first 40 bytes of a block are those of version 1, in which there are no ladders.
TEST(KeyedManifestTest, GoldenBytesOfBothVersions) {
  KeyedManifest manifest;
  manifest.written_at = 7;
  manifest.spec = Tensors(2, 32, 1, 64, 64, "q8_0");
  manifest.persistence = Persistence::kAll;
  manifest.id = HashNamespaceSpec(manifest.spec);
  manifest.blocks = {{{1, 2}, 4096, 3, 4, 0}, {{5, 6}, 8192, 7, 8, 0}};
  for (const char* version : {"v1", "v2"}) {
    const bool second = version[1] == '2';
    if (second) {
      manifest.spec.degrade = {Pair("turbo4"), Pair("turbo3")};
      manifest.id = HashNamespaceSpec(manifest.spec);
      manifest.blocks[1].rung = 2;
      if (std::getenv("KVTIDE_WRITE_GOLDEN") != nullptr)
        std::ofstream(SourcePath("tests/golden/cache/keyed_manifest_v2.bin"), std::ios::binary)
            << EncodeKeyedManifest(manifest);
    }
    std::ifstream file(SourcePath(absl::StrCat("tests/golden/cache/keyed_manifest_", version, ".bin")),
                       std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    const absl::StatusOr<KeyedManifest> read = DecodeKeyedManifest(text.str());
    ASSERT_TRUE(read.ok()) << version << ": " << read.status();
    EXPECT_EQ(read->spec, manifest.spec);
    EXPECT_EQ(read->id, manifest.id) << "the ids of namespaces have changed";
    EXPECT_EQ(read->written_at, 7);
    EXPECT_EQ(read->persistence, Persistence::kAll);
    ASSERT_EQ(read->blocks.size(), 2u);
    EXPECT_EQ(read->blocks[1].key, manifest.blocks[1].key);
    EXPECT_EQ(read->blocks[1].offset, 8192u);
    EXPECT_EQ(read->blocks[1].checksum, 8u);
    EXPECT_EQ(read->blocks[0].rung, 0);
    EXPECT_EQ(read->blocks[1].rung, manifest.blocks[1].rung);
    if (second) {
      EXPECT_EQ(EncodeKeyedManifest(manifest), text.str());
    }
  }
  std::string bytes = EncodeKeyedManifest(manifest);
  bytes.back() = 3;
  EXPECT_TRUE(IsError(DecodeKeyedManifest(bytes).status(), absl::StatusCode::kDataLoss, "none of its pairs"));
  bytes[4] = 3;
  EXPECT_TRUE(IsError(DecodeKeyedManifest(bytes).status(), absl::StatusCode::kFailedPrecondition,
                      "in version 3, this build reads 1 to 2"));
}

}  // namespace
}  // namespace kvtide::testing
