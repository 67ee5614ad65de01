// The simulation of the block store over many seeds, and the proof that it sees wrong bytes.
// KVTIDE_SIM_SEEDS=first:count and KVTIDE_SIM_STEPS choose others.
#include "tests/sim/keyed_sim.h"

#include <cstdlib>
#include <string>

#include "gtest/gtest-spi.h"

namespace kvtide::testing {
namespace {

class KeyedSimTest : public KeyedSim {};

TEST_F(KeyedSimTest, OverADiskWithRestarts) {
  int64_t first = 1, count = 8;
  if (const char* text = std::getenv("KVTIDE_SIM_SEEDS"); text != nullptr) {
    const std::string seeds = text;
    const size_t colon = seeds.find(':');
    first = std::stoll(seeds.substr(0, colon));
    count = colon == std::string::npos ? 1 : std::stoll(seeds.substr(colon + 1));
  }
  const char* steps_text = std::getenv("KVTIDE_SIM_STEPS");
  const int64_t steps = steps_text != nullptr ? std::atoll(steps_text) : 300;
  for (int64_t i = 0; i < count; i++)
    if (!Run(static_cast<uint32_t>(first + i), steps)) return;
  std::printf(
      "seeds %lld to %lld, %lld steps each, %llu verbs inside others, %llu blocks loaded, %llu restarts\n",
      static_cast<long long>(first), static_cast<long long>(first + count - 1), static_cast<long long>(steps),
      static_cast<unsigned long long>(nested_), static_cast<unsigned long long>(loaded_),
      static_cast<unsigned long long>(restarts_));
}

TEST_F(KeyedSimTest, NoticesAWrongByte) {
  ::testing::TestPartResultArray failures;
  bool good = true;
  {
    ::testing::ScopedFakeTestPartResultReporter intercept(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &failures);
    good = Run(1, 300, true);
  }
  EXPECT_FALSE(good);
  EXPECT_GT(failures.size(), 0);
}

}  // namespace
}  // namespace kvtide::testing
