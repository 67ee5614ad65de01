// Sequences that begin with what is cached: LookupPrefix finds the longest prefix of some tokens that can be
// read now and holds it by a lease, and a new sequence takes its blocks over. They are shared: whoever writes
// into one first gets a copy of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/call/prefix_calls.h"
#include "daemon/cache/reuse/remote_exchange.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class PrefixReuse {
 public:
  PrefixReuse(CacheCore& core, RemoteExchange& remote) : core_(core), remote_(remote) {}

  absl::StatusOr<PrefixReport> Lookup(const PrefixCall& call);
  // A new sequence with the tokens of the lease, which is over then.
  absl::StatusOr<SequencePtr> Begin(CacheLock& lock, ModelId model, const SequenceOptions& options,
                                    LeaseId lease, const CallContext& context);
  // The blocks that only the index will have once the sequence is closed. Before it is.
  static std::vector<Block*> BlocksOf(const Sequence& sequence);

 private:
  struct Found {
    int64_t blocks = 0;
    std::vector<Block*> all;  // that a sequence which begins with so many would have
  };

  // The device whose prefix of the tokens is the longest, and what is there; null: there is nothing.
  absl::StatusOr<PrefixSpacePtr> Best(CacheLock& lock, const Sequence& like, std::span<const BlockKey> keys,
                                      const CallContext& context, Found* found);
  absl::Status CheckAnswering(CacheLock& lock, const PrefixSpace& space, std::span<const BlockKey> keys,
                              const CallContext& context, Found* found);
  static void TakeOver(CacheState& state, const PrefixSpacePtr& space, std::span<const BlockKey> keys,
                       int64_t blocks, Sequence& sequence);

  CacheCore& core_;
  RemoteExchange& remote_;
};

}  // namespace kvtide
