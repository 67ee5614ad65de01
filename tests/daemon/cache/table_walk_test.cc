// The walk over tables in slices shows every block once, also when the tables change between slices.
#include "daemon/cache/table_walk.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

// A sequence of the tables' shape whose block numbers can be told from the blocks.
SequencePtr MakeSequence(std::deque<Block>* store, const std::vector<int>& tables, int twins) {
  auto sequence = std::make_shared<Sequence>();
  for (size_t g = 0; g < tables.size(); g++) {
    GroupTable& table = sequence->groups.emplace_back();
    for (int b = 0; b < tables[g]; b++) table.blocks.push_back(&store->emplace_back());
    for (int b = 0; b < twins; b++) table.staging[b] = &store->emplace_back();
  }
  return sequence;
}

TEST(TableWalkTest, ShowsEveryBlockOnceInSlicesOfAnySize) {
  std::deque<Block> store;
  const std::vector<SequencePtr> sequences = {MakeSequence(&store, {5, 0, 3}, 1), MakeSequence(&store, {}, 0),
                                              MakeSequence(&store, {0}, 0), MakeSequence(&store, {7, 1}, 2)};
  for (size_t count = 1; count <= store.size() + 1; count++) {
    TableWalk walk(sequences);
    std::vector<const Block*> seen;
    size_t slices = 1;
    while (true) {
      size_t slice = 0;
      const bool more = walk.Next(count, [&](const Block* block) {
        seen.push_back(block);
        slice++;
      });
      ASSERT_LE(slice, count);
      if (!more) break;
      ASSERT_LE(++slices, store.size() + 2);
    }
    ASSERT_EQ(seen.size(), store.size());
    std::sort(seen.begin(), seen.end());
    ASSERT_EQ(std::unique(seen.begin(), seen.end()), seen.end());
  }
  const std::vector<SequencePtr> none;
  TableWalk walk(none);
  EXPECT_FALSE(walk.Next(10, [](const Block*) { FAIL(); }));
}

TEST(TableWalkTest, GoesOnAtTheBlockNumberWhateverHappensToTheTable) {
  std::deque<Block> store;
  const std::vector<SequencePtr> sequences = {MakeSequence(&store, {10}, 0)};
  GroupTable& table = sequences[0]->groups[0];
  TableWalk walk(sequences);
  std::vector<const Block*> seen;
  const auto see = [&](const Block* block) { seen.push_back(block); };
  EXPECT_TRUE(walk.Next(3, see));
  for (int i = 0; i < 5; i++) table.blocks.pop_front();  // a window that slides
  table.first_block = 5;
  EXPECT_TRUE(walk.Next(2, see));
  EXPECT_EQ(seen.back(), table.at(6));
  table.blocks.resize(1);  // a truncation
  EXPECT_FALSE(walk.Next(9, see));
  EXPECT_EQ(seen.size(), 5u);
}

}  // namespace
}  // namespace kvtide
