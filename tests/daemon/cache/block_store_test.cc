// The store of blocks by itself: ids, wishes, places.
#include "daemon/cache/block/block_store.h"

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

class BlockStoreTest : public ::testing::Test {
 protected:
  BlockStoreTest() : backend_(MakeCpuBackend({})), layout_({1, 1, 64, 64}, ExactPair()) {
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), 5000 * layout_.block_bytes(), false},
                     {"host", backend_.get(), 5000 * layout_.block_bytes(), false}};
    EXPECT_TRUE(store_.Init(options).ok());
  }
  Block* Allocate(int tier = 0, const RecencyPtr& record = nullptr) {
    Block* block = store_.Allocate(tier, 0, &layout_);
    if (block == nullptr) return block;
    store_.AddDirect(block, true);
    if (record != nullptr) store_.Join(block, record);
    return block;
  }
  SequenceRecency NewSequence() { return {store_.NewRecency(absl::UnixEpoch()), nullptr}; }
  std::vector<Block*> Coldest(int tier) {
    std::vector<Block*> blocks;
    store_.Peek(tier, [&](const Block& block) {
      blocks.push_back(store_.Get(block.id));
      return true;
    });
    return blocks;
  }

  std::unique_ptr<Backend> backend_;
  const BlockLayout layout_;
  BlockStore store_;
};

TEST_F(BlockStoreTest, BlocksThatAreAlikeHaveOneKind) {
  const auto account = std::make_shared<TenantAccount>();
  account->tier_bytes.resize(2);
  std::vector<Block*> blocks;
  for (int i = 0; i < 20; i++) blocks.push_back(Allocate());
  EXPECT_EQ(store_.kinds(), 1u);
  for (Block* const block : blocks) store_.SetAccount(block, account);
  EXPECT_EQ(store_.kinds(), 1u);
  EXPECT_EQ(account->places, 20u);
  const auto profile = std::make_shared<const Profile>();
  store_.SetProfile(blocks.front(), profile);
  EXPECT_EQ(store_.kinds(), 2u);
  EXPECT_EQ(blocks.front()->account(), account.get());
  EXPECT_EQ(blocks.front()->profile(), profile);
  EXPECT_EQ(blocks.back()->profile(), nullptr);
  store_.CheckInvariants();
  for (Block* const block : blocks) store_.RemoveDirect(block, true);
  EXPECT_EQ(store_.kinds(), 0u);
  EXPECT_EQ(profile.use_count(), 1);
  EXPECT_EQ(account->places, 0u);
}

TEST_F(BlockStoreTest, WhatIsWantedIsBoundedAndForgetsTheDead) {
  SequenceRecency one = NewSequence();
  const SequenceRecency other = NewSequence();
  std::vector<Block*> blocks;
  for (int i = 0; i < 300; i++) blocks.push_back(Allocate(1, i < 200 ? one.own : other.own));
  blocks.push_back(Allocate(0, other.own));
  for (int i = 0; i < 2; i++) {
    store_.Want(other);
    store_.Want(one);
  }
  std::vector<Block*> wanted = store_.TakeWanted(150);
  EXPECT_EQ(wanted.size(), 150u);
  EXPECT_EQ(wanted.front(), blocks[200]) << "in the order in which they were wanted";
  EXPECT_EQ(wanted.back(), blocks[49]);
  EXPECT_TRUE(store_.TakeWanted(1000).empty());
  store_.Want(one);
  for (int i = 0; i < 200; i++) store_.RemoveDirect(blocks[static_cast<size_t>(i)], true);
  one = {};
  EXPECT_TRUE(store_.TakeWanted(1000).empty());
  store_.Want(other);
  store_.Unwant(other);
  EXPECT_TRUE(store_.TakeWanted(1000).empty());
  for (size_t i = 200; i < blocks.size(); i++) store_.RemoveDirect(blocks[i], true);
  store_.CheckInvariants();
}

TEST_F(BlockStoreTest, BlocksGoByTheRecencyOfTheirSequenceAndForksShareWhatWasThere) {
  SequenceRecency parent = NewSequence(), stranger = NewSequence(), child;
  Block* first = Allocate(0, parent.own);
  Block* strange = Allocate(0, stranger.own);
  Block* second = Allocate(0, parent.own);
  EXPECT_EQ(Coldest(0), (std::vector<Block*>{first, second, strange}));
  store_.Touch(parent, absl::UnixEpoch() + absl::Seconds(5));
  EXPECT_EQ(Coldest(0), (std::vector<Block*>{strange, first, second}));
  EXPECT_EQ(store_.LastTouched(*second), absl::UnixEpoch() + absl::Seconds(5));
  store_.ForkRecency(&parent, &child);
  Block* of_parent = Allocate(0, parent.own);
  Block* of_child = Allocate(0, child.own);
  store_.Touch(stranger, absl::UnixEpoch());
  store_.Touch(child, absl::UnixEpoch());
  EXPECT_EQ(Coldest(0), (std::vector<Block*>{of_parent, strange, first, second, of_child}));
  SequenceRecency grandchild;
  store_.BeginRead(parent.own);
  const RecencyPtr being_read = parent.own;
  store_.ForkRecency(&parent, &grandchild);  // what the parent had alone is the family's, too, now
  EXPECT_FALSE(store_.IsIdle(*of_parent));
  EXPECT_FALSE(store_.IsIdle(*first));
  EXPECT_TRUE(store_.IsIdle(*of_child));
  store_.CheckInvariants();
  store_.EndRead(being_read);
  EXPECT_TRUE(store_.IsIdle(*of_parent));
  store_.Touch(grandchild, absl::UnixEpoch());
  EXPECT_EQ(Coldest(0), (std::vector<Block*>{strange, of_child, first, second, of_parent}));
  std::vector<Block*> idle;
  store_.PeekIdle(0, store_.TouchSerial(*of_child), [&](const Block& block) {
    idle.push_back(store_.Get(block.id));
    return true;
  });
  EXPECT_EQ(idle, std::vector<Block*>{strange}) << "what was used before the child";
  store_.CheckInvariants();
  for (Block* block : {first, strange, second, of_parent, of_child}) store_.RemoveDirect(block, true);
  store_.CheckInvariants();
}

TEST_F(BlockStoreTest, AnIdNamesOneBlockForGood) {
  Block* block = Allocate();
  const BlockId id = block->id;
  EXPECT_EQ(store_.Get(id), block);
  store_.RemoveDirect(block, true);
  EXPECT_EQ(store_.Get(id), nullptr);
  Block* next = Allocate();
  EXPECT_EQ(SlotOf(next->id), SlotOf(id)) << "slots are used again";
  EXPECT_NE(next->id, id);
  EXPECT_EQ(store_.Get(id), nullptr);
  store_.RemoveDirect(next, true);
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
  store_.RemoveDirect(block, true);
}

}  // namespace
}  // namespace kvtide
