// Loads of pages by every way to a pool: what was stored stands in the engine's pages, whatever the pieces
// and wherever in a chunk a load begins and ends; what fails in the middle is never called written.
#include "clients/cpp/page_load.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_page_copier.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using client::BlockStore;
using client::LoadPages;
using client::PageLoad;
using client::PageLoadReport;

constexpr int kLayers = 3, kPages = 64, kChunkPages = 4, kChunks = 7;
constexpr size_t kPageBytes = 320, kChunkBytes = kLayers * kChunkPages * kPageBytes;

// Works late: what a slot was given is written when it is waited for, from the payload as it is then. Fails
// at the n-th of all waits that have something to do.
class LateCopier final : public PageCopier {
 public:
  explicit LateCopier(std::unique_ptr<PageCopier> inner) : inner_(std::move(inner)) {}
  size_t chunk_bytes() const override { return inner_->chunk_bytes(); }
  absl::Status After(void* event) override { return inner_->After(event); }
  absl::Status Read(int slot, std::span<const int32_t> pages, std::byte* payload) override {
    return inner_->Read(slot, pages, payload);
  }
  absl::Status Write(int slot, const std::byte* payload, int skip, std::span<const int32_t> pages) override {
    const size_t end = static_cast<size_t>(skip) + pages.size();
    std::vector<const std::byte*> chunks;
    for (size_t page = 0; page < end; page += kChunkPages)
      chunks.push_back(payload + page / kChunkPages * kChunkBytes);
    return WriteChunks(slot, chunks, skip, pages);
  }
  absl::Status WriteChunks(int slot, std::span<const std::byte* const> chunks, int skip,
                           std::span<const int32_t> pages) override {
    EXPECT_FALSE(late_.contains(slot)) << "the slot is still at work";
    late_[slot] = {{chunks.begin(), chunks.end()}, skip, {pages.begin(), pages.end()}};
    return absl::OkStatus();
  }
  absl::Status Wait(int slot) override {
    const auto at = late_.find(slot);
    if (at == late_.end()) return absl::OkStatus();
    const Late late = std::move(at->second);
    late_.erase(at);
    if (--until_failure_ == 0) return absl::InternalError("planted");
    if (before_write_) before_write_();
    EXPECT_TRUE(inner_->WriteChunks(slot, late.chunks, late.skip, late.pages).ok());
    return inner_->Wait(slot);
  }
  absl::Status Pin(std::byte*, size_t) override { return absl::OkStatus(); }
  absl::Status PinReadOnly(const std::byte*, size_t) override { return absl::OkStatus(); }
  void Unpin(const std::byte*) override {}
  size_t bytes() const override { return 0; }

  void FailAtWait(int n) { until_failure_ = n; }
  // Called before anything is written.
  void BeforeWrites(std::function<void()> call) { before_write_ = std::move(call); }
  bool idle() const { return late_.empty(); }

 private:
  struct Late {
    std::vector<const std::byte*> chunks;
    int skip = 0;
    std::vector<int32_t> pages;
  };
  std::unique_ptr<PageCopier> inner_;
  std::map<int, Late> late_;
  int until_failure_ = 0;
  std::function<void()> before_write_;
};

constexpr char kInPlace[] = "_in_place";

std::vector<std::string> WaysAndPlaces() {
  std::vector<std::string> ways = kWays;
  for (const char* way : {"embedded", "shared_memory"}) ways.push_back(absl::StrCat(way, kInPlace));
  return ways;
}

class PageLoadTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    in_place_ = absl::EndsWith(GetParam(), kInPlace);
    client::PoolOptions by;
    by.host_tier = in_place_;
    pool_ = ways_.Open(std::string(absl::StripSuffix(GetParam(), kInPlace)), by);
    ASSERT_NE(pool_, nullptr);
    client::NamespaceSpec spec;
    spec.model = "page load test";
    spec.block_tokens = 64;
    spec.content = client::OpaqueBlocks{static_cast<int64_t>(kChunkBytes), "test"};
    store_ = *BlockStore::Open(*pool_, spec);
    stored_.resize(kChunks * kChunkBytes);
    for (std::byte& byte : stored_) byte = static_cast<std::byte>(random_());
    for (int i = 0; i < kChunks; i++) keys_.push_back(absl::StrCat("key ", i));
    const std::vector<std::string_view> keys(keys_.begin(), keys_.end());
    ASSERT_EQ(store_->Store(keys, stored_)->stored, kChunks);
    lease_ = store_->Lookup(keys)->lease;
    PageCopyOptions options;
    options.page_bytes = kPageBytes;
    options.page_stride = kPageBytes + 32;
    options.pages = kPages;
    options.chunk_pages = kChunkPages;
    options.piece_bytes = kChunks * kChunkBytes;
    std::vector<std::byte*> layers;
    for (std::vector<std::byte>& layer : layers_) {
      layer.resize(kPages * static_cast<size_t>(options.page_stride));
      layers.push_back(layer.data());
    }
    copier_ = std::make_unique<LateCopier>(*MakeCpuPageCopier(*backend_, options, layers));
    stride_ = static_cast<size_t>(options.page_stride);
  }
  void TearDown() override {
    if (store_ == nullptr) return;
    EXPECT_TRUE(store_->Delete().ok());
  }

  // Buffers for so many chunks.
  PageLoad LoadOf(int64_t piece_chunks, std::span<const int32_t> pages, int skip = 0) {
    PageLoad load;
    load.lease = lease_;
    load.chunks = kChunks;
    load.chunk_pages = kChunkPages;
    load.skip = skip;
    load.pages = pages;
    load.in_place = in_place_;
    for (int slot = 0; slot < PageCopier::kSlots; slot++) {
      buffers_[slot] = *pool_->Allocate(static_cast<size_t>(piece_chunks) * kChunkBytes);
      load.buffers[slot] = {buffers_[slot].data(), buffers_[slot].bytes()};
    }
    return load;
  }
  std::vector<int32_t> SomePages(size_t count) {
    std::vector<int32_t> pages(kPages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random_);
    pages.resize(count);
    return pages;
  }
  // Pages [0, count) of the load are written, all others as they were.
  void ExpectWritten(std::span<const int32_t> pages, int skip, size_t count,
                     const std::vector<std::vector<std::byte>>& before) {
    std::vector<std::vector<std::byte>> wanted = before;
    for (size_t i = 0; i < count; i++) {
      const size_t at = i + static_cast<size_t>(skip);
      for (size_t layer = 0; layer < kLayers; layer++)
        std::memcpy(wanted[layer].data() + static_cast<size_t>(pages[i]) * stride_,
                    stored_.data() + at / kChunkPages * kChunkBytes +
                        (layer * kChunkPages + at % kChunkPages) * kPageBytes,
                    kPageBytes);
    }
    EXPECT_TRUE(layers_ == wanted);
  }

  std::mt19937 random_{7};
  bool in_place_ = false;
  Ways ways_;
  std::unique_ptr<Pool> pool_;
  std::unique_ptr<BlockStore> store_;
  std::vector<std::string> keys_;
  std::vector<std::byte> stored_;
  client::LeaseId lease_ = 0;
  std::unique_ptr<Backend> backend_ = MakeCpuBackend({.threads = 1});
  std::vector<std::vector<std::byte>> layers_{kLayers};
  std::unique_ptr<LateCopier> copier_;
  client::TensorBuffer buffers_[PageCopier::kSlots];
  size_t stride_ = 0;
};

TEST_P(PageLoadTest, BlocksStandInTheirPagesWhateverThePieces) {
  for (int64_t piece = 1; piece <= kChunks; piece++)
    for (const int skip : {0, 1, kChunkPages - 1}) {
      // The last chunk may be wanted in part.
      const size_t count = size_t{kChunks} * kChunkPages - static_cast<size_t>(skip) - random_() % 3;
      const std::vector<int32_t> pages = SomePages(count);
      const auto before = layers_;
      PageLoadReport report;
      const absl::Status status = LoadPages(*store_, *copier_, LoadOf(piece, pages, skip), &report);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(report.chunks, kChunks);
      EXPECT_EQ(report.lost, -1);
      EXPECT_EQ(report.in_place, in_place_ ? kChunks : 0);
      EXPECT_TRUE(copier_->idle());
      ASSERT_NO_FATAL_FAILURE(ExpectWritten(pages, skip, count, before)) << piece << " " << skip;
    }
}

TEST_P(PageLoadTest, WhatFailsOnItsWayToThePagesIsNotCounted) {
  for (int failure = 1; failure <= 4; failure++) {
    const std::vector<int32_t> pages = SomePages(size_t{kChunks} * kChunkPages);
    const PageLoad load = LoadOf(2, pages);  // pieces of 2, 2, 2 and 1 chunks
    copier_->FailAtWait(failure);
    PageLoadReport report;
    EXPECT_EQ(LoadPages(*store_, *copier_, load, &report).message(), "planted");
    EXPECT_EQ(report.chunks, 2 * (failure - 1));
    EXPECT_TRUE(copier_->idle()) << "the buffers may go";
  }
}

TEST_P(PageLoadTest, AStoreThatFailsLeavesWhatWasWritten) {
  const std::vector<int32_t> pages = SomePages(size_t{kChunks} * kChunkPages);
  PageLoad load = LoadOf(2, pages);
  load.chunks = kChunks + 1;  // the last piece is beyond the lease
  const auto before = layers_;
  PageLoadReport report;
  EXPECT_TRUE(absl::IsOutOfRange(LoadPages(*store_, *copier_, load, &report)));
  EXPECT_EQ(report.chunks, 6);
  EXPECT_TRUE(copier_->idle());
  ExpectWritten(pages, 0, 6 * kChunkPages, before);
  load.chunks = kChunks;
  ASSERT_TRUE(*store_->Release(lease_));
  EXPECT_TRUE(absl::IsNotFound(LoadPages(*store_, *copier_, load, &report)));
  EXPECT_EQ(report.chunks, 0);
}

TEST_P(PageLoadTest, WhatDoesNotFitIsSaid) {
  const std::vector<int32_t> pages = SomePages(size_t{kChunks} * kChunkPages);
  PageLoad load = LoadOf(1, pages);
  for (std::span<std::byte>& buffer : load.buffers) buffer = buffer.first(kChunkBytes - 1);
  PageLoadReport report;
  EXPECT_TRUE(absl::IsInvalidArgument(LoadPages(*store_, *copier_, load, &report)));
  client::NamespaceSpec spec;
  spec.model = "page load test";
  spec.block_tokens = 64;
  spec.content = client::OpaqueBlocks{64, "other"};
  const auto other = *BlockStore::Open(*pool_, spec);
  const absl::Status status = LoadPages(*other, *copier_, LoadOf(1, pages), &report);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(status.message().find("64 bytes"), absl::string_view::npos) << status;
  EXPECT_TRUE(other->Delete().ok());
}

// Between the daemon's answer and the copy the lease ends and the blocks are deleted: what is copied is what
// was there. Room that was held is room again afterwards.
TEST_P(PageLoadTest, BlocksThatGoWhileTheyAreCopiedKeepTheirBytes) {
  const std::vector<int32_t> pages = SomePages(size_t{kChunks} * kChunkPages);
  const auto before = layers_;
  const PageLoad load = LoadOf(kChunks, pages);
  client::NamespaceSpec spec;
  spec.model = "page load test";
  spec.block_tokens = 64;
  spec.content = client::OpaqueBlocks{static_cast<int64_t>(kChunkBytes), "others"};
  bool once = false;
  // By another client, as the ring serves one call at a time, and this one is not in one.
  copier_->BeforeWrites([&] {
    if (std::exchange(once, true)) return;
    EXPECT_TRUE(*store_->Release(lease_));
    EXPECT_TRUE(store_->Delete().ok());
    const auto other = *BlockStore::Open(*pool_, spec);
    const std::vector<std::byte> noise(kChunkBytes, std::byte{0x5a});
    // More than the tier holds.
    for (int i = 0; i < 48 * 1024 * 1024 / static_cast<int>(kChunkBytes) / 64; i++) {
      std::vector<std::string> names;
      std::vector<std::byte> payload;
      for (int j = 0; j < 80; j++) {
        names.push_back(absl::StrCat("noise ", i, " ", j));
        payload.insert(payload.end(), noise.begin(), noise.end());
      }
      const std::vector<std::string_view> keys(names.begin(), names.end());
      ASSERT_TRUE(other->Store(keys, payload).ok());
    }
    EXPECT_TRUE(other->Delete().ok());
  });
  PageLoadReport report;
  const absl::Status status = LoadPages(*store_, *copier_, load, &report);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(once);
  EXPECT_EQ(report.chunks, kChunks);
  ExpectWritten(pages, 0, pages.size(), before);
  store_.reset();
}

INSTANTIATE_TEST_SUITE_P(Ways, PageLoadTest, ::testing::ValuesIn(WaysAndPlaces()),
                         [](const auto& way) { return way.param; });

}  // namespace
}  // namespace kvtide::testing
