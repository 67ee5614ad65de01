#include "kernels/format/catalogue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

TEST(Catalogue, KnowsTheseTypes) {
  std::set<std::string> names;
  for (const CacheType type : AllCacheTypes()) {
    names.insert(Name(type));
    EXPECT_EQ(ParseCacheType(Name(type)).value(), type);
  }
  EXPECT_EQ(static_cast<int>(names.size()), kCodecTypes) << "names must differ";
  EXPECT_EQ(names, (std::set<std::string>{"f16", "bf16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2",
                                          "wht4", "iso4", "iso3", "planar4", "planar3", "rotor4", "rotor3",
                                          "pq4", "pq3"}));
}

TEST(Catalogue, UnknownNamesAreRefusedWithTheListOfKnownOnes) {
  const absl::Status status = ParseCacheType("turbo5").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              testing::HasSubstr("unknown cache type 'turbo5'; known: f16, bf16, q8_0"));
  EXPECT_FALSE(ParseCacheType("").ok());
  EXPECT_FALSE(ParseCacheType("F16").ok());
  EXPECT_FALSE(ParseCacheType("f16 ").ok());
}

TEST(Catalogue, PairsParseAndPrint) {
  const CachePair pair = ParseCachePair("q8_0/turbo4").value();
  EXPECT_EQ(PairName(pair), "q8_0/turbo4");
  EXPECT_EQ(PairName(ParseCachePair("pq4").value()), "pq4/pq4");
  EXPECT_EQ(PairName(ExactPair()), "f16/f16");
  EXPECT_FALSE(ParseCachePair("q8_0/").ok());
  EXPECT_FALSE(ParseCachePair("/q8_0").ok());
  EXPECT_FALSE(ParseCachePair("q8_0/turbo4/f16").ok());
}

TEST(Catalogue, AnAliasHasItsOwnNameAndTheBytesOfItsType) {
  for (const char* name : {"pq3", "pq4"}) {
    const CacheType alias = ParseCacheType(name).value();
    EXPECT_EQ(std::string(Name(alias)), name);
    ASSERT_NE(Info(alias).alias_of, nullptr);
    const CacheType type = ParseCacheType(Info(alias).alias_of).value();
    EXPECT_EQ(Info(type).alias_of, nullptr);
    for (const Side side : {Side::kKey, Side::kValue}) {
      const std::vector<float> rows = test::BellRows(1, 64, 96);
      EXPECT_EQ(test::HalfPage(alias, side, 96).Encode(rows).bytes,
                test::HalfPage(type, side, 96).Encode(rows).bytes);
    }
  }
}

TEST(Catalogue, TypesThatMixFewChannelsAskForEqualisedKeys) {
  for (const CacheType type : AllCacheTypes()) {
    const std::string name = Name(type);
    const bool few = name.starts_with("planar") || name.starts_with("iso") || name.starts_with("rotor") ||
                     name.starts_with("pq");
    EXPECT_EQ(Info(type).keys == Equalise::kFull, few) << name;
  }
}

TEST(Catalogue, StoredFormsAreSharedByTypesThatDifferInTheRotationOnly) {
  const auto form = [](const char* name) {
    return VisitStored(*ParseCacheType(name), [](auto codec) -> const void* {
      using C = decltype(codec);
      static const char tag = C::kBits;
      return &tag;
    });
  };
  EXPECT_EQ(form("turbo4"), form("iso4"));
  EXPECT_EQ(form("turbo4"), form("pq4"));
  EXPECT_EQ(form("turbo3"), form("rotor3"));
  EXPECT_NE(form("turbo4"), form("turbo3"));
  EXPECT_NE(form("turbo4"), form("q4_0"));
  EXPECT_NE(form("turbo4"), form("wht4"));
  EXPECT_NE(form("f16"), form("bf16"));
}

}  // namespace
}  // namespace kvtide
