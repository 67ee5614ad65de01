// The disk tier over files that fail: what was acknowledged as durable reads back bit for bit after a crash
// at any step, also when the index was lost; nothing reads another block's bytes; errors stay with their
// block. All of it in clear and encrypted.
#include "daemon/disk/disk_tier.h"

#include <unistd.h>
#include <xxhash.h>

#include <filesystem>
#include <random>
#include <thread>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/tier/extent_allocator.h"
#include "daemon/disk/extent_header.h"
#include "daemon/disk/folder_key.h"
#include "gtest/gtest.h"
#include "tests/daemon/disk/fault_file_system.h"

namespace kvtide {
namespace {

using testing::FaultFileSystem;
constexpr char kFolder[] = "/disk";

using Bytes = std::vector<std::byte>;

std::shared_ptr<const SecretKey> TestKey(int number = 0) {
  auto key = std::make_shared<SecretKey>();
  for (size_t i = 0; i < kKeyBytes; i++)
    key->bytes()[i] = static_cast<std::byte>(i + 1 + 50 * static_cast<size_t>(number));
  return key;
}

Bytes RandomBytes(std::mt19937& random, size_t count) {
  Bytes bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

DiskTierOptions SmallOptions(FaultFileSystem& files, uint64_t id_seed, bool encrypted) {
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
  if (encrypted) options.key = TestKey();
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

class DiskTierTest : public ::testing::TestWithParam<bool> {
 protected:
  DiskTierOptions Options() { return SmallOptions(files_, ++lives_, GetParam()); }
  void Open() { tier_ = DiskTier::Open(Options()).value(); }
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

TEST_P(DiskTierTest, BlocksOfEverySizeComeBack) {
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

TEST_P(DiskTierTest, NeverGivesAnotherBlocksBytes) {
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

TEST_P(DiskTierTest, EveryDamagedPageIsNoticed) {
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
TEST_P(DiskTierTest, AnErrorOfAnyPieceIsTheBlocksAndNoOthers) {
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

TEST_P(DiskTierTest, JobsOfOneRunFailAlone) {
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

TEST_P(DiskTierTest, AFullDiskStopsWritesForAWhileAndSaysSo) {
  absl::Time now = absl::FromUnixSeconds(1'000'000);
  DiskTierOptions options = Options();
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

TEST_P(DiskTierTest, NoRoomForTheSegmentsIsSaidAtTheStart) {
  files_.set_capacity(20 * kDiskPage);
  const absl::Status status = DiskTier::Open(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST_P(DiskTierTest, ASecondDaemonOnTheFolderIsRefused) {
  Open();
  EXPECT_EQ(DiskTier::Open(Options()).status().code(), absl::StatusCode::kAlreadyExists);
  Restart();  // the lock of a dead process does not stay
}

TEST_P(DiskTierTest, AFailedSyncMakesNothingDurableAnyMore) {
  Open();
  files_.Fail(FaultFileSystem::kSync);
  EXPECT_FALSE(tier_->Put(1, "value").ok());
  EXPECT_FALSE(tier_->Put(1, "value").ok());  // the second sync would say OK about bytes that are gone
  EXPECT_EQ(tier_->Stats().sync_errors, 1u);
  Restart();
  EXPECT_TRUE(tier_->Put(1, "value").ok());
}

// A mistyped size must not cost what was acknowledged as durable.
TEST_P(DiskTierTest, ASmallerTierIsRefusedWhileSomethingIsDurable) {
  const auto open = [&](size_t pages) {
    tier_.reset();
    DiskTierOptions options = Options();
    options.capacity_bytes = pages * kDiskPage;
    absl::StatusOr<std::unique_ptr<DiskTier>> opened = DiskTier::Open(options);
    if (opened.ok()) tier_ = *std::move(opened);
    return opened.status();
  };
  ASSERT_TRUE(open(64).ok());
  BlockLabel near = LabelOf(1, 1), far = LabelOf(1, 2);
  const Bytes content = RandomBytes(random_, 9000);
  ASSERT_TRUE(Write(*tier_, 8 * kDiskPage, near, content).ok());
  ASSERT_TRUE(Write(*tier_, 50 * kDiskPage, far, content).ok());
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  const auto expect_all = [&] {
    EXPECT_EQ(Read(*tier_, {8 * kDiskPage, near}).value(), content);
    EXPECT_EQ(Read(*tier_, {50 * kDiskPage, far}).value(), content);
    std::vector<std::string> lost;
    EXPECT_EQ(tier_->Load(&lost).at(1), "value");
    EXPECT_TRUE(lost.empty());
  };
  for (const size_t pages : {24u, 63u}) {
    const absl::Status refused = open(pages);
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
    EXPECT_TRUE(absl::StrContains(refused.message(), "give it 262144 bytes")) << refused;
    ASSERT_TRUE(open(64).ok());
    expect_all();
  }
  ASSERT_TRUE(open(80).ok());
  expect_all();
  // A larger one that the disk has no room for does not count, whatever it has left behind.
  files_.set_capacity(90 * kDiskPage);
  EXPECT_EQ(open(200).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(open(80).ok());
  expect_all();
  // A folder of a build that wrote no size.
  tier_.reset();
  ASSERT_TRUE(files_.Remove(absl::StrCat(kFolder, "/size")).ok());
  EXPECT_EQ(open(64).code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(open(80).ok());
  expect_all();
  // Where nothing is durable any more, what still fits stays.
  const uint64_t key = 1;
  ASSERT_TRUE(tier_->Erase({&key, 1}).ok());
  ASSERT_TRUE(open(26).ok());
  EXPECT_EQ(Read(*tier_, {8 * kDiskPage, near}).value(), content);
}

// Somebody has cut files short, or taken some away.
TEST_P(DiskTierTest, FilesThatAreShorterThanTheyWereAreSaid) {
  Open();
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  tier_.reset();
  ASSERT_TRUE(files_.Remove(absl::StrCat(kFolder, "/segment-1")).ok());
  ASSERT_TRUE(files_.Open(absl::StrCat(kFolder, "/segment-2"), false, false).value()->Truncate(5000).ok());
  Open();
  std::vector<std::string> lost;
  EXPECT_EQ(tier_->Load(&lost).at(1), "value");
  ASSERT_EQ(lost.size(), 2u);
  EXPECT_TRUE(absl::StrContains(lost[0], "/disk/segment-1 has 0 of 40960 bytes")) << lost[0];
  EXPECT_TRUE(absl::StrContains(lost[1], "/disk/segment-2 has 5000 of 40960 bytes")) << lost[1];
  tier_.reset();
  Open();
  lost.clear();
  (void)tier_->Load(&lost);
  EXPECT_TRUE(lost.empty());
}

TEST_P(DiskTierTest, AFullFileOfManifestsIsSaidAndFreedByErase) {
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

TEST_P(DiskTierTest, ADamagedManifestIsLostAlone) {
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

// Two manifests of a key are there when the former one could not be wiped. If the newer one is damaged the
// former counts, and that is said: what it does not name is lost.
TEST_P(DiskTierTest, AnOlderManifestThatCountsIsSaid) {
  for (const size_t damaged : {size_t{100}, kDiskPage + 100}) {  // the label, the value
    SCOPED_TRACE(damaged);
    Open();
    ASSERT_TRUE(tier_->Put(1, std::string(5000, 'a')).ok());
    files_.Fail(FaultFileSystem::kWrite, 2);  // after the manifest and the index
    ASSERT_TRUE(tier_->Put(1, std::string(5000, 'b')).ok());
    files_.ClearFaults();
    ASSERT_TRUE(files_.Damage(absl::StrCat(kFolder, "/manifests"), 3 * kDiskPage + damaged));
    Restart();
    std::vector<std::string> lost;
    EXPECT_EQ(tier_->Load(&lost).at(1), std::string(5000, 'a'));
    ASSERT_EQ(lost.size(), 1u);
    EXPECT_NE(lost[0].find("newest manifest of 1 is damaged: an older one counts"), std::string::npos)
        << lost[0];
    EXPECT_EQ(tier_->Stats().manifest_errors, 1u);
    // It is said once, and the next value is the newest one.
    ASSERT_TRUE(tier_->Put(1, "new").ok());
    Restart();
    EXPECT_EQ(tier_->Load(&lost).at(1), "new");
    EXPECT_TRUE(lost.empty());
    EXPECT_EQ(tier_->Stats().manifest_errors, 0u);
    const uint64_t key = 1;
    ASSERT_TRUE(tier_->Erase({&key, 1}).ok());
    tier_.reset();
  }
}

// An offload that was still under way when its sequence was closed does not bring it back (Mooncake #2799,
// #3160).
TEST_P(DiskTierTest, ErasedKeysStayErasedWhenTheIndexIsLost) {
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
TEST_P(DiskTierTest, AFormerValueThatCouldNotBeWipedGoesWithTheKey) {
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

// A manifest whose page could not be read at a start is lost for good: at a later start, when it can be read
// again, it would be the value of a key that was erased meanwhile.
TEST_P(DiskTierTest, AManifestThatCouldNotBeReadAtAStartDoesNotComeBack) {
  const uint64_t key = 1;
  int lost_keys = 0;
  for (int calls = 0; calls < 16; calls++) {
    SCOPED_TRACE(calls);
    Open();
    ASSERT_TRUE(tier_->Put(key, "value").ok());
    tier_.reset();
    // The stretch of the page, and then the page.
    files_.Fail(FaultFileSystem::kRead, calls, 2);
    absl::StatusOr<std::unique_ptr<DiskTier>> tier = DiskTier::Open(Options());
    files_.ClearFaults();
    std::vector<std::string> lost;
    if (!tier.ok()) {  // nothing was changed
      Open();
      EXPECT_EQ(tier_->Load(&lost).count(key), 1u);
    } else {
      tier_ = *std::move(tier);
      if (tier_->Load(&lost).count(key) == 0) {
        lost_keys++;
        EXPECT_EQ(lost.size(), 1u);
      }
    }
    ASSERT_TRUE(tier_->Erase({&key, 1}).ok());
    tier_.reset();
    Open();
    lost.clear();
    EXPECT_EQ(tier_->Load(&lost).count(key), 0u);
    EXPECT_TRUE(lost.empty());
    tier_.reset();
  }
  EXPECT_GT(lost_keys, 0);
}

// A naive model beside the tier: random blocks and values that name them; the process dies at any step; the
// index is damaged now and then.
class Life {
 public:
  Life(uint32_t seed, bool damage_index, bool encrypted)
      : random_(seed), files_(seed), seed_(seed), damage_index_(damage_index), encrypted_(encrypted) {}

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
    return DiskTier::Open(SmallOptions(
        files_, uint64_t{seed_} * 100 + static_cast<uint64_t>(life_) * 2 + more + 1, encrypted_));
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
  const bool damage_index_, encrypted_;
  int life_ = 0;
  std::map<uint64_t, Kept> durable_;
  std::optional<std::pair<uint64_t, Kept>> putting_;
  std::optional<uint64_t> erasing_;
};

class DiskTierLives : public ::testing::TestWithParam<bool> {};

TEST_P(DiskTierLives, WhatWasAcknowledgedAsDurableIsThereAfterACrashAtAnyStep) {
  for (uint32_t seed = 1; seed <= 100 && !::testing::Test::HasFailure(); seed++)
    Life(seed, false, GetParam()).Run();
}

TEST_P(DiskTierLives, ADamagedIndexIsBuiltAnew) {
  for (uint32_t seed = 1001; seed <= 1200 && !::testing::Test::HasFailure(); seed++)
    Life(seed, true, GetParam()).Run();
}

std::string FormOf(bool encrypted) { return encrypted ? "Encrypted" : "Clear"; }
INSTANTIATE_TEST_SUITE_P(Forms, DiskTierTest, ::testing::Bool(),
                         [](const auto& test) { return FormOf(test.param); });
INSTANTIATE_TEST_SUITE_P(Forms, DiskTierLives, ::testing::Bool(),
                         [](const auto& test) { return FormOf(test.param); });

// What only the encrypted form has.
class EncryptedDisk : public ::testing::Test {
 protected:
  DiskTierOptions Options() { return SmallOptions(files_, ++lives_, true); }
  void Open() { tier_ = DiskTier::Open(Options()).value(); }
  // The bytes of a file on the medium.
  Bytes Raw(const std::string& name) {
    const std::unique_ptr<File> file = files_.Open(absl::StrCat(kFolder, "/", name), false, false).value();
    Bytes bytes(file->Size().value());
    EXPECT_TRUE(ReadAll(*file, 0, bytes).ok());
    return bytes;
  }
  void Overwrite(const std::string& name, uint64_t offset, std::span<const std::byte> bytes) {
    const std::unique_ptr<File> file = files_.Open(absl::StrCat(kFolder, "/", name), false, false).value();
    ASSERT_TRUE(WriteAll(*file, offset, bytes).ok());
  }
  std::map<std::string, Bytes> AllRaw() {
    std::map<std::string, Bytes> all;
    const std::vector<std::string> names = files_.List(kFolder).value();
    for (const std::string& name : names)
      if (name != "lock") all[name] = Raw(name);
    return all;
  }
  FaultFileSystem files_;
  std::unique_ptr<DiskTier> tier_;
  uint64_t lives_ = 0;
  std::mt19937 random_{7};
};

// Everything that the tier is told is looked for in all files: in clear all of it is found, so that the
// search is known to find; encrypted none of it.
TEST_F(EncryptedDisk, NothingThatTellsContentsIsOnTheDisk) {
  for (const bool encrypted : {false, true}) {
    FaultFileSystem files;
    const auto tier = DiskTier::Open(SmallOptions(files, 1, encrypted)).value();
    BlockLabel label = LabelOf(0x1122334455667788, 3);
    label.tenant = 0x7766554433221100;
    label.model_hash = 0x1a2b3c4d5e6f7081;
    label.chain = {0x0f1e2d3c4b5a6978, 0x8899aabbccddeeff};
    const Bytes content = RandomBytes(random_, 3 * kDiskPage + 77);
    ASSERT_TRUE(Write(*tier, 8 * kDiskPage, label, content).ok());
    ASSERT_TRUE(tier->Put(0x4142434445464748, "sequence 'secret-chat' of tenant acme: tokens 17 39 5").ok());
    std::vector<std::string> wanted = {"secret-chat", "acme", "turbo4", "q8_0"};
    const auto number = [&](uint64_t n) { wanted.emplace_back(reinterpret_cast<const char*>(&n), sizeof n); };
    number(label.sequence), number(label.tenant), number(label.model_hash), number(label.chain[0]);
    number(label.chain[1]), number(label.write_id), number(label.checksum), number(0x4142434445464748);
    for (const size_t at : {size_t{0}, size_t{5000}, content.size() - 24})
      wanted.emplace_back(reinterpret_cast<const char*>(content.data()) + at, 24);
    std::string all;
    for (const std::string& path : files.Paths()) {
      const std::unique_ptr<File> file = files.Open(path, false, false).value();
      Bytes bytes(file->Size().value());
      ASSERT_TRUE(ReadAll(*file, 0, bytes).ok());
      all.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
    for (const std::string& text : wanted)
      EXPECT_EQ(all.find(text) == std::string::npos, encrypted)
          << (encrypted ? "in clear: " : "not found: ") << text;
  }
}

// Each bit of the page of the label and some of every other page.
TEST_F(EncryptedDisk, EveryChangedBitIsNoticed) {
  Open();
  BlockLabel label = LabelOf(1, 0), other = LabelOf(2, 0);
  const Bytes content = RandomBytes(random_, 3 * kDiskPage - 100);  // with padding, which is encrypted too
  ASSERT_TRUE(Write(*tier_, 0, label, content).ok());
  ASSERT_TRUE(Write(*tier_, 4 * kDiskPage, other, content).ok());
  const Bytes raw = Raw("segment-0");
  for (size_t at = 0; at < 4 * kDiskPage; at += at < 300 ? 1 : at < kDiskPage ? 61 : 487) {
    const std::byte changed = raw[at] ^ static_cast<std::byte>(1u << (at % 8));
    Overwrite("segment-0", at, {&changed, 1});
    EXPECT_EQ(Read(*tier_, {0, label}).status().code(), absl::StatusCode::kDataLoss) << at;
    Overwrite("segment-0", at, {&raw[at], 1});
  }
  EXPECT_EQ(Read(*tier_, {0, label}).value(), content);
  EXPECT_EQ(Read(*tier_, {4 * kDiskPage, other}).value(), content);
}

TEST_F(EncryptedDisk, ExtentsDoNotOpenInAnotherPlaceNorAfterThatTheyWereReplaced) {
  Open();
  BlockLabel a = LabelOf(1, 0), b = LabelOf(1, 0);
  const Bytes first = RandomBytes(random_, 2 * kDiskPage), second = RandomBytes(random_, 2 * kDiskPage);
  constexpr size_t kExtent = 3 * kDiskPage;
  ASSERT_TRUE(Write(*tier_, 0, a, first).ok());
  ASSERT_TRUE(Write(*tier_, kExtent, b, second).ok());
  const Bytes raw = Raw("segment-0");
  // Exchanged, and read as what they were at their former place.
  Overwrite("segment-0", 0, std::span(raw).subspan(kExtent, kExtent));
  Overwrite("segment-0", kExtent, std::span(raw).first(kExtent));
  for (const ExtentRef& extent : {ExtentRef{0, a}, {0, b}, {kExtent, a}, {kExtent, b}})
    EXPECT_EQ(Read(*tier_, extent).status().code(), absl::StatusCode::kDataLoss) << extent.offset;
  // Bytes of one behind the label of the other.
  Overwrite("segment-0", 0, std::span(raw).first(2 * kExtent));
  Overwrite("segment-0", kDiskPage, std::span(raw).subspan(kExtent + kDiskPage, 2 * kDiskPage));
  EXPECT_EQ(Read(*tier_, {0, a}).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Read(*tier_, {kExtent, b}).value(), second);
  // What lay there before is put back.
  BlockLabel again = LabelOf(1, 0);
  ASSERT_TRUE(Write(*tier_, 0, again, first).ok());
  Overwrite("segment-0", 0, std::span(raw).first(kExtent));
  EXPECT_EQ(Read(*tier_, {0, again}).status().code(), absl::StatusCode::kDataLoss);
  // The same bytes of the same block never look the same.
  ASSERT_TRUE(Write(*tier_, 0, again, first).ok());
  EXPECT_NE(Raw("segment-0"), raw);
}

TEST_F(EncryptedDisk, WritesThatWereTornAreNoticed) {
  Open();
  BlockLabel before = LabelOf(1, 0), label = LabelOf(1, 0);
  const Bytes content = RandomBytes(random_, 7 * kDiskPage);
  ASSERT_TRUE(Write(*tier_, 0, before, RandomBytes(random_, 7 * kDiskPage)).ok());
  const Bytes old = Raw("segment-0");
  ASSERT_TRUE(Write(*tier_, 0, label, content).ok());
  const Bytes whole = Raw("segment-0");
  for (size_t sector = 0; sector < 8 * kDiskPage / 512; sector++) {
    if (sector % 8 > 1) continue;  // two of each page
    Overwrite("segment-0", sector * 512, std::span(old).subspan(sector * 512, 512));
    EXPECT_EQ(Read(*tier_, {0, label}).status().code(), absl::StatusCode::kDataLoss) << sector;
    Overwrite("segment-0", 0, std::span(whole).first(8 * kDiskPage));
  }
  EXPECT_EQ(Read(*tier_, {0, label}).value(), content);
}

// A manifest that was moved or put back in the place of a newer one's bytes is no manifest.
TEST_F(EncryptedDisk, ManifestsDoNotOpenInAnotherPlace) {
  Open();
  ASSERT_TRUE(tier_->Put(1, "first").ok());
  const Bytes raw = Raw("manifests");
  ASSERT_TRUE(tier_->Erase(std::vector<uint64_t>{1}).ok());
  tier_.reset();
  Overwrite("manifests", 4 * kDiskPage, std::span(raw).first(2 * kDiskPage));
  Open();
  std::vector<std::string> lost;
  EXPECT_TRUE(tier_->Load(&lost).empty());
}

TEST_F(EncryptedDisk, WithoutTheRightKeyNothingIsReadAndNothingIsChanged) {
  Open();
  BlockLabel label = LabelOf(1, 0);
  const Bytes content = RandomBytes(random_, 5000);
  ASSERT_TRUE(Write(*tier_, 0, label, content).ok());
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  tier_.reset();
  const std::map<std::string, Bytes> before = AllRaw();
  const auto refused = [&](std::shared_ptr<const SecretKey> key, const std::string& words) {
    DiskTierOptions options = Options();
    options.key = std::move(key);
    options.capacity_bytes = 32 * kDiskPage;  // files would be cut if they were opened
    const absl::Status status = DiskTier::Open(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_NE(status.message().find(words), std::string::npos) << status;
    EXPECT_EQ(AllRaw(), before);
  };
  refused(nullptr, "disk_key_file");
  refused(TestKey(1), "another key");
  Open();
  std::vector<std::string> lost;
  EXPECT_EQ(tier_->Load(&lost), (std::map<uint64_t, std::string>{{1, "value"}}));
  EXPECT_EQ(Read(*tier_, {0, label}).value(), content);
}

TEST_F(EncryptedDisk, AKeyForAFolderInClearIsRefusedAndNothingIsChanged) {
  tier_ = DiskTier::Open(SmallOptions(files_, 1, false)).value();
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  EXPECT_FALSE(tier_->Stats().encrypted);
  tier_.reset();
  const std::map<std::string, Bytes> before = AllRaw();
  const absl::Status status = DiskTier::Open(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_NE(status.message().find("not encrypted"), std::string::npos) << status;
  EXPECT_EQ(AllRaw(), before);
  tier_ = DiskTier::Open(SmallOptions(files_, 2, false)).value();
  std::vector<std::string> lost;
  EXPECT_EQ(tier_->Load(&lost).at(1), "value");
}

TEST_F(EncryptedDisk, ADamagedOrLostKeyOfTheFolderIsSaidAndNothingIsChanged) {
  Open();
  EXPECT_TRUE(tier_->Stats().encrypted);
  ASSERT_TRUE(tier_->Put(1, "value").ok());
  tier_.reset();
  const Bytes key = Raw("encryption");
  for (size_t at = 0; at < key.size(); at++) {
    const std::byte changed = key[at] ^ std::byte{4};
    Overwrite("encryption", at, {&changed, 1});
    const std::map<std::string, Bytes> before = AllRaw();
    const absl::Status status = DiskTier::Open(Options()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << at << ": " << status;
    EXPECT_EQ(AllRaw(), before);
    Overwrite("encryption", at, {&key[at], 1});
  }
  ASSERT_TRUE(files_.Remove(absl::StrCat(kFolder, "/encryption")).ok());
  const absl::Status lost_key = DiskTier::Open(Options()).status();
  EXPECT_EQ(lost_key.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(lost_key.message().find("is lost"), std::string::npos) << lost_key;
  ASSERT_TRUE(files_.Open(absl::StrCat(kFolder, "/encryption"), true, false).ok());
  Overwrite("encryption", 0, key);  // a copy is put back
  Open();
  std::vector<std::string> lost;
  EXPECT_EQ(tier_->Load(&lost).at(1), "value");
}

// An index whose records were exchanged or written by somebody else is built anew from the manifests.
TEST_F(EncryptedDisk, AForgedIndexIsBuiltAnew) {
  Open();
  ASSERT_TRUE(tier_->Put(1, "one").ok());
  tier_.reset();
  std::string index;
  const std::vector<std::string> names = files_.List(kFolder).value();
  for (const std::string& name : names)
    if (absl::StartsWith(name, "index-")) index = name;
  FaultFileSystem forger;
  ASSERT_TRUE(forger.MakeFolder(kFolder).ok());
  const auto forged = Journal::Create(forger, kFolder, {{7, "forged"}}).value();
  const std::unique_ptr<File> file = forger.Open(forger.Paths().front(), false, false).value();
  Bytes bytes(file->Size().value());
  ASSERT_TRUE(ReadAll(*file, 0, bytes).ok());
  Overwrite(index, 0, bytes);
  Open();
  EXPECT_NE(tier_->rebuild_reason(), "");
  std::vector<std::string> lost;
  EXPECT_EQ(tier_->Load(&lost), (std::map<uint64_t, std::string>{{1, "one"}}));
  EXPECT_TRUE(lost.empty());
}

// The operator's key is changed, and the process dies at any step of that: one of the two opens the folder.
TEST_F(EncryptedDisk, TheOperatorsKeyIsChangedWholeOrNotAtAll) {
  int changed = 0, kept = 0;
  for (int calls = 0; calls < 10; calls++) {
    SCOPED_TRACE(calls);
    FaultFileSystem files(static_cast<uint32_t>(calls) + 1);
    auto tier = DiskTier::Open(SmallOptions(files, 1, true)).value();
    ASSERT_TRUE(tier->Put(1, "value").ok());
    EXPECT_EQ(ChangeOperatorsKey(files, kFolder, *TestKey(), *TestKey(1)).code(),
              absl::StatusCode::kAlreadyExists);
    tier.reset();
    EXPECT_EQ(ChangeOperatorsKey(files, kFolder, *TestKey(2), *TestKey(1)).code(),
              absl::StatusCode::kFailedPrecondition);
    files.DieAfter(calls);
    const bool said = ChangeOperatorsKey(files, kFolder, *TestKey(), *TestKey(1)).ok();
    files.Crash();
    DiskTierOptions options = SmallOptions(files, 2, true);
    options.key = TestKey(1);
    absl::StatusOr<std::unique_ptr<DiskTier>> with_new = DiskTier::Open(options);
    ASSERT_TRUE(with_new.ok() || !said) << with_new.status();
    (with_new.ok() ? changed : kept)++;
    if (!with_new.ok()) with_new = DiskTier::Open(SmallOptions(files, 3, true));
    ASSERT_TRUE(with_new.ok()) << with_new.status();
    std::vector<std::string> lost;
    EXPECT_EQ((*with_new)->Load(&lost).at(1), "value");
    with_new->reset();
  }
  EXPECT_GT(changed, 0);
  EXPECT_GT(kept, 0);
}

// Real files, with both ways of I/O, several Runs at the same time.
class RealDisk : public ::testing::TestWithParam<std::tuple<IoKind, bool>> {};

TEST_P(RealDisk, ManyThreadsWriteAndReadBack) {
  const auto [io, encrypted] = GetParam();
  if (io == IoKind::kUring && !CheckUring().ok()) GTEST_SKIP() << CheckUring().message();
  std::string folder = ::testing::TempDir() + "/kvtide_disk_XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  DiskTierOptions options;
  options.folder = folder;
  options.capacity_bytes = 24 << 20;
  options.segment_bytes = 5 << 20;
  options.piece_bytes = 64 << 10;
  options.io = io;
  if (encrypted) options.key = TestKey();
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

// What is written into files without a name is durable for nobody.
TEST(RemovedFolder, NothingIsMadeDurableAnyMore) {
  for (const bool all : {true, false}) {
    std::string folder = ::testing::TempDir() + "/kvtide_disk_XXXXXX";
    ASSERT_NE(mkdtemp(folder.data()), nullptr);
    DiskTierOptions options;
    options.folder = folder;
    options.capacity_bytes = 4 << 20;
    const std::unique_ptr<DiskTier> tier = DiskTier::Open(options).value();
    ASSERT_TRUE(tier->Put(1, "value").ok());
    std::filesystem::remove_all(all ? folder : folder + "/lock");
    const absl::Status status = tier->Put(2, "value");
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "lock was removed while it was in use")) << status;
    std::filesystem::remove_all(folder);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, RealDisk,
                         ::testing::Combine(::testing::Values(IoKind::kUring, IoKind::kThreads),
                                            ::testing::Bool()),
                         [](const auto& test) {
                           return absl::StrCat(
                               std::get<0>(test.param) == IoKind::kUring ? "IoUring" : "Threads",
                               FormOf(std::get<1>(test.param)));
                         });

}  // namespace
}  // namespace kvtide
