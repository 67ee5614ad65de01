#include "clients/cpp/call_trace.h"

#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "clients/cpp/pool.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::client {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kTrace[] = "0af7651916cd43dd8448eb211c80319c";
const std::string kParent = absl::StrCat("00-", kTrace, "-b7ad6b7169203331-01");

TEST(CallTrace, CountsInItsThreadAndTheLastOneDoes) {
  EXPECT_EQ(TraceCalls::Current().request_id, "");
  const TraceCalls outer({.request_id = "a", .traceparent = "b"});
  {
    const TraceCalls inner({.request_id = "c"});
    EXPECT_EQ(TraceCalls::Current().request_id, "c");
    EXPECT_EQ(TraceCalls::Current().traceparent, "");
    std::thread([] { EXPECT_EQ(TraceCalls::Current().request_id, ""); }).join();
  }
  EXPECT_EQ(TraceCalls::Current().request_id, "a");
  EXPECT_EQ(TraceCalls::Current().traceparent, "b");
}

struct TestWay {
  std::string name, prefix;
  bool session = false;
};
class CallTraceByWay : public ::testing::TestWithParam<TestWay> {};
INSTANTIATE_TEST_SUITE_P(Ways, CallTraceByWay,
                         ::testing::Values(TestWay{"SharedMemory", "shm:", true},
                                           TestWay{"Session", "", true}, TestWay{"Unary", "", false}),
                         [](const auto& way) { return way.param.name; });

// Lines about calls that failed, and about slow ones, have both; so has the status of the one that failed.
TEST_P(CallTraceByWay, GoesIntoTheLog) {
  const auto daemon = e2e::TestDaemon::Start({"--slow-call-ms", "1"});
  PoolOptions options;
  options.client.session = GetParam().session;
  const auto connected = Pool::Connect(absl::StrCat(GetParam().prefix, daemon->address()), options);
  ASSERT_TRUE(connected.ok()) << connected.status();
  Pool& pool = **connected;
  ASSERT_TRUE(pool.RegisterModel(e2e::SmallModel()).ok());
  PlanQuestion slow;
  slow.model = "small";
  for (int i = 1; i <= 64; i++) slow.contexts.push_back(i * 1024);
  {
    const TraceCalls trace({.request_id = "chat-17/3", .traceparent = kParent});
    const absl::Status failed = pool.CloseSequence(4711);
    EXPECT_EQ(failed.code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(RequestIdOf(failed), "chat-17/3");
    EXPECT_TRUE(pool.Plan(slow).ok());
  }
  {
    // What would break a line, or gRPC's metadata, is not sent.
    const TraceCalls trace({.request_id = "two\nlines", .traceparent = "00-\x1b[31m"});
    const absl::Status failed = pool.CloseSequence(4712);
    EXPECT_EQ(failed.code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(daemon->Log(), HasSubstr(absl::StrCat("sequence=4712 request=", RequestIdOf(failed), " ")));
  }
  const std::string log = daemon->Log();
  EXPECT_THAT(log, ContainsRegex(absl::StrCat("call failed method=CloseSequence code=NOT_FOUND sequence=4711 "
                                              "request=chat-17/3 .*trace=",
                                              kTrace)));
  EXPECT_THAT(log, ContainsRegex(absl::StrCat(
                       "slow call method=Plan code=OK request=chat-17/3 .*trace=", kTrace, ".*served_us=")));
  EXPECT_THAT(log, Not(HasSubstr("[31m")));
  EXPECT_THAT(log, Not(ContainsRegex("sequence=4712[^\n]*trace=")));
}

TEST(CallTrace, AStatusOfNobodyHasNoName) {
  EXPECT_EQ(RequestIdOf(absl::OkStatus()), "");
  EXPECT_EQ(RequestIdOf(absl::UnavailableError("nobody answers")), "");
}

}  // namespace
}  // namespace kvtide::client
