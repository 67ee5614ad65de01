#include "kernels/cpu/page/page_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/format/page_codec.h"

namespace kvtide {
namespace {

std::vector<float> RandomRows(int dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<size_t>(kBlockTokens * dim));
  for (float& x : rows) x = normal(random) * (random() % 50 == 0 ? 20.0f : 1.0f);
  std::fill_n(rows.begin(), dim, 0.0f);  // a token of zeros
  return rows;
}

HeadProfile RandomProfile(int dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> gain(0.3f, 3.0f), mean(-1.0f, 1.0f);
  HeadProfile profile;
  for (int i = 0; i < dim; i++) {
    profile.mean.push_back(mean(random));
    profile.gain.push_back(gain(random));
  }
  return profile;
}

// So that the suites that go over the supported levels leave none out.
TEST(PageKernels, ThisBuildHasTheLevelsOfThisProcessor) {
  EXPECT_EQ(SupportedSimdLevels().front(), SimdLevel::kPlain);
  for (SimdLevel level : kVectorLevels) {
    SCOPED_TRACE(SimdLevelName(level));
    const PageKernels* kernels = FindPageKernels(level);
    ASSERT_EQ(kernels != nullptr, ProcessorHas(level));
    if (kernels == nullptr) continue;
    EXPECT_STREQ(kernels->name, SimdLevelName(level));
  }
}

// Recoding must not depend on the vector unit, so decoding has to give the same floats, bit by bit.
TEST(PageKernels, EveryLevelDecodesToTheFloatsOfTheDefinition) {
  for (SimdLevel level : SupportedSimdLevels()) {
    const PageKernels& kernels = *FindPageKernels(level);
    for (CacheType type : AllCacheTypes()) {
      for (int dim : {32, 64, 80, 96, 112, 128, 192, 256, 512}) {
        for (Side side : {Side::kKey, Side::kValue}) {
          SCOPED_TRACE(std::string(kernels.name) + " " + Name(type) + " dim " + std::to_string(dim) +
                       (side == Side::kKey ? " K" : " V"));
          const HalfLayout layout = MakeHalfLayout(type, dim);
          const HeadProfile profile = RandomProfile(dim, 5);
          const HeadProfile* use = side == Side::kKey ? &profile : nullptr;
          const std::vector<float> rows = RandomRows(dim, static_cast<uint32_t>(dim));
          // 16 bytes off whole vectors: callers promise no more.
          std::vector<std::byte> memory(layout.bytes + 128);
          std::byte* half = memory.data();
          while (reinterpret_cast<uintptr_t>(half) % 64 != 16) half++;
          EncodeHalf(type, side, layout, use, rows.data(), kBlockTokens, half);
          std::vector<float> wanted(rows.size()), got(rows.size());
          DecodeHalf(type, side, layout, use, half, wanted.data());
          kernels.decode(type, side, layout, use, 0, half, got.data());
          for (size_t i = 0; i < wanted.size(); i++) {
            ASSERT_EQ(FloatBits(got[i]), FloatBits(wanted[i]))
                << "value " << i << ": " << got[i] << ", definition " << wanted[i];
          }
        }
      }
    }
  }
}

// All patterns of 16 bits, at any length and place.
TEST(PageKernels, EveryLevelWidensAndNarrowsAsTheDefinition) {
  std::vector<uint16_t> patterns(65536);
  for (size_t i = 0; i < patterns.size(); i++) patterns[i] = static_cast<uint16_t>(i);
  std::mt19937 random(7);
  std::vector<float> values(70000);
  for (float& x : values) x = FloatFromBits(static_cast<uint32_t>(random()));
  for (size_t i = 0; i < 20000; i++)  // around f16's range and its halves
    values[i] =
        FloatFromBits(static_cast<uint32_t>(0x33000000u + random() % 0x15000000u) | (random() % 2) << 31);
  for (SimdLevel level : SupportedSimdLevels()) {
    const PageKernels& kernels = *FindPageKernels(level);
    SCOPED_TRACE(kernels.name);
    for (const DataType type : {DataType::kF16, DataType::kBf16}) {
      std::vector<float> wide(65536);
      for (size_t at = 0; at < 65536;) {
        const size_t count = std::min<size_t>(1 + random() % 500, 65536 - at);
        kernels.widen({patterns.data(), type}, at, count, wide.data() + at);
        at += count;
      }
      for (size_t i = 0; i < 65536; i++)
        ASSERT_EQ(FloatBits(wide[i]), FloatBits((TensorView{patterns.data(), type}.At(i)))) << i;
      std::vector<uint16_t> got(values.size()), wanted(values.size());
      for (size_t at = 0; at < values.size();) {
        const size_t count = std::min<size_t>(1 + random() % 500, values.size() - at);
        kernels.narrow(values.data() + at, count, {got.data(), type}, at);
        at += count;
      }
      for (size_t i = 0; i < values.size(); i++) {
        StoreElement(values[i], {wanted.data(), type}, i);
        ASSERT_EQ(got[i], wanted[i]) << values[i];
      }
    }
    std::vector<float> same(100);
    kernels.widen({values.data(), DataType::kF32}, 3, 97, same.data());
    std::vector<float> back(100);
    kernels.narrow(same.data(), 97, {back.data(), DataType::kF32}, 3);
    EXPECT_EQ(std::memcmp(back.data() + 3, values.data() + 3, 97 * sizeof(float)), 0);
  }
}

}  // namespace
}  // namespace kvtide
