// The walk over tables in slices shows every block once, also when the tables change between slices.
#include "daemon/cache/sequence/table_walk.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

class TableWalkTest : public ::testing::Test {
 protected:
  TableWalkTest() : backend_(MakeCpuBackend({})), layout_({1, 1, 64, 64}, ExactPair()) {
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), 100 * layout_.block_bytes(), false}};
    EXPECT_TRUE(store_.Init(options).ok());
  }
  Block* NewBlock() {
    blocks_++;
    return store_.Allocate(0, 0, &layout_);
  }
  // A sequence of the tables' shape.
  SequencePtr MakeSequence(const std::vector<int>& tables, int twins) {
    auto sequence = std::make_shared<Sequence>();
    sequence->recency.own = store_.NewRecency(absl::UnixEpoch());
    for (size_t g = 0; g < tables.size(); g++) {
      GroupTable& table = sequence->groups.emplace_back();
      table.blocks = std::make_unique<BlockTable>(&store_, true);
      for (int b = 0; b < tables[g]; b++) table.blocks->PushBack(NewBlock(), sequence->recency.own);
      for (int b = 0; b < twins; b++) table.staging[b] = NewBlock();
    }
    return sequence;
  }

  std::unique_ptr<Backend> backend_;
  const BlockLayout layout_;
  BlockStore store_;
  size_t blocks_ = 0;
};

TEST_F(TableWalkTest, ShowsEveryBlockOnceInSlicesOfAnySize) {
  const std::vector<SequencePtr> sequences = {MakeSequence({5, 0, 3}, 1), MakeSequence({}, 0),
                                              MakeSequence({0}, 0), MakeSequence({7, 1}, 2)};
  for (size_t count = 1; count <= blocks_ + 1; count++) {
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
      ASSERT_LE(++slices, blocks_ + 2);
    }
    ASSERT_EQ(seen.size(), blocks_);
    std::sort(seen.begin(), seen.end());
    ASSERT_EQ(std::unique(seen.begin(), seen.end()), seen.end());
  }
  const std::vector<SequencePtr> none;
  TableWalk walk(none);
  EXPECT_FALSE(walk.Next(10, [](const Block*) { FAIL(); }));
}

TEST_F(TableWalkTest, GoesOnAtTheBlockNumberWhateverHappensToTheTable) {
  const std::vector<SequencePtr> sequences = {MakeSequence({10}, 0)};
  GroupTable& table = sequences[0]->groups[0];
  TableWalk walk(sequences);
  std::vector<const Block*> seen;
  const auto see = [&](const Block* block) { seen.push_back(block); };
  EXPECT_TRUE(walk.Next(3, see));
  for (int i = 0; i < 5; i++) table.blocks->PopFront();  // a window that slides
  EXPECT_TRUE(walk.Next(2, see));
  EXPECT_EQ(seen.back(), table.at(6));
  while (table.end_block() > 6) table.blocks->PopBack();  // a truncation
  EXPECT_FALSE(walk.Next(9, see));
  EXPECT_EQ(seen.size(), 5u);
}

}  // namespace
}  // namespace kvtide
