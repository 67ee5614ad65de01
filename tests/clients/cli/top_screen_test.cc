#include "clients/cli/ops/top_screen.h"

#include <algorithm>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;
using testing::Not;

const Terminal kPlain(false, false, 200);

DaemonSnapshot At(double uptime, int64_t tokens) {
  DaemonSnapshot snapshot;
  snapshot.address = "127.0.0.1:7600";
  snapshot.info.version = "0.1.0";
  snapshot.stats.uptime_seconds = uptime;
  snapshot.stats.appended_tokens = tokens;
  snapshot.stats.moved_bytes = tokens << 20;
  client::TierStats tier;
  tier.name = "device";
  tier.capacity_bytes = 1000;
  tier.used_bytes = 500;
  tier.demoted_blocks = tokens;
  snapshot.stats.tiers = {tier};
  for (int i = 1; i <= 100; ++i) {
    client::SequenceInfo sequence;
    sequence.id = static_cast<uint64_t>(i);
    sequence.tokens = i;
    sequence.model = "m";
    snapshot.sequences.push_back(sequence);
  }
  return snapshot;
}

int Lines(const std::string& text) { return static_cast<int>(std::count(text.begin(), text.end(), '\n')); }

TEST(TopScreen, RatesBetweenSnapshots) {
  const std::string text = RenderTop(At(10, 100), At(12, 300), 2, 60, kPlain);
  EXPECT_THAT(text, HasSubstr("appended 100 tokens/s"));
  EXPECT_THAT(text, HasSubstr("moved " + planner::FormatBytes(100 << 20) + "/s"));
  EXPECT_THAT(text, HasSubstr("100/s"));  // demoted
  EXPECT_THAT(text, HasSubstr("[###############...............]"));
  EXPECT_THAT(text, HasSubstr("50 %"));
}

TEST(TopScreen, TellsByWhichWayCallsCome) {
  DaemonSnapshot before = At(10, 100), now = At(12, 300);
  before.stats.ways = {{"grpc", 1, 100, 0, 0, 0}, {"direct", 2, 1000, 500, 0, 0}};
  now.stats.ways = {{"grpc", 1, 300, 0, 0, 0}, {"direct", 3, 1040, 520, 0, 0}};
  const std::string text = RenderTop(before, now, 2, 60, kPlain);
  EXPECT_THAT(text, HasSubstr("clients: gRPC 1 (100/s calls, 0/s steps"));
  EXPECT_THAT(text, HasSubstr("direct 3 (20/s calls, 10/s steps"));
}

TEST(TopScreen, ARestartGivesTheRatesOfTheNewDaemon) {
  EXPECT_THAT(RenderTop(At(1000, 5000), At(1, 20), 2, 60, kPlain), HasSubstr("appended 10 tokens/s"));
}

TEST(TopScreen, NoTimeBetween) {
  EXPECT_THAT(RenderTop(At(10, 100), At(10, 100), 0, 60, kPlain), HasSubstr("appended 0 tokens/s"));
}

TEST(TopScreen, LongestSequencesAsManyAsFit) {
  const std::string text = RenderTop(At(10, 1), At(11, 1), 1, 20, kPlain);
  EXPECT_EQ(Lines(text), 20);
  EXPECT_THAT(text, HasSubstr("\n100 "));
  EXPECT_THAT(text, Not(HasSubstr("\n1  ")));
  for (int height = 1; height < 40; ++height)
    EXPECT_LE(Lines(RenderTop(At(1, 1), At(2, 2), 1, height, kPlain)), height);
}

TEST(TopScreen, WhatIsWrongTenantsAndTheOrderThatIsAskedFor) {
  DaemonSnapshot now = At(11, 1);
  now.stats.troubles = {{"remote", "redis://a is away: Connection refused", 65, false}};
  for (client::SequenceInfo& sequence : now.sequences) {
    sequence.idle_seconds = static_cast<double>(sequence.id);
    sequence.tenant = sequence.id % 2 == 0 ? "acme" : "shop";
  }
  const std::string hottest = RenderTop(At(10, 1), now, 1, 40, kPlain, SequenceOrder::kHottest);
  EXPECT_THAT(hottest, HasSubstr("\ntrouble: remote for 1:05: redis://a is away: Connection refused\n"));
  EXPECT_THAT(hottest, HasSubstr("\nacme "));
  EXPECT_THAT(hottest, HasSubstr("\n1 "));
  EXPECT_THAT(hottest, Not(HasSubstr("\n100 ")));
  EXPECT_THAT(RenderTop(At(10, 1), now, 1, 40, kPlain, SequenceOrder::kColdest), HasSubstr("\n100 "));
  EXPECT_THAT(RenderTop(At(10, 1), At(11, 1), 1, 40, kPlain), Not(HasSubstr("tenant")));
}

TEST(TopScreen, StaysInsideTheTerminal) {
  const Terminal narrow(true, true, 40);
  std::istringstream lines(RenderTop(At(1, 1), At(2, 200), 1, 30, narrow));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(DisplayWidth(line), 40) << line;
}

TEST(TopScreen, ErrorsAndLatencyOfTheBusiestMethods) {
  DaemonSnapshot before = At(10, 100), now = At(12, 300);
  before.stats.methods = {{"Append", 100, {{"ABORTED", 1}}, 0, 0}};
  now.stats.methods = {{"Attend", 50, {}, 90e-6, 1e-3},
                       {"Append", 300, {{"ABORTED", 1}, {"DATA_LOSS", 4}}, 1e-3, 1.5}};
  now.stats.lost_blocks = 6;
  before.stats.refused = {{"quota", 2}};
  now.stats.refused = {{"quota", 9}, {"queue_full", 1}};
  const std::string text = RenderTop(before, now, 2, 60, kPlain);
  EXPECT_THAT(text, HasSubstr("refused: 4/s (so far quota 9, queue_full 1)"));
  EXPECT_THAT(text, HasSubstr("100/s"));
  EXPECT_THAT(text, HasSubstr("2/s"));
  EXPECT_THAT(text, HasSubstr("ABORTED 1, DATA_LOSS 4"));
  EXPECT_THAT(text, HasSubstr("1.5 s"));
  EXPECT_THAT(text, HasSubstr("lost 6"));
}

}  // namespace
}  // namespace kvtide::cli
