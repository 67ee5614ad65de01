// The simulation over many seeds, and the proof that it finds what it is for. KVTIDE_SIM_SEEDS=first:count
// and KVTIDE_SIM_STEPS choose others; tests/sim/run_pieces.sh runs many:
//     KVTIDE_SIM_SEEDS=1000:500 kvtide_test_sim --gtest_filter='*SimWorlds.*'
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
    std::printf(
        "seeds %lld to %lld, %lld steps each, %llu verbs inside others, %llu seals deferred, %llu blocks "
        "recoded, attended below %llu times in place, %llu after a promotion\n",
        static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
        static_cast<long long>(runs.steps), static_cast<unsigned long long>(nested_),
        static_cast<unsigned long long>(deferred_), static_cast<unsigned long long>(degraded_),
        static_cast<unsigned long long>(in_place_), static_cast<unsigned long long>(promoted_));
  }

  // A backend that goes wrong in this way is noticed within a few seeds.
  bool Notices(World world, FaultyBackend::Defect defect) {
    for (uint32_t seed = 1; seed <= 20; seed++)
      if (FindsAFault([&] { return Run(world, seed, 200, defect); })) return true;
    return false;
  }
};

using CacheSimWorlds = CacheSimTest;  // what tests/sim/run_pieces.sh runs

TEST_F(CacheSimWorlds, UnderPressure) { RunSeeds(World::kPressure, 8); }
TEST_F(CacheSimWorlds, InTightTiersWithVerbsInsideOthers) { RunSeeds(World::kTight, 8); }
TEST_F(CacheSimWorlds, OverADiskThatFails) { RunSeeds(World::kDisk, 8); }
TEST_F(CacheSimWorlds, InRoomyTiersWithVerbsInsideOthers) { RunSeeds(World::kRoomy, 8); }

// A seed says all: what ran before it in the same process changes nothing.
TEST_F(CacheSimTest, ASeedRunsTheSameWayAfterOthers) {
  for (const World world : {World::kPressure, World::kTight, World::kDisk}) {
    ASSERT_TRUE(Run(world, 3, 60));
    const std::string alone = trail_;
    for (uint32_t seed = 4; seed < 7; seed++) ASSERT_TRUE(Run(world, seed, 60));
    ASSERT_TRUE(Run(world, 3, 60));
    EXPECT_EQ(trail_, alone);
  }
}

TEST_F(CacheSimTest, NoticesACopyToAWrongPlace) {
  EXPECT_TRUE(Notices(World::kRoomy, FaultyBackend::Defect::kCopyElsewhere));
}
TEST_F(CacheSimTest, NoticesACopyThatEndsAfterItWasSaidToBeDone) {
  EXPECT_TRUE(Notices(World::kTight, FaultyBackend::Defect::kCopyAfterDone));
}
TEST_F(CacheSimTest, NoticesRowsThatWereNotWritten) {
  EXPECT_TRUE(Notices(World::kPressure, FaultyBackend::Defect::kLoseRows));
}
// Only a seal that found no room may wait.
TEST_F(CacheSimTest, NoticesABlockThatIsNotSealed) {
  EXPECT_TRUE(Notices(World::kPressure, FaultyBackend::Defect::kSealNothing));
  EXPECT_TRUE(Notices(World::kTight, FaultyBackend::Defect::kSealNothing));
}

}  // namespace
}  // namespace kvtide::testing
