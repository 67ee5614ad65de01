// One session stream of kvtided: calls in order, one at a time, each with a deadline. Thread-safe: a second
// caller waits. A call that misses its deadline breaks the session, since its answer could not be told from
// the next one's; the daemon then closes what was created on it, and every later call is Unavailable.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cpp/credentials.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"

namespace kvtide::client {

class Session {
 public:
  // `token` may be null.
  static absl::StatusOr<std::unique_ptr<Session>> Start(v1::KvCacheService::Stub* stub,
                                                        absl::Duration timeout, TokenFile* token);
  ~Session();

  // Numbers the request. An error that the daemon reports for the call is returned as a status; the session
  // goes on.
  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response);

 private:
  explicit Session(absl::Duration timeout) : timeout_(timeout) {}
  // Waits for the one operation that is under way.
  absl::Status Wait(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Break() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const absl::Duration timeout_;
  Mutex mutex_;  // held while a call is under way
  grpc::ClientContext context_ ABSL_GUARDED_BY(mutex_);
  grpc::CompletionQueue queue_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::SessionRequest, v1::SessionResponse>> stream_
      ABSL_GUARDED_BY(mutex_);
  v1::SessionResponse response_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_request_ ABSL_GUARDED_BY(mutex_) = 0;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace kvtide::client
