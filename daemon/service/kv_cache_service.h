// kvtide.v1.KvCacheService over the cache, on the bytes of calls: gRPC gives every call here before anything
// of it is read, so that who calls, how many and how much is known first. Two pools of threads serve calls,
// in turns between connections; gRPC's threads serve small calls themselves when nothing waits. Every call is
// reported once.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "daemon/service/connections.h"
#include "daemon/service/handlers.h"
#include "daemon/service/rpc_loop.h"
#include "daemon/service/verbs.h"
#include "daemon/service/worker_pool.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class RingSession;

class KvCacheService {
 public:
  // Borrows the cache and the connections. To be destroyed after the server whose calls it begins.
  KvCacheService(KvCache* cache, const Connections* connections, const ServiceOptions& options);
  ~KvCacheService();

  // From now on new calls, and those that wait, are answered UNAVAILABLE, and bulk calls are cancelled;
  // others that have begun go on.
  void Drain();
  // About once a second: gives up on answers that nobody takes, and brings the gauges up to date.
  void Tick();
  // Idle sessions do not count.
  int64_t calls_under_way() const { return options_.gauges->calls_under_way; }
  Clients* clients() const { return options_.clients.get(); }

  // Takes a call that has arrived.
  void Begin(Rpc* rpc);
  // On whose behalf a call is made: by its token, else its certificate, else its connection. Unauthenticated
  // or PermissionDenied with what to do.
  absl::StatusOr<IdentityPtr> Identify(const grpc::ServerContext& context,
                                       const Connection& connection) const;
  // Unavailable while draining.
  absl::Status CheckNotDraining() const;
  // Tells who counts calls and logs failures. `client` may be null.
  void Report(const CallReport& report, Client* client) const;

 private:
  class AnyCall;
  class UnaryCall;
  class SessionCall;
  class RefusedCall;
  friend class RingSession;

  bool IsBulk(const Verb* verb) const;
  // Hands a call to the threads of its verb.
  void Submit(const Verb* verb, Caller caller, WorkerPool::Work* work);
  // Counts a call of a tenant that begins, until EndCall; ResourceExhausted where it has as many as its quota
  // allows. False: the tenant has no quota, and nothing was counted.
  absl::StatusOr<bool> BeginCall(const std::string& tenant);
  void EndCall(const std::string& tenant);
  std::string NewRequestId();

  const ServiceOptions options_;
  const Connections* const connections_;
  Handlers handlers_;
  MemoryBudget memory_;
  std::atomic<bool> draining_{false};
  std::atomic<uint64_t> last_request_;
  Mutex mutex_;
  absl::flat_hash_set<AnyCall*> calls_ ABSL_GUARDED_BY(mutex_);  // that exist
  absl::flat_hash_set<RingSession*> rings_ ABSL_GUARDED_BY(mutex_);
  Mutex tenants_mutex_;
  absl::flat_hash_map<std::string, uint64_t> calls_of_
      ABSL_GUARDED_BY(tenants_mutex_);  // of tenants with a quota
  WorkerPool prompt_, bulk_;            // last: their threads use all above
};

}  // namespace kvtide::service
