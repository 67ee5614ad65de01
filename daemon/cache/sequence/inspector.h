// Looks at everything and changes nothing: statistics, descriptions of sequences, and the check of all
// invariants.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/sequence_calls.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class Inspector {
 public:
  explicit Inspector(CacheCore& core) : core_(core) {}

  CacheStats Stats() const;
  SequenceMemory MemoryOfSequences() const;
  absl::StatusOr<SequenceInfo> GetSequence(SequenceId id, const CallContext& context) const;
  std::vector<SequenceInfo> ListSequences(const SequenceList& list, const CallContext& context) const;
  void CheckInvariants() const;

 private:
  static SequenceInfo Describe(const CacheState& state, const Sequence& sequence);
  static void AddDegraded(int group, const GroupTable& table, SequenceInfo& info);

  CacheCore& core_;
};

}  // namespace kvtide
