// The disk tier over files that fail: what was acknowledged as durable reads back bit for bit after a crash
// at any step, also when the index was lost; nothing reads another block's bytes; errors stay with their
// block.
#include "daemon/disk/disk_tier.h"

#include <unistd.h>
#include <xxhash.h>

#include <filesystem>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "daemon/cache/extent_allocator.h"
#include "daemon/disk/extent_header.h"
#include "gtest/gtest.h"
#include "tests/daemon/disk/fault_file_system.h"

namespace kvtide {
namespace {

using testing::FaultFileSystem;
constexpr char kFolder[] = "/disk";

using Bytes = std::vector<std::byte>;

Bytes RandomBytes(std::mt19937& random, size_t count) {
  Bytes bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

DiskTierOptions SmallOptions(FaultFileSystem& files, uint64_t id_seed) {
  DiskTierOptions options;
  options.folder = kFolder;
  options.capacity_bytes = 64 * kDiskPage;
  options.segment_bytes = 10 * kDiskPage;  // extents cross their borders
  options.piece_bytes = 2 * kDiskPage;
  options.depth = 3;
  options.runs = 1;
  options.io = IoKind::kInline;
  options.files = &files;
  options.id_seed = id_seed;
  return options;
}

absl::Status Write(DiskTier& tier, size_t offset, BlockLabel& label, const Bytes& bytes) {
  IoJob job;
  job.write = true;
  job.offset = offset;
  label.write_id = tier.NextWriteId();
  label.bytes = bytes.size();
  job.label = label;
  job.copy = [&](size_t at, std::span<std::byte> piece) {
    std::copy_n(bytes.begin() + static_cast<int64_t>(at), piece.size(), piece.begin());
    return absl::OkStatus();
  };
  tier.Run({&job, 1});
  label = job.label;
  return job.status;
}

// Where a block lies.
struct ExtentRef {
  size_t offset = 0;
  BlockLabel label;
};

absl::StatusOr<Bytes> Read(DiskTier& tier, const ExtentRef& extent) {
  Bytes bytes(extent.label.bytes);
  IoJob job;
  job.offset = extent.offset;
  job.label = extent.label;
  job.copy = [&](size_t at, std::span<std::byte> piece) {
    std::copy(piece.begin(), piece.end(), bytes.begin() + static_cast<int64_t>(at));
    return absl::OkStatus();
  };
  tier.Run({&job, 1});
  if (!job.status.ok()) return job.status;
  return bytes;
}

BlockLabel LabelOf(uint64_t sequence, int64_t index) {
  BlockLabel label;
  label.sequence = sequence;
  label.index = index;
  label.k_type = "q8_0";
  label.v_type = "turbo4";
  return label;
}

class DiskTierTest : public ::testing::Test {
 protected:
  void Open() { tier_ = DiskTier::Open(SmallOptions(files_, ++lives_)).value(); }
  void Restart() {
    tier_.reset();
    files_.Crash();
    Open();
  }
  FaultFileSystem files_;
  std::unique_ptr<DiskTier> tier_;
  uint64_t lives_ = 0;
  std::mt19937 random_{7};
};

TEST_F(DiskTierTest, BlocksOfEverySizeComeBack) {
  Open();
  files_.set_short_results(true);
  for (size_t bytes = 1; bytes < 12 * kDiskPage; bytes += 1 + bytes / 3) {
    BlockLabel label = LabelOf(1, static_cast<int64_t>(bytes));
    const Bytes content = RandomBytes(random_, bytes);
    ASSERT_TRUE(Write(*tier_, 5 * kDiskPage, label, content).ok());
    EXPECT_EQ(label.checksum, XXH3_64bits(content.data(), content.size()));
    const absl::StatusOr<Bytes> read = Read(*tier_, {5 * kDiskPage, label});
    ASSERT_TRUE(read.ok()) << bytes << ": " << read.status();
    EXPECT_EQ(*read, content);
  }
}

TEST_F(DiskTierTest, NeverGivesAnotherBlocksBytes) {
  Open();
  BlockLabel first = LabelOf(1, 0), second = LabelOf(1, 0);
  const Bytes content = RandomBytes(random_, 3 * kDiskPage);
  ASSERT_TRUE(Write(*tier_, 0, first, content).ok());
  ASSERT_TRUE(Write(*tier_, 0, second, content).ok());  // the same bytes of the same block, written again
  EXPECT_EQ(Read(*tier_, {0, first}).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(Read(*tier_, {0, second}).ok());
  EXPECT_EQ(Read(*tier_, {kDiskPage, second}).status().code(), absl::StatusCode::kDataLoss);
  BlockLabel other = second;
  other.codec_version_k++;
  EXPECT_EQ(Read(*tier_, {0, other}).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(tier_->Stats().checksum_errors, 3u);
}

TEST_F(DiskTierTest, EveryDamagedPageIsNoticed) {
  Open();
  BlockLabel label = LabelOf(1, 0);
  const Bytes content = RandomBytes(random_, 4 * kDiskPage);
  ASSERT_TRUE(Write(*tier_, 0, label, content).ok());
  for (size_t page = 0; page < 5; page++) {
    const size_t at = page * kDiskPage + (page == 0 ? 20 : random_() % kDiskPage);
    ASSERT_TRUE(files_.Damage(absl::StrCat(kFolder, "/segment-0"), at));
    EXPECT_EQ(Read(*tier_, {0, label}).status().code(), absl::StatusCode::kDataLoss) << page;
    ASSERT_TRUE(files_.Damage(absl::StrCat(kFolder, "/segment-0"), at));  // and back
  }
  EXPECT_EQ(Read(*tier_, {0, label}).value(), content);
}

// A transfer that failed is never a success, whichever of its pieces it was.
TEST_F(DiskTierTest, AnErrorOfAnyPieceIsTheBlocksAndNoOthers) {
  Open();
  for (int piece = 0; piece < 5; piece++) {
    const Bytes content = RandomBytes(random_, 9 * kDiskPage);
    BlockLabel label = LabelOf(1, 0), other = LabelOf(2, 0);
    files_.Fail(FaultFileSystem::kWrite, piece);
    EXPECT_EQ(Write(*tier_, 0, label, content).code(), absl::StatusCode::kUnavailable) << piece;
    EXPECT_FALSE(Read(*tier_, {0, label}).ok());
    files_.ClearFaults();
    ASSERT_TRUE(Write(*tier_, 0, label, content).ok());
    ASSERT_TRUE(Write(*tier_, 20 * kDiskPage, other, content).ok());
    files_.Fail(FaultFileSystem::kRead, piece);
    EXPECT_EQ(Read(*tier_, {0, label}).status().code(), absl::StatusCode::kDataLoss) << piece;
    EXPECT_EQ(Read(*tier_, {20 * kDiskPage, other}).value(), content);
    EXPECT_EQ(Read(*tier_, {0, label}).value(), content);
  }
}

TEST_F(DiskTierTest, JobsOfOneRunFailAlone) {
  Open();
  std::vector<Bytes> content;
  std::vector<IoJob> jobs(5);
  for (size_t i = 0; i < jobs.size(); i++) {
    content.push_back(RandomBytes(random_, 5 * kDiskPage));
    jobs[i].write = true;
    jobs[i].offset = i * 6 * kDiskPage;
    jobs[i].label = LabelOf(i + 1, 0);
    jobs[i].label.write_id = tier_->NextWriteId();
    jobs[i].label.bytes = content[i].size();
    jobs[i].copy = [&, i](size_t at, std::span<std::byte> piece) -> absl::Status {
      if (i == 1 && at > 0) return absl::InternalError("the GPU fails");
      std::copy_n(content[i].begin() + static_cast<int64_t>(at), piece.size(), piece.begin());
      return absl::OkStatus();
    };
  }
  Cancellation cancellation;
  cancellation.Cancel();
  jobs[3].cancellation = &cancellation;
  tier_->Run(jobs);
  EXPECT_EQ(jobs[1].status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(jobs[3].status.code(), absl::StatusCode::kCancelled);
  for (const size_t i : {0, 2, 4}) {
    ASSERT_TRUE(jobs[i].status.ok()) << jobs[i].status;
    EXPECT_EQ(Read(*tier_, {jobs[i].offset, jobs[i].label}).value(), content[i]);
  }
}

TEST_F(DiskTierTest, AFullDiskStopsWritesForAWhileAndSaysSo) {
  absl::Time now = absl::FromUnixSeconds(1'000'000);
  DiskTierOptions options = SmallOptions(files_, 1);
  options.clock = [&] { return now; };
  tier_ = DiskTier::Open(options).value();
  const Bytes content = RandomBytes(random_, kDiskPage);
  BlockLabel label = LabelOf(1, 0);
  for (const int seconds : {1, 2, 4}) {
    files_.Fail(FaultFileSystem::kWrite, 0, 1, absl::ResourceExhaustedError("No space left on device"));
    EXPECT_EQ(Write(*tier_, 0, label, content).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_FALSE(tier_->Writable());
    EXPECT_FALSE(tier_->Stats().writable);
    EXPECT_EQ(tier_->Stats().problem, "No space left on device");
    now += absl::Seconds(seconds) - absl::Milliseconds(1);
    EXPECT_FALSE(tier_->Writable());
    now += absl::Milliseconds(1);
    EXPECT_TRUE(tier_->Writable());
  }
  EXPECT_TRUE(Write(*tier_, 0, label, content).ok());
  EXPECT_TRUE(tier_->Stats().writable);
  EXPECT_EQ(tier_->Stats().problem, "");
}

TEST_F(DiskTierTest, NoRoomForTheSegmentsIsSaidAtTheStart) {
  files_.set_capacity(20 * kDiskPage);
  const absl::Status status = DiskTier::Open(SmallOptions(files_, 1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST_F(DiskTierTest, ASecondDaemonOnTheFolderIsRefused) {
  Open();
  EXPECT_EQ(DiskTier::Open(SmallOptions(files_, 9)).status().code(), absl::StatusCode::kAlreadyExists);
  Restart();  // the lock of a dead process does not stay
}

TEST_F(DiskTierTest, AFailedSyncMakesNothingDurableAnyMore) {
  Open();
  files_.Fail(FaultFileSystem::kSync);
  EXPECT_FALSE(tier_->Put(1, "value").ok());
  EXPECT_FALSE(tier_->Put(1, "value").ok());  // the second sync would say OK about bytes that are gone
  EXPECT_EQ(tier_->Stats().sync_errors, 1u);
  Restart();
  EXPECT_TRUE(tier_->Put(1, "value").ok());
}

TEST_F(DiskTierTest, ChangesOfTheSizeKeepWhatStillFits) {
  Open();
  BlockLabel label = LabelOf(1, 1);
  const Bytes content = RandomBytes(random_, 9000);
  ASSERT_TRUE(Write(*tier_, 8 * kDiskPage, label, content).ok());
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  for (const size_t pages : {24u, 80u, 26u}) {
    tier_.reset();
    DiskTierOptions options = SmallOptions(files_, ++lives_);
    options.capacity_bytes = pages * kDiskPage;
    tier_ = DiskTier::Open(options).value();
    EXPECT_EQ(Read(*tier_, {8 * kDiskPage, label}).value(), content) << pages;
    std::vector<std::string> lost;
    EXPECT_EQ(tier_->Load(&lost).at(1), "value");
  }
}

TEST_F(DiskTierTest, AFullFileOfManifestsIsSaidAndFreedByErase) {
  Open();
  std::vector<uint64_t> keys;
  absl::Status status;
  for (uint64_t key = 1; status.ok(); key++) {
    status = tier_->Put(key, std::string(3000, 'x'));
    if (status.ok()) keys.push_back(key);
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(keys.size(), 3u);
  ASSERT_TRUE(tier_->Erase(keys).ok());
  for (const uint64_t key : keys) EXPECT_TRUE(tier_->Put(100 + key, std::string(3000, 'y')).ok());
}

TEST_F(DiskTierTest, ADamagedManifestIsLostAlone) {
  Open();
  ASSERT_TRUE(tier_->Put(1, std::string(5000, 'a')).ok());
  ASSERT_TRUE(tier_->Put(2, std::string(5000, 'b')).ok());
  ASSERT_TRUE(files_.Damage(absl::StrCat(kFolder, "/manifests"), kDiskPage + 100));
  Restart();
  std::vector<std::string> lost;
  const std::map<uint64_t, std::string> values = tier_->Load(&lost);
  EXPECT_EQ(values, (std::map<uint64_t, std::string>{{2, std::string(5000, 'b')}}));
  ASSERT_EQ(lost.size(), 1u);
  EXPECT_NE(lost[0].find("manifest of 1"), std::string::npos) << lost[0];
  EXPECT_TRUE(tier_->Put(1, "new").ok());
}

// An offload that was still under way when its sequence was closed does not bring it back (Mooncake #2799,
// #3160).
TEST_F(DiskTierTest, ErasedKeysStayErasedWhenTheIndexIsLost) {
  Open();
  for (int version = 1; version <= 3; version++)
    ASSERT_TRUE(tier_->Put(1, absl::StrCat("version ", version)).ok());
  files_.Fail(FaultFileSystem::kSync, 1);  // of the index, after that of the manifest
  EXPECT_FALSE(tier_->Put(1, "in doubt").ok());
  files_.ClearFaults();
  Restart();
  const uint64_t key = 1;
  ASSERT_TRUE(tier_->Erase({&key, 1}).ok());
  tier_.reset();
  files_.Crash();
  for (const std::string& path : files_.Paths())
    if (path.find("index") != std::string::npos) {
      ASSERT_TRUE(files_.Remove(path).ok());
    }
  Open();
  EXPECT_NE(tier_->rebuild_reason(), "");
  std::vector<std::string> lost;
  EXPECT_TRUE(tier_->Load(&lost).empty());
}

// Whichever write of a Put fails, what is erased afterwards is gone for good: an older value whose place
// could not be wiped must not be the newest one then.
TEST_F(DiskTierTest, AFormerValueThatCouldNotBeWipedGoesWithTheKey) {
  const uint64_t key = 1;
  int put = 0;
  for (int calls = 0; calls < 6; calls++) {
    SCOPED_TRACE(calls);
    Open();
    ASSERT_TRUE(tier_->Put(key, "former").ok());
    files_.Fail(FaultFileSystem::kWrite, calls);
    if (tier_->Put(key, "value").ok()) put++;
    files_.ClearFaults();
    ASSERT_TRUE(tier_->Erase({&key, 1}).ok());
    tier_.reset();
    files_.Crash();
    for (const std::string& path : files_.Paths())
      if (path.find("index") != std::string::npos) {
        ASSERT_TRUE(files_.Remove(path).ok());
      }
    Open();
    std::vector<std::string> lost;
    EXPECT_EQ(tier_->Load(&lost).count(key), 0u);
    tier_.reset();
  }
  EXPECT_GT(put, 0);
}

// A naive model beside the tier: random blocks and values that name them; the process dies at any step; the
// index is damaged now and then.
class Life {
 public:
  Life(uint32_t seed, bool damage_index)
      : random_(seed), files_(seed), seed_(seed), damage_index_(damage_index) {}

  void Run() {
    for (life_ = 0; life_ < 5 && !::testing::Test::HasFailure(); life_++) {
      files_.DieAfter(static_cast<int>(random_() % 200));
      absl::StatusOr<std::unique_ptr<DiskTier>> tier = Open(0);
      if (tier.ok()) Work(**tier);
      tier = absl::CancelledError("dead");
      files_.Crash();
      Recover();
    }
  }

 private:
  // What a key has: a value, and the block that it names.
  struct Kept {
    std::string value;
    ExtentRef block;
    Bytes bytes;
  };

  absl::StatusOr<std::unique_ptr<DiskTier>> Open(uint64_t more) {
    return DiskTier::Open(
        SmallOptions(files_, uint64_t{seed_} * 100 + static_cast<uint64_t>(life_) * 2 + more + 1));
  }

  // As the cache gives it: nothing that counts is used again.
  std::optional<size_t> FindSpace(const DiskTier& tier, size_t bytes) {
    ExtentAllocator space(tier.capacity_bytes());
    for (const auto& [key, kept] : durable_)
      EXPECT_TRUE(space.AllocateAt(kept.block.offset, tier.ExtentBytes(kept.bytes.size())));
    const auto end = random_() % 2 == 0 ? ExtentAllocator::End::kTop : ExtentAllocator::End::kBottom;
    return space.Allocate(tier.ExtentBytes(bytes), end);
  }

  void Work(DiskTier& tier) {
    for (int step = 0; step < 40 && !files_.dead(); step++) {
      const uint64_t key = 1 + random_() % 5;
      if (random_() % 5 == 0) {
        erasing_ = key;
        if (!tier.Erase({&key, 1}).ok()) return;
        erasing_.reset();
        durable_.erase(key);
        continue;
      }
      Kept kept;
      kept.bytes = RandomBytes(random_, 1 + random_() % (7 * kDiskPage));
      kept.block.label = LabelOf(key, step);
      const std::optional<size_t> offset = FindSpace(tier, kept.bytes.size());
      if (!offset.has_value()) continue;
      kept.block.offset = *offset;
      if (!Write(tier, *offset, kept.block.label, kept.bytes).ok()) continue;
      kept.value = absl::StrCat("block ", kept.block.label.write_id, std::string(random_() % 6000, '.'));
      putting_ = {key, kept};
      const absl::Status status = tier.Put(key, kept.value);
      if (status.code() == absl::StatusCode::kResourceExhausted) {
        putting_.reset();
        continue;
      }
      if (!status.ok()) return;
      putting_.reset();
      durable_[key] = kept;
    }
  }

  void Recover() {
    const std::string where = absl::StrCat("seed ", seed_, " life ", life_);
    if (damage_index_)
      for (const std::string& path : files_.Paths())
        if (path.find("index") != std::string::npos && path.find("tmp") == std::string::npos)
          files_.Damage(path, random_() % std::max<uint64_t>(1, files_.SizeOf(path)));
    const absl::StatusOr<std::unique_ptr<DiskTier>> tier = Open(1);
    ASSERT_TRUE(tier.ok()) << where << ": " << tier.status();
    std::vector<std::string> lost;
    const std::map<uint64_t, std::string> found = (*tier)->Load(&lost);
    std::map<uint64_t, Kept> now;
    for (const auto& [key, kept] : durable_)
      ASSERT_TRUE(found.count(key) != 0 || erasing_ == key) << where << ": key " << key << " is gone";
    for (const auto& [key, value] : found) {
      const auto known = durable_.find(key);
      const Kept* kept = known != durable_.end() && known->second.value == value ? &known->second : nullptr;
      if (putting_.has_value() && putting_->first == key && putting_->second.value == value)
        kept = &putting_->second;
      ASSERT_NE(kept, nullptr) << where << ": key " << key << " was erased, or never had this value";
      const absl::StatusOr<Bytes> bytes = Read(**tier, kept->block);
      ASSERT_TRUE(bytes.ok()) << where << ": " << bytes.status();
      ASSERT_TRUE(*bytes == kept->bytes) << where;
      now[key] = *kept;
    }
    // Only a value that was being erased may be missing; a damaged index may have brought its key back.
    if (!damage_index_) {
      ASSERT_LE(lost.size(), erasing_.has_value() ? 1u : 0u) << where << ": " << lost[0];
    }
    durable_ = std::move(now);
    putting_.reset();
    erasing_.reset();
  }

  std::mt19937 random_;
  FaultFileSystem files_;
  const uint32_t seed_;
  const bool damage_index_;
  int life_ = 0;
  std::map<uint64_t, Kept> durable_;
  std::optional<std::pair<uint64_t, Kept>> putting_;
  std::optional<uint64_t> erasing_;
};

TEST(DiskTierLives, WhatWasAcknowledgedAsDurableIsThereAfterACrashAtAnyStep) {
  for (uint32_t seed = 1; seed <= 100 && !::testing::Test::HasFailure(); seed++) Life(seed, false).Run();
}

TEST(DiskTierLives, ADamagedIndexIsBuiltAnew) {
  for (uint32_t seed = 1001; seed <= 1200 && !::testing::Test::HasFailure(); seed++) Life(seed, true).Run();
}

// Real files, with both ways of I/O, several Runs at the same time.
class RealDisk : public ::testing::TestWithParam<IoKind> {};

TEST_P(RealDisk, ManyThreadsWriteAndReadBack) {
  if (GetParam() == IoKind::kUring && !CheckUring().ok()) GTEST_SKIP() << CheckUring().message();
  std::string folder = ::testing::TempDir() + "/kvtide_disk_XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  DiskTierOptions options;
  options.folder = folder;
  options.capacity_bytes = 24 << 20;
  options.segment_bytes = 5 << 20;
  options.piece_bytes = 64 << 10;
  options.io = GetParam();
  options.runs = 2;
  const std::unique_ptr<DiskTier> tier = DiskTier::Open(options).value();
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<uint32_t>(t));
      for (int round = 0; round < 10; round++) {
        const Bytes content = RandomBytes(random, 1 + random() % (2 << 20));
        BlockLabel label = LabelOf(t + 1, round);
        const size_t offset = t * (6 << 20) + random() % 100 * kDiskPage;
        ASSERT_TRUE(Write(*tier, offset, label, content).ok());
        const absl::StatusOr<Bytes> read = Read(*tier, {offset, label});
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_TRUE(*read == content);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(tier->Stats().writes, 40u);
  EXPECT_EQ(DiskTier::Open(options).status().code(), absl::StatusCode::kAlreadyExists);
  std::filesystem::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(Kinds, RealDisk, ::testing::Values(IoKind::kUring, IoKind::kThreads),
                         [](const auto& test) {
                           return test.param == IoKind::kUring ? "IoUring" : "Threads";
                         });

}  // namespace
}  // namespace kvtide
