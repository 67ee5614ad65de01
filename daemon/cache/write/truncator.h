// Truncation. The only step that can fail is reopening a coded block as an f16 tail; it comes before anything
// is changed.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class Truncator {
 public:
  Truncator(CacheCore& core, Mover& mover) : core_(core), mover_(mover) {}

  absl::Status Truncate(SequenceId id, int64_t tokens, const CallContext& context);

 private:
  struct Cut;

  absl::Status CheckCut(const Sequence& sequence, const Cut& cut) const;
  absl::Status ReopenTails(CacheLock& lock, Sequence& sequence, Cut& cut);
  absl::StatusOr<WritingBlock> ReopenCodedBlock(CacheLock& lock, Sequence& sequence, int group, int64_t index,
                                                int64_t tokens);
  absl::Status DecodeInto(const Place& source, const BlockLayout& layout, const GroupTable& table,
                          const Profile* profile, int64_t position, const Place& target,
                          int64_t tokens) const;
  void CutTable(CacheState& state, Sequence& sequence, int group, Cut& cut);

  CacheCore& core_;
  Mover& mover_;
};

}  // namespace kvtide
