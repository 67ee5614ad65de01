// Tiers that take no blocks, a remote tier that is away, sequences that do not become durable and lost GPUs
// are found in the statistics, and gone again when they are.
#include "daemon/find_troubles.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

using ::testing::HasSubstr;

const absl::Time kStart = absl::FromUnixSeconds(1'800'000'000);

TEST(TroubleFinder, FindsWhatTheStatisticsSay) {
  TroubleFinder finder;
  service::Troubles troubles;
  CacheStats stats;
  stats.tiers.resize(2);
  stats.tiers[1].name = "disk";
  stats.tiers[1].attends = false;
  finder.Look(stats, {}, kStart, &troubles);
  EXPECT_EQ(troubles.Bits(), 0u);
  stats.tiers[1].io.writable = false;
  stats.tiers[1].io.problem = "No space left on device";
  stats.remote.emplace().server = "redis://a";
  stats.remote->write_problem = "OOM";
  finder.Look(stats, {"CUDA device 0 is lost", true}, kStart, &troubles);
  EXPECT_THAT(troubles.TextOf(service::Trouble::kDisk), HasSubstr("disk takes no blocks: No space left"));
  EXPECT_THAT(troubles.TextOf(service::Trouble::kRemote), HasSubstr("redis://a takes no blocks: OOM"));
  EXPECT_THAT(troubles.TextOf(service::Trouble::kDevice), HasSubstr("device 0 is lost"));
  EXPECT_TRUE(troubles.EndService());
  stats.remote->problem = "Connection refused";
  finder.Look(stats, {"CUDA device 0 is lost", false}, kStart, &troubles);
  EXPECT_THAT(troubles.TextOf(service::Trouble::kRemote), HasSubstr("redis://a is away: Connection refused"));
  EXPECT_FALSE(troubles.EndService()) << "another device serves";
  finder.Look({}, {}, kStart, &troubles);
  EXPECT_EQ(troubles.Bits(), 0u);
}

TEST(TroubleFinder, WhatDoesNotBecomeDurableCountsForAWhile) {
  TroubleFinder finder;
  service::Troubles troubles;
  CacheStats stats;
  stats.failed_persists = 3;
  finder.Look(stats, {}, kStart, &troubles);
  EXPECT_THAT(troubles.TextOf(service::Trouble::kPersist), HasSubstr("kvtide persist says"));
  stats.persist_problem = "sequence 7: tier 'disk': Input/output error";
  finder.Look(stats, {}, kStart, &troubles);
  EXPECT_THAT(troubles.TextOf(service::Trouble::kPersist),
              HasSubstr("sequence 7: tier 'disk': Input/output"));
  finder.Look(stats, {}, kStart + absl::Seconds(100), &troubles);
  EXPECT_NE(troubles.TextOf(service::Trouble::kPersist), "");
  finder.Look(stats, {}, kStart + absl::Seconds(125), &troubles);
  EXPECT_EQ(troubles.TextOf(service::Trouble::kPersist), "");
}

}  // namespace
}  // namespace kvtide
