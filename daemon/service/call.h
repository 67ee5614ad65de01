// What a handler knows of the call that it serves: who wants it until when, and the memory that it may take.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/service/memory_budget.h"
#include "daemon/service/tensor.h"

namespace kvtide::service {

class OpenSteps;
class PlacesInUse;

struct Call {
  CallContext context;
  MemoryBudget::Hold* memory = nullptr;   // large answers are added before they are made; null = not counted
  int64_t max_answer_bytes = 0;           // of this way; 0 = max_message_bytes
  const TensorMemory* tensors = nullptr;  // where tensors may lie beside the message; null = nowhere
  OpenSteps* steps = nullptr;             // of the session that the call came on; null = it has none
  PlacesInUse* places = nullptr;          // of the session that the call came on; null = it maps no host tier
  bool maps_pool = false;                 // the client writes and reads blocks of the first tier itself
  // Set where the call is served by a thread that looks after sockets: a handler that could take longer than
  // kBriefWork sets it and returns any error, having changed nothing; then other threads serve the call.
  bool* declined = nullptr;

  absl::Status Decline() const {
    *declined = true;
    return absl::AbortedError("declined");
  }
};

// Products of queries, tokens and query heads (KvCache::EstimateWork) that take some tens of microseconds.
constexpr double kBriefWork = 1 << 13;

}  // namespace kvtide::service
