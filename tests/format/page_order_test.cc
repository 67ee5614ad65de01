#include "kernels/format/page_order.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

namespace kvtide {
namespace {

const int kStoredDims[] = {32, 64, 96, 128, 160, 192, 256, 512};

template <class Place, class Owner>
void ExpectBijection(Place place_of, Owner owner_of, int d) {
  std::vector<bool> taken(static_cast<size_t>(64 * d));
  for (int t = 0; t < 64; t++)
    for (int i = 0; i < d; i++) {
      const CodePlace p = place_of(t, i, d);
      ASSERT_TRUE(p.quad >= 0 && p.quad < 2 * d / 32 && p.lane >= 0 && p.lane < 32 && p.unit >= 0 &&
                  p.unit < 4 && p.element >= 0 && p.element < 8)
          << t << " " << i;
      const size_t index = static_cast<size_t>(((p.quad * 32 + p.lane) * 4 + p.unit) * 8 + p.element);
      ASSERT_FALSE(taken[index]) << "two codes in one place: token " << t << " dim " << i;
      taken[index] = true;
      const CodeOwner owner = owner_of(p, d);
      ASSERT_EQ(owner.token, t);
      ASSERT_EQ(owner.dim, i);
    }
}

TEST(PageOrder, EveryCodeHasItsOwnPlaceAndTheWayBackIsRight) {
  for (const int d : kStoredDims) {
    ExpectBijection(KeyPlace, KeyOwner, d);
    ExpectBijection(ValuePlace, ValueOwner, d);
  }
}

TEST(PageOrder, PlacesByHand) {
  // Token 37 = 32 + 5: group 1; 5 = 8*0 + 2*2 + 1, so n = 1, unit 2. Dim 75 = 2*32 + 8*1 + 3: step 2, lane
  // column 1.
  const CodePlace k = KeyPlace(37, 75, 128);
  EXPECT_EQ(std::tuple(k.quad, k.lane, k.unit, k.element), std::tuple(1 * 4 + 2, 4 * 1 + 1, 2, 3));
  // As a value: dim 75 = 2*32 + 8*1 + 3: unit 1, n = 3. Token 37 = 32 + 8*0 + 5.
  const CodePlace v = ValuePlace(37, 75, 128);
  EXPECT_EQ(std::tuple(v.quad, v.lane, v.unit, v.element), std::tuple(2 * 2 + 1, 4 * 3 + 0, 1, 5));
}

TEST(PageOrder, WordsOfALaneAreDistinctAndInsideThePlane) {
  for (const int bits : {2, 3, 4, 5, 8})
    for (const int d : kStoredDims) {
      std::set<size_t> offsets;
      for (int w = 0; w < LaneWords(bits, d); w++)
        for (int lane = 0; lane < 32; lane++) offsets.insert(LaneWordOffset(w, lane));
      EXPECT_EQ(offsets.size() * 4, CodePlaneBytes(bits, d));
      EXPECT_EQ(*offsets.rbegin() + 4, CodePlaneBytes(bits, d));
    }
}

TEST(PageOrder, AQuarterWarpReadsAllBanksOnce) {
  for (int first = 0; first < 32; first += 8) {
    std::set<size_t> banks;
    for (int lane = first; lane < first + 8; lane++) banks.insert(LaneWordOffset(0, lane) / 16 % 8);
    EXPECT_EQ(banks.size(), 8u) << "lanes from " << first;
  }
}

TEST(PageOrder, HalfPrecisionPagesAreAPermutationWithoutBankConflicts) {
  for (const int d : kStoredDims) {
    std::set<int> indices;
    for (int t = 0; t < 64; t++)
      for (int i = 0; i < d; i++) indices.insert(HalfPrecisionIndex(t, i, d));
    EXPECT_EQ(static_cast<int>(indices.size()), 64 * d);
    EXPECT_EQ(*indices.rbegin(), 64 * d - 1);
    for (int t = 0; t < 64; t += 8)
      for (int chunk = 0; chunk < d / 8; chunk++) {
        std::set<int> banks;
        for (int i = 0; i < 8; i++) banks.insert(HalfPrecisionIndex(t + i, 8 * chunk, d) / 8 % 8);
        EXPECT_EQ(banks.size(), 8u) << "d " << d << " token " << t << " chunk " << chunk;
      }
  }
}

TEST(PageOrder, StoredDimsAreMultiplesOf32) {
  EXPECT_EQ(StoredDim(64), 64);
  EXPECT_EQ(StoredDim(80), 96);
  EXPECT_EQ(StoredDim(112), 128);
  EXPECT_EQ(StoredDim(16), 32);
}

}  // namespace
}  // namespace kvtide
