// Calls since the start, by method: how many ended with which code, and how long they took; and those that
// were refused, by reason. What GetStats shows; the metrics have the same and more. Thread-safe, and cheap:
// each call adds to three counters.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/service/call_report.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

class CallCounts {
 public:
  void Add(const CallReport& call);
  // Methods that were called, most often called ones first, and refusals that there were, in that order too.
  void ToProto(v1::GetStatsResponse* stats) const;

 private:
  static constexpr size_t kMethods = 64, kCodes = 17, kBuckets = 40;
  struct Method {
    std::atomic<const char*> name{nullptr};
    std::array<std::atomic<int64_t>, kCodes> codes{};
    // Those that took less than kFirst x kStep^i.
    std::array<std::atomic<int64_t>, kBuckets> durations{};
  };
  Method* Find(const char* name);
  static double Quantile(const Method& method, double share);

  std::array<Method, kMethods> methods_;
  std::array<std::atomic<int64_t>, kRefusals> refused_{};
};

}  // namespace kvtide::service
