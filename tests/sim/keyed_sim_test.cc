// The simulation of the block store over many seeds, and the proof that it sees wrong bytes.
// KVTIDE_SIM_SEEDS=first:count and KVTIDE_SIM_STEPS choose others.
#include "tests/sim/keyed_sim.h"

#include <map>
#include <string>

#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

class KeyedSimTest : public KeyedSim {};
using KeyedSimWorlds = KeyedSimTest;  // what tests/sim/run_pieces.sh runs

TEST_F(KeyedSimWorlds, OverADiskWithRestarts) {
  const SimRuns runs(8, 300);
  for (int64_t i = 0; i < runs.count; i++)
    if (!Run(static_cast<uint32_t>(runs.first + i), runs.steps, {})) return;
  std::printf(
      "seeds %lld to %lld, %lld steps each, %llu verbs inside others, %llu blocks loaded, %llu in place, "
      "%llu "
      "restarts\n",
      static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
      static_cast<long long>(runs.steps), static_cast<unsigned long long>(nested_),
      static_cast<unsigned long long>(loaded_), static_cast<unsigned long long>(in_place_),
      static_cast<unsigned long long>(restarts_));
}

TEST_F(KeyedSimWorlds, WithARemoteTierThatIsAwaySlowAndForgetful) {
  const SimRuns runs(8, 300);
  for (int64_t seed = runs.first; seed < runs.first + runs.count; seed++)
    if (!Run(static_cast<uint32_t>(seed), runs.steps, {.remote = true, .read_faults = seed % 2 == 0})) return;
  EXPECT_TRUE(fetched_ > 0 || runs.count < 8);
  std::printf("seeds %lld to %lld, %lld steps each, %llu blocks fetched, %llu restarts\n",
              static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
              static_cast<long long>(runs.steps), static_cast<unsigned long long>(fetched_),
              static_cast<unsigned long long>(restarts_));
}

TEST_F(KeyedSimWorlds, OverADiskThatCannotBeReadAtAStart) {
  const SimRuns runs(8, 300);
  for (int64_t i = 0; i < runs.count; i++)
    if (!Run(static_cast<uint32_t>(runs.first + i), runs.steps, {.read_faults = true})) return;
  EXPECT_TRUE(restarts_ > refused_starts_ || runs.count < 8);
  std::printf("seeds %lld to %lld, %lld steps each, %llu restarts, %llu starts refused\n",
              static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
              static_cast<long long>(runs.steps), static_cast<unsigned long long>(restarts_),
              static_cast<unsigned long long>(refused_starts_));
}

TEST_F(KeyedSimWorlds, WithLaddersOverADiskAndARemoteTier) {
  const SimRuns runs(8, 300);
  for (int64_t seed = runs.first; seed < runs.first + runs.count; seed++)
    if (!Run(static_cast<uint32_t>(seed), runs.steps, {.remote = seed % 4 == 3, .ladders = true})) return;
  EXPECT_TRUE(degraded_ > 0 || runs.count < 8);
  std::printf("seeds %lld to %lld, %lld steps each, %llu blocks loaded, %llu of fewer bits, %llu restarts\n",
              static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
              static_cast<long long>(runs.steps), static_cast<unsigned long long>(loaded_),
              static_cast<unsigned long long>(degraded_), static_cast<unsigned long long>(restarts_));
}

// A seed says all: neither what ran before it nor a race of threads changes anything.
TEST_F(KeyedSimTest, ASeedRunsTheSameWayAfterOthers) {
  for (const World world :
       {World{}, World{.remote = true}, World{.read_faults = true}, World{.ladders = true}}) {
    std::map<uint32_t, std::string> trails;
    for (uint32_t seed = 3; seed < 7; seed++) {
      ASSERT_TRUE(Run(seed, 200, world));
      trails[seed] = trail_;
    }
    for (uint32_t seed = 6; seed >= 3; seed--) {
      ASSERT_TRUE(Run(seed, 200, world));
      EXPECT_EQ(trail_, trails[seed]) << "seed " << seed;
    }
  }
}

TEST_F(KeyedSimTest, NoticesAWrongByte) {
  EXPECT_TRUE(FindsAFault([&] { return Run(1, 300, {.lie = true}); }));
}

TEST_F(KeyedSimTest, NoticesRowsThatHaveOtherBitsThanTheirRungs) {
  EXPECT_TRUE(FindsAFault([&] {
    for (uint32_t seed = 1; seed <= 8; seed++)
      if (!Run(seed, 300, {.ladders = true, .skips_rungs = true})) return false;
    return true;
  }));
}

TEST_F(KeyedSimTest, NoticesDamageThatTheRemoteTierDoesNot) {
  EXPECT_TRUE(FindsAFault([&] {
    for (uint32_t seed = 1; seed <= 16; seed++)
      if (!Run(seed, 300, {.remote = true, .unseen_damage = true})) return false;
    return true;
  }));
}

}  // namespace
}  // namespace kvtide::testing
