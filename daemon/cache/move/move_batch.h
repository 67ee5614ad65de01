// Blocks on their way to other places: started one by one under the mutex, copied together without it. A
// block on its way is marked as moving: nobody writes or drops it, readers go on reading the old place.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/block/block_label.h"
#include "daemon/cache/call/move_report.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

// A block's bytes from one place to another, which do not overlap; the caller keeps both.
struct CopyJob {
  CopyJob(const BlockStore& store, const Block& block, const Place& source, const Place& target);
  int from = 0, to = 0;               // tiers
  const std::byte* source = nullptr;  // null: in a tier of I/O, at source_offset
  std::byte* target = nullptr;
  size_t source_offset = 0, target_offset = 0;
  size_t bytes = 0;
  BlockLabel source_label, target_label;  // where there is I/O
  absl::Status status;                    // of the copy, when it has ended
};
// What the target of a new block's bytes is known by, when it is written by I/O.
void NameWrite(const CacheCore& core, const Block& block, Place* target);

// What is done with bytes on their way between memories, by the thread that waits for the copies. `begun`:
// the source may be read beside the copy. `ended`: the target has the bytes, while others are under way.
struct CopyWatch {
  std::function<void(const CopyJob&)> begun, ended;
};

// Copies all of them side by side, in pieces of CacheOptions::move_piece_bytes, and returns when none runs
// any more, however some have ended. Without the mutex. The watch is told of each job between memories once,
// of its end if it went well.
void CopyAll(const CacheCore& core, std::span<CopyJob> jobs, const Cancellation* cancellation = nullptr,
             const CopyWatch* watch = nullptr);

// Made, used and destroyed under the mutex; only Finish gives it up.
class MoveBatch {
 public:
  // `report` gets what has moved and what was left; borrowed.
  // `cancellation` stops transfers of I/O between their pieces.
  MoveBatch(CacheLock& lock, MoveReport* report, const Cancellation* cancellation = nullptr)
      : lock_(lock), report_(report), cancellation_(cancellation) {}
  // What was started and not finished stays where it is.
  ~MoveBatch();
  MoveBatch(const MoveBatch&) = delete;
  MoveBatch& operator=(const MoveBatch&) = delete;

  // `target` is reserved for the block and now the batch's; the block is neither written nor moved.
  void Start(Block* block, Place* target);
  // The same within the block's tier, which attends, with its bytes recoded to a rung of its ladder. The
  // block has no backup and no lease; one that is given a lease before it is done keeps its form.
  void StartRecode(Block* block, Place* target, const BlockLayout* rung);
  bool empty() const { return running_.empty(); }
  // As many as may be on their way at a time (max_moves_in_flight).
  bool full() const { return running_.size() >= lock_.core().options().max_moves_in_flight; }
  // Copies, verifies and computes checksums beside the copies, then gives every block its new place or leaves
  // it in the old one.
  void Finish();

 private:
  struct Running {
    HeldBlock block;
    Place* target = nullptr;
    bool verify = false, compute = false;  // checksums: of the source, of the target
    uint64_t checksum = 0;
    bool corrupt = false;               // the source is not what it was
    const BlockLayout* rung = nullptr;  // that it is recoded to; null: it is copied
    const BlockLayout* from = nullptr;  // of a block that is recoded, and with what
    std::shared_ptr<const Profile> profile;
    int64_t position = 0;
  };

  void Settle(Running& move, const CopyJob& job);
  void RecodeAll(std::span<CopyJob> jobs);

  CacheLock& lock_;
  MoveReport* const report_;
  const Cancellation* const cancellation_;
  std::vector<Running> running_;
};

}  // namespace kvtide
