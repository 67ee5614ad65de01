#include "daemon/metrics/request_metrics.h"

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
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

TEST_F(RequestMetricsTest, RefusalsByReason) {
  size_t reasons = 0;
  for (const auto& [name, value] : Scrape().samples)
    if (name.rfind("kvtide_refused_calls_total{", 0) == 0) {
      reasons++;
      EXPECT_EQ(value, 0) << name;
    }
  EXPECT_EQ(reasons, kRefusals);
  metrics_.Record({.method = "Append", .code = 8, .refusal = Refusal::kQuota});
  metrics_.Record({.method = "Session", .code = 16, .refusal = Refusal::kUnauthenticated});
  metrics_.Record({.method = "Append", .code = 15});
  EXPECT_EQ(Sample("kvtide_refused_calls_total{reason=\"quota\"}"), 1);
  EXPECT_EQ(Sample("kvtide_refused_calls_total{reason=\"unauthenticated\"}"), 1);
  EXPECT_EQ(Sample("kvtide_refused_calls_total{reason=\"no_room\"}"), 0);
}

TEST_F(RequestMetricsTest, CountsTimesAndBytes) {
  metrics_.Record({.method = "Append",
                   .code = 0,
                   .duration = absl::Microseconds(80),
                   .request_bytes = 1000,
                   .response_bytes = 20});
  metrics_.Record({.method = "Append",
                   .code = 0,
                   .duration = absl::Milliseconds(3),
                   .request_bytes = 500,
                   .response_bytes = 10});
  metrics_.Record({.method = "Append",
                   .code = 8,
                   .duration = absl::Seconds(60),
                   .request_bytes = 1,
                   .response_bytes = 0});
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
  metrics_.Record(
      {.method = "Session", .code = 1, .duration = absl::Hours(5), .request_bytes = 0, .response_bytes = 0});
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"CANCELLED\",method=\"Session\"}"), 1);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Session\"}"), -1);
}

TEST_F(RequestMetricsTest, OtherNamesAndCodesMakeNoSeries) {
  metrics_.Record({.method = "Attend"});  // the tenant's first
  const size_t before = Scrape().samples.size();
  metrics_.Record({.method = "Nonsense",
                   .code = 0,
                   .duration = absl::Seconds(1),
                   .request_bytes = 5,
                   .response_bytes = 5});
  metrics_.Record({.method = "Append",
                   .code = 99,
                   .duration = absl::Seconds(1),
                   .request_bytes = 5,
                   .response_bytes = 5});
  metrics_.Record({.method = "Append",
                   .code = -1,
                   .duration = absl::Seconds(-1),
                   .request_bytes = -5,
                   .response_bytes = -5});
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
      for (int i = 0; i < 1000; ++i)
        metrics_.Record({.method = "Attend",
                         .code = 0,
                         .duration = absl::Microseconds(i),
                         .request_bytes = 1,
                         .response_bytes = 2});
    });
  }
  for (int i = 0; i < 10; ++i) Scrape();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Sample("kvtide_rpc_requests_total{code=\"OK\",method=\"Attend\"}"), 4000);
  EXPECT_EQ(Sample("kvtide_rpc_duration_seconds_count{method=\"Attend\"}"), 4000);
  EXPECT_EQ(Sample("kvtide_rpc_sent_bytes_total{method=\"Attend\"}"), 8000);
}

TEST_F(RequestMetricsTest, PhasesOfACallAddUp) {
  metrics_.Record({.method = "Append",
                   .duration = absl::Milliseconds(10),
                   .received = absl::Milliseconds(2),
                   .waited = absl::Milliseconds(5)});
  metrics_.Record({.method = "Session", .duration = absl::Hours(1)});
  EXPECT_NEAR(Sample("kvtide_rpc_phase_seconds_sum{phase=\"receive\"}"), 0.002, 1e-9);
  EXPECT_NEAR(Sample("kvtide_rpc_phase_seconds_sum{phase=\"queue\"}"), 0.005, 1e-9);
  EXPECT_NEAR(Sample("kvtide_rpc_phase_seconds_sum{phase=\"serve\"}"), 0.003, 1e-9);
  EXPECT_EQ(Sample("kvtide_rpc_phase_seconds_count{phase=\"serve\"}"), 1) << "a stream is no call";
}

TEST_F(RequestMetricsTest, TenantsHaveTheirOwnUpToABound) {
  metrics_.Record(
      {.method = "Append", .duration = absl::Milliseconds(2), .request_bytes = 7, .tenant = "acme"});
  metrics_.Record(
      {.method = "Attend", .code = 8, .duration = absl::Seconds(2), .response_bytes = 0, .tenant = "acme"});
  EXPECT_EQ(Sample("kvtide_tenant_calls_total{outcome=\"answered\",tenant=\"acme\"}"), 1);
  EXPECT_EQ(Sample("kvtide_tenant_calls_total{outcome=\"failed\",tenant=\"acme\"}"), 1);
  EXPECT_EQ(Sample("kvtide_tenant_received_bytes_total{tenant=\"acme\"}"), 7);
  EXPECT_EQ(Sample("kvtide_tenant_call_seconds_bucket{tenant=\"acme\",le=\"0.01\"}"), 1);
  for (int i = 0; i < 5000; i++) metrics_.Record({.method = "Append", .tenant = "t\n" + std::to_string(i)});
  EXPECT_EQ(Sample("kvtide_tenant_calls_total{outcome=\"answered\",tenant=\"t?0\"}"), 1);
  EXPECT_EQ(Sample("kvtide_tenant_calls_total{outcome=\"answered\",tenant=\"(others)\"}"), 5000 - 31);
  size_t series = 0;
  for (const auto& [name, value] : Scrape().samples)
    series += name.find("tenant=") != std::string::npos ? 1 : 0;
  EXPECT_EQ(series, 33u * (2 + 2 + 6 + 3 + kRefusals)) << "however many tenants there are";
}

// Whose calls are refused and why, and what comes from nobody, which is no tenant's; a crowd that came first
// does not hide it.
TEST_F(RequestMetricsTest, TenantsAreRefusedByReason) {
  for (int i = 0; i < 100; i++) metrics_.Record({.method = "Append", .tenant = absl::StrCat("t", i)});
  metrics_.Record({.method = "Append", .code = 8, .tenant = "t3", .refusal = Refusal::kQuota});
  metrics_.Record({.method = "Attend", .code = 8, .tenant = "t3", .refusal = Refusal::kQuota});
  metrics_.Record({.method = "Attend", .code = 16, .tenant = "", .refusal = Refusal::kUnauthenticated});
  metrics_.Record({.method = "Session", .code = 16, .tenant = "", .refusal = Refusal::kUnauthenticated});
  metrics_.Record({.method = "Session", .code = 1, .tenant = "t3"});
  metrics_.Record({.method = "Attend", .code = 8, .tenant = "t99", .refusal = Refusal::kQueueFull});
  const auto refused = [&](const std::string& reason, const std::string& tenant) {
    return Sample(
        absl::StrCat("kvtide_tenant_refused_calls_total{reason=\"", reason, "\",tenant=\"", tenant, "\"}"));
  };
  EXPECT_EQ(refused("quota", "t3"), 2);
  EXPECT_EQ(refused("queue_full", "t3"), 0) << "there from its first call on, so that a rate sees the first";
  EXPECT_EQ(refused("unauthenticated", "(nobody)"), 2);
  EXPECT_EQ(refused("queue_full", "(others)"), 1);
  EXPECT_EQ(Sample("kvtide_tenant_calls_total{outcome=\"failed\",tenant=\"(nobody)\"}"), 1);
  size_t series = 0;
  for (const auto& [name, value] : Scrape().samples)
    series += name.find("kvtide_tenant_refused") != std::string::npos ? 1 : 0;
  EXPECT_EQ(series, 34u * kRefusals);
}

}  // namespace
}  // namespace kvtide::metrics
