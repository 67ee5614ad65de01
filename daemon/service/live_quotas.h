// What tenants may have of the service: calls and connections at a time. May be replaced while calls run.
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "daemon/cache/call/tenants.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class LiveQuotas {
 public:
  void Set(TenantQuotas quotas) {
    const MutexLock lock(mutex_);
    quotas_ = std::move(quotas);
  }
  // TenantLimits::kNone: no limit.
  uint64_t CallsOf(const std::string& tenant) const {
    const MutexLock lock(mutex_);
    return quotas_.Of(tenant).calls;
  }
  uint64_t ConnectionsOf(const std::string& tenant) const {
    const MutexLock lock(mutex_);
    return quotas_.Of(tenant).connections;
  }

 private:
  mutable Mutex mutex_;
  TenantQuotas quotas_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
