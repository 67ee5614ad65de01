#include "daemon/metrics/request_metrics.h"

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "daemon/metrics/metrics.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "prometheus/text_serializer.h"
#include "tests/daemon/metrics/exposition.h"

namespace kvtide::metrics {
namespace {

class RequestMetricsTest : public testing::Test {
 protected:
  Exposition Scrape() const {
    return ParseExposition(prometheus::TextSerializer().Serialize(registry_.Collect()));
  }
  double Sample(const std::string& name) const {
    const Exposition exposition = Scrape();
    const auto found = exposition.samples.find(name);
    return found == exposition.samples.end() ? -1 : found->second;
  }

  prometheus::Registry registry_;
  RequestMetrics metrics_{&registry_};
};

TEST_F(RequestMetricsTest, MethodsAreThoseOfTheService) {
  const google::protobuf::FileDescriptor* file = v1::SessionRequest::descriptor()->file();
  const google::protobuf::ServiceDescriptor* service = file->FindServiceByName("KvCacheService");
  ASSERT_NE(service, nullptr);
  std::set<std::string> expected;
  for (int i = 0; i < service->method_count(); ++i) expected.insert(service->method(i)->name());
  EXPECT_EQ(std::set<std::string>(std::begin(kMethods), std::end(kMethods)), expected);
}

// A counter that appears with 1 has no rate: the first failure would not be seen.
TEST_F(RequestMetricsTest, EveryCodeStartsAtZero) {
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"DATA_LOSS\",method=\"Attend\"}"), 0);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"Plan\"}"), 0);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Append\"}"), 0);
}

TEST_F(RequestMetricsTest, CountsTimesAndBytes) {
  metrics_.Record("Append", 0, absl::Microseconds(80), 1000, 20);
  metrics_.Record("Append", 0, absl::Milliseconds(3), 500, 10);
  metrics_.Record("Append", 8, absl::Seconds(60), 1, 0);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"Append\"}"), 2);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"RESOURCE_EXHAUSTED\",method=\"Append\"}"), 1);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Append\"}"), 3);
  EXPECT_NEAR(Sample("kvtide_rpc_duration_seconds_sum{method=\"Append\"}"), 60.00308, 1e-6);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_bucket{method=\"Append\",le=\"5e-05\"}"), 0);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_bucket{method=\"Append\",le=\"0.0001\"}"), 1);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_bucket{method=\"Append\",le=\"0.005\"}"), 2);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_bucket{method=\"Append\",le=\"+Inf\"}"), 3);
  EXPECT_EQ(Sample("kvtide_rpc_received_bytes_total{method=\"Append\"}"), 1501);
  EXPECT_EQ(Sample("kvtide_rpc_sent_bytes_total{method=\"Append\"}"), 30);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"Attend\"}"), 0);
}

TEST_F(RequestMetricsTest, ASessionIsNoLatency) {
  metrics_.Record("Session", 1, absl::Hours(5), 0, 0);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"CANCELLED\",method=\"Session\"}"), 1);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Session\"}"), -1);
}

TEST_F(RequestMetricsTest, OtherNamesAndCodesMakeNoSeries) {
  const size_t before = Scrape().samples.size();
  metrics_.Record("Nonsense", 0, absl::Seconds(1), 5, 5);
  metrics_.Record("Append", 99, absl::Seconds(1), 5, 5);
  metrics_.Record("Append", -1, absl::Seconds(-1), -5, -5);
  EXPECT_EQ(Scrape().samples.size(), before);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"other\"}"), 1);
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"UNKNOWN\",method=\"Append\"}"), 2);
  EXPECT_EQ(Sample("kvtide_rpc_received_bytes_total{method=\"Append\"}"), 5);
}

TEST_F(RequestMetricsTest, CodeNames) {
  EXPECT_STREQ(CodeName(0), "OK");
  EXPECT_STREQ(CodeName(1), "CANCELLED");
  EXPECT_STREQ(CodeName(5), "NOT_FOUND");
  EXPECT_STREQ(CodeName(8), "RESOURCE_EXHAUSTED");
  EXPECT_STREQ(CodeName(9), "FAILED_PRECONDITION");
  EXPECT_STREQ(CodeName(14), "UNAVAILABLE");
  EXPECT_STREQ(CodeName(15), "DATA_LOSS");
  EXPECT_STREQ(CodeName(16), "UNAUTHENTICATED");
  EXPECT_STREQ(CodeName(17), "UNKNOWN");
}

TEST_F(RequestMetricsTest, ManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this] {
      for (int i = 0; i < 1000; ++i) metrics_.Record("Attend", 0, absl::Microseconds(i), 1, 2);
    });
  }
  for (int i = 0; i < 10; ++i) Scrape();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"Attend\"}"), 4000);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Attend\"}"), 4000);
  EXPECT_EQ(Sample("kvtide_rpc_sent_bytes_total{method=\"Attend\"}"), 8000);
}

}  // namespace
}  // namespace kvtide::metrics
