#include "kernels/cuda/device/grown_size.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace kvtide::cuda {
namespace {

TEST(GrownSize, WishesThatGrowStepByStepSeldomTakeMemory) {
  size_t bytes = 0;
  int taken = 0;
  for (size_t wanted = 1; wanted < size_t{64} << 20; wanted += 1000) {
    if (wanted <= bytes) continue;
    bytes = GrownSize(bytes, wanted, SIZE_MAX);
    EXPECT_GE(bytes, wanted);
    taken++;
  }
  EXPECT_LE(taken, 25);
  EXPECT_LE(bytes, size_t{100} << 20);
}

TEST(GrownSize, IsRoundedAndTakesNoMoreThanAllowed) {
  EXPECT_EQ(GrownSize(0, 1, SIZE_MAX), size_t{64} << 10);
  EXPECT_EQ(GrownSize(1 << 20, (1 << 20) + 1, SIZE_MAX), (size_t{3} << 20) / 2);
  EXPECT_EQ(GrownSize(1 << 20, (1 << 20) + 1, 1200000), 1200000u);
  EXPECT_EQ(GrownSize(1 << 20, 1300000, 1200000), 1300000u);
}

}  // namespace
}  // namespace kvtide::cuda
