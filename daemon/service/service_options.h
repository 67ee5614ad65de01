// What the service needs to know beside the cache. Checked by the daemon's configuration.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/call/tenants.h"
#include "daemon/calibrate/calibrator.h"
#include "daemon/service/access.h"
#include "daemon/service/call_counts.h"
#include "daemon/service/call_report.h"
#include "daemon/service/clients.h"
#include "daemon/service/convert.h"
#include "daemon/service/listener.h"
#include "daemon/service/live_quotas.h"
#include "daemon/service/tls.h"
#include "daemon/service/tokens.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

class Troubles;

// What the service shows of itself; shared with whoever shows the numbers, and counted in any thread.
struct ServiceGauges {
  std::atomic<int64_t> calls_under_way{0};  // being handled or waiting, idle sessions aside
  std::atomic<int64_t> queued_calls{0}, queued_bulk_calls{0};
  std::atomic<int64_t> connections{0}, connections_limit{0};
  std::atomic<int64_t> connections_accepted{0};                                 // since the start
  std::array<std::atomic<int64_t>, kConnectionRefusals> connections_refused{};  // the same, by reason
  std::atomic<int64_t> call_memory_bytes{0};                                    // as of about a second ago
  // Clients of the shared-memory way, their arenas, and those that were refused since the start.
  std::atomic<int64_t> shared_memory_clients{0}, shared_memory_refused{0};
  std::atomic<int64_t> shared_memory_bytes{0}, shared_memory_limit_bytes{0};
};

// The shared-memory way: limits of its arenas, and who may have one.
struct SharedMemoryOptions {
  int64_t total_bytes = int64_t{512} << 20;   // of all arenas; 0 = the way is closed
  int64_t client_bytes = int64_t{256} << 20;  // of one
  size_t max_clients = 64;
  bool host_sharing = false;  // admins may map the tier of host memory, for reading
  // How long a thread looks at a client's ring before it sleeps. At most half of the processors do at a time.
  absl::Duration poll = absl::Microseconds(50);
};

// v1::MemoryUse.
struct MemoryUse {
  std::string part;
  int64_t predicted_bytes = 0, actual_bytes = 0;
};

struct ServiceOptions {
  std::string version;
  SequenceDefaults defaults;
  std::vector<std::string> listen;  // see address.h; at least one
  Access access;                    // who may call, and as which tenant
  TlsOptions tls;                   // of TCP addresses
  // Bearer tokens; null = none. Where there are some, calls over TCP need one, unless they come with a
  // certificate.
  std::shared_ptr<Tokens> tokens;
  // Calls and connections of them; the rest is the cache's. Never null.
  std::shared_ptr<LiveQuotas> quotas = std::make_shared<LiveQuotas>();
  int64_t max_message_bytes = int64_t{64} << 20;
  int threads = 2;                 // for calls that engines wait for
  int bulk_threads = 2;            // for those that may take long: moves, plans, reads
  bool waits_for_lookups = false;  // lookups are such calls: there is a remote tier
  size_t max_queued_calls = 1024;  // for each of the two
  size_t max_connections = 1024;
  absl::Duration idle = absl::Minutes(30);  // a connection without calls is closed after so long
  int max_calls_per_connection = 256;       // at a time; the client's gRPC keeps back what is beyond
  // Requests and answers of calls under way, all together; one connection may have half of it. 0 = the least,
  // LeastCallMemory.
  int64_t call_memory_bytes = 0;
  int64_t staging_bytes = 0;                      // of the cache's tiers of I/O
  SharedMemoryOptions shared_memory;              // beside every Unix socket of `listen`
  std::function<void(const CallReport&)> report;  // may be empty
  // Makes an arena's tensors reachable for devices for as long as what it returns lives, so that attention
  // over them copies nothing; null: they stay as they are. Called with a client's first attention. May be
  // empty.
  std::function<std::shared_ptr<void>(std::byte* tensors, size_t bytes)> pin;
  // Told of what a lookup has found in a tier, or, with an empty tier, has not found: blocks by key, or
  // tokens of a prefix. From any thread; quick. May be empty.
  std::function<void(std::string_view tenant, const char* unit, std::string_view tier, uint64_t count)>
      looked_up;
  // Told at most once a second when connections were refused, with their numbers since the start (the gauges
  // have them too); may be empty.
  std::function<void(const RefusedConnections& refused)> refused;
  // Called about once a second by the thread that looks after connections, when it has asked the threads of
  // calls for their queues: the daemon is not stuck. May be empty.
  std::function<void()> alive;
  // Told when the file of a Unix socket was gone and has been made again, or why it could not be; may be
  // empty.
  std::function<void(const std::string& address, const absl::Status& status)> mended;
  // What GetStats tells of; null: nothing. Server::Start puts those of its watch here.
  std::shared_ptr<const Troubles> troubles;
  // What the memory of the daemon should be, and what it is; may be empty.
  std::function<std::vector<MemoryUse>()> memory;
  Calibrator* calibrator = nullptr;  // borrowed; null: nothing is calibrated from traffic
  // What the daemon runs with, and reading that again (ReloadConfig); may be empty.
  std::function<v1::GetConfigResponse()> config;
  std::function<absl::StatusOr<v1::ReloadConfigResponse>()> reload;
  std::shared_ptr<CallCounts> counts = std::make_shared<CallCounts>();
  std::shared_ptr<Clients> clients = std::make_shared<Clients>();
  std::shared_ptr<ServiceGauges> gauges = std::make_shared<ServiceGauges>();
};

// A connection must be able to have a largest request and a largest answer at once.
int64_t LeastCallMemory(int64_t max_message_bytes);
// What gRPC may hold of messages that are still arriving.
int64_t ReceiveMemoryBytes(const ServiceOptions& options);
// The most that the process takes beside its tiers, whatever clients do: itself, what arrives, calls under
// way.
int64_t MemoryOverheadBytes(const ServiceOptions& options);

}  // namespace kvtide::service
