// Who makes a call of the cache and how long it is wanted. Every verb takes one; long work looks at it
// between its rounds. The deadline is on the cache's clock.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "daemon/cache/call/identity.h"
#include "kernels/base/cancellation.h"

namespace kvtide {

struct CallContext {
  std::string caller;  // for logs and fair queues: the connection; empty = this process
  // Whose sequences and models the call may see and whose it makes; borrowed for the call.
  const Identity* identity = &Identity::OfThisProcess();
  uint64_t request_id = 0;  // names the call in logs; 0 = none
  absl::Time deadline = absl::InfiniteFuture();
  const Cancellation* cancellation = nullptr;  // borrowed for the call; null = cannot be cancelled
  // Most products of queries, tokens and heads that one attention may need; 0 = the cache's own limit.
  int64_t max_attend_work = 0;

  const std::string& tenant() const { return identity->tenant; }

  // OK while the call is wanted, else Cancelled or DeadlineExceeded: "`what` was cancelled".
  absl::Status Check(absl::Time now, const char* what) const {
    if (IsCancelled(cancellation)) return absl::CancelledError(absl::StrCat(what, " was cancelled"));
    if (now >= deadline)
      return absl::DeadlineExceededError(absl::StrCat("the deadline of ", what, " has passed"));
    return absl::OkStatus();
  }
};

}  // namespace kvtide
