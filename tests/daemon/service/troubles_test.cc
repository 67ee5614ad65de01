// What is wrong is told when it begins, changes and ends, to the log once and to metrics and statistics as
// long as it lasts.
#include "daemon/service/troubles.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::ElementsAre;

const absl::Time kStart = absl::FromUnixSeconds(1'800'000'000);

TEST(Troubles, TheLogHearsOfTheBeginningAndTheEnd) {
  std::vector<std::string> lines;
  Troubles troubles(
      [&](const char* level, const std::string& line) { lines.push_back(std::string(level) + " " + line); });
  const auto at = [](int seconds) { return kStart + absl::Seconds(seconds); };
  troubles.Set(Trouble::kRemote, "", false, at(0));
  troubles.Set(Trouble::kRemote, "redis://a is \"away\"\n", false, at(1));
  troubles.Set(Trouble::kRemote, "redis://a is \"away\"\n", false, at(5));
  troubles.Set(Trouble::kRemote, "time-out", false, at(6));  // too soon for another line
  troubles.Set(Trouble::kRemote, "refused", false, at(7));
  troubles.Set(Trouble::kRemote, "refused", false, at(12));
  troubles.Set(Trouble::kDevice, "lost", true, at(91));
  troubles.Set(Trouble::kRemote, "", false, at(100));
  EXPECT_THAT(lines, ElementsAre(R"(warning trouble=remote problem="redis://a is \"away\"\n")",
                                 R"(warning trouble=remote problem="refused")",
                                 R"(error trouble=device problem="lost")",
                                 "info trouble=remote is over after=1m39s"));
}

TEST(Troubles, AreToldAsLongAsTheyLast) {
  Troubles troubles;
  EXPECT_EQ(troubles.Bits(), 0u);
  troubles.Set(Trouble::kCertificate, "/etc/x.pem has expired", false, kStart);
  EXPECT_EQ(troubles.Bits(), 1u << static_cast<int>(Trouble::kCertificate));
  EXPECT_EQ(troubles.TextOf(Trouble::kCertificate), "/etc/x.pem has expired");
  EXPECT_FALSE(troubles.EndService());
  troubles.Set(Trouble::kDevice, "lost", true, kStart);
  EXPECT_TRUE(troubles.EndService());
  troubles.Set(Trouble::kDevice, "", false, kStart);
  EXPECT_FALSE(troubles.EndService());
}

// Its texts have paths and addresses in them, which are no tenant's business.
TEST(Troubles, StatisticsTellThemWithTextsForAdmins) {
  Troubles troubles;
  troubles.Set(Trouble::kTokens, "/etc/tokens: no such file", false, kStart);
  troubles.Set(Trouble::kDevice, "CUDA device 0 is lost", true, kStart + absl::Seconds(90));
  v1::GetStatsResponse admin, tenant;
  troubles.ToProto(Identity::OfThisProcess(), kStart + absl::Seconds(100), &admin);
  ASSERT_EQ(admin.troubles_size(), 2);
  EXPECT_EQ(admin.troubles(0).what(), "tokens");
  EXPECT_EQ(admin.troubles(0).text(), "/etc/tokens: no such file");
  EXPECT_EQ(admin.troubles(0).seconds(), 100);
  EXPECT_FALSE(admin.troubles(0).ends_service());
  EXPECT_EQ(admin.troubles(1).seconds(), 10);
  EXPECT_TRUE(admin.troubles(1).ends_service());
  troubles.Set(Trouble::kTokens, "");
  troubles.ToProto(Identity{}, kStart + absl::Seconds(100), &tenant);
  ASSERT_EQ(tenant.troubles_size(), 1);
  EXPECT_EQ(tenant.troubles(0).what(), "device");
  EXPECT_EQ(tenant.troubles(0).text(), "");
}

}  // namespace
}  // namespace kvtide::service
