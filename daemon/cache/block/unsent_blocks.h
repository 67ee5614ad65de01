// Blocks that wait to be written to the remote tier, in the order in which they were found first; a bounded
// number. Guarded by the cache's mutex (it is part of CacheState).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "daemon/cache/tier/block_id.h"
#include "kernels/base/mutex.h"

namespace kvtide {

struct UnsentBlocks {
  std::deque<BlockId> ids;  // some may be no more
  size_t most = 0;          // 0: none are kept
  bool when_found = true;   // false: only those that are about to be dropped
  uint64_t left_out = 0;    // the oldest make way
  CondVar come;

  // A block that others could find from now on.
  void Found(BlockId id) {
    if (when_found) Add(id);
  }
  void Add(BlockId id) {
    if (most == 0) return;
    if (ids.size() >= most) {
      ids.pop_front();
      left_out++;
    }
    ids.push_back(id);
    come.NotifyOne();
  }
};

}  // namespace kvtide
