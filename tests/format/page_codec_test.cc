// The byte-level part of the page codec: which bit belongs to which code.
#include "kernels/format/page_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

using test::HalfPage;

const int kStoredDims[] = {32, 64, 96, 128, 192, 256, 512};

template <class F>
void ForEachWidth(F f) {
  f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 3>());
  f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 5>());
  f(std::integral_constant<int, 8>());
}

// One set bit walks over every bit of every code of a plane; it must appear in one place of its own and
// nowhere else.
TEST(PageCodec, EveryBitOfEveryCodeHasItsOwnBitInThePlane) {
  ForEachWidth([](auto width) {
    constexpr int kBits = decltype(width)::value;
    for (const int d : kStoredDims)
      for (const Side side : {Side::kKey, Side::kValue}) {
        const size_t bytes = CodePlaneBytes(kBits, d);
        std::vector<std::byte> plane(bytes), seen(bytes);
        for (int t = 0; t < 64; t++)
          for (int i = 0; i < d; i++)
            for (int b = 0; b < kBits; b++) {
              const CodePlace place = side == Side::kKey ? KeyPlace(t, i, d) : ValuePlace(t, i, d);
              StoreCode<kBits>(plane.data(), place, 1 << b);
              ASSERT_EQ(LoadCode<kBits>(plane.data(), place), 1 << b);
              int set = 0;
              for (int w = 0; w < kBits; w++) {
                const int word = place.quad * kBits + w;
                const uint32_t value = LoadWord(plane.data(), word, place.lane);
                const uint32_t before = LoadWord(seen.data(), word, place.lane);
                set += std::popcount(value);
                ASSERT_EQ(value & before, 0u) << kBits << " bits, d " << d << ", token " << t << " dim " << i;
                StoreWord(seen.data(), word, place.lane, value | before);
                StoreWord(plane.data(), word, place.lane, 0);
              }
              ASSERT_EQ(set, 1);
            }
        ASSERT_TRUE(std::all_of(plane.begin(), plane.end(), [](std::byte x) { return x == std::byte{0}; }));
        size_t used = 0;
        for (const std::byte x : seen)
          used += static_cast<size_t>(std::popcount(std::to_integer<unsigned>(x)));
        ASSERT_EQ(used, static_cast<size_t>(64 * d * kBits));
      }
  });
}

TEST(PageCodec, StoringACodeLeavesItsNeighboursAlone) {
  ForEachWidth([](auto width) {
    constexpr int kBits = decltype(width)::value;
    const int d = 96;
    test::Random random(7);
    std::vector<std::byte> plane(CodePlaneBytes(kBits, d));
    std::vector<int> expected(static_cast<size_t>(64 * d));
    for (int round = 0; round < 20000; round++) {
      const int t = random.Below(64), i = random.Below(d), code = random.Below(1 << kBits);
      StoreCode<kBits>(plane.data(), KeyPlace(t, i, d), code);
      expected[static_cast<size_t>(t * d + i)] = code;
    }
    for (int t = 0; t < 64; t++)
      for (int i = 0; i < d; i++)
        ASSERT_EQ(LoadCode<kBits>(plane.data(), KeyPlace(t, i, d)), expected[static_cast<size_t>(t * d + i)]);
  });
}

TEST(PageCodec, BitsOfAQuadByHand) {
  uint8_t codes[32] = {};
  uint32_t words[8];
  codes[8 * 2 + 5] = 9;  // unit 2, element 5
  PackQuad<4>(codes, words);
  EXPECT_EQ(words[2], 9u << 20);
  codes[8 * 2 + 5] = 25;
  PackQuad<5>(codes, words);
  EXPECT_EQ(words[2], 9u << 20);
  EXPECT_EQ(words[4], 1u << 22);
  PackQuad<8>(codes, words);
  EXPECT_EQ(words[5], 25u << 8);
  codes[8 * 2 + 5] = 0;
  codes[8 * 3 + 5] = 6;  // the fourth unit of 3 bits lies in the spare bits of the others
  PackQuad<3>(codes, words);
  EXPECT_EQ(words[0], 0u);
  EXPECT_EQ(words[1], 1u << 23);
  EXPECT_EQ(words[2], 1u << 23);
  codes[8 * 3 + 5] = 3;
  PackQuad<2>(codes, words);
  EXPECT_EQ(words[1], 3u << 22);
}

// EncodeHalf puts codes where the accessors look for them, and scales where the layout says.
TEST(PageCodec, PagesAreReadableWithTheAccessors) {
  for (const CacheType type : AllCacheTypes())
    for (const Side side : {Side::kKey, Side::kValue})
      for (const int dim : {80, 128, 192}) {
        HalfPage page(type, side, dim);
        page.Encode(test::BellRows(3, 64, dim));
        const std::vector<float> rotated = page.DecodeRotated();
        const int d = page.layout.stored_dim;
        VisitCodec(type, [&](auto codec) {
          using C = decltype(codec);
          for (int t = 0; t < 64; t++)
            for (int i = 0; i < d; i++) {
              float value;
              if constexpr (C::kStorage == Storage::kHalf) {
                value = C::Unpack(
                    reinterpret_cast<const uint16_t*>(page.bytes.data())[HalfPrecisionIndex(t, i, d)]);
              } else {
                const CodePlace place = side == Side::kKey ? KeyPlace(t, i, d) : ValuePlace(t, i, d);
                const auto* scales =
                    reinterpret_cast<const uint16_t*>(page.bytes.data() + page.layout.code_bytes);
                value = F16ToF32(scales[i / C::kGroup * 64 + t]) * C::kLevelUnit *
                        static_cast<float>(C::Level(LoadCode<C::kBits>(page.bytes.data(), place)));
              }
              ASSERT_EQ(rotated[static_cast<size_t>(t * d + i)], value)
                  << Info(type).name << " " << t << " " << i;
            }
        });
      }
}

TEST(PageCodecDeathTest, RefusesAnotherTypesLayoutAndAMeanOfV) {
  HalfPage page(*ParseCacheType("turbo4"), Side::kValue, 128);
  const std::vector<float> rows(64 * 128, 1.0f);
  EXPECT_DEATH(EncodeHalf(*ParseCacheType("turbo3"), Side::kValue, page.layout, nullptr, rows.data(), 64,
                          page.bytes.data()),
               "layout is not of type turbo3");
  HeadProfile profile;
  profile.mean.assign(128, 0.5f);
  EXPECT_DEATH(page.Encode(rows, 64, &profile), "mean or gain of V");
}

}  // namespace
}  // namespace kvtide
