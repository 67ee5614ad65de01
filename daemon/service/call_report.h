// What is told of a call when it has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "daemon/cache/call/refusal.h"

namespace kvtide::service {

// How a client reaches the daemon: messages over gRPC; messages in memory that both share; the same, and the
// client maps the pool and writes and reads blocks itself.
enum class Way { kGrpc, kSharedMemory, kDirect };
constexpr size_t kWays = 3;
constexpr const char* kWayNames[kWays] = {"grpc", "shared_memory", "direct"};
constexpr const char* NameOf(Way way) { return kWayNames[static_cast<size_t>(way)]; }

// Told after every call, from any thread; must be quick. `method` is a string literal, `code` a gRPC status
// code; texts are the callee's for the call only.
struct CallReport {
  const char* method = "";
  Way way = Way::kGrpc;
  int code = 0;
  std::optional<Refusal> refusal;  // none: answered, failed, or given up
  absl::Duration duration;         // from the call's arrival to its answer; of it,
  absl::Duration received;         // until its request was there,
  absl::Duration waited;           // and from there until a thread took it;
  absl::Duration locked;           // of the rest, the time that its thread waited for the cache's mutex
  int64_t request_bytes = 0, response_bytes = 0;
  std::string_view message;  // empty when the call went well
  std::string_view request_id, caller, tenant;
  std::string_view trace;  // the trace id of the client's traceparent; empty = none
  uint64_t sequence = 0;   // the first that the request names; 0 = none

  // Code, refusal and message of the status, which is borrowed.
  void SetStatus(const absl::Status& status) {
    code = status.raw_code();
    refusal = RefusalOf(status);
    message = std::string_view(status.message().data(), status.message().size());
  }
};

}  // namespace kvtide::service
