// Lists of chunks beside a plain vector.
#include "daemon/cache/block/chunk_list.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(ChunkList, HoldsWhatWasAddedInOrder) {
  static_assert(sizeof(ChunkList) == sizeof(void*));
  std::vector<Chunk> chunks(8);
  std::mt19937 random(1);
  ChunkList list;
  std::vector<Chunk*> expected;
  for (int step = 0; step < 2000; step++) {
    // A block may be in one chunk once: what is there goes, what is not comes.
    Chunk* const chunk = &chunks[random() % chunks.size()];
    const auto there = std::find(expected.begin(), expected.end(), chunk);
    if (there == expected.end()) {
      list.Add(chunk);
      expected.push_back(chunk);
    } else if (random() % 4 != 0 || expected.size() < 3) {
      list.Remove(chunk);
      expected.erase(there);
    }
    if (random() % 16 == 0) {
      ChunkList moved(std::move(list));
      list = std::move(moved);
    }
    ASSERT_EQ(std::vector<Chunk*>(list.begin(), list.end()), expected);
    ASSERT_EQ(list.size(), expected.size());
    ASSERT_EQ(list.empty(), expected.empty());
    if (!expected.empty()) {
      ASSERT_EQ(list.front(), expected.front());
    }
  }
}

TEST(ChunkListDeathTest, WhatIsNotThereIsNotRemoved) {
  Chunk one, other;
  ChunkList list;
  list.Add(&one);
  EXPECT_DEATH(list.Remove(&other), "");
}

}  // namespace
}  // namespace kvtide
