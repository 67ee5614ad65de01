#include "daemon/service/call_counts.h"

#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::service {
namespace {

CallReport Call(const char* method, int code, absl::Duration duration) {
  CallReport call;
  call.method = method;
  call.code = code;
  call.duration = duration;
  return call;
}

TEST(CallCounts, TellsErrorsByCodeAndHowLongCallsTake) {
  CallCounts counts;
  for (int i = 0; i < 98; i++) counts.Add(Call("Append", 0, absl::Microseconds(100)));
  counts.Add(Call("Append", 8, absl::Microseconds(100)));
  counts.Add(Call("Append", 15, absl::Milliseconds(500)));
  for (int i = 0; i < 300; i++) counts.Add(Call("Attend", 0, absl::Hours(1)));
  v1::GetStatsResponse stats;
  counts.ToProto(Identity::OfThisProcess(), &stats);
  const auto& methods = stats.methods();
  ASSERT_EQ(methods.size(), 2);
  EXPECT_EQ(methods[0].method(), "Attend");
  EXPECT_GT(methods[0].p50_seconds(), 5);
  EXPECT_EQ(methods[0].failed_size(), 0);
  const v1::MethodStats& append = methods[1];
  EXPECT_EQ(append.calls(), 100);
  ASSERT_EQ(append.failed_size(), 2);
  EXPECT_EQ(append.failed(0).code(), "RESOURCE_EXHAUSTED");
  EXPECT_EQ(append.failed(1).code(), "DATA_LOSS");
  EXPECT_EQ(append.failed(1).calls(), 1);
  // Within a step of the truth, and never below it.
  EXPECT_GE(append.p50_seconds(), 100e-6);
  EXPECT_LE(append.p50_seconds(), 142e-6);
  EXPECT_LE(append.p99_seconds(), 142e-6);
}

TEST(CallCounts, SessionsCountButHaveNoLatency) {
  CallCounts counts;
  counts.Add(Call("Session", 1, absl::Hours(1)));
  v1::GetStatsResponse stats;
  counts.ToProto(Identity::OfThisProcess(), &stats);
  const auto& methods = stats.methods();
  ASSERT_EQ(methods.size(), 1);
  EXPECT_EQ(methods[0].calls(), 1);
  EXPECT_EQ(methods[0].p99_seconds(), 0);
}

// By reason, the most frequent first; what went well, failed or was given up is none.
TEST(CallCounts, RefusalsByReason) {
  CallCounts counts;
  const auto add = [&](const absl::Status& status) {
    CallReport call = Call("Append", 0, absl::Microseconds(1));
    call.SetStatus(status);
    EXPECT_EQ(call.code, status.raw_code());
    counts.Add(call);
  };
  add(absl::OkStatus());
  add(absl::CancelledError("given up"));
  add(absl::DataLossError("lost"));
  add(absl::InternalError("a fault"));
  add(absl::ResourceExhaustedError("full"));
  for (int i = 0; i < 2; i++) add(Refused(Refusal::kQueueFull, absl::ResourceExhaustedError("wait")));
  v1::GetStatsResponse stats;
  counts.ToProto(Identity::OfThisProcess(), &stats);
  ASSERT_EQ(stats.refused_size(), 2);
  EXPECT_EQ(stats.refused(0).reason(), "queue_full");
  EXPECT_EQ(stats.refused(0).calls(), 2);
  EXPECT_EQ(stats.refused(1).reason(), "no_room");
}

// Whose they were: for an admin all, by name as far as there are names; for others their own.
TEST(CallCounts, RefusalsByTenant) {
  CallCounts counts;
  const auto add = [&](const std::string& tenant, const absl::Status& status, int calls = 1) {
    CallReport call = Call("Append", 0, absl::Microseconds(1));
    call.SetStatus(status);
    call.tenant = tenant;
    for (int i = 0; i < calls; i++) counts.Add(call);
  };
  const absl::Status quota = Refused(Refusal::kQuota, absl::ResourceExhaustedError("enough"));
  add("acme", quota, 2);
  add("shop", quota, 5);
  add("", absl::UnauthenticatedError("who?"));
  for (int i = 0; i < 1000; i++) add(absl::StrCat("t", i), quota);
  add("", absl::UnauthenticatedError("who?"));
  const auto refused = [&](const Identity& caller, int at) {
    v1::GetStatsResponse stats;
    counts.ToProto(caller, &stats);
    std::vector<std::pair<std::string, int64_t>> tenants;
    for (const auto& of : stats.refused(at).tenants()) tenants.emplace_back(of.tenant(), of.calls());
    return tenants;
  };
  using Tenants = std::vector<std::pair<std::string, int64_t>>;
  const Tenants all = refused({"default", true}, 0);
  EXPECT_EQ(all.size(), CallCounts::kMostTenants + 1);
  EXPECT_EQ(all.at(0).first, "(others)");
  EXPECT_EQ(all.at(1), std::make_pair(std::string("shop"), int64_t{5}));
  EXPECT_EQ(all.at(2), std::make_pair(std::string("acme"), int64_t{2}));
  int64_t sum = 0;
  for (const auto& [tenant, calls] : all) sum += calls;
  EXPECT_EQ(sum, 1007);
  EXPECT_EQ(refused({"default", true}, 1), (Tenants{{"(nobody)", 2}}));
  EXPECT_EQ(refused({"acme", false}, 0), (Tenants{{"acme", 2}}));
  EXPECT_EQ(refused({"acme", false}, 1), Tenants());
}

// All that the service has, and what may come.
TEST(CallCounts, NoMethodIsLeftOut) {
  CallCounts counts;
  std::vector<std::string> names;
  const google::protobuf::ServiceDescriptor* const service =
      v1::SessionRequest::descriptor()->file()->service(0);
  for (int i = 0; i < service->method_count(); i++) names.push_back(service->method(i)->name());
  for (const std::string& name : names) counts.Add(Call(name.c_str(), 0, absl::Microseconds(1)));
  v1::GetStatsResponse stats;
  counts.ToProto(Identity::OfThisProcess(), &stats);
  const auto& methods = stats.methods();
  EXPECT_EQ(methods.size(), static_cast<int>(names.size()));
}

TEST(CallCounts, AnyNumberOfThreadsAddTheSameMethods) {
  CallCounts counts;
  const char* const kNames[] = {"A", "B", "C", "D"};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 4000; i++) counts.Add(Call(kNames[(t + i) % 4], 0, absl::Microseconds(i)));
    });
  for (std::thread& thread : threads) thread.join();
  v1::GetStatsResponse stats;
  counts.ToProto(Identity::OfThisProcess(), &stats);
  const auto& methods = stats.methods();
  ASSERT_EQ(methods.size(), 4);
  for (const v1::MethodStats& method : methods) EXPECT_EQ(method.calls(), 4000);
}

}  // namespace
}  // namespace kvtide::service
