// Calls that change a sequence wait while it is made durable, as its writer: that is the cache's own doing,
// and no other call of the client's that it could wait for itself.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

// The writer of a sequence that is being made durable.
inline const void* PersistingWriter(const Sequence& sequence) { return &sequence; }

bool BeingPersisted(std::span<const SequencePtr> sequences);

// Returns when none of the sequences has that writer, or after io_wait; the mutex is free meanwhile.
// Cancelled or DeadlineExceeded when the call, `what`, is not wanted any more: nothing has changed then.
absl::Status AwaitPersisted(CacheLock& lock, std::span<const SequencePtr> sequences,
                            const CallContext& context, const char* what);

}  // namespace kvtide
