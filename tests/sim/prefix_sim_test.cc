// The simulation of prefixes over many seeds, and the proof that it sees wrong rows.
// KVTIDE_SIM_SEEDS=first:count and KVTIDE_SIM_STEPS choose others.
#include "tests/sim/prefix_sim.h"

#include <map>
#include <string>

#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

class PrefixSimTest : public PrefixSim {};
using PrefixSimWorlds = PrefixSimTest;  // what tests/sim/run_pieces.sh runs

TEST_F(PrefixSimWorlds, OverADiskWithRestarts) {
  const SimRuns runs(8, 300);
  for (int64_t i = 0; i < runs.count; i++)
    if (!Run(static_cast<uint32_t>(runs.first + i), runs.steps)) return;
  EXPECT_TRUE(reused_ > 0 || runs.count < 8);
  std::printf(
      "seeds %lld to %lld, %lld steps each, %llu verbs inside others, %llu tokens reused, %llu restarts, "
      "%llu of them after a death in a verb\n",
      static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
      static_cast<long long>(runs.steps), static_cast<unsigned long long>(nested_),
      static_cast<unsigned long long>(reused_), static_cast<unsigned long long>(restarts_),
      static_cast<unsigned long long>(deaths_));
}

TEST_F(PrefixSimWorlds, WithARemoteTierThatIsAwaySlowAndForgetful) {
  const SimRuns runs(8, 300);
  for (int64_t i = 0; i < runs.count; i++)
    if (!Run(static_cast<uint32_t>(runs.first + i), runs.steps, false, true)) return;
  EXPECT_TRUE(fetched_ > 0 || runs.count < 8);
  std::printf("seeds %lld to %lld, %lld steps each, %llu blocks fetched, %llu restarts\n",
              static_cast<long long>(runs.first), static_cast<long long>(runs.first + runs.count - 1),
              static_cast<long long>(runs.steps), static_cast<unsigned long long>(fetched_),
              static_cast<unsigned long long>(restarts_));
}

// A seed says all: neither what ran before it nor a race of threads changes anything.
TEST_F(PrefixSimTest, ASeedRunsTheSameWayAfterOthers) {
  for (const bool remote : {false, true}) {
    std::map<uint32_t, std::string> trails;
    for (uint32_t seed = 3; seed < 7; seed++) {
      ASSERT_TRUE(Run(seed, 200, false, remote));
      trails[seed] = trail_;
    }
    for (uint32_t seed = 6; seed >= 3; seed--) {
      ASSERT_TRUE(Run(seed, 200, false, remote));
      EXPECT_EQ(trail_, trails[seed]) << "seed " << seed;
    }
  }
}

TEST_F(PrefixSimTest, NoticesRowsOfOtherTokens) {
  EXPECT_TRUE(FindsAFault([&] { return Run(1, 300, true); }));
}

}  // namespace
}  // namespace kvtide::testing
