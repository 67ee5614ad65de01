#include "kernels/format/block_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/format/half_page.h"

namespace kvtide {
namespace {

BlockLayout Layout(const char* pair, int dim_k = 128, int dim_v = 128, int layers = 1, int heads = 1) {
  return BlockLayout({layers, heads, dim_k, dim_v}, ParseCachePair(pair).value());
}

TEST(BlockLayout, TrueBitsAndRatios) {
  const struct {
    const char* pair;
    double bits, ratio;
  } rows[] = {{"f16/f16", 16, 1},
              {"q8_0/q8_0", 8.5, 1.882},
              {"q5_0/q5_0", 5.5, 2.909},
              {"q4_0/q4_0", 4.5, 3.556},
              {"turbo4/turbo4", 4.125, 3.879},
              {"turbo3/turbo3", 3.125, 5.12},
              {"turbo2/turbo2", 2.125, 7.529},
              {"planar3/turbo3", 3.125, 5.12},
              {"planar3/f16", 9.5625, 1.673},
              {"q8_0/pq4", 6.3125, 2.535},
              {"rotor3/rotor3", 3.125, 5.12},
              {"iso4/iso4", 4.125, 3.879}};
  for (const auto& row : rows) {
    EXPECT_DOUBLE_EQ(Layout(row.pair).BitsPerValue(), row.bits) << row.pair;
    EXPECT_NEAR(16 / Layout(row.pair).BitsPerValue(), row.ratio, 0.001) << row.pair;
  }
}

TEST(BlockLayout, PaddingIsCounted) {
  EXPECT_DOUBLE_EQ(Layout("turbo4/turbo4", 80, 80).BitsPerValue(), (96 * 4 + 16) / 80.0);
  EXPECT_DOUBLE_EQ(Layout("turbo4/turbo4", 112, 112).BitsPerValue(), (128 * 4 + 16) / 112.0);
  EXPECT_DOUBLE_EQ(Layout("f16/f16", 80, 80).BitsPerValue(), 16 * 96 / 80.0);
  EXPECT_DOUBLE_EQ(Layout("turbo4/turbo4", 192, 192).BitsPerValue(), (192 * 4 + 32) / 192.0);
  // 3 bits and an odd number of steps of 32: 18 words of a lane are filled up to 20.
  EXPECT_DOUBLE_EQ(Layout("turbo3/turbo3", 96, 96).BitsPerValue(), (20 * 32 * 32 / 64.0 + 16) / 96.0);
}

TEST(BlockLayout, HalvesAreWholeLinesAndRecordsFollowEachOther) {
  for (const CacheType k : AllCacheTypes())
    for (const CacheType v : {k, *ParseCacheType("f16"), *ParseCacheType("turbo3")})
      for (const int dim_k : test::HeadDims())
        for (const int dim_v : {dim_k, 128}) {
          const BlockLayout layout({3, 2, dim_k, dim_v}, {k, v});
          EXPECT_EQ(layout.k().bytes % 128, 0u);
          EXPECT_EQ(layout.v().bytes % 128, 0u);
          EXPECT_EQ(layout.k_codes(), 0u);
          EXPECT_EQ(layout.k_scales(), layout.k().code_bytes);
          EXPECT_EQ(layout.v_codes(), layout.k().bytes);
          EXPECT_EQ(layout.v_scales() + layout.v().scale_bytes, layout.record_bytes());
          EXPECT_EQ(layout.RecordOffset(0, 0), 0u);
          EXPECT_EQ(layout.RecordOffset(1, 1), 3 * layout.record_bytes());
          EXPECT_EQ(layout.RecordOffset(2, 1) + layout.record_bytes(), layout.block_bytes());
        }
}

TEST(BlockLayout, HalvesHoldTheirCodesAndScalesAndWasteLittle) {
  for (const CacheType type : AllCacheTypes())
    for (int dim = 16; dim <= 512; dim += 16) {
      const HalfLayout half = MakeHalfLayout(type, dim);
      const CacheTypeInfo& info = Info(type);
      const size_t values = static_cast<size_t>(64 * half.stored_dim);
      const size_t scales =
          info.group == 0 ? 0
                          : static_cast<size_t>(64 * ((half.stored_dim + info.group - 1) / info.group) * 2);
      EXPECT_GE(half.code_bytes * 8, values * static_cast<size_t>(info.bits));
      EXPECT_LE(half.code_bytes * 8, values * static_cast<size_t>(info.bits) + 8 * 512);
      EXPECT_EQ(half.scale_bytes, scales);
      EXPECT_EQ(half.bytes, half.code_bytes + half.scale_bytes);
      EXPECT_TRUE(half.stored_dim >= dim && half.stored_dim < dim + 32);
    }
}

TEST(BlockLayout, SizesOfKnownModels) {
  // Llama-3.1-8B: 32 layers, 8 KV heads of 128. 128 KiB per token in f16.
  EXPECT_EQ(Layout("f16/f16", 128, 128, 32, 8).block_bytes(), 64u * 131072u);
  EXPECT_EQ(Layout("turbo3/turbo3", 128, 128, 32, 8).block_bytes(), 64u * 25600u);
  EXPECT_EQ(Layout("turbo4/turbo4", 128, 128, 32, 8).block_bytes(), 64u * 33792u);
}

TEST(BlockLayout, ShapesOutsideTheLimitsAreRefused) {
  EXPECT_TRUE(CheckGroupShape({1, 1, 16, 512}).ok());
  EXPECT_TRUE(CheckGroupShape({1024, 1024, 128, 128}).ok());
  for (const GroupShape bad :
       {GroupShape{0, 1, 128, 128}, GroupShape{1, 0, 128, 128}, GroupShape{1025, 1, 128, 128},
        GroupShape{1, 1, 8, 128}, GroupShape{1, 1, 128, 528}, GroupShape{1, 1, 100, 128},
        GroupShape{1, 1, -128, 128}})
    EXPECT_EQ(CheckGroupShape(bad).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(CheckGroupShape({1, 1, 100, 128}).message()),
              testing::HasSubstr("multiples of 16"));
}

}  // namespace
}  // namespace kvtide
