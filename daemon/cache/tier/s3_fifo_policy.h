// S3-FIFO (J. Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023) over recency
// records: what is new goes through a small queue, and only what is asked for again, there or in time after
// it (ghost_keys.h), gets into the main queue, where the oldest goes next unless it was used since it was
// looked at last. So what nobody asks for twice leaves early and drives nothing else out.
//
// The entries are records, which blocks share that were stored or found together, and count with their
// blocks. Records of open sequences are in the main queue.
#pragma once

#include <memory>

#include "daemon/cache/tier/eviction_policy.h"

namespace kvtide {

struct S3FifoOptions {
  // Part of the tier's blocks that may be new ones. The paper has 0.1, for objects that are used again soon
  // or never; the next turn of a conversation comes minutes later (daemon/cache/README.md, Decisions).
  double small_share = 0.5;
};

// Insert, Touch, Count and Remove take constant time; Evict pays for what it passes over once for each use of
// that.
std::unique_ptr<EvictionPolicy> MakeS3FifoPolicy(const S3FifoOptions& options = {});

}  // namespace kvtide
