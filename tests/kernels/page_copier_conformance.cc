#include "tests/kernels/page_copier_conformance.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/format/page_codec.h"
#include "kernels/store_row.h"

namespace kvtide::testing {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// How an engine orders a page.
enum class Order {
  kHeadsFirst,   // [heads][tokens][K dim, V dim]: FlashAttention's cells
  kTokensFirst,  // [tokens][heads][K dim, V dim]
  kSplit,        // [K, V][tokens][heads][dim], with a gap behind the page
  kTransposed,   // K [heads][dim][tokens], V [heads][tokens][dim]
  kOdd,          // as kTokensFirst, each token behind one unused value
};

struct Engine {
  Order order = Order::kHeadsFirst;
  DataType type = DataType::kBf16;
  int tokens = 16, heads = 2, dim_k = 64, dim_v = 64, layers = 3, chunk_pages = 4, pages = 23;
  std::string pair = "turbo4/turbo4";
};

PageCopyOptions OptionsOf(const Engine& e) {
  PageCopyOptions options;
  options.type = e.type;
  options.tokens = e.tokens;
  options.kv_heads = e.heads;
  options.head_dim_k = e.dim_k;
  options.head_dim_v = e.dim_v;
  options.pages = e.pages;
  options.chunk_pages = e.chunk_pages;
  options.pair = *ParseCachePair(e.pair);
  const int64_t cell = e.dim_k + e.dim_v, k_values = int64_t{e.tokens} * e.heads * e.dim_k;
  int64_t values = int64_t{e.tokens} * e.heads * cell;
  switch (e.order) {
    case Order::kHeadsFirst:
      options.k = {0, cell, e.tokens * cell, 1};
      options.v = {e.dim_k, cell, e.tokens * cell, 1};
      break;
    case Order::kTokensFirst:
      options.k = {0, e.heads * cell, cell, 1};
      options.v = {e.dim_k, e.heads * cell, cell, 1};
      break;
    case Order::kSplit:
      options.k = {0, int64_t{e.heads} * e.dim_k, e.dim_k, 1};
      options.v = {k_values, int64_t{e.heads} * e.dim_v, e.dim_v, 1};
      values += 64;
      break;
    case Order::kTransposed:
      options.k = {0, 1, int64_t{e.tokens} * e.dim_k, e.tokens};
      options.v = {k_values, e.dim_v, int64_t{e.tokens} * e.dim_v, 1};
      break;
    case Order::kOdd:
      options.k = {1, e.heads * cell + 1, cell, 1};
      options.v = {1 + e.dim_k, e.heads * cell + 1, cell, 1};
      values += e.tokens;
      break;
  }
  options.page_stride = values * static_cast<int64_t>(DataTypeBytes(e.type));
  options.piece_bytes = 3 * ChunkBytes(options, Size(e.layers));
  return options;
}

// Pages on the host beside those in the world, all layers one after the other.
class Pages {
 public:
  Pages(PageCopierWorld& world, const PageCopyOptions& options, int layers, unsigned seed)
      : world_(world), options_(options), bytes_(Size(options.pages) * Size(options.page_stride)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int l = 0; l < layers; l++) {
      layers_.push_back(world.Allocate(bytes_));
      std::vector<std::byte>& host = host_.emplace_back(bytes_);
      if (options.page_bytes > 0) {
        for (std::byte& byte : host) byte = static_cast<std::byte>(random());
      } else {
        const MutableTensorView values(host.data(), options.type);
        for (size_t i = 0; i < bytes_ / DataTypeBytes(options.type); i++) values.Set(i, 3 * normal(random));
      }
      Upload();
    }
  }
  void Upload() {
    for (size_t l = 0; l < layers_.size(); l++) world_.Upload(host_[l].data(), layers_[l], bytes_);
  }
  std::span<std::byte* const> layers() const { return layers_; }
  std::byte* Page(size_t layer, int32_t page) { return host_[layer].data() + page * options_.page_stride; }
  size_t Index(const PageRows& side, int token, int head, int dim) const {
    return Size(side.first + token * side.token + head * side.head + dim * side.dim);
  }
  float At(size_t layer, int32_t page, const PageRows& side, int token, int head, int dim) {
    return TensorView{Page(layer, page), options_.type}.At(Index(side, token, head, dim));
  }
  void Set(size_t layer, int32_t page, const PageRows& side, int token, int head, int dim, float value) {
    MutableTensorView(Page(layer, page), options_.type).Set(Index(side, token, head, dim), value);
  }
  // The world has what the host has.
  void ExpectEqual() {
    for (size_t l = 0; l < layers_.size(); l++) {
      std::vector<std::byte> there(bytes_);
      world_.Download(layers_[l], there.data(), bytes_);
      for (int32_t page = 0; page < options_.pages; page++)
        ASSERT_EQ(std::memcmp(there.data() + page * options_.page_stride, Page(l, page),
                              Size(options_.page_stride)),
                  0)
            << "layer " << l << " page " << page;
    }
  }

 private:
  PageCopierWorld& world_;
  const PageCopyOptions options_;
  const size_t bytes_;
  std::vector<std::byte*> layers_;
  std::vector<std::vector<std::byte>> host_;
};

std::vector<int32_t> SomePages(int count, int of, unsigned seed) {
  std::vector<int32_t> all(Size(of));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(seed));
  all.resize(Size(count));
  return all;
}

// Calls each(record of the chunk, layer, token of the chunk that the record begins with, head).
template <class F>
void ForEachRecord(const PageCopyOptions& options, size_t layers, F each) {
  size_t record = 0;
  for (size_t layer = 0; layer < layers; layer++)
    for (int token = 0; token < options.tokens * options.chunk_pages; token += kBlockTokens)
      for (int head = 0; head < options.kv_heads; head++) each(record++, layer, token, head);
}

std::vector<std::byte> Expected(Pages& pages, const PageCopyOptions& options, std::span<const int32_t> ids) {
  const BlockLayout layout = ChunkLayout(options, pages.layers().size(), options.pair);
  std::vector<std::byte> out(ids.size() / Size(options.chunk_pages) * layout.block_bytes());
  for (size_t chunk = 0; chunk * layout.block_bytes() < out.size(); chunk++)
    ForEachRecord(options, pages.layers().size(), [&](size_t record, size_t layer, int first, int head) {
      std::byte* const to = out.data() + chunk * layout.block_bytes() + record * layout.record_bytes();
      for (const bool key : {true, false}) {
        const HalfLayout& half = key ? layout.k() : layout.v();
        std::vector<float> rows;
        for (int t = first; t < first + kBlockTokens; t++)
          for (int d = 0; d < half.head_dim; d++)
            rows.push_back(F16ToF32(
                F32ToF16(pages.At(layer, ids[chunk * Size(options.chunk_pages) + Size(t / options.tokens)],
                                  key ? options.k : options.v, t % options.tokens, head, d))));
        EncodeHalf(key ? options.pair.k : options.pair.v, key ? Side::kKey : Side::kValue, half, nullptr,
                   rows.data(), kBlockTokens, key ? to : to + layout.v_codes());
      }
    });
  return out;
}

// Puts the values of a payload into pages on the host: ids[i] is its page skip + i.
void Decode(const std::byte* payload, int skip, std::span<const int32_t> ids, const PageCopyOptions& options,
            Pages& pages) {
  const BlockLayout layout = ChunkLayout(options, pages.layers().size(), options.pair);
  const size_t end = Size(skip) + ids.size(), per_chunk = Size(options.chunk_pages);
  for (size_t chunk = 0; chunk * per_chunk < end; chunk++)
    ForEachRecord(options, pages.layers().size(), [&](size_t record, size_t layer, int first, int head) {
      const std::byte* const from = payload + chunk * layout.block_bytes() + record * layout.record_bytes();
      for (const bool key : {true, false}) {
        const HalfLayout& half = key ? layout.k() : layout.v();
        std::vector<float> rows(kBlockTokens * Size(half.head_dim));
        DecodeHalf(key ? options.pair.k : options.pair.v, key ? Side::kKey : Side::kValue, half, nullptr,
                   key ? from : from + layout.v_codes(), rows.data());
        const float largest = options.type == DataType::kF16 ? kMaxF16 : kMaxF32;
        for (int t = first; t < first + kBlockTokens; t++) {
          const size_t at = chunk * per_chunk + Size(t / options.tokens);
          if (at < Size(skip) || at >= end) continue;
          for (int d = 0; d < half.head_dim; d++)
            pages.Set(layer, ids[at - Size(skip)], key ? options.k : options.v, t % options.tokens, head, d,
                      std::clamp(rows[Size(t - first) * Size(half.head_dim) + Size(d)], -largest, largest));
        }
      }
    });
}

std::vector<Engine> Engines() {
  std::vector<Engine> out;
  for (const Order order :
       {Order::kHeadsFirst, Order::kTokensFirst, Order::kSplit, Order::kTransposed, Order::kOdd})
    for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
      out.push_back({.order = order, .type = type});
  for (const int tokens : {16, 32, 64, 128})
    out.push_back({.order = Order::kTokensFirst,
                   .tokens = tokens,
                   .layers = 2,
                   .chunk_pages = std::max(1, 64 / tokens),
                   .pages = 9 * std::max(1, 64 / tokens)});
  for (const char* pair : {"f16/f16", "bf16/bf16", "q8_0/turbo4", "q8_0/q5_0", "turbo3/turbo2", "q4_0/iso3"})
    out.push_back({.heads = 3, .dim_k = 128, .dim_v = 128, .layers = 2, .pair = pair});
  out.push_back({.heads = 1, .dim_k = 80, .dim_v = 48, .layers = 1, .pair = "q8_0/q8_0"});
  out.push_back({.heads = 1, .dim_k = 256, .dim_v = 64, .layers = 1, .pair = "turbo4/q8_0"});
  // More records than a launch has.
  out.push_back({.heads = 8,
                 .dim_k = 16,
                 .dim_v = 16,
                 .layers = 70,
                 .chunk_pages = 4,
                 .pages = 12,
                 .pair = "q8_0/q8_0"});
  return out;
}

std::string Name(const Engine& e) {
  return absl::StrCat("order ", static_cast<int>(e.order), " ", DataTypeName(e.type), " tokens ", e.tokens,
                      " heads ", e.heads, " dims ", e.dim_k, "/", e.dim_v, " layers ", e.layers, " ", e.pair);
}

TEST_P(PageCopierConformance, RowsBecomeTheRecordsOfTheFormatAndComeBack) {
  for (const Engine& engine : Engines()) {
    SCOPED_TRACE(Name(engine));
    const auto world = GetParam().make();
    const PageCopyOptions options = OptionsOf(engine);
    Pages pages(*world, options, engine.layers, 1), others(*world, options, engine.layers, 2);
    const auto reading = world->Make(options, pages.layers());
    ASSERT_TRUE(reading.ok()) << reading.status();
    const auto writing = world->Make(options, others.layers());
    ASSERT_TRUE(writing.ok()) << writing.status();
    const std::vector<int32_t> from = SomePages(2 * engine.chunk_pages, engine.pages, 3);
    const std::vector<std::byte> wanted = Expected(pages, options, from);
    ASSERT_EQ(wanted.size(), 2 * (*reading)->chunk_bytes());
    std::vector<std::byte> payload(wanted.size());
    ASSERT_TRUE((*reading)->Read(0, from, payload.data()).ok());
    ASSERT_TRUE((*reading)->Wait(0).ok());
    ASSERT_EQ(std::memcmp(payload.data(), wanted.data(), wanted.size()), 0);
    pages.ExpectEqual();
    // All but the first page, and not to the end of the last chunk.
    const int skip = engine.chunk_pages > 1 ? 1 : 0;
    const std::vector<int32_t> to =
        SomePages(2 * engine.chunk_pages - skip - (engine.chunk_pages > 2 ? 1 : 0), engine.pages, 4);
    ASSERT_TRUE((*writing)->Write(1, payload.data(), skip, to).ok());
    ASSERT_TRUE((*writing)->Wait(1).ok());
    Decode(wanted.data(), skip, to, options, others);
    ASSERT_NO_FATAL_FAILURE(others.ExpectEqual());
  }
}

TEST_P(PageCopierConformance, BytesComeBackAsTheyAre) {
  struct Bytes {
    size_t page;
    int64_t stride;
    int chunk_pages;
  };
  for (const Bytes& bytes : {Bytes{4096, 4096, 1},
                             {67584, 67584, 1},
                             {4096, 4112, 4},
                             {100, 128, 3},
                             {1, 3, 2},
                             {40000, 40000, 2}}) {
    SCOPED_TRACE(absl::StrCat(bytes.page, " bytes, ", bytes.stride, " apart"));
    const auto world = GetParam().make();
    PageCopyOptions options;
    options.page_bytes = bytes.page;
    options.page_stride = bytes.stride;
    options.chunk_pages = bytes.chunk_pages;
    options.pages = 11;
    constexpr int kLayers = 5;
    options.piece_bytes = 3 * ChunkBytes(options, kLayers);
    Pages pages(*world, options, kLayers, 1);
    const auto copier = world->Make(options, pages.layers());
    ASSERT_TRUE(copier.ok()) << copier.status();
    const std::vector<int32_t> from = SomePages(3 * bytes.chunk_pages, options.pages, 3);
    std::vector<std::byte> payload(3 * (*copier)->chunk_bytes());
    ASSERT_TRUE((*copier)->Read(1, from, payload.data()).ok());
    ASSERT_TRUE((*copier)->Wait(1).ok());
    const auto at = [&](size_t layer, size_t page) {
      const size_t per_chunk = Size(bytes.chunk_pages);
      return payload.data() + (page / per_chunk) * (*copier)->chunk_bytes() +
             (layer * per_chunk + page % per_chunk) * bytes.page;
    };
    for (size_t l = 0; l < kLayers; l++)
      for (size_t p = 0; p < from.size(); p++)
        ASSERT_EQ(std::memcmp(at(l, p), pages.Page(l, from[p]), bytes.page), 0) << l << " " << p;
    // Into other pages of the same layers, from the second on.
    const int skip = bytes.chunk_pages > 1 ? 1 : 0;
    const std::vector<int32_t> to = SomePages(3 * bytes.chunk_pages - skip, options.pages, 5);
    ASSERT_TRUE((*copier)->Write(0, payload.data(), skip, to).ok());
    ASSERT_TRUE((*copier)->Wait(0).ok());
    for (size_t l = 0; l < kLayers; l++)
      for (size_t p = 0; p < to.size(); p++)
        std::memcpy(pages.Page(l, to[p]), at(l, p + Size(skip)), bytes.page);
    ASSERT_NO_FATAL_FAILURE(pages.ExpectEqual());
  }
}

// Chunks in memory that may only be read, some of them neighbours, in another order than they are wanted.
TEST_P(PageCopierConformance, ChunksComeFromWhereTheyLie) {
  for (const bool rows : {false, true}) {
    SCOPED_TRACE(rows ? "rows" : "bytes");
    const auto world = GetParam().make();
    Engine engine{.pages = 40};
    PageCopyOptions options = OptionsOf(engine);
    if (!rows) options.page_bytes = 1000;
    constexpr size_t kChunks = 6;
    options.piece_bytes = kChunks * ChunkBytes(options, Size(engine.layers));
    Pages pages(*world, options, engine.layers, 1), others(*world, options, engine.layers, 2);
    const auto reading = world->Make(options, pages.layers()),
               writing = world->Make(options, others.layers());
    ASSERT_TRUE(reading.ok() && writing.ok());
    const size_t chunk = (*reading)->chunk_bytes();
    const std::vector<int32_t> from =
        SomePages(static_cast<int>(kChunks) * engine.chunk_pages, options.pages, 3);
    std::vector<std::byte> payload(kChunks * chunk);
    ASSERT_TRUE((*reading)->Read(0, from, payload.data()).ok());
    ASSERT_TRUE((*reading)->Wait(0).ok());
    // Places in the order of memory: chunk 3, 4, a gap, 0, 1, 2, 5.
    const size_t places[kChunks] = {3, 4, 5, 0, 1, 6};
    const size_t bytes = (8 * chunk + 4095) / 4096 * 4096;
    const int file = ::memfd_create("tier", MFD_CLOEXEC);
    ASSERT_EQ(::ftruncate(file, static_cast<off_t>(bytes)), 0);
    for (size_t c = 0; c < kChunks; c++)
      ASSERT_EQ(::pwrite(file, payload.data() + c * chunk, chunk, static_cast<off_t>(places[c] * chunk)),
                static_cast<ssize_t>(chunk));
    void* const mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    ::close(file);
    const auto* const tier = static_cast<const std::byte*>(mapped);
    const absl::Status pinned = (*writing)->PinReadOnly(tier, bytes);
    EXPECT_TRUE(pinned.ok() || absl::IsUnimplemented(pinned)) << pinned;
    std::vector<const std::byte*> chunks;
    for (const size_t place : places) chunks.push_back(tier + place * chunk);
    const std::vector<int32_t> to =
        SomePages(static_cast<int>(kChunks) * engine.chunk_pages - 3, options.pages, 4);
    ASSERT_TRUE((*writing)->WriteChunks(1, chunks, 2, to).ok());
    ASSERT_TRUE((*writing)->Wait(1).ok());
    // As from one payload.
    const auto again = world->Make(options, pages.layers());
    ASSERT_TRUE((*again)->Write(0, payload.data(), 2, to).ok());
    ASSERT_TRUE((*again)->Wait(0).ok());
    for (const int32_t page : to)
      for (size_t l = 0; l < pages.layers().size(); l++) {
        const size_t wanted = rows ? Size(options.page_stride) : options.page_bytes;
        std::vector<std::byte> one(wanted), other(wanted);
        world->Download(pages.layers()[l] + page * options.page_stride, one.data(), wanted);
        world->Download(others.layers()[l] + page * options.page_stride, other.data(), wanted);
        ASSERT_EQ(one, other) << "layer " << l << " page " << page;
      }
    const auto refused = [&](const absl::Status& status, absl::string_view words) {
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_NE(status.message().find(words), absl::string_view::npos) << status;
    };
    refused((*writing)->WriteChunks(0, std::span(chunks).first(5), 2, to), "5 chunks, the pages lie in 6");
    chunks[4] = nullptr;
    refused((*writing)->WriteChunks(0, chunks, 2, to), "nowhere");
    (*writing)->Unpin(tier);
    ::munmap(mapped, bytes);
  }
}

TEST_P(PageCopierConformance, SlotsTakeTurns) {
  const auto world = GetParam().make();
  const Engine engine{.pages = 64};
  const PageCopyOptions options = OptionsOf(engine);
  Pages pages(*world, options, engine.layers, 1), others(*world, options, engine.layers, 2);
  const auto reading = world->Make(options, pages.layers()), writing = world->Make(options, others.layers());
  ASSERT_TRUE(reading.ok() && writing.ok());
  const size_t chunk = (*reading)->chunk_bytes();
  std::vector<std::byte> payloads[PageCopier::kSlots];
  for (auto& payload : payloads) payload.resize(chunk);
  EXPECT_TRUE((*reading)->Pin(payloads[0].data(), chunk).ok());
  std::vector<std::vector<int32_t>> from, to;
  const std::vector<int32_t> targets = SomePages(options.pages, options.pages, 9);
  for (int piece = 0; piece < 7; piece++) {
    from.push_back(SomePages(engine.chunk_pages, options.pages, static_cast<unsigned>(piece)));
    to.emplace_back(targets.begin() + piece * engine.chunk_pages,
                    targets.begin() + (piece + 1) * engine.chunk_pages);
  }
  for (int piece = 0; piece < 7; piece++) {
    const int slot = piece % PageCopier::kSlots;
    ASSERT_TRUE((*writing)->Wait(slot).ok());  // the payload is free
    ASSERT_TRUE((*reading)->Read(slot, from[Size(piece)], payloads[slot].data()).ok());
    ASSERT_TRUE((*reading)->Wait(slot).ok());
    ASSERT_TRUE((*writing)->Write(slot, payloads[slot].data(), 0, to[Size(piece)]).ok());
    Decode(Expected(pages, options, from[Size(piece)]).data(), 0, to[Size(piece)], options, others);
  }
  for (int slot = 0; slot < PageCopier::kSlots; slot++) ASSERT_TRUE((*writing)->Wait(slot).ok());
  (*reading)->Unpin(payloads[0].data());
  ASSERT_NO_FATAL_FAILURE(others.ExpectEqual());
}

TEST_P(PageCopierConformance, ValuesThatF16DoesNotHoldAreNamedWithTheirChunk) {
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -70000.f}) {
    const auto world = GetParam().make();
    const Engine engine;
    const PageCopyOptions options = OptionsOf(engine);
    Pages pages(*world, options, engine.layers, 1);
    const auto copier = world->Make(options, pages.layers());
    ASSERT_TRUE(copier.ok());
    const std::vector<int32_t> ids = SomePages(3 * engine.chunk_pages, options.pages, 3);
    pages.Set(2, ids[Size(engine.chunk_pages) + 3], options.v, engine.tokens - 1, 1, engine.dim_v - 1, value);
    pages.Upload();
    std::vector<std::byte> payload(3 * (*copier)->chunk_bytes());
    ASSERT_TRUE((*copier)->Wait(0).ok());
    absl::Status read = (*copier)->Read(0, ids, payload.data());
    const absl::Status waited = (*copier)->Wait(0);
    if (read.ok()) read = waited;
    EXPECT_TRUE(absl::IsInvalidArgument(read)) << read;
    EXPECT_NE(read.message().find("chunk 1"), absl::string_view::npos) << read;
    // Nothing of it stays.
    const std::span<const int32_t> first = std::span(ids).first(Size(engine.chunk_pages));
    ASSERT_TRUE((*copier)->Read(0, first, payload.data()).ok());
    ASSERT_TRUE((*copier)->Wait(0).ok());
    EXPECT_EQ(std::memcmp(payload.data(), Expected(pages, options, first).data(), (*copier)->chunk_bytes()),
              0);
  }
}

TEST_P(PageCopierConformance, CallsThatDoNotFitSayWhy) {
  const auto world = GetParam().make();
  const Engine engine;
  const PageCopyOptions options = OptionsOf(engine);
  Pages pages(*world, options, engine.layers, 1);
  const auto copier = world->Make(options, pages.layers());
  ASSERT_TRUE(copier.ok());
  std::vector<std::byte> payload(3 * (*copier)->chunk_bytes());
  const auto refused = [&](const absl::Status& status, absl::string_view words) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find(words), absl::string_view::npos) << status;
  };
  const std::vector<int32_t> chunk = SomePages(engine.chunk_pages, options.pages, 1);
  refused((*copier)->Read(2, chunk, payload.data()), "slot 2");
  refused((*copier)->Read(0, std::span(chunk).first(3), payload.data()), "no whole chunks");
  refused((*copier)->Read(0, std::vector<int32_t>{0, 1, 2, 23}, payload.data()), "page 23 of 23");
  refused((*copier)->Read(0, std::vector<int32_t>{0, 1, 2, -1}, payload.data()), "page -1");
  refused((*copier)->Read(0, std::vector<int32_t>(16), payload.data()), "more than a piece");
  refused((*copier)->Write(0, payload.data(), 4, chunk), "skip is 4");
  EXPECT_TRUE((*copier)->Read(0, {}, payload.data()).ok());
  EXPECT_TRUE((*copier)->Write(0, payload.data(), 0, {}).ok());
  EXPECT_TRUE((*copier)->Wait(0).ok());
  pages.ExpectEqual();

  const auto made = [&](const auto& change, absl::string_view words) {
    PageCopyOptions other = options;
    change(other);
    refused(world->Make(other, pages.layers()).status(), words);
  };
  made([](PageCopyOptions& o) { o.tokens = 15; }, "no multiple of 64");
  made([](PageCopyOptions& o) { o.page_stride -= 2; }, "beyond a page");
  made([](PageCopyOptions& o) { o.v.head = int64_t{1} << 62; }, "beyond a page");
  made([](PageCopyOptions& o) { o.piece_bytes = 1; }, "a chunk");
  made([](PageCopyOptions& o) { o.pair.k = CalibratedTypes().front(); }, "needs a profile");
  made([](PageCopyOptions& o) { o.page_bytes = Size(o.page_stride) + 1; }, "apart");
  made([](PageCopyOptions& o) { o.head_dim_k = 60; }, "60");
  refused(world->Make(options, {}).status(), "0 layers");
}

}  // namespace

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PageCopierConformance);

}  // namespace kvtide::testing
