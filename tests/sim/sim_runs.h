// Which seeds a simulation runs, and how many steps of each: KVTIDE_SIM_SEEDS=first:count (or one seed) and
// KVTIDE_SIM_STEPS choose others than a test's own. With KVTIDE_SIM_TRAILS every seed prints what became of
// it: two builds that print the same have run the same histories.
#pragma once

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace kvtide::testing {

struct SimRuns {
  int64_t first = 1, count = 0, steps = 0;

  SimRuns(int64_t usual_count, int64_t usual_steps) : count(usual_count), steps(usual_steps) {
    if (const char* text = std::getenv("KVTIDE_SIM_SEEDS"); text != nullptr) {
      const std::string seeds = text;
      const size_t colon = seeds.find(':');
      first = std::stoll(seeds.substr(0, colon));
      count = colon == std::string::npos ? 1 : std::stoll(seeds.substr(colon + 1));
    }
    if (const char* text = std::getenv("KVTIDE_SIM_STEPS"); text != nullptr) steps = std::atoll(text);
  }
};

inline void SayTrail(uint32_t seed, const std::string& trail) {
  if (std::getenv("KVTIDE_SIM_TRAILS") != nullptr) std::printf("seed %u: %s\n", seed, trail.c_str());
}

// Whether a run finds something wrong, which it says by false and by failures of the test; those are kept
// from the test.
template <class Run>
bool FindsAFault(Run&& run) {
  ::testing::TestPartResultArray failures;
  bool good = true;
  {
    ::testing::ScopedFakeTestPartResultReporter intercept(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &failures);
    good = run();
  }
  if (!good) {
    EXPECT_GT(failures.size(), 0);
  }
  return !good;
}

}  // namespace kvtide::testing
