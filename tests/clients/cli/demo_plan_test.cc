#include "clients/cli/demo/demo_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/format/block_layout.h"

namespace kvtide::cli {
namespace {

constexpr engine::KvGeometry kTidelm{6, 4, 2, 128, 0};
constexpr int64_t kMiB = 1 << 20;

TEST(DemoPlanTest, AskedPairsAreSizedByTheBlockLayout) {
  const auto plan = PlanDemo("tidelm-7m", kTidelm, 4096, 16 * kMiB, 64 * kMiB, "q8_0/turbo4");
  ASSERT_TRUE(plan.ok()) << plan.status();
  const BlockLayout layout({6, 2, 128, 128}, *ParseCachePair("q8_0/turbo4"));
  EXPECT_EQ(plan->pair, "q8_0/turbo4");
  EXPECT_EQ(plan->f16_bytes, 64 * ExactBlockBytes(kTidelm));
  EXPECT_EQ(plan->pair_bytes, 61 * static_cast<int64_t>(layout.block_bytes()) + 3 * ExactBlockBytes(kTidelm));
  EXPECT_TRUE(plan->fits);
  EXPECT_FALSE(plan->f16_fits);
}

TEST(DemoPlanTest, AmpleMemoryKeepsF16) {
  const auto plan = PlanDemo("tidelm-7m", kTidelm, 4096, 64 * kMiB, 0, "");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->pair, "f16/f16");
  EXPECT_TRUE(plan->f16_fits);
}

TEST(DemoPlanTest, RefusesUnknownTypesAndWhatFitsNowhere) {
  EXPECT_EQ(PlanDemo("m", kTidelm, 4096, 16 * kMiB, 64 * kMiB, "turbo9/turbo9").status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto plan = PlanDemo("m", kTidelm, 4096, kMiB, 0, "q8_0/q8_0");
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(plan.status().message()), testing::HasSubstr("--device-memory"));
}

}  // namespace
}  // namespace kvtide::cli
