#include "daemon/service/descriptors.h"

#include <fcntl.h>
#include <unistd.h>

#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

TEST(Descriptors, CountsWhatIsOpenNow) {
  const size_t before = LookAtDescriptors().open;
  EXPECT_GE(before, 3u);
  EXPECT_GT(LookAtDescriptors().limit, before);
  std::vector<int> more;
  for (int i = 0; i < 30; i++) more.push_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(LookAtDescriptors().open, before + 30);
  for (const int fd : more) ::close(fd);
  EXPECT_EQ(LookAtDescriptors().open, before);
}

TEST(Descriptors, AllThatAreWantedHaveRoom) {
  const ClientCounts wanted{1024, 64};
  const DescriptorUse use{DescriptorsFor({0, 40}, wanted), 40};
  EXPECT_EQ(use.limit, 40u + 24 + 1024 + 3 * 64);
  EXPECT_EQ(ShareDescriptors(use, wanted).value(), wanted);
  EXPECT_EQ(DescriptorShortage(use, wanted, wanted), "");
  const DescriptorUse fewer{use.limit - 1, 40};
  const ClientCounts room = ShareDescriptors(fewer, wanted).value();
  EXPECT_NE(room, wanted);
  EXPECT_THAT(DescriptorShortage(fewer, wanted, room), HasSubstr("LimitNOFILE (ulimit -n), 1280 are enough"));
}

// A GPU takes forty of 64: nobody would be served beside the first client.
TEST(Descriptors, TooFewAreAnErrorWithTheLimitThatWouldDo) {
  const auto refused = ShareDescriptors({64, 44}, {1024, 64});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("LimitNOFILE"));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("1284 are enough"));
  EXPECT_TRUE(ShareDescriptors({70, 44}, {2, 0}).ok());
  EXPECT_TRUE(ShareDescriptors({72, 44}, {1024, 0}).ok());
}

TEST(Descriptors, WhatIsGivenNeverExceedsTheTable) {
  std::mt19937 rng(1);
  for (int i = 0; i < 20000; i++) {
    const DescriptorUse use{rng() % 3000, rng() % 300};
    const ClientCounts wanted{1 + rng() % 2000, rng() % 200};
    const auto counts = ShareDescriptors(use, wanted);
    if (!counts.ok()) {
      EXPECT_LT(use.limit, use.open + kDescriptorsForLater + 6);
      continue;
    }
    EXPECT_LE(counts->connections, wanted.connections);
    EXPECT_LE(counts->ring_clients, wanted.ring_clients);
    EXPECT_LE(DescriptorsFor(use, *counts), use.limit);
    // Nothing is left that somebody wanted.
    const uint64_t left = use.limit - DescriptorsFor(use, *counts);
    EXPECT_TRUE(counts->connections == wanted.connections || left == 0);
    EXPECT_TRUE(counts->ring_clients == wanted.ring_clients || left < kDescriptorsOfRingClient ||
                counts->connections < wanted.connections)
        << use.limit << " " << use.open << " " << wanted.connections << " " << wanted.ring_clients;
  }
}

}  // namespace
}  // namespace kvtide::service
