#include "kernels/cpu/page_kernels.h"

#include <gtest/gtest.h>

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
          kernels.decode(type, side, layout, use, half, got.data());
          for (size_t i = 0; i < wanted.size(); i++) {
            ASSERT_EQ(FloatBits(got[i]), FloatBits(wanted[i]))
                << "value " << i << ": " << got[i] << ", definition " << wanted[i];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvtide
