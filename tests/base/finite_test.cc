#include "kernels/base/finite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvtide {
namespace {

// Every 16-bit pattern against every kind of limit, by comparison of the values themselves.
TEST(FirstBeyond, AgreesWithTheValuesOfEveryPattern) {
  for (const DataType type : {DataType::kF16, DataType::kBf16})
    for (const float largest :
         {1e-30f, 1.0f, 1.0001f, 3.14f, 65279.0f, 65280.0f, kMaxF16, 65519.0f, 1e30f, kMaxF32})
      for (uint32_t pattern = 0; pattern < 65536; pattern++) {
        alignas(4) const uint16_t bits[2] = {static_cast<uint16_t>(pattern), 0};
        const TensorView one{bits, type};
        const bool within = std::fabs(one.At(0)) <= largest;
        ASSERT_EQ(FirstBeyond(one, 1, largest), within ? 1u : 0u)
            << DataTypeName(type) << " " << one.At(0) << " limit " << largest;
      }
}

TEST(FirstBeyond, FindsTheFirstAtAnyPlace) {
  std::mt19937 random(1);
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
    for (const size_t count :
         {size_t{1}, size_t{31}, size_t{65}, size_t{130}, size_t{4096}, size_t{4097}, size_t{10000}})
      for (int round = 0; round < 20; round++) {
        std::vector<float> storage(count);
        const MutableTensorView values{storage.data(), type};
        for (size_t i = 0; i < count; i++) values.Set(i, static_cast<float>(random() % 2000) - 1000);
        EXPECT_EQ(FirstBeyond({storage.data(), type}, count, 1000), count);
        const size_t first = random() % count, second = first + random() % (count - first);
        const float bad[] = {NAN, -INFINITY, INFINITY, 1100};
        values.Set(second, bad[random() % 4]);
        values.Set(first, bad[random() % 4]);
        EXPECT_EQ(FirstBeyond({storage.data(), type}, count, 1000), first);
      }
}

TEST(FirstBeyond, KnowsTheLargestF32) {
  const float values[] = {kMaxF32, -kMaxF32, INFINITY};
  EXPECT_EQ(FirstBeyond({values, DataType::kF32}, 3, kMaxF32), 2u);
  EXPECT_EQ(FirstBeyond({values, DataType::kF32}, 0, kMaxF32), 0u);
}

}  // namespace
}  // namespace kvtide
