// The allocator against a byte map: random sizes and ends, every extent inside the slab and free of others.
#include "daemon/cache/tier/extent_allocator.h"

#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

using End = ExtentAllocator::End;

TEST(ExtentAllocatorTest, TakesFromBothEndsAndMergesNeighbours) {
  ExtentAllocator allocator(1024 + 5);
  EXPECT_EQ(allocator.capacity_bytes(), 1024u);
  const size_t bottom = *allocator.Allocate(128, End::kBottom), top = *allocator.Allocate(256, End::kTop);
  EXPECT_EQ(bottom, 0u);
  EXPECT_EQ(top, 768u);
  const size_t next = *allocator.Allocate(1, End::kBottom);  // rounded up
  EXPECT_EQ(next, 128u);
  EXPECT_EQ(allocator.free_bytes(), 512u);
  EXPECT_EQ(allocator.Allocate(513, End::kTop), std::nullopt);
  allocator.Free(bottom, 128);
  EXPECT_EQ(allocator.free_extents(), 2u);
  EXPECT_EQ(allocator.LargestFreeExtent(), 512u);
  allocator.Free(next, 1);
  EXPECT_EQ(allocator.free_extents(), 1u);
  allocator.Free(top, 256);
  EXPECT_EQ(allocator.LargestFreeExtent(), 1024u);
  allocator.CheckInvariants();
}

TEST(ExtentAllocatorTest, EmptyAndZeroAreRefused) {
  ExtentAllocator allocator(100);
  EXPECT_EQ(allocator.capacity_bytes(), 0u);
  EXPECT_EQ(allocator.Allocate(1, End::kBottom), std::nullopt);
  ExtentAllocator other(4096);
  EXPECT_EQ(other.Allocate(0, End::kTop), std::nullopt);
}

TEST(ExtentAllocatorTest, SizesAboveFourGiBDoNotOverflow) {
  ExtentAllocator allocator((size_t{1} << 33) + 256);
  const size_t first = *allocator.Allocate((size_t{1} << 32) + 1, End::kBottom);
  const size_t second = *allocator.Allocate(size_t{1} << 32, End::kTop);
  EXPECT_EQ(first, 0u);
  EXPECT_EQ(second, (size_t{1} << 32) + 256);
  EXPECT_EQ(allocator.free_bytes(), 128u);
  allocator.CheckInvariants();
}

TEST(ExtentAllocatorTest, AllocatesAtAnOffsetIfAllOfItIsFree) {
  ExtentAllocator allocator(1024);
  EXPECT_TRUE(allocator.AllocateAt(256, 200));  // rounded up to 256
  EXPECT_FALSE(allocator.AllocateAt(128, 256));
  EXPECT_FALSE(allocator.AllocateAt(384, 1));
  EXPECT_FALSE(allocator.AllocateAt(896, 256)) << "beyond the end";
  EXPECT_FALSE(allocator.AllocateAt(512, 0));
  EXPECT_FALSE(allocator.AllocateAt(512, ~size_t{0}));
  EXPECT_TRUE(allocator.AllocateAt(512, 512));
  EXPECT_TRUE(allocator.AllocateAt(128, 128));
  std::vector<std::pair<size_t, size_t>> seen;
  const auto see = [&](size_t offset, size_t bytes) {
    seen.emplace_back(offset, bytes);
    return true;
  };
  allocator.Peek(0, see);
  EXPECT_EQ(seen, (std::vector<std::pair<size_t, size_t>>{{0, 128}}));
  allocator.Free(256, 200);
  allocator.Peek(1, see);
  EXPECT_EQ(seen.back(), (std::pair<size_t, size_t>{256, 256}));
  EXPECT_EQ(seen.size(), 2u);
  allocator.CheckInvariants();
}

TEST(ExtentAllocatorTest, SizesNearTheLargestNumberDoNotOverflow) {
  ExtentAllocator allocator(4096);
  EXPECT_EQ(allocator.Allocate(~size_t{0}, End::kBottom), std::nullopt);
  EXPECT_EQ(allocator.Allocate(4096, End::kBottom), 0u);
}

// The work of a call grows with the logarithm of the extents: every second page of a million is free.
TEST(ExtentAllocatorTest, AMillionExtentsAreSearchedInFewSteps) {
  constexpr size_t kPages = 2'000'000, kPage = 8192;
  ExtentAllocator allocator(kPages * kPage);
  for (size_t page = 0; page < kPages; page++)
    ASSERT_TRUE(allocator.Allocate(kPage, End::kBottom).has_value());
  for (size_t page = 0; page < kPages; page += 2) allocator.Free(page * kPage, kPage);
  EXPECT_EQ(allocator.free_extents(), kPages / 2);
  EXPECT_LT(allocator.Height(), 70) << "20 would be perfect";
  EXPECT_EQ(allocator.Allocate(kPage + 1, End::kTop), std::nullopt);
  allocator.Free(kPage, kPage);
  EXPECT_EQ(allocator.Allocate(2 * kPage, End::kTop), kPage) << "of three pages in a row the last two";
}

TEST(ExtentAllocatorDeathTest, FreeingTwiceStopsTheProcess) {
  ExtentAllocator allocator(4096);
  const size_t offset = *allocator.Allocate(256, End::kBottom);
  allocator.Free(offset, 256);
  EXPECT_DEATH(allocator.Free(offset, 256), "freed twice");
}

TEST(ExtentAllocatorTest, RandomChurnAgreesWithAByteMap) {
  for (const uint32_t seed : {1u, 2u, 3u, 4u}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    constexpr size_t kUnits = 200;
    ExtentAllocator allocator(kUnits * 128);
    std::vector<bool> map(kUnits);
    struct Extent {
      size_t offset, bytes;
    };
    std::vector<Extent> extents;
    for (int step = 0; step < 3000; step++) {
      if (extents.empty() || random() % 5 < 3) {
        const size_t bytes = 1 + random() % (128 * (random() % 2 != 0 ? 5 : 30));
        const size_t units = (bytes + 127) / 128;
        const End end = random() % 2 != 0 ? End::kTop : End::kBottom;
        size_t run = 0, longest = 0;
        for (const bool used : map) longest = std::max(longest, run = used ? 0 : run + 1);
        ASSERT_EQ(allocator.LargestFreeExtent(), longest * 128);
        const std::optional<size_t> offset = allocator.Allocate(bytes, end);
        ASSERT_EQ(offset.has_value(), units <= longest);
        if (!offset.has_value()) continue;
        for (size_t u = 0; u < units; u++) {
          ASSERT_FALSE(map[*offset / 128 + u]);
          map[*offset / 128 + u] = true;
        }
        extents.push_back({*offset, bytes});
      } else {
        const size_t i = random() % extents.size();
        allocator.Free(extents[i].offset, extents[i].bytes);
        for (size_t u = 0; u < (extents[i].bytes + 127) / 128; u++) map[extents[i].offset / 128 + u] = false;
        extents[i] = extents.back();
        extents.pop_back();
      }
      allocator.CheckInvariants();
    }
    for (const Extent& extent : extents) allocator.Free(extent.offset, extent.bytes);
    EXPECT_EQ(allocator.LargestFreeExtent(), allocator.capacity_bytes());
  }
}

}  // namespace
}  // namespace kvtide
