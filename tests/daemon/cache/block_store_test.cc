// The store of blocks by itself: ids, wishes, places.
#include "daemon/cache/block_store.h"

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

class BlockStoreTest : public ::testing::Test {
 protected:
  BlockStoreTest() : backend_(MakeCpuBackend({})), layout_({1, 1, 64, 64}, ExactPair()) {
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), 5000 * layout_.block_bytes(), false}};
    EXPECT_TRUE(store_.Init(options).ok());
  }
  Block* Allocate() {
    Block* block = store_.Allocate(0, 0, &layout_);
    if (block != nullptr) store_.AddRef(block, true);
    return block;
  }

  std::unique_ptr<Backend> backend_;
  const BlockLayout layout_;
  BlockStore store_;
};

TEST_F(BlockStoreTest, TheListOfWantedBlocksIsBoundedAndForgetsTheDead) {
  std::vector<Block*> blocks;
  for (int i = 0; i < 5000; i++) blocks.push_back(Allocate());
  for (Block* block : blocks) {
    store_.Want(block);
    store_.Want(block);
  }
  for (int i = 0; i < 1000; i++) store_.Release(blocks[static_cast<size_t>(i)], true);
  EXPECT_EQ(store_.TakeWanted().size(), BlockStore::kMostWanted - 1000);
  EXPECT_TRUE(store_.TakeWanted().empty());
  store_.Want(blocks.back());
  EXPECT_EQ(store_.TakeWanted(), std::vector<Block*>{blocks.back()});
  for (size_t i = 1000; i < blocks.size(); i++) store_.Release(blocks[i], true);
  store_.CheckInvariants();
}

TEST_F(BlockStoreTest, AnIdNamesOneBlockForGood) {
  Block* block = Allocate();
  const BlockId id = block->id;
  EXPECT_EQ(store_.Get(id), block);
  store_.Release(block, true);
  EXPECT_EQ(store_.Get(id), nullptr);
  Block* next = Allocate();
  EXPECT_EQ(SlotOf(next->id), SlotOf(id)) << "slots are used again";
  EXPECT_NE(next->id, id);
  EXPECT_EQ(store_.Get(id), nullptr);
  store_.Release(next, true);
}

TEST_F(BlockStoreTest, ABlockMovesInsideItsTierAndClaimedBytesAreNobodyElses) {
  Block* block = Allocate();
  const size_t bytes = layout_.block_bytes(), old = block->place->offset;
  Place* claim = store_.Claim(0, 0, 3 * bytes);
  ASSERT_NE(claim, nullptr);
  EXPECT_EQ(store_.ReserveAt(0, bytes, *block), nullptr);
  Place* target = store_.ReserveAt(0, 3 * bytes, *block);
  ASSERT_NE(target, nullptr);
  store_.SwapPlace(block, target);
  EXPECT_EQ(block->place->offset, 3 * bytes);
  EXPECT_EQ(store_.tier(0).places.count(old), 0u);
  store_.Retire(claim);
  store_.CheckInvariants();
  EXPECT_EQ(store_.tier(0).allocator.used_bytes(), bytes);
  store_.Release(block, true);
}

}  // namespace
}  // namespace kvtide
