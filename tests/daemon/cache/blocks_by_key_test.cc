// Blocks found by key beside a map; keys of which only the tags are equal too.
#include "daemon/cache/block/blocks_by_key.h"

#include <map>
#include <random>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

class BlocksByKeyTest : public ::testing::Test {
 protected:
  BlocksByKeyTest() : backend_(MakeCpuBackend({})), layout_({1, 1, 64, 64}, ExactPair()) {
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), 1000 * layout_.block_bytes(), false}};
    EXPECT_TRUE(store_.Init(options).ok());
  }
  Block* NewBlock(const BlockKey& key, int group) {
    Block* const block = store_.Allocate(0, 0, &layout_);
    store_.AddDirect(block, false);
    BlockKind kind = *block->kind;
    kind.group = group;
    store_.SetKind(block, kind);
    block->key = key;
    return block;
  }
  void Free(Block* block) { store_.RemoveDirect(block, false); }

  std::unique_ptr<Backend> backend_;
  const BlockLayout layout_;
  BlockStore store_;
  BlocksByKey blocks_{&store_};
};

TEST_F(BlocksByKeyTest, FindsWhatIsThereByKeyAndGroup) {
  std::mt19937_64 random(1);
  std::map<std::pair<uint64_t, int>, Block*> expected;
  for (int step = 0; step < 5000; step++) {
    // Few different tags: 32 bits of the lower half of the key.
    const uint64_t number = random() % 200;
    const BlockKey key{number % 5 << 32, number};
    const int group = static_cast<int>(random() % 2);
    Block*& block = expected[{number, group}];
    blocks_.FetchEntry(key, group);
    blocks_.FetchBlock(key, group);
    ASSERT_EQ(blocks_.Find(key, group), block);
    if (block == nullptr) {
      block = NewBlock(key, group);
      blocks_.Insert(*block);
    } else {
      ASSERT_TRUE(blocks_.Erase(*block));
      ASSERT_FALSE(blocks_.Erase(*block));
      Free(std::exchange(block, nullptr));
    }
  }
  size_t there = 0;
  for (const auto& [name, block] : expected) there += block != nullptr ? 1 : 0;
  EXPECT_EQ(blocks_.size(), there);
  blocks_.ForEach([&](const Block* block) {
    EXPECT_EQ((expected[{block->key.high, block->group()}]), block);
    there--;
  });
  EXPECT_EQ(there, 0u);
  blocks_.clear();
  EXPECT_TRUE(blocks_.empty());
  for (const auto& [name, block] : expected)
    if (block != nullptr) Free(block);
  EXPECT_EQ(store_.kinds(), 0u);
}

}  // namespace
}  // namespace kvtide
