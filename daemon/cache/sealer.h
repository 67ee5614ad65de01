// What follows an append: the profile from the first block, blocks that fell out of a sliding window, and
// sealing. All of it may wait for the next append when there is no room; nothing here fails a call. The
// caller is the sequence's writer.
#pragma once

#include "daemon/cache/cache_core.h"
#include "daemon/cache/mover.h"

namespace kvtide {

class Sealer {
 public:
  Sealer(CacheCore& core, Mover& mover) : core_(core), mover_(mover) {}

  void Settle(CacheLock& lock, Sequence& sequence);

 private:
  bool MakeFirstBlockProfile(CacheLock& lock, GroupTable& table);
  void FreeFallenBlocks(CacheState& state, Sequence& sequence, GroupTable& table);
  int64_t SealRange(CacheLock& lock, Sequence& sequence, int group, int64_t begin, int64_t end);

  CacheCore& core_;
  Mover& mover_;
};

}  // namespace kvtide
