// A tier of I/O below the others: blocks go down under pressure and on request and come back before anybody
// computes on them; what the disk cannot give back is lost alone and told; a full, failing or slow disk does
// not harm what is resident. Whatever moves, attention stays equal to the shadow's.
#include <atomic>
#include <thread>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

constexpr size_t kBlock = 65536;                // an f16 block of SmallModel
constexpr size_t kExtent = kBlock + kDiskPage;  // what it takes on disk
constexpr int kDisk = 2;

class IoTierTest : public CacheTest {
 protected:
  // Blocks of the three tiers.
  void StartSmall(size_t device, size_t host, size_t disk) {
    StartWithDisk(device * kBlock, host * kBlock, (disk * kExtent) * 130 / 128 + 10 * kDiskPage);
  }
  TierStats Disk() const { return cache_->Stats().tiers[kDisk]; }
  // Threads of the cache look at them until it ends.
  std::atomic<bool> hanging_ = false, go_on_ = false;
};

TEST_F(IoTierTest, BlocksGoDownToTheDiskUnderPressureAndAreAttendedAfterwards) {
  StartSmall(4, 4, 40);
  Client a(*cache_, SmallModel(), WithPair("f16"), random_),
      b(*cache_, SmallModel(), WithPair("f16"), random_);
  for (int i = 0; i < 6; i++) ASSERT_TRUE(a.Append(64).ok());
  for (int i = 0; i < 6; i++) ASSERT_TRUE(b.Append(64).ok());
  EXPECT_EQ(Disk().blocks, 4u);
  EXPECT_EQ(Disk().used_bytes, 4 * kExtent);
  cache_->CheckInvariants();
  a.CheckAllLayers();
  b.CheckAllLayers();
  ASSERT_TRUE(a.Step(70).ok());
  ASSERT_TRUE(b.Step(70).ok());
  a.CheckAllLayers();
  EXPECT_GT(Disk().io.read_bytes, 0u);
  EXPECT_FALSE(Disk().attends);
  EXPECT_EQ(cache_->Stats().dropped_blocks, 0u);
}

TEST_F(IoTierTest, EverythingThatIsDoneToAParkedSequenceWorks) {
  for (const char* pair : {"f16", "q8_0/turbo4", "turbo3"}) {
    StartSmall(20, 20, 60);
    Client client(*cache_, SmallModel(), WithPair(pair, {1, 1}), random_);
    const auto park = [&] {
      ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
      EXPECT_EQ(client.info().blocks_by_tier[kDisk], static_cast<uint64_t>((client.length() + 63) / 64));
    };
    ASSERT_TRUE(client.Append(64 * 5 + 30).ok());
    park();
    client.CheckAllLayers();
    park();
    ASSERT_TRUE(client.Append(10).ok());  // the tail comes back, and is written
    client.CheckAllLayers();
    park();
    ASSERT_TRUE(client.Append(200).ok());  // blocks that leave the exact window are sealed out of the disk
    client.CheckAllLayers();
    park();
    ASSERT_TRUE(client.Step(70).ok());
    client.CheckAllLayers();
    park();
    ASSERT_TRUE(client.Truncate(100).ok());  // a cut through a coded block
    client.CheckAllLayers();
    park();
    Client fork = client.Fork();
    ASSERT_TRUE(fork.Append(5).ok());  // the shared tail is copied
    fork.CheckAllLayers();
    client.CheckAllLayers();
    ASSERT_TRUE(fork.Close().ok());
    park();
    const MoveReport up = *cache_->Prefetch({{client.id()}});
    EXPECT_EQ(up.moved_blocks, 2u);
    EXPECT_EQ(client.info().blocks_by_tier[0], 2u);
    client.CheckAllLayers();
    EXPECT_EQ(cache_->Stats().tiers[kDisk].lost_blocks, 0u);
    ASSERT_TRUE(client.Close().ok());
    EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
    cache_.reset();
    disk_.reset();
  }
}

TEST_F(IoTierTest, SequencesThatCodeAtOnceGoThroughTheDiskToo) {
  StartSmall(20, 20, 60);
  SequenceOptions options = WithPair("q8_0/turbo4");
  options.seal_at_once = true;
  Client client(*cache_, MixedModel(), options, random_);
  for (int i = 0; i < 6; i++) {
    ASSERT_TRUE(client.Append(45).ok());
    client.CheckAllLayers();
    ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
  }
  ASSERT_TRUE(client.Truncate(260).ok());
  client.CheckAllLayers();
}

TEST_F(IoTierTest, ReadTokensReadsWhatLiesOnDisk) {
  StartSmall(8, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("q8_0/turbo4", {1, 1}), random_);
  ASSERT_TRUE(client.Append(300).ok());
  const auto read = [&] {
    std::vector<float> k(300 * 2 * 64), v(300 * 2 * 64);
    const LayerRead layers[] = {{1, MutableTensorView(k.data()), MutableTensorView(v.data())}};
    ReadCall call;
    call.sequence = client.id();
    call.tokens = 300;
    call.layers = layers;
    EXPECT_TRUE(cache_->ReadTokens(call).ok());
    k.insert(k.end(), v.begin(), v.end());
    return k;
  };
  const std::vector<float> before = read();
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
  EXPECT_EQ(read(), before);
}

TEST_F(IoTierTest, ASequenceLargerThanTheTiersAboveIsRefusedAndKept) {
  StartSmall(4, 4, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  for (int i = 0; i < 12; i++) ASSERT_TRUE(client.Append(64).ok());
  EXPECT_TRUE(IsError(client.CheckAttention(0), absl::StatusCode::kResourceExhausted,
                      "do not fit into the tiers above"));
  ASSERT_TRUE(client.Truncate(8 * 64).ok());
  client.CheckAllLayers();
}

// LMCache #5151: restored lengths beyond a limit were wrong, with every counter right.
TEST_F(IoTierTest, SequencesOfEveryLengthComeBackFromDisk) {
  StartSmall(40, 40, 200);
  for (const int64_t blocks : {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 70}) {
    Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
    ASSERT_TRUE(client.Append(64 * blocks - 1).ok());
    ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
    client.CheckAllLayers();
    ASSERT_TRUE(client.Close().ok());
  }
}

// LMCache #4385: the disk tier gave other requests' bytes. FlexKV #186: blocks came back in another order.
TEST_F(IoTierTest, ManySequencesSpillAndComeBackEachWithItsOwnBlocks) {
  StartSmall(6, 6, 200);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 10; i++)
    clients.push_back(std::make_unique<Client>(*cache_, i % 2 == 0 ? SmallModel() : MixedModel(),
                                               WithPair(i % 3 == 0 ? "f16" : "q8_0/turbo4", {1, 1}),
                                               random_));
  std::mt19937 dice(3);
  for (int round = 0; round < 60; round++) {
    Client& client = *clients[dice() % clients.size()];
    if (client.length() > 250) {
      ASSERT_TRUE(client.Truncate(0).ok());
    }
    ASSERT_TRUE(client.Append(1 + static_cast<int64_t>(dice() % 100)).ok());
    clients[dice() % clients.size()]->CheckAllLayers();
    if (dice() % 3 == 0) {
      ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
    }
  }
  for (const auto& client : clients) client->CheckAllLayers();
  EXPECT_GT(Disk().io.reads, 20u);
  EXPECT_EQ(Disk().lost_blocks, 0u);
}

// Dynamo #15079: a transfer error counted as completion.
TEST_F(IoTierTest, AnIoErrorLosesThatBlockAndNothingElse) {
  StartSmall(8, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_),
      other(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 4).ok());
  ASSERT_TRUE(other.Append(64 * 3).ok());
  const SequenceId both[] = {client.id(), other.id()};
  ASSERT_TRUE(cache_->Evict(both, kDisk).ok());
  files_->Fail(FaultFileSystem::kRead, 6);  // six pieces a block: the second block's first one
  EXPECT_TRUE(IsError(client.CheckAttention(0), absl::StatusCode::kDataLoss,
                      "tokens 64 to 127 were dropped or lost"));
  EXPECT_EQ(client.info().dropped_blocks, 1u);
  EXPECT_EQ(Disk().lost_blocks, 1u);
  EXPECT_EQ(Disk().io.read_errors, 1u);
  other.CheckAllLayers();
  ASSERT_TRUE(client.Truncate(64).ok());
  ASSERT_TRUE(client.Step(64).ok());
  client.CheckAllLayers();
}

TEST_F(IoTierTest, ADamagedBlockIsNoticedAndLostAlone) {
  StartSmall(8, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 3).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
  // f16 blocks lie at the end of the tier; damage a byte in the middle of one of them.
  const size_t at = disk_->capacity_bytes() - 2 * kExtent + 3 * kDiskPage + 77;
  ASSERT_TRUE(files_->Damage(absl::StrCat("/disk/segment-", at / (100 * kDiskPage)), at % (100 * kDiskPage)));
  EXPECT_EQ(client.CheckAttention(0).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(client.info().dropped_blocks, 1u);
  EXPECT_EQ(Disk().io.checksum_errors, 1u);
}

TEST_F(IoTierTest, AFullDiskStopsDemotionAndSaysSo) {
  StartSmall(3, 3, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  for (int i = 0; i < 6; i++) ASSERT_TRUE(client.Append(64).ok());
  files_->Fail(FaultFileSystem::kWrite, 0, 1000, absl::ResourceExhaustedError("No space left on device"));
  EXPECT_FALSE(client.Append(64).ok());
  EXPECT_TRUE(IsError(client.Append(64), absl::StatusCode::kResourceExhausted, "takes nothing now"));
  EXPECT_FALSE(Disk().io.writable);
  EXPECT_NE(Disk().io.problem.find("No space left"), std::string::npos);
  client.CheckAllLayers();  // what is there is served
  cache_->CheckInvariants();
  files_->ClearFaults();
  clock_.Advance(absl::Minutes(1));
  ASSERT_TRUE(client.Append(64).ok());
  EXPECT_TRUE(Disk().io.writable);
}

TEST_F(IoTierTest, AFullTierIsRefusedWithItsNumbers) {
  StartSmall(2, 2, 3);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  absl::Status status;
  for (int i = 0; i < 10 && status.ok(); i++) status = client.Append(64);
  EXPECT_TRUE(IsError(status, absl::StatusCode::kResourceExhausted, "tier 'disk' has"));
  EXPECT_EQ(client.length(), 7 * 64);
}

// Mooncake #3160: a removed key came back with a queued offload. PegaFlow #418: a block was freed under a
// save.
TEST_F(IoTierTest, ASequenceThatIsClosedDuringItsMoveIsGone) {
  StartSmall(8, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 4).ok());
  bool closed = false;
  files_->SetHook([&](FaultFileSystem::Call call) {
    if (call != FaultFileSystem::kWrite || closed) return;
    closed = true;
    EXPECT_TRUE(client.Close().ok());
  });
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
  files_->SetHook(nullptr);
  EXPECT_TRUE(closed);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(IoTierTest, ACancelledCallStopsBetweenPieces) {
  StartSmall(8, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 4).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDisk).ok());
  Cancellation cancellation;
  int reads = 0;
  files_->SetHook([&](FaultFileSystem::Call call) {
    if (call == FaultFileSystem::kRead && ++reads == 3) cancellation.Cancel();
  });
  std::vector<float> k(256 * 2 * 64);
  const LayerRead layers[] = {{0, MutableTensorView(k.data()), {}}};
  CallContext context;
  context.cancellation = &cancellation;
  ReadCall call;
  call.sequence = client.id();
  call.tokens = 256;
  call.layers = layers;
  call.context = &context;
  EXPECT_EQ(cache_->ReadTokens(call).code(), absl::StatusCode::kCancelled);
  files_->SetHook(nullptr);
  EXPECT_LE(reads, 6);
  EXPECT_EQ(Disk().blocks, 4u);
  EXPECT_EQ(cache_->Stats().failed_moves, 0u);
  client.CheckAllLayers();
}

// A move to the disk hangs; attends on what is resident go on.
TEST_F(IoTierTest, ASlowDiskDoesNotHoldAttendsOnResidentBlocks) {
  StartSmall(8, 8, 40);
  Client parked(*cache_, SmallModel(), WithPair("f16"), random_),
      resident(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(parked.Append(64 * 4).ok());
  ASSERT_TRUE(resident.Append(64 * 4).ok());
  std::atomic<bool> hanging = false, go_on = false;
  files_->SetHook([&](FaultFileSystem::Call call) {
    if (call != FaultFileSystem::kWrite) return;
    hanging = true;
    while (!go_on) std::this_thread::yield();
  });
  std::thread mover([&] { EXPECT_TRUE(cache_->Evict({{parked.id()}}, kDisk).ok()); });
  while (!hanging) std::this_thread::yield();
  for (int i = 0; i < 20; i++) {
    resident.CheckAllLayers();
    EXPECT_TRUE(resident.Step(1).ok());
  }
  parked.CheckAllLayers();  // its blocks are where they were until the copy is there
  go_on = true;
  mover.join();
  files_->SetHook(nullptr);
  parked.CheckAllLayers();
}

// The thread that moves between memories goes on while the disk hangs.
TEST_F(IoTierTest, ASlowDiskDoesNotHoldMovesBetweenMemories) {
  options_.background_moves = true;
  options_.move_interval = absl::Milliseconds(1);
  options_.limits.idle = absl::ZeroDuration();
  options_.limits.high_watermark = 0.5;
  options_.limits.low_watermark = 0.25;
  options_.limits.promote_on_attend = false;
  files_->SetHook([&](FaultFileSystem::Call call) {
    if (call != FaultFileSystem::kWrite || !cache_) return;
    hanging_ = true;
    while (!go_on_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  StartSmall(8, 16, 40);
  Client first(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(first.Append(64 * 7).ok());
  ASSERT_TRUE(cache_->Evict({{first.id()}}, 1).ok());
  Client second(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(second.Append(64 * 7).ok());
  while (!hanging_) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // host -> disk
  const uint64_t before = cache_->Stats().tiers[0].demoted_blocks;
  Client third(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(third.Append(64).ok());
  while (cache_->Stats().tiers[0].blocks > 4) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_GE(cache_->Stats().tiers[0].demoted_blocks, before);
  go_on_ = true;
  second.CheckAllLayers();
  third.CheckAllLayers();
}

TEST_F(IoTierTest, IdleBlocksAboveTheWatermarkGoToTheDiskByPolicy) {
  options_.limits.high_watermark = 0.5;
  options_.limits.low_watermark = 0.25;
  StartSmall(4, 8, 40);
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 6).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  clock_.Advance(absl::Seconds(10));
  cache_->RunMovesOnce();
  EXPECT_EQ(client.info().blocks_by_tier[1], 2u);
  EXPECT_EQ(client.info().blocks_by_tier[kDisk], 4u);
  client.CheckAllLayers();
}

TEST_F(IoTierTest, BothDevicesOfAFirstTierUseTheDisk) {
  StartWithDisk(6 * kBlock, 4 * kBlock, 60 * kExtent, 2);
  Client a(*cache_, SmallModel(), WithPair("f16"), random_),
      b(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(a.Append(64 * 5).ok());
  ASSERT_TRUE(b.Append(64 * 5).ok());
  const SequenceId both[] = {a.id(), b.id()};
  ASSERT_TRUE(cache_->Evict(both, 3).ok());
  EXPECT_EQ(cache_->Stats().tiers[3].blocks, 10u);
  a.CheckAllLayers();
  b.CheckAllLayers();
  ASSERT_TRUE(cache_->Prefetch(both).ok());
  EXPECT_EQ(cache_->Stats().tiers[0].blocks, 5u);
  EXPECT_EQ(cache_->Stats().tiers[1].blocks, 5u);
}

TEST_F(IoTierTest, ATierNeedsOneWayToItsBlocks) {
  options_.tiers = {{"device", device_.get(), kMiB}, {"disk", nullptr, kMiB}};
  EXPECT_TRUE(
      IsError(CheckCacheOptions(options_), absl::StatusCode::kInvalidArgument, "no backend and no I/O"));
}

}  // namespace
}  // namespace kvtide::testing
