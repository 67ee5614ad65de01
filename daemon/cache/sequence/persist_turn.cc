#include "daemon/cache/sequence/persist_turn.h"

#include <algorithm>

#include "kernels/base/status.h"

namespace kvtide {

bool BeingPersisted(std::span<const SequencePtr> sequences) {
  return std::any_of(sequences.begin(), sequences.end(), [](const SequencePtr& sequence) {
    return sequence->writer == PersistingWriter(*sequence);
  });
}

absl::Status AwaitPersisted(CacheLock& lock, std::span<const SequencePtr> sequences,
                            const CallContext& context, const char* what) {
  if (!BeingPersisted(sequences)) return absl::OkStatus();
  const CacheOptions& options = lock.core().options();
  const absl::Time last = options.clock() + options.io_wait;
  while (BeingPersisted(sequences) && options.room_wait > absl::ZeroDuration() && options.clock() < last) {
    lock.WaitForChange(options.room_wait);
    KVTIDE_RETURN_IF_ERROR(context.Check(options.clock(), what));
  }
  return absl::OkStatus();
}

}  // namespace kvtide
