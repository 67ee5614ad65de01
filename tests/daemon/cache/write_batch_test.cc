#include "daemon/cache/write/write_batch.h"

#include "daemon/cache/move/mover.h"
#include "daemon/cache/write/sealer.h"
#include "daemon/cache/write/writer.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

class WriteBatchTest : public ::testing::Test {
 protected:
  WriteBatchTest() : backend_(MakeCpuBackend({})), core_(Options()) {
    EXPECT_TRUE(core_.Start().ok());
    CacheLock lock(core_);
    const ModelId model = lock->sequences.RegisterModel(SmallModel(), kDefaultTenant).value();
    sequence_ = lock->sequences.Create(model, WithPair("f16")).value();
  }
  ~WriteBatchTest() override {
    CacheLock lock(core_);
    sequence_.reset();
    lock->sequences.Clear();
    lock->store.CheckInvariants();
  }
  CacheOptions Options() {
    CacheOptions options;
    options.background_moves = false;
    options.tiers = {{"device", backend_.get(), 8 * kMiB, false}};
    return options;
  }
  LayerWrite& Add(WriteBatch& batch, int64_t start) {
    batch.AddSequence(sequence_);
    LayerWrite& write = batch.AddWrite(0, start, 2);
    write.k = write.v = {rows_.data(), DataType::kF32};
    write.hash = HashRows(write);
    return write;
  }

  const std::unique_ptr<Backend> backend_;
  CacheCore core_;
  Mover mover_{core_};
  Sealer sealer_{core_, mover_};
  Writer writer_{core_, mover_, sealer_};
  SequencePtr sequence_;
  std::vector<float> rows_ = std::vector<float>(256, 0.5f);
};

using WriteBatchDeathTest = WriteBatchTest;

TEST_F(WriteBatchDeathTest, ABatchThatWasBegunAndNotEndedStopsTheProcess) {
  EXPECT_DEATH(
      {
        CacheLock lock(core_);
        WriteBatch batch;
        Add(batch, 0);
        (void)writer_.Begin(lock, batch);
      },
      "neither finished nor rolled back");
}

TEST_F(WriteBatchTest, ABatchThatDidNotBeginOrWasRolledBackLeavesNothing) {
  CacheLock lock(core_);
  {
    WriteBatch unused;
    Add(unused, 0);
  }
  {
    WriteBatch wrong;
    Add(wrong, 7);
    EXPECT_EQ(writer_.Begin(lock, wrong).code(), absl::StatusCode::kOutOfRange);
  }
  {
    WriteBatch batch;
    Add(batch, 0);
    ASSERT_TRUE(writer_.Begin(lock, batch).ok());
    EXPECT_TRUE(sequence_->writer);
    EXPECT_GT(lock->store.stored_bytes(), 0u);
    writer_.Rollback(*lock, batch);
  }
  EXPECT_FALSE(sequence_->writer);
  EXPECT_EQ(lock->store.stored_bytes(), 0u);
}

TEST_F(WriteBatchTest, TheHashTellsValuesTypesAndSidesApart) {
  WriteBatch batch;
  LayerWrite& write = Add(batch, 0);
  const uint64_t hash = write.hash;
  EXPECT_EQ(HashRows(write), hash);
  rows_[17] = -0.5f;
  EXPECT_NE(HashRows(write), hash);
  rows_[17] = 0.5f;
  std::vector<float> other(256, 0.25f);
  write.k = {other.data(), DataType::kF32};
  const uint64_t in_k = HashRows(write);
  std::swap(write.k, write.v);
  EXPECT_NE(HashRows(write), in_k);
  write.k.type = DataType::kBf16;
  const uint64_t as_bf16 = HashRows(write);
  write.k.type = DataType::kF16;
  EXPECT_NE(HashRows(write), as_bf16);
}

}  // namespace
}  // namespace kvtide::testing
