// Blocks on their way to other places: started one by one under the mutex, copied together without it. A
// block on its way is marked as moving: nobody writes or drops it, readers go on reading the old place.
#pragma once

#include <span>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/block_guards.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/move_report.h"

namespace kvtide {

// Bytes from one place to another, which do not overlap; the caller keeps both.
struct CopyJob {
  int from = 0, to = 0;  // tiers
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  size_t bytes = 0;
  absl::Status status;  // of the copy, when it has ended
};

// Copies all of them side by side, in pieces of CacheOptions::move_piece_bytes, and returns when none runs
// any more, however some have ended. Without the mutex.
void CopyAll(const CacheCore& core, std::span<CopyJob> jobs);

// Made, used and destroyed under the mutex; only Finish gives it up.
class MoveBatch {
 public:
  // `report` gets what has moved and what was left; borrowed.
  MoveBatch(CacheLock& lock, MoveReport* report) : lock_(lock), report_(report) {}
  // What was started and not finished stays where it is.
  ~MoveBatch();
  MoveBatch(const MoveBatch&) = delete;
  MoveBatch& operator=(const MoveBatch&) = delete;

  // `target` is reserved for the block and now the batch's; the block is neither written nor moved.
  void Start(Block* block, Place* target);
  bool empty() const { return running_.empty(); }
  // As many as may be on their way at a time (max_moves_in_flight).
  bool full() const { return running_.size() >= lock_.core().options().max_moves_in_flight; }
  // Copies, verifies and computes checksums, then gives every block its new place or leaves it in the old
  // one.
  void Finish();

 private:
  struct Running {
    HeldBlock block;
    Place* target = nullptr;
    bool verify = false, compute = false;  // checksums: of the source, of the target
    uint64_t checksum = 0;
    bool corrupt = false;
  };

  void Settle(Running& move, const CopyJob& job);

  CacheLock& lock_;
  MoveReport* const report_;
  std::vector<Running> running_;
};

}  // namespace kvtide
