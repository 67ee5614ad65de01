#include "kernels/cpu/page/code_table.h"

#include <gtest/gtest.h>

#include "kernels/format/catalogue.h"
#include "kernels/format/page_order.h"

namespace kvtide {
namespace {

TEST(CodeTable, PositionsAreThoseOfThePageOrder) {
  for (int token = 0; token < kBlockTokens; token++) {
    const CodePlace place = KeyPlace(token, 0, 128);
    EXPECT_EQ(TokenPosition(token), place.quad / 4 * 32 + place.lane / 4 * 4 + place.unit);
    EXPECT_EQ(TokenAtPosition(TokenPosition(token)), token);
  }
  for (int dim = 0; dim < 128; dim++) {
    const CodePlace place = ValuePlace(0, dim, 128);
    EXPECT_EQ(DimPosition(dim), place.quad / 2 * 32 + place.lane / 4 * 4 + place.unit);
    EXPECT_EQ(DimAtPosition(DimPosition(dim)), dim);
  }
}

TEST(CodeTable, HoldsTheLevelsOfEveryCode) {
  for (CacheType type : AllCacheTypes()) {
    const CodeTable& table = CodeTableOf(type);
    EXPECT_EQ(table.coded(), Info(type).storage == Storage::kCodes);
    if (!table.coded() || table.bits == 8) continue;
    VisitCodec(type, [&](auto codec) {
      using C = decltype(codec);
      if constexpr (C::kStorage == Storage::kCodes) {
        for (int code = 0; code < 1 << C::kBits; code++) {
          EXPECT_EQ(table.words[code], C::Level(code));
          EXPECT_EQ(table.bytes[code], C::Level(code));
        }
      }
    });
  }
}

}  // namespace
}  // namespace kvtide
