// Calls since the start, by method: how many ended with which code, and how long they took; and those that
// were refused, by reason and tenant. What GetStats shows; the metrics have the same and more. Thread-safe,
// and cheap: each call adds to three counters.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "daemon/cache/call/identity.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/service/call_report.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

class CallCounts {
 public:
  void Add(const CallReport& call);
  // Methods that were called, most often called ones first, and refusals that there were, in that order too,
  // with those of the tenants that the caller may see.
  void ToProto(const Identity& caller, v1::GetStatsResponse* stats) const;

  static constexpr size_t kMostTenants = 32;  // that have names

 private:
  static constexpr size_t kMethods = 64, kCodes = 17, kBuckets = 40;
  struct Method {
    std::atomic<const char*> name{nullptr};
    std::array<std::atomic<int64_t>, kCodes> codes{};
    // Those that took less than kFirst x kStep^i.
    std::array<std::atomic<int64_t>, kBuckets> durations{};
  };
  Method* Find(const char* name);
  void CountRefusal(Refusal why, std::string_view tenant);
  static double Quantile(const Method& method, double share);

  std::array<Method, kMethods> methods_;
  std::array<std::atomic<int64_t>, kRefusals> refused_{};
  mutable Mutex mutex_;
  // By tenant, or "(others)"; callers that are nobody have the empty name.
  absl::flat_hash_map<std::string, std::array<int64_t, kRefusals>> of_tenants_ ABSL_GUARDED_BY(mutex_){
      {"", {}}};
};

}  // namespace kvtide::service
