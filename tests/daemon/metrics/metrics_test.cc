#include "daemon/metrics/metrics.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "daemon/metrics/allocator_collector.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/daemon/metrics/exposition.h"

namespace kvtide::metrics {
namespace {

using testing::HasSubstr;

int Connect(const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  EXPECT_TRUE(absl::SimpleAtoi(address.substr(colon + 1), &port));
  sockaddr_in peer{};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(port));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &peer.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&peer), sizeof(peer)) == 0) return fd;
  close(fd);
  return -1;
}

// The answer of GET `path`, headers included; empty when nobody listens or answers.
std::string Get(const std::string& address, const std::string& path) {
  const int fd = Connect(address);
  std::string answer;
  if (fd >= 0) {
    const timeval most{10, 0};  // as scrapes wait
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most));
    const std::string request = "GET " + path + " HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    EXPECT_EQ(send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;)
      answer.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return answer;
}

TEST(Metrics, TextHasAllParts) {
  const Exposition exposition = ParseExposition(BusyMetrics()->Text());
  EXPECT_EQ(exposition.types.at("kvtide_build_info"), "gauge");
  EXPECT_EQ(exposition.types.at("kvtide_calls_under_way"), "gauge");
  EXPECT_EQ(exposition.samples.at("kvtide_calls_under_way"), 4);
  EXPECT_EQ(exposition.types.at("kvtide_stored_bytes"), "gauge");
  EXPECT_EQ(exposition.types.at("kvtide_rpc_requests_total"), "counter");
  EXPECT_EQ(exposition.types.at("kvtide_rpc_duration_seconds"), "histogram");
  EXPECT_EQ(exposition.types.at("kvtide_rpc_received_bytes_total"), "counter");
  EXPECT_EQ(exposition.types.at("kvtide_rpc_sent_bytes_total"), "counter");
  EXPECT_EQ(exposition.types.at("process_cpu_seconds_total"), "counter");
  EXPECT_EQ(
      exposition.samples.at("kvtide_tenant_lookups_total{found_in=\"host\",tenant=\"acme\",unit=\"blocks\"}"),
      30);
  EXPECT_EQ(
      exposition.samples.at("kvtide_tenant_lookups_total{found_in=\"none\",tenant=\"acme\",unit=\"blocks\"}"),
      10);
  EXPECT_EQ(exposition.types.at("kvtide_work_seconds"), "histogram");
  EXPECT_EQ(exposition.samples.at("kvtide_work_seconds_bucket{work=\"attend\",le=\"0.00025\"}"), 0);
  EXPECT_EQ(exposition.samples.at("kvtide_work_seconds_bucket{work=\"attend\",le=\"0.001\"}"), 1);
  EXPECT_EQ(exposition.samples.at("kvtide_work_seconds_count{work=\"seal\"}"), 0);
  EXPECT_EQ(exposition.types.count("kvtide_allocator_allocated_bytes"),
            ProcessMallctl() == nullptr ? 0u : 1u);
  EXPECT_THAT(BusyMetrics()->Text(), HasSubstr("version=\"1.2.3\""));
}

// Dashboards and storage live from few labels; an id of a sequence would make a series for each.
TEST(Metrics, LabelsAreFew) {
  const std::set<std::string> allowed = {
      "tier",     "device",   "pair", "backend",   "position", "location", "lane",  "method",  "code", "le",
      "version",  "compiler", "cuda", "operation", "tenant",   "result",   "phase", "outcome", "work", "unit",
      "priority", "found_in", "way",  "part",      "state",    "kind",     "what",  "reason"};
  const std::regex label("([a-z_]+)=\"");
  size_t series = 0;
  for (const auto& [name, value] : ParseExposition(BusyMetrics()->Text()).samples) {
    ++series;
    for (auto it = std::sregex_iterator(name.begin(), name.end(), label); it != std::sregex_iterator();
         ++it) {
      EXPECT_EQ(allowed.count((*it)[1]), 1u) << name;
    }
  }
  EXPECT_LT(
      series,
      2200u);  // some 40 for each verb, most of them buckets of its latency and codes; 50 of a remote tier
}

TEST(Metrics, ServesOverHttpAndStops) {
  const std::unique_ptr<Metrics> metrics = BusyMetrics();
  const absl::StatusOr<std::string> address = metrics->Start("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  EXPECT_NE(*address, "127.0.0.1:0");
  const std::string answer = Get(*address, "/metrics");
  EXPECT_THAT(answer, HasSubstr("HTTP/1.1 200 OK"));
  EXPECT_THAT(answer, HasSubstr("kvtide_tokens 70001"));
  EXPECT_THAT(answer, HasSubstr("kvtide_rpc_requests_total{code=\"OK\",method=\"AppendAttend\"} 10"));
  EXPECT_THAT(Get(*address, "/other"), HasSubstr("404"));
  metrics->Stop();
  EXPECT_EQ(Get(*address, "/metrics"), "");
  metrics->Stop();
}

TEST(Metrics, IdleConnectionsKeepNoScrapeWaiting) {
  const std::unique_ptr<Metrics> metrics = BusyMetrics();
  const absl::StatusOr<std::string> address = metrics->Start("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  std::vector<int> idle;
  for (int i = 0; i < 40; i++) idle.push_back(Connect(*address));
  EXPECT_THAT(Get(*address, "/metrics"), HasSubstr("200 OK"));
  for (const int fd : idle) close(fd);
}

TEST(Metrics, APortInUse) {
  const std::unique_ptr<Metrics> first = BusyMetrics();
  const absl::StatusOr<std::string> address = first->Start("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  const std::unique_ptr<Metrics> second = BusyMetrics();
  const absl::Status status = second->Start(*address).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(*address + " is in use"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--metrics-address"));
  // A failed start leaves nothing behind.
  EXPECT_TRUE(second->Start("127.0.0.1:0").ok());
}

TEST(Metrics, BadAddresses) {
  const std::unique_ptr<Metrics> metrics = BusyMetrics();
  EXPECT_EQ(metrics->Start("nonsense").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(metrics->Start("192.0.2.1:9464").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Metrics, ScrapesWhileCallsEnd) {
  std::atomic<int> snapshots{0};
  MetricsOptions options;
  options.version = "1";
  options.stats = [&snapshots] {
    ++snapshots;
    return BusyStats();
  };
  Metrics metrics(std::move(options));
  const absl::StatusOr<std::string> address = metrics.Start("127.0.0.1:0");
  ASSERT_TRUE(address.ok()) << address.status();
  std::thread caller([&metrics] {
    for (int i = 0; i < 2000; ++i)
      metrics.RecordCall({.method = "Attend",
                          .code = i % 17,
                          .duration = absl::Microseconds(i),
                          .request_bytes = 1,
                          .response_bytes = 1});
  });
  for (int i = 0; i < 5; ++i) EXPECT_THAT(Get(*address, "/metrics"), HasSubstr("200 OK"));
  caller.join();
  metrics.Stop();
  EXPECT_EQ(snapshots, 5);
  EXPECT_THAT(metrics.Text(), HasSubstr("kvtide_rpc_duration_seconds_count{method=\"Attend\"} 2000"));
}

}  // namespace
}  // namespace kvtide::metrics
