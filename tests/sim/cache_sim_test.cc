// The simulation over many seeds, and the proof that it finds what it is for. KVTIDE_SIM_SEEDS=first:count
// and KVTIDE_SIM_STEPS choose others:
//     KVTIDE_SIM_SEEDS=1000:500 kvtide_test_sim
#include "tests/sim/cache_sim.h"

#include <cstdlib>
#include <string>

#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

class CacheSimTest : public CacheSim {
 protected:
  // The seeds of a world: `count` unless the environment says otherwise.
  void RunSeeds(World world, int64_t count) {
    const SimRuns runs(count, 200);
    for (int64_t i = 0; i < runs.count; i++)
      if (!Run(world, static_cast<uint32_t>(runs.first + i), runs.steps)) return;
    std::printf("seeds %lld to %lld, %lld steps each, %llu verbs inside others\n",
                static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
                static_cast<long long>(runs.steps), static_cast<unsigned long long>(nested_));
  }

  // A backend that goes wrong in this way is noticed within a few seeds.
  bool Notices(World world, FaultyBackend::Defect defect) {
    for (uint32_t seed = 1; seed <= 20; seed++)
      if (FindsAFault([&] { return Run(world, seed, 200, defect); })) return true;
    return false;
  }
};

TEST_F(CacheSimTest, UnderPressure) { RunSeeds(World::kPressure, 8); }
TEST_F(CacheSimTest, InTightTiersWithVerbsInsideOthers) { RunSeeds(World::kTight, 8); }
TEST_F(CacheSimTest, OverADiskThatFails) { RunSeeds(World::kDisk, 8); }
TEST_F(CacheSimTest, InRoomyTiersWithVerbsInsideOthers) { RunSeeds(World::kRoomy, 8); }

TEST_F(CacheSimTest, NoticesACopyToAWrongPlace) {
  EXPECT_TRUE(Notices(World::kRoomy, FaultyBackend::Defect::kCopyElsewhere));
}
TEST_F(CacheSimTest, NoticesACopyThatEndsAfterItWasSaidToBeDone) {
  EXPECT_TRUE(Notices(World::kTight, FaultyBackend::Defect::kCopyAfterDone));
}
TEST_F(CacheSimTest, NoticesRowsThatWereNotWritten) {
  EXPECT_TRUE(Notices(World::kPressure, FaultyBackend::Defect::kLoseRows));
}

}  // namespace
}  // namespace kvtide::testing
