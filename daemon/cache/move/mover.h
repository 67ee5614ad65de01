// Moves between tiers: eviction and prefetch on request, the thread that moves by policy, and what writers
// need of them.
#pragma once

#include <span>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/move_report.h"
#include "daemon/cache/move/io_backlog.h"
#include "daemon/cache/move/room_maker.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class Mover {
 public:
  explicit Mover(CacheCore& core) : core_(core), room_(core) {}
  ~Mover() { Stop(); }
  // Moves by policy on a thread of its own, until Stop.
  void Start();
  void Stop();

  // Room for writers; see RoomMaker.
  absl::StatusOr<std::vector<WritingBlock>> Allocate(CacheLock& lock, int home,
                                                     std::span<const BlockLayout* const> layouts,
                                                     size_t want_bytes, const TenantAccount* account) {
    return room_.Allocate(lock, home, layouts, want_bytes, account);
  }
  WritingBlock AllocateIn(CacheLock& lock, int tier, int home, const BlockLayout* layout, size_t want_bytes) {
    return room_.AllocateIn(lock, tier, home, layout, want_bytes);
  }
  // The bytes of the block in `from` to a place of the same layout; the bytes of both are the caller's to
  // keep.
  absl::Status Copy(CacheLock& lock, const Block& block, const Place& from, const Place& to);
  // Moves those blocks that lie where nobody can compute on them to where somebody can: home while it is
  // below promote_below, else the next tier that attends, making room there. What was lost on the way is
  // dropped then. ResourceExhausted when not all of them fit at once; Aborted when others move them for too
  // long. Only what was used before `before_serial` makes way. The mutex may have been free: look at the
  // tables again.
  absl::Status BringIn(CacheLock& lock, std::span<const HeldBlock> blocks, uint64_t before_serial,
                       const CallContext& context);
  // The same for one block that a call writes or decodes.
  absl::Status BringIn(CacheLock& lock, Block* block);
  // Moves those blocks home that fit there while it stays below promote_below and nobody makes way. What does
  // not stays where it is, which is no error.
  void BringHome(CacheLock& lock, std::span<const HeldBlock> blocks, const CallContext& context);
  // Bytes that may come home so.
  static size_t RoomAtHome(const CacheState& state, int home, const TierLimits& limits);
  bool IsFar(const Block& block) const { return block.place != nullptr && !core_.attends(block.place->tier); }
  // Returns when the block is not being moved; Aborted after room_wait.
  absl::Status WaitUntilStill(CacheLock& lock, const Block& block) const;

  // These work in slices and give the mutex up between them. A call that is no longer wanted (cancelled, past
  // its deadline) stops there; the error says what had moved by then.
  absl::StatusOr<MoveReport> Evict(std::span<const SequenceId> ids, int tier, const CallContext& context);
  absl::StatusOr<MoveReport> EvictAll(int tier, const CallContext& context);
  absl::StatusOr<MoveReport> Prefetch(std::span<const SequenceId> ids, const CallContext& context);
  MoveReport RunOnce();

 private:
  class Eviction;

  absl::Status CheckTier(int tier) const;
  absl::StatusOr<std::vector<SequencePtr>> FindAll(const CacheState& state, std::span<const SequenceId> ids,
                                                   const CallContext& context) const;
  // Moves the blocks to `tier`, making room there.
  MoveReport MoveTo(CacheLock& lock, std::span<const HeldBlock> blocks, int tier, uint64_t before_serial,
                    const Cancellation* cancellation = nullptr);
  void BringBatch(CacheLock& lock, std::span<const HeldBlock> blocks, int home, uint64_t before_serial,
                  const Cancellation* cancellation);
  // Not OK when the call is no longer wanted.
  absl::Status Check(const CallContext& context, const char* what, const MoveReport& report) const;
  // `wanted_bytes`: of blocks that are to come up here.
  TierView ViewIdle(const CacheState& state, int tier, size_t wanted_bytes, absl::Time now) const;
  void Run();
  void RunIo();
  bool IsIo(const Move& move) const {
    return !core_.attends(move.from) || (move.to >= 0 && !core_.attends(move.to));
  }

  CacheCore& core_;
  RoomMaker room_;
  CondVar wake_;  // the mover stops, or has moves for the other thread
  IoBacklog io_;  // of the thread for I/O; under the cache's mutex, as `stopping_`
  bool stopping_ = false;
  std::thread thread_, io_thread_;  // a slow disk does not keep moves between memories waiting
};

}  // namespace kvtide
