// Tables of forks against plain lists of blocks: whatever is changed, each shows its own blocks, chunks count
// what they hold, and a snapshot shows what the table was when it was taken.
#include "daemon/cache/block/block_table.h"

#include <algorithm>
#include <deque>
#include <random>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

struct Model {
  std::unique_ptr<BlockTable> table;
  int64_t first = 0;
  std::deque<Block*> blocks;
};

// What a snapshot has to show for good.
struct Shown {
  std::shared_ptr<const TableSnapshot> snapshot;
  int64_t first = 0;
  std::vector<std::byte*> data;  // null: dropped
  std::vector<const BlockLayout*> layouts;
};

class BlockTableTest : public ::testing::Test {
 protected:
  BlockTableTest()
      : backend_(MakeCpuBackend({})),
        exact_({1, 1, 64, 64}, ExactPair()),
        coded_({1, 1, 64, 64}, *ParseCachePair("turbo4")) {
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), size_t{64} << 20, false},
                     {"host", backend_.get(), size_t{64} << 20, false}};
    EXPECT_TRUE(store_.Init(options).ok());
    record_ = store_.NewRecency(absl::UnixEpoch());
  }
  Block* NewBlock() { return store_.Allocate(0, 0, random_() % 3 == 0 ? &coded_ : &exact_); }
  int64_t AnyIndex(const Model& model) {
    return model.first + static_cast<int64_t>(random_() % model.blocks.size());
  }

  void Change(Model& model) {
    BlockTable& table = *model.table;
    switch (random_() % 8) {
      case 0:
      case 1:
      case 2:
        for (uint32_t n = random_() % 90; n > 0; n--) {
          model.blocks.push_back(NewBlock());
          table.PushBack(model.blocks.back(), record_);
        }
        break;
      case 3:
        for (uint32_t n = random_() % 40; n > 0 && !model.blocks.empty(); n--) {
          table.PopBack();
          model.blocks.pop_back();
        }
        break;
      case 4:
        for (uint32_t n = random_() % 40; n > 0 && !model.blocks.empty(); n--) {
          table.PopFront();
          model.blocks.pop_front();
          model.first++;
        }
        break;
      case 5:
        if (random_() % 4 != 0) break;
        table.Clear();
        model.blocks.clear();
        model.first = 0;
        break;
      default:
        if (model.blocks.empty()) break;
        const int64_t index = AnyIndex(model);
        Block* block = NewBlock();
        table.Replace(index, block, record_);
        model.blocks[static_cast<size_t>(index - model.first)] = block;
    }
  }

  // A block of the table goes to the other tier, or loses its bytes.
  void Move(Model& model) {
    if (model.blocks.empty()) return;
    Block* block = model.table->at(AnyIndex(model));
    if (block->place == nullptr) return;
    if (random_() % 6 == 0) {
      store_.Drop(block);
      return;
    }
    Place* place = store_.Reserve(1 - block->place->tier, *block);
    ASSERT_NE(place, nullptr);
    store_.SwapPlace(block, place);
  }

  Shown Look(Model& model) {
    Shown shown{model.table->Snapshot(), model.first, {}, {}};
    for (const Block* block : model.blocks) {
      shown.data.push_back(block->place != nullptr ? store_.Data(*block->place) : nullptr);
      shown.layouts.push_back(block->layout());
    }
    return shown;
  }

  static void Check(const Shown& shown) {
    int64_t at = shown.first;
    const auto end = shown.first + static_cast<int64_t>(shown.data.size());
    ASSERT_EQ(shown.snapshot->end_block() - shown.snapshot->first_block(), end - at);
    for (const SnapshotRun& run : shown.snapshot->runs()) {
      ASSERT_EQ(run.first_block, at);
      for (std::byte* data : run.blocks) {
        const auto i = static_cast<size_t>(at - shown.first);
        ASSERT_EQ(data, shown.data[i]);
        ASSERT_EQ(run.layout, shown.layouts[i]);
        ASSERT_EQ(data == nullptr, run.tier == ChunkPicture::kDropped);
        at++;
      }
    }
    ASSERT_EQ(at, end);
  }

  std::mt19937 random_{11};
  std::unique_ptr<Backend> backend_;
  const BlockLayout exact_, coded_;
  BlockStore store_;
  RecencyPtr record_;
};

TEST_F(BlockTableTest, RandomChangesOfForksAgreeWithLists) {
  std::vector<Model> models(1);
  models[0].table = std::make_unique<BlockTable>(&store_, true);
  std::vector<Shown> held;  // by readers
  for (int step = 0; step < 1500; step++) {
    Model& model = models[random_() % models.size()];
    const uint32_t dice = random_() % 10;
    if (dice < 5) {
      Change(model);
    } else if (dice < 7) {
      Move(model);
    } else if (dice < 8 && models.size() < 6) {
      Model fork{model.table->Fork(), model.first, model.blocks};
      models.push_back(std::move(fork));
    } else if (dice < 9 && models.size() > 1) {
      std::swap(model, models.back());
      models.pop_back();
    } else {
      held.push_back(Look(model));
      if (held.size() > 5) held.erase(held.begin());
    }
    for (const Model& each : models) {
      ASSERT_EQ(each.table->end() - each.table->first(), static_cast<int64_t>(each.blocks.size()));
      if (!each.blocks.empty()) {
        ASSERT_EQ(each.table->first(), each.first);
      }
      int64_t index = each.table->first();
      for (const Block* block : each.blocks) ASSERT_EQ(each.table->at(index++), block);
    }
    if (step % 10 == 0) {
      store_.CheckInvariants();
      for (const Shown& shown : held) Check(shown);
      for (Model& each : models) Check(Look(each));
    }
  }
  held.clear();
  models.clear();
  store_.CheckInvariants();
  EXPECT_EQ(store_.stored_bytes(), 0u);
  EXPECT_EQ(store_.table_bytes(), 0u);
  EXPECT_EQ(store_.tier(0).allocator.used_bytes() + store_.tier(1).allocator.used_bytes(), 0u);
}

TEST_F(BlockTableTest, ASnapshotIsTheSameUntilTheTableChangesAndKeepsOldPlaces) {
  BlockTable table(&store_, true);
  for (int i = 0; i < 200; i++) table.PushBack(NewBlock(), record_);
  std::shared_ptr<const TableSnapshot> snapshot = table.Snapshot();
  EXPECT_EQ(table.Snapshot(), snapshot);
  Block* block = table.at(70);
  const size_t used = store_.tier(0).allocator.used_bytes();
  store_.SwapPlace(block, store_.Reserve(1, *block));
  EXPECT_EQ(store_.tier(0).allocator.used_bytes(), used) << "a reader has the old place";
  EXPECT_NE(table.Snapshot()->serial(), snapshot->serial());
  snapshot.reset();
  EXPECT_LT(store_.tier(0).allocator.used_bytes(), used);
}

// What forks cost is what they change.
TEST_F(BlockTableTest, ForksShareTheirChunks) {
  BlockTable table(&store_, true);
  for (int i = 0; i < 64 * 20; i++) table.PushBack(store_.Allocate(0, 0, &coded_), record_);
  const uint64_t before = store_.table_bytes();
  std::vector<std::unique_ptr<BlockTable>> forks;
  for (int i = 0; i < 50; i++) forks.push_back(table.Fork());
  EXPECT_EQ(store_.table_bytes(), before);
  EXPECT_EQ(store_.shared_blocks(), 64u * 20);
  forks[0]->PopBack();
  EXPECT_EQ(store_.table_bytes(), before + sizeof(Chunk));
  EXPECT_EQ(table.at(64 * 20 - 1)->references(), 50);
  EXPECT_EQ(table.at(0)->references(), 51);
  EXPECT_EQ(store_.shared_blocks(), 64u * 20);
  forks.clear();
  EXPECT_EQ(store_.shared_blocks(), 0u);
  store_.CheckInvariants();
}

}  // namespace
}  // namespace kvtide
