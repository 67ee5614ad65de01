// The calls' side of call_trace.h: what goes with a call, and comes back with its error.
#pragma once

#include <string_view>

#include "absl/status/status.h"
#include "grpcpp/client_context.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::client {

// The trace of this thread's calls, to a call that has not begun.
void AddTrace(grpc::ClientContext* context);
void AddTrace(v1::SessionRequest* request);

// An error knows what its call is called in the daemon's log.
absl::Status WithRequestId(absl::Status status, std::string_view id);
absl::Status FromProto(const v1::SessionError& error);

}  // namespace kvtide::client
