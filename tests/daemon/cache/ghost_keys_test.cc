// Dropped keys are remembered once, for as many drops as the cache has blocks, in bounded memory.
#include "daemon/cache/tier/ghost_keys.h"

#include <random>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

BlockKey Key(uint64_t number) {
  std::mt19937_64 random(number);
  return {random(), random()};
}

TEST(GhostKeys, AreTakenOnce) {
  GhostKeys ghosts(true);
  EXPECT_FALSE(ghosts.Take(Key(1)));
  ghosts.Add(Key(1), 100);
  ghosts.Add(Key(1), 100);
  EXPECT_TRUE(ghosts.Take(Key(1)));
  EXPECT_FALSE(ghosts.Take(Key(1)));
}

TEST(GhostKeys, OrNever) {
  GhostKeys none;
  none.Add(Key(1), 100);
  EXPECT_FALSE(none.Take(Key(1)));
  EXPECT_EQ(none.bytes(), 0u);
}

TEST(GhostKeys, AreForgottenAfterAsManyDropsAsThereAreBlocks) {
  constexpr size_t kBlocks = 10'000;
  GhostKeys ghosts(true);
  // The table has its size once it knows of so many blocks.
  ghosts.Add(Key(1), kBlocks);
  for (uint64_t i = 2; i <= 5 * kBlocks; i++) ghosts.Add(Key(i), kBlocks);
  size_t young = 0, old = 0;
  for (uint64_t i = 1; i <= 3 * kBlocks; i++) old += ghosts.Take(Key(i));
  for (uint64_t i = 4 * kBlocks + 200; i <= 5 * kBlocks; i++) young += ghosts.Take(Key(i));
  EXPECT_LT(old, kBlocks / 100);
  EXPECT_GT(young, kBlocks * 85 / 100) << "some sets have more than others";
}

TEST(GhostKeys, OthersAreRarelyTakenForThem) {
  constexpr size_t kBlocks = 100'000;
  GhostKeys ghosts(true);
  for (uint64_t i = 0; i < kBlocks; i++) ghosts.Add(Key(i), kBlocks);
  size_t wrong = 0;
  for (uint64_t i = 0; i < kBlocks; i++) wrong += ghosts.Take(Key(i + kBlocks));
  EXPECT_LT(wrong, kBlocks / 1000);
}

TEST(GhostKeys, TakeFourToEightBytesABlock) {
  GhostKeys ghosts(true);
  for (const size_t blocks : {1'000u, 65'536u, 100'000u, 1'000'000u}) {
    ghosts.Add(Key(1), blocks);
    EXPECT_GE(ghosts.bytes(), 4 * blocks);
    EXPECT_LE(ghosts.bytes(), 8 * blocks);
  }
}

}  // namespace
}  // namespace kvtide
