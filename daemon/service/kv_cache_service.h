// kvtide.v1.KvCacheService over the cache. Calls that only touch metadata are answered in gRPC's own thread;
// the others go through a bounded queue to the service's threads, so that gRPC's threads never wait. Every
// call is reported once.
#pragma once

#include <atomic>
#include <memory>

#include "daemon/service/handlers.h"
#include "daemon/service/worker_pool.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"

namespace kvtide::service {

class KvCacheService final : public v1::KvCacheService::CallbackService {
 public:
  // Borrows the cache. To be destroyed after the server that it is registered with.
  KvCacheService(KvCache* cache, const ServiceOptions& options);
  ~KvCacheService() override;

  // From now on new calls are answered UNAVAILABLE; those under way go on.
  void Drain() { draining_ = true; }
  // Idle sessions do not count.
  int64_t calls_under_way() const { return *options_.calls_under_way; }

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext*, const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse*) override;
  grpc::ServerUnaryReactor* RegisterModel(grpc::CallbackServerContext*, const v1::RegisterModelRequest*,
                                          v1::RegisterModelResponse*) override;
  grpc::ServerUnaryReactor* CreateSequence(grpc::CallbackServerContext*, const v1::CreateSequenceRequest*,
                                           v1::CreateSequenceResponse*) override;
  grpc::ServerUnaryReactor* ForkSequence(grpc::CallbackServerContext*, const v1::ForkSequenceRequest*,
                                         v1::ForkSequenceResponse*) override;
  grpc::ServerUnaryReactor* TruncateSequence(grpc::CallbackServerContext*, const v1::TruncateSequenceRequest*,
                                             v1::TruncateSequenceResponse*) override;
  grpc::ServerUnaryReactor* CloseSequence(grpc::CallbackServerContext*, const v1::CloseSequenceRequest*,
                                          v1::CloseSequenceResponse*) override;
  grpc::ServerUnaryReactor* Append(grpc::CallbackServerContext*, const v1::AppendRequest*,
                                   v1::AppendResponse*) override;
  grpc::ServerUnaryReactor* Attend(grpc::CallbackServerContext*, const v1::AttendRequest*,
                                   v1::AttendResponse*) override;
  grpc::ServerUnaryReactor* AppendAttend(grpc::CallbackServerContext*, const v1::AppendAttendRequest*,
                                         v1::AppendAttendResponse*) override;
  grpc::ServerUnaryReactor* EvictSequences(grpc::CallbackServerContext*, const v1::EvictSequencesRequest*,
                                           v1::EvictSequencesResponse*) override;
  grpc::ServerUnaryReactor* PrefetchSequences(grpc::CallbackServerContext*,
                                              const v1::PrefetchSequencesRequest*,
                                              v1::PrefetchSequencesResponse*) override;
  grpc::ServerUnaryReactor* ListSequences(grpc::CallbackServerContext*, const v1::ListSequencesRequest*,
                                          v1::ListSequencesResponse*) override;
  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext*, const v1::GetStatsRequest*,
                                     v1::GetStatsResponse*) override;
  grpc::ServerUnaryReactor* Plan(grpc::CallbackServerContext*, const v1::PlanRequest*,
                                 v1::PlanResponse*) override;
  grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse>* Session(
      grpc::CallbackServerContext*) override;

 private:
  template <class Request, class Response>
  class UnaryCall;
  class SessionCall;
  enum class Where { kHere, kWorker };

  // Begins and ends a call: counts, refuses while draining, reports.
  absl::Status Begin();
  void End(const char* method, absl::Time start, const absl::Status& status, int64_t request_bytes,
           int64_t response_bytes);
  absl::Status CheckNotDraining() const;
  void Report(const char* method, absl::Time start, const absl::Status& status, int64_t request_bytes,
              int64_t response_bytes);

  const ServiceOptions options_;
  Handlers handlers_;
  std::atomic<bool> draining_{false};
  WorkerPool workers_;  // last: its threads use all above
};

}  // namespace kvtide::service
