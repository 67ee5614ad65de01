// What a handler knows of the call that it serves: who wants it until when, and the memory that it may take.
#pragma once

#include "daemon/cache/call_context.h"
#include "daemon/service/memory_budget.h"

namespace kvtide::service {

struct Call {
  CallContext context;
  MemoryBudget::Hold* memory = nullptr;  // large answers are added before they are made; null = not counted
};

}  // namespace kvtide::service
