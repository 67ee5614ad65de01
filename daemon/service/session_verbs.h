// The calls that travel on a session stream: which handler a request belongs to.
#pragma once

#include "absl/status/status.h"
#include "daemon/service/handlers.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::service {

// Handles one request and sets the result of the same verb. `method` gets the verb's name, a literal.
// InvalidArgument for a request without a call, or with one of a newer version.
absl::Status HandleSessionRequest(Handlers* handlers, const v1::SessionRequest& request,
                                  v1::SessionResponse* response, const Cancelled& cancelled,
                                  const char** method);

}  // namespace kvtide::service
