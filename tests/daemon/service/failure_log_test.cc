#include "daemon/failure_log.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

struct Lines {
  std::vector<std::string> lines;
  FailureLog log{[this](const char* level, const std::string& line) {
    lines.push_back(std::string(level) + ": " + line);
  }};
};

service::CallReport Failure(int code) {
  service::CallReport call;
  call.method = "Append";
  call.code = code;
  call.duration = absl::Microseconds(120);
  call.message = "no room";
  call.request_id = "r-1";
  call.caller = "unix:uid=0,pid=7";
  call.sequence = 42;
  return call;
}

TEST(FailureLog, ALineSaysWhatFailedForWhom) {
  Lines out;
  out.log.Add(Failure(8), absl::UnixEpoch());
  out.log.Add(Failure(0), absl::UnixEpoch());
  service::CallReport refused = Failure(8);
  refused.refusal = Refusal::kQuota;
  out.log.Add(refused, absl::UnixEpoch());
  service::CallReport unnamed = Failure(16);
  unnamed.request_id = "";
  out.log.Add(unnamed, absl::UnixEpoch());
  EXPECT_THAT(
      out.lines,
      ElementsAre("warning: call failed method=Append code=RESOURCE_EXHAUSTED sequence=42 request=r-1 "
                  "caller=unix:uid=0,pid=7 way=grpc us=120 message=\"no room\"",
                  "warning: call failed method=Append code=RESOURCE_EXHAUSTED sequence=42 request=r-1 "
                  "caller=unix:uid=0,pid=7 way=grpc us=120 reason=quota message=\"no room\"",
                  "info: call failed method=Append code=UNAUTHENTICATED sequence=42 caller=unix:uid=0,pid=7 "
                  "way=grpc us=120 message=\"no room\""));
}

TEST(FailureLog, TheDaemonsOwnFaultsAreErrorsAndMistakesOfClientsAreNot) {
  Lines out;
  for (const int code : {13, 15, 3, 14}) out.log.Add(Failure(code), absl::UnixEpoch());
  ASSERT_EQ(out.lines.size(), 4u);
  EXPECT_EQ(out.lines[0].substr(0, 6), "error:");
  EXPECT_EQ(out.lines[1].substr(0, 6), "error:");
  EXPECT_EQ(out.lines[2].substr(0, 5), "info:");
  EXPECT_EQ(out.lines[3].substr(0, 8), "warning:");
}

TEST(FailureLog, AFloodIsCounted) {
  Lines out;
  for (int i = 0; i < 1000; i++) out.log.Add(Failure(3), absl::UnixEpoch());
  EXPECT_EQ(out.lines.size(), 10u);
  // Other codes have limits of their own.
  out.log.Add(Failure(5), absl::UnixEpoch());
  ASSERT_EQ(out.lines.size(), 11u);
  EXPECT_THAT(out.lines.back(), Not(HasSubstr("suppressed")));
  out.log.Add(Failure(3), absl::UnixEpoch() + absl::Seconds(1));
  ASSERT_EQ(out.lines.size(), 12u);
  EXPECT_THAT(out.lines.back(), HasSubstr("suppressed=990"));
}

TEST(FailureLog, ASlowCallSaysWhereItsTimeWent) {
  std::vector<std::string> lines;
  FailureLog log(
      [&](const char* level, const std::string& line) { lines.push_back(std::string(level) + ": " + line); },
      absl::Milliseconds(5));
  service::CallReport call = Failure(0);
  call.duration = absl::Milliseconds(9);
  call.received = absl::Milliseconds(1);
  call.waited = absl::Milliseconds(6);
  call.locked = absl::Microseconds(1500);
  call.way = service::Way::kSharedMemory;
  call.tenant = "acme";
  call.trace = "0af7651916cd43dd8448eb211c80319c";
  log.Add(call, absl::UnixEpoch());
  call.duration = absl::Milliseconds(4);
  log.Add(call, absl::UnixEpoch());
  call.method = "Session";
  call.duration = absl::Hours(3);
  log.Add(call, absl::UnixEpoch());
  EXPECT_THAT(lines,
              ElementsAre("warning: slow call method=Append code=OK sequence=42 request=r-1 "
                          "caller=unix:uid=0,pid=7 way=shared_memory tenant=acme "
                          "trace=0af7651916cd43dd8448eb211c80319c us=9000 received_us=1000 waited_us=6000 "
                          "served_us=2000 locked_us=1500 request_bytes=0 response_bytes=0"));
}

TEST(FailureLog, ATextStaysWithinItsLine) {
  Lines out;
  service::CallReport call = Failure(3);
  call.message = "unknown model \"a\nerror: forged\x1b[31m\x7f\"";
  out.log.Add(call, absl::UnixEpoch());
  ASSERT_EQ(out.lines.size(), 1u);
  EXPECT_THAT(out.lines[0], HasSubstr("message=\"unknown model \\\"a\\nerror: forged\\x1b[31m\\x7f\\\"\""));
  EXPECT_EQ(Escaped(std::string(2000, 'x')).size(), 1027u);
}

}  // namespace
}  // namespace kvtide
