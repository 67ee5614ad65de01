// What kvtided tells Prometheus: the cache's books, counts and latencies of calls, the allocator, the process
// and the build. The owner gives callbacks and reports calls; nothing else of the daemon knows Prometheus.
// RecordCall is quick and may be called from any thread; the callbacks are called at every scrape, from a
// thread of the endpoint, until Stop or the destructor has returned.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/refusal.h"

namespace kvtide::metrics {

// A way to reach the daemon; counters are since the start.
struct WayStats {
  std::string way;
  int64_t clients = 0;  // connected
  int64_t calls = 0, steps = 0, received_bytes = 0, sent_bytes = 0;
};

// A part of the daemon's memory: what it should take, and what it takes.
struct MemoryUse {
  std::string part;
  int64_t predicted_bytes = 0, actual_bytes = 0;
};

// Calibrations from traffic: how many are in each state, and seconds since the start.
struct CalibrationStats {
  int64_t gathering = 0, making = 0, ready = 0, refused = 0;
  int64_t memory_bytes = 0;
  double observed_seconds = 0, spent_seconds = 0, making_seconds = 0;
};

// What the service shows of itself.
struct ServiceStats {
  std::vector<WayStats> ways;
  CalibrationStats calibrations;
  std::vector<MemoryUse> memory;
  int64_t calls_under_way = 0;                      // arrived and not answered
  int64_t queued_calls = 0, queued_bulk_calls = 0;  // of these, waiting for a thread
  int64_t connections = 0, connections_limit = 0;
  int64_t connections_accepted = 0;                                  // since the start
  std::vector<std::pair<std::string, int64_t>> connections_refused;  // all reasons that there can be
  int64_t call_memory_bytes = 0, call_memory_limit = 0;
  int64_t memory_overhead_limit = 0;
  int64_t shared_memory_clients = 0, shared_memory_refused = 0;  // refused: since the start
  int64_t shared_memory_bytes = 0, shared_memory_limit = 0;
  int64_t certificate_expires = 0;                     // Unix time; 0 = there is none
  std::vector<std::pair<std::string, bool>> troubles;  // all that there can be, and whether it is there now
};

struct MetricsOptions {
  std::string version;                    // "0.1.0"
  bool cuda = false;                      // this build has the CUDA backend
  std::function<CacheStats()> stats;      // KvCache::Stats; required
  std::function<ServiceStats()> service;  // may be empty
  std::vector<std::string> works;         // kinds of work that RecordWork names by index
};

// A finished call.
struct CallSample {
  const char* method = "";
  int code = 0;             // a gRPC status code
  absl::Duration duration;  // from its arrival to its answer; of it,
  absl::Duration received;  // until its request was there,
  absl::Duration waited;    // and from there until a thread took it
  int64_t request_bytes = 0, response_bytes = 0;
  std::string_view tenant;
  std::optional<Refusal> refusal = std::nullopt;
};

// Method names that calls are counted under; calls with other names count as "other". A test holds this
// against the service.
constexpr const char* kMethods[] = {
    "GetServerInfo",    "RegisterModel",     "UnregisterModel",  "CreateSequence",   "ForkSequence",
    "TruncateSequence", "CloseSequence",     "Append",           "Attend",           "AppendAttend",
    "EvictSequences",   "PrefetchSequences", "ListSequences",    "GetStats",         "Plan",
    "Session",          "ReadTokens",        "PersistSequences", "OpenNamespace",    "StoreBlocks",
    "LookupBlocks",     "LoadBlocks",        "ReleaseLease",     "DeleteNamespace",  "PersistNamespace",
    "ListNamespaces",   "BeginStep",         "EndStep",          "GetStepProfile",   "PinSequences",
    "GetConfig",        "ReloadConfig",      "LookupPrefix",     "StartCalibration", "StopCalibration",
    "ListCalibrations", "ExportProfile",     "InstallProfile",   "PinStep",          "SetPriority",
};

class Metrics {
 public:
  explicit Metrics(MetricsOptions options);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // One finished call. "Session" is a whole stream: it is counted, but its
  // length is not a latency.
  void RecordCall(const CallSample& call);

  // A lookup of the tenant has found so many `unit`s ("blocks", "tokens") in the tier; an empty one: not
  // found.
  void RecordLookup(std::string_view tenant, std::string_view unit, std::string_view tier, uint64_t count);

  // A backend has worked for so long.
  void RecordWork(size_t work, absl::Duration time);

  // Serves http://ADDRESS/metrics. ADDRESS is "127.0.0.1:9464", "[::1]:9464" or "localhost:0"; returns it
  // with the port that was bound. InvalidArgument for no such address, Unavailable for a port in use, both
  // with what to do.
  absl::StatusOr<std::string> Start(const std::string& address);
  // After it no callback runs. Idempotent.
  void Stop();

  // The exposition as Prometheus reads it.
  std::string Text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvtide::metrics
