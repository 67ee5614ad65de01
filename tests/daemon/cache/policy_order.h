// The order in which a policy would take blocks away.
#pragma once

#include <vector>

#include "daemon/cache/tier/eviction_policy.h"

namespace kvtide::testing {

inline std::vector<RecordSlot> Order(const EvictionPolicy& policy) {
  std::vector<RecordSlot> order;
  policy.Peek([&](RecordSlot id) {
    order.push_back(id);
    return true;
  });
  return order;
}

}  // namespace kvtide::testing
