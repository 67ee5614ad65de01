// What a running read relies on: the snapshots of the tables that it reads, and that the mover knows of it.
// Made and ended under the mutex, used without it.
#pragma once

#include <memory>
#include <vector>

#include "daemon/cache/block/table_snapshot.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class Reading {
 public:
  // For up to `tables` tables.
  Reading(CacheState& state, size_t tables);
  ~Reading();
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  // The table of a group as it is now. Aborted if the sequence is closed, or codes at once and is being
  // written by another call than `writer`, which is null for one that only reads.
  absl::StatusOr<const TableSnapshot*> Add(const SequencePtr& sequence, int group, const void* writer);

  // Adds to the counters of attended blocks when the reading ends.
  uint64_t attended_blocks = 0, attended_blocks_below_tier0 = 0;
  std::vector<uint64_t> attended_bytes;  // by tier; empty = none
  std::vector<uint64_t> attended_in_place, promoted_first;

 private:
  struct Entry {
    SequencePtr sequence;
    std::shared_ptr<const TableSnapshot> snapshot;
    SequenceRecency recency;
  };
  CacheState& state_;
  std::vector<Entry> entries_;
};

}  // namespace kvtide
