// Texts of addresses: what is said, what is left to defaults, and what is wrong with a wrong one.
#include "daemon/remote/remote_options.h"

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(RemoteOptionsTest, AddressesAreRead) {
  const std::pair<const char*, const char*> texts[] = {
      {"cache", "redis://cache:6379"},
      {"cache:7000", "redis://cache:7000"},
      {"redis://cache", "redis://cache:6379"},
      {"redis://10.0.0.5:6380/3", "redis://10.0.0.5:6380/3"},
      {"rediss://cache.example:6390", "rediss://cache.example:6390"},
      {"[::1]", "redis://[::1]:6379"},
      {"rediss://[fe80::1]:7000", "rediss://[fe80::1]:7000"},
      {"unix:/run/redis/redis.sock", "unix:/run/redis/redis.sock"},
  };
  for (const auto& [text, expected] : texts) {
    const absl::StatusOr<RemoteAddress> address = ParseRemoteAddress(text);
    ASSERT_TRUE(address.ok()) << address.status();
    EXPECT_EQ(address->Text(), expected);
    EXPECT_EQ(ParseRemoteAddress(address->Text())->Text(), expected) << "what is shown can be said again";
  }
}

TEST(RemoteOptionsTest, WrongOnesSayWhatIsWrong) {
  const std::pair<const char*, const char*> texts[] = {
      {"", "host is missing"},       {":6379", "host is missing"},  {"cache:", "port is missing"},
      {"cache:0", "is no port"},     {"cache:70000", "is no port"}, {"cache:x", "is no port"},
      {"::1", "stands in []"},       {"[::1", "] is missing"},      {"[::1]6379", "behind ]"},
      {"cache/x", "no number"},      {"cache/-1", "no number"},     {"unix:redis.sock", "does not begin"},
      {"redis://u:pw@host", "file"},
  };
  for (const auto& [text, part] : texts) {
    const absl::Status status = ParseRemoteAddress(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << text << ": " << status;
    EXPECT_FALSE(absl::StrContains(status.message(), "pw")) << "a password in an error";
  }
}

TEST(RemoteOptionsTest, PrefixesArePlain) {
  RemoteOptions options;
  for (const char* good : {"kvtide", "a", "prod-1_x.y"}) {
    options.prefix = good;
    EXPECT_TRUE(CheckRemoteOptions(options).ok()) << good;
  }
  const std::string long_prefix(65, 'a');
  for (const char* bad : {"", "a:b", "a*", "a b", "[a]", "\n", long_prefix.c_str()}) {
    options.prefix = bad;
    EXPECT_TRUE(absl::IsInvalidArgument(CheckRemoteOptions(options))) << bad;
  }
}

}  // namespace
}  // namespace kvtide
