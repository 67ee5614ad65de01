#include "daemon/metrics/endpoint_address.h"

#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

using testing::HasSubstr;

TEST(EndpointAddress, Parses) {
  EXPECT_EQ(ParseEndpointAddress("127.0.0.1:9464")->Text(), "127.0.0.1:9464");
  EXPECT_EQ(ParseEndpointAddress("0.0.0.0:0")->port, 0);
  EXPECT_EQ(ParseEndpointAddress("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseEndpointAddress("[::1]:80")->Text(), "[::1]:80");
  const absl::StatusOr<EndpointAddress> local = ParseEndpointAddress("localhost:9464");
  ASSERT_TRUE(local.ok()) << local.status();
  EXPECT_THAT(local->host, testing::AnyOf("127.0.0.1", "::1"));
}

TEST(EndpointAddress, SaysWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "no port"},
      {"127.0.0.1", "no port"},
      {":9464", "no host"},
      {"127.0.0.1:", "not a number"},
      {"127.0.0.1:http", "not a number"},
      {"127.0.0.1:65536", "not a number"},
      {"127.0.0.1:-1", "not a number"},
      {"::1:80", "brackets"},
      {"no such host:80", "no host named no such host"},
  };
  for (const auto& [text, message] : cases) {
    const absl::Status status = ParseEndpointAddress(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr("127.0.0.1:9464")) << text;
  }
}

TEST(EndpointAddress, ListensOrSaysWhyNot) {
  const auto socket = Listen({"127.0.0.1", 0});
  ASSERT_TRUE(socket.ok()) << socket.status();
  close(*socket);
  // TEST-NET-1 is no address of any host.
  EXPECT_EQ(Listen({"192.0.2.1", 9464}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::metrics
