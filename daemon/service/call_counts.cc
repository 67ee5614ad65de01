#include "daemon/service/call_counts.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/status/status.h"

namespace kvtide::service {
namespace {

// From 10 us on, two steps for a doubling: 40 of them reach 7 s, which the last one stands for and beyond.
constexpr double kFirst = 10e-6;
const double kStep = std::sqrt(2.0);

constexpr char kOthers[] = "(others)", kNobody[] = "(nobody)";

}  // namespace

CallCounts::Method* CallCounts::Find(const char* name) {
  for (Method& method : methods_) {
    const char* there = method.name.load(std::memory_order_acquire);
    if (there == nullptr && method.name.compare_exchange_strong(there, name)) return &method;
    if (absl::string_view(there) == name) return &method;
  }
  return nullptr;  // there are not so many
}

void CallCounts::CountRefusal(Refusal why, std::string_view tenant) {
  refused_[static_cast<size_t>(why)].fetch_add(1, std::memory_order_relaxed);
  const MutexLock lock(mutex_);
  auto found = of_tenants_.find(absl::string_view(tenant.data(), tenant.size()));
  if (found == of_tenants_.end()) {
    const bool named = of_tenants_.size() <= kMostTenants;
    found = of_tenants_.try_emplace(named ? std::string(tenant) : kOthers).first;
  }
  found->second[static_cast<size_t>(why)]++;
}

void CallCounts::Add(const CallReport& call) {
  if (call.refusal.has_value()) CountRefusal(*call.refusal, call.tenant);
  Method* const method = Find(call.method);
  if (method == nullptr) return;
  const size_t code =
      call.code >= 0 && static_cast<size_t>(call.code) < kCodes ? static_cast<size_t>(call.code) : 2;
  method->codes[code].fetch_add(1, std::memory_order_relaxed);
  if (absl::string_view(call.method) == "Session") return;  // a stream lasts as long as its client
  const double steps =
      std::log(std::max(1.0, absl::ToDoubleSeconds(call.duration) / kFirst)) / std::log(kStep);
  const auto bucket =
      static_cast<size_t>(std::clamp(std::ceil(steps), 0.0, static_cast<double>(kBuckets - 1)));
  method->durations[bucket].fetch_add(1, std::memory_order_relaxed);
}

double CallCounts::Quantile(const Method& method, double share) {
  std::array<int64_t, kBuckets> counts{};
  int64_t all = 0;
  for (size_t i = 0; i < kBuckets; i++)
    all += counts[i] = method.durations[i].load(std::memory_order_relaxed);
  int64_t below = 0;
  for (size_t i = 0; i < kBuckets; i++) {
    below += counts[i];
    if (all > 0 && static_cast<double>(below) >= share * static_cast<double>(all))
      return kFirst * std::pow(kStep, static_cast<double>(i));
  }
  return 0;
}

void CallCounts::ToProto(const Identity& caller, v1::GetStatsResponse* to) const {
  std::vector<v1::MethodStats> all;
  for (const Method& method : methods_) {
    const char* const name = method.name.load(std::memory_order_acquire);
    if (name == nullptr) break;
    v1::MethodStats& stats = all.emplace_back();
    stats.set_method(name);
    int64_t calls = 0;
    for (size_t code = 0; code < kCodes; code++) {
      const int64_t count = method.codes[code].load(std::memory_order_relaxed);
      calls += count;
      if (code == 0 || count == 0) continue;
      v1::CodeCount* const failed = stats.add_failed();
      failed->set_code(absl::StatusCodeToString(static_cast<absl::StatusCode>(code)));
      failed->set_calls(count);
    }
    stats.set_calls(calls);
    stats.set_p50_seconds(Quantile(method, 0.5));
    stats.set_p99_seconds(Quantile(method, 0.99));
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const v1::MethodStats& a, const v1::MethodStats& b) { return a.calls() > b.calls(); });
  for (v1::MethodStats& stats : all) *to->add_methods() = std::move(stats);
  std::vector<v1::RefusedCalls> refused;
  for (size_t i = 0; i < kRefusals; i++) {
    const int64_t calls = refused_[i].load(std::memory_order_relaxed);
    if (calls == 0) continue;
    v1::RefusedCalls& one = refused.emplace_back();
    one.set_reason(kRefusalNames[i]);
    one.set_calls(calls);
    const MutexLock lock(mutex_);
    for (const auto& [tenant, counts] : of_tenants_) {
      if (counts[i] == 0 || !caller.MaySee(tenant)) continue;
      v1::RefusedCalls::OfTenant* const of = one.add_tenants();
      of->set_tenant(tenant.empty() ? kNobody : tenant);
      of->set_calls(counts[i]);
    }
    std::sort(one.mutable_tenants()->begin(), one.mutable_tenants()->end(), [](const auto& a, const auto& b) {
      return a.calls() != b.calls() ? a.calls() > b.calls() : a.tenant() < b.tenant();
    });
  }
  std::stable_sort(refused.begin(), refused.end(), [](const v1::RefusedCalls& a, const v1::RefusedCalls& b) {
    return a.calls() > b.calls();
  });
  for (v1::RefusedCalls& one : refused) *to->add_refused() = std::move(one);
}

}  // namespace kvtide::service
