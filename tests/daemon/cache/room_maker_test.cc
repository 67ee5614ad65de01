// Room in tiers whose free bytes lie in pieces: blocks move inside of their tier, or down, until a larger one
// fits. Whatever moves, attention stays equal to the shadow's.
#include "daemon/cache/move/room_maker.h"

#include <deque>
#include <utility>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

class RoomMakerTest : public CacheTest {
 protected:
  // Sequences of one block each until nothing fits; then every second one is closed.
  void FillAndPunch(const ModelSpec& model, std::vector<Client>* kept) {
    std::vector<Client> all;
    while (true) {
      all.emplace_back(*cache_, model, WithPair("f16"), random_);
      if (!all.back().Append(64).ok()) break;
    }
    ASSERT_TRUE(all.back().Close().ok());
    all.pop_back();
    for (size_t i = 0; i < all.size(); i++) {
      if (i % 2 == 0) {
        kept->push_back(all[i]);
      } else {
        ASSERT_TRUE(all[i].Close().ok());
      }
    }
  }
};

// Blocks of 16 KiB and of 1 MiB.
ModelSpec Small() { return UniformModel("16k", {1, 1, 64, 64}, 1); }
ModelSpec Large() { return UniformModel("1m", {8, 8, 64, 64}, 8); }

TEST_F(RoomMakerTest, EverySecondSmallBlockFreeAndLargeOnesFit) {
  Start(8 * kMiB, 8 * kMiB);
  std::vector<Client> small;
  FillAndPunch(Small(), &small);
  ASSERT_EQ(small.size(), 512u);
  EXPECT_EQ(cache_->Stats().tiers[0].largest_free_extent_bytes, 16384u);
  Client large(*cache_, Large(), WithPair("f16"), random_);
  for (int block = 0; block < 7; block++) {
    const absl::Status status = large.Append(64);
    ASSERT_TRUE(status.ok()) << block << ": " << status;
  }
  EXPECT_EQ(UsedBytes(cache_->Stats()), 15 * kMiB);
  EXPECT_GT(cache_->Stats().compacted_blocks, 0u);
  ASSERT_TRUE(large.CheckAttention(3).ok());
  for (Client& client : small) client.CheckAllLayers();
}

TEST_F(RoomMakerTest, OneTierAlone) {
  Start(4 * kMiB, 0);
  std::vector<Client> small;
  FillAndPunch(Small(), &small);
  Client large(*cache_, Large(), WithPair("f16"), random_);
  ASSERT_TRUE(large.Append(128).ok());
  for (Client& client : small) client.CheckAllLayers();
  large.CheckAllLayers();
}

// What somebody reads stays where it is; a hole is made between.
TEST_F(RoomMakerTest, BlocksThatAreReadOrWrittenStay) {
  options_.room_wait = absl::ZeroDuration();
  Start(4 * kMiB, 0);
  std::vector<Client> small;
  FillAndPunch(Small(), &small);
  Client large(*cache_, Large(), WithPair("f16"), random_);
  bool tried = false;
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kAttend || tried) return;
    tried = true;
    ASSERT_TRUE(large.Append(64).ok());
  });
  ASSERT_TRUE(small[small.size() / 2].CheckAttention(0).ok());
  device_->SetHook(nullptr);
  EXPECT_TRUE(tried);
  for (Client& client : small) client.CheckAllLayers();
  large.CheckAllLayers();
}

// A prefetch makes room of what was used before it, in holes too: what is used while it runs stays.
TEST_F(RoomMakerTest, AHoleForAPrefetchTakesNothingThatWasUsedMeanwhile) {
  constexpr int kPairs = 85;  // of a block of 16 KiB and one of 32 KiB
  for (const bool used_meanwhile : {false, true}) {
    SCOPED_TRACE(used_meanwhile);
    Start(kMiB + kPairs * 48 * 1024, 16 * kMiB);
    Client filler(*cache_, Large(), WithPair("f16"), random_),
        large(*cache_, Large(), WithPair("f16"), random_);
    ASSERT_TRUE(large.Append(128).ok());
    const SequenceId id = large.id();
    ASSERT_EQ(cache_->Evict({&id, 1}, 1)->moved_blocks, 2u);
    ASSERT_TRUE(filler.Append(64).ok());
    std::vector<Client> small, medium;
    for (int i = 0; i < kPairs; i++) {
      small.emplace_back(*cache_, Small(), WithPair("f16"), random_);
      ASSERT_TRUE(small.back().Append(64).ok());
      medium.emplace_back(*cache_, UniformModel("32k", {1, 1, 128, 128}, 1), WithPair("f16"), random_);
      ASSERT_TRUE(medium.back().Append(64).ok());
    }
    ASSERT_TRUE(filler.Close().ok());
    for (Client& client : small) ASSERT_TRUE(client.Close().ok());
    // One block of the large one finds room. For the other one some of 32 KiB would have to go, which fit
    // nowhere else.
    bool used = !used_meanwhile;
    const auto use = [&](FaultyBackend::Call call) {
      if (call != FaultyBackend::kStartCopy || std::exchange(used, true)) return;
      for (Client& client : medium) ASSERT_TRUE(client.CheckAttention(0).ok());
    };
    host_->SetHook(use);
    device_->SetHook(use);
    EXPECT_EQ(cache_->Prefetch({&id, 1})->moved_blocks, used_meanwhile ? 1u : 2u);
    host_->SetHook(nullptr);
    device_->SetHook(nullptr);
    uint64_t stayed = 0;
    for (const Client& client : medium) stayed += cache_->GetSequence(client.id())->blocks_by_tier[0];
    EXPECT_EQ(stayed == kPairs, used_meanwhile) << stayed;
    large.CheckAllLayers();
    cache_->CheckInvariants();
  }
}

TEST_F(RoomMakerTest, AFailedCopyInsideATierLosesNothing) {
  Start(4 * kMiB, 0);
  std::vector<Client> small;
  FillAndPunch(Small(), &small);
  Client large(*cache_, Large(), WithPair("f16"), random_);
  device_->Fail(FaultyBackend::kPoll, 3);
  (void)large.Append(64);
  device_->Fail(FaultyBackend::kPoll, 0);
  cache_->CheckInvariants();
  if (large.length() == 0) {
    ASSERT_TRUE(large.Append(64).ok());
  }
  for (Client& client : small) client.CheckAllLayers();
  large.CheckAllLayers();
}

// Others take what is free while blocks move out of the hole: they do not get the hole.
TEST_F(RoomMakerTest, AHoleThatIsBeingMadeBelongsToWhoMakesIt) {
  options_.max_moves_in_flight = 4;
  Start(4 * kMiB, 0);
  std::vector<Client> small;
  FillAndPunch(Small(), &small);
  Client large(*cache_, Large(), WithPair("f16"), random_);
  std::deque<Client> others;
  bool inside = false;
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call != FaultyBackend::kStartCopy || inside || others.size() == 20) return;
    inside = true;
    others.emplace_back(*cache_, Small(), WithPair("f16"), random_);
    ASSERT_TRUE(others.back().Append(64).ok());
    inside = false;
  });
  ASSERT_TRUE(large.Append(64).ok());
  device_->SetHook(nullptr);
  EXPECT_EQ(others.size(), 20u);
  for (Client& client : small) client.CheckAllLayers();
  for (Client& client : others) client.CheckAllLayers();
  large.CheckAllLayers();
}

// Random shapes, pairs and lengths come and go. Nothing is refused while nine tenths of the tiers would do.
TEST_F(RoomMakerTest, NineTenthsStayUsableForWhateverShapesComeAndGo) {
  const std::vector<ModelSpec> models = {
      UniformModel("a", {1, 1, 64, 64}, 1),  UniformModel("b", {3, 1, 64, 64}, 1),
      UniformModel("c", {2, 3, 128, 64}, 3), UniformModel("d", {5, 1, 80, 96}, 1),
      UniformModel("e", {4, 4, 64, 64}, 4),
  };
  const char* pairs[] = {"f16", "q8_0", "q8_0/turbo4", "turbo3", "turbo4/q5_0"};
  for (const size_t host : {size_t{0}, 6 * kMiB}) {
    for (const uint32_t seed : {1u, 2u}) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed << ", host " << host);
      std::mt19937 random(seed);
      Start(6 * kMiB, host);
      std::deque<Client> clients;
      int refused = 0;
      for (int step = 0; step < 250; step++) {
        const ModelSpec& model = models[random() % models.size()];
        clients.emplace_back(*cache_, model, WithPair(pairs[random() % 5], {random() % 2 == 0 ? 1 : 0, 0}),
                             random_);
        const int64_t blocks = 1 + static_cast<int64_t>(random() % 3);
        const uint64_t used = UsedBytes(cache_->Stats());
        const absl::Status status = clients.back().Append(64 * blocks);
        if (!status.ok()) {
          refused++;
          const size_t need =
              static_cast<size_t>(blocks) * BlockLayout(model.groups[0].shape, ExactPair()).block_bytes();
          ASSERT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
          // A block lies in one tier: what is left of both may be a little less than a block each.
          ASSERT_GT(static_cast<double>(used + need), 0.9 * static_cast<double>(6 * kMiB + host)) << status;
          ASSERT_TRUE(clients.back().Close().ok());
          clients.pop_back();
          // Many at once, so that holes of all sizes come about.
          for (size_t i = clients.size() / 3; i > 0; i--) {
            const size_t victim = random() % clients.size();
            ASSERT_TRUE(clients[victim].Close().ok());
            clients.erase(clients.begin() + static_cast<std::ptrdiff_t>(victim));
          }
        }
      }
      EXPECT_GT(refused, 2) << "the tiers were full often enough";
      cache_->CheckInvariants();
      for (Client& client : clients) {
        // A seal that found no room waits for the next append; the model knows none.
        if (TotalBytes(client.info()) == client.shadow().BytesAtRest()) client.CheckAllLayers();
        ASSERT_TRUE(client.Close().ok());
      }
      cache_.reset();
    }
  }
}

}  // namespace
}  // namespace kvtide::testing
