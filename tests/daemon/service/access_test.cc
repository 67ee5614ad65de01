#include "daemon/service/access.h"

#include <sys/socket.h>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

Access Rules(const std::vector<std::string>& texts) {
  absl::StatusOr<Access> access = Access::Parse(texts);
  EXPECT_TRUE(access.ok()) << access.status();
  return *std::move(access);
}

TEST(Access, ItsOwnUserAndRootAreAdminsAndNobodyElseIsLetIn) {
  const Access access = Rules({});
  for (const uint32_t user : {uint32_t{0}, uint32_t{::geteuid()}}) {
    const auto identity = access.OfUnixPeer({user, 5, {}});
    ASSERT_TRUE(identity.ok());
    EXPECT_EQ((*identity)->tenant, kDefaultTenant);
    EXPECT_TRUE((*identity)->admin);
  }
  const auto other = access.OfUnixPeer({4321, 5, {6, 7}});
  EXPECT_EQ(other.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("--allow uid:4321"));
  EXPECT_FALSE(access.OfPlainTcp()->admin);
}

TEST(Access, TheFirstRuleThatFitsDecides) {
  const Access access = Rules({"uid:1001=acme", "gid:44=ops:admin", "gid:45", "uid:0=acme", "tcp=web"});
  const auto tenant = [&](const UnixPeer& peer) {
    const auto identity = access.OfUnixPeer(peer);
    return identity.ok() ? (*identity)->tenant + ((*identity)->admin ? "!" : "") : "nobody";
  };
  EXPECT_EQ(tenant({1001, 44, {}}), "acme");
  EXPECT_EQ(tenant({1002, 44, {}}), "ops!");
  EXPECT_EQ(tenant({1002, 9, {3, 44}}), "ops!") << "one of the other groups";
  EXPECT_EQ(tenant({1002, 45, {}}), "default");
  EXPECT_EQ(tenant({0, 0, {}}), "acme") << "rules stand before the defaults";
  EXPECT_EQ(tenant({1003, 3, {}}), "nobody");
  EXPECT_EQ(access.OfPlainTcp()->tenant, "web");
  EXPECT_TRUE(Rules({"group"}).OfUnixPeer({77, ::getegid(), {}}).ok());
  EXPECT_FALSE(Rules({"group"}).OfUnixPeer({77, ::getegid() + 1, {}}).ok());
  EXPECT_TRUE(Rules({"anyone=guests"}).OfUnixPeer({77, 78, {}}).ok());
}

TEST(Access, ACertificatesNameIsTheTenantUnlessARuleSaysMore) {
  const Access access = Rules({"cert:ops.example=default:admin"});
  EXPECT_EQ((*access.OfCertificate({"acme", "engine.example"}))->tenant, "acme");
  EXPECT_FALSE((*access.OfCertificate({"acme"}))->admin);
  EXPECT_TRUE((*access.OfCertificate({"acme", "ops.example"}))->admin);
  EXPECT_EQ((*access.OfCertificate({"Acme Inc.", "engine.example"}))->tenant, "engine.example");
  EXPECT_THAT(std::string(access.OfCertificate({"Acme Inc"}).status().message()),
              HasSubstr("--allow cert:NAME"));
  EXPECT_EQ(access.OfCertificate({}).status().code(), absl::StatusCode::kPermissionDenied);
}

TEST(Access, ARuleThatIsNoneIsNamed) {
  for (const char* text :
       {"", "1001", "uid:", "uid:x", "uid:-1", "gid:4294967296", "pid:4", "uid:1=", "uid:1=a b",
        "uid:1=a:root", "user:", "user:no-such-user-here", "group:no-such-group-here"}) {
    const auto access = Access::Parse({"uid:1", text});
    EXPECT_EQ(access.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(access.status().message()), HasSubstr(std::string("allow \"") + text + "\""))
        << text;
  }
  EXPECT_FALSE(CheckTenant(std::string(65, 'a')).ok());
  EXPECT_FALSE(CheckTenant("a\n").ok());
  EXPECT_TRUE(CheckTenant("acme-2_x.y").ok());
}

TEST(Access, TheKernelSaysWhoIsAtTheOtherEnd) {
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const auto peer = PeerOf(ends[0]);
  ASSERT_TRUE(peer.ok()) << peer.status();
  EXPECT_EQ(peer->user, ::geteuid());
  EXPECT_EQ(peer->group, ::getegid());
  EXPECT_EQ(peer->groups.size(), static_cast<size_t>(::getgroups(0, nullptr)));
  EXPECT_TRUE(Rules({}).OfSocket(ends[1]).ok());
  ::close(ends[0]);
  ::close(ends[1]);
  EXPECT_FALSE(PeerOf(-1).ok());
}

}  // namespace
}  // namespace kvtide::service
