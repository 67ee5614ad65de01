// Room and moves: allocation that demotes or drops by policy, eviction and prefetch on request, and the
// thread that moves by itself.
#pragma once

#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/block_guards.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/call_context.h"
#include "daemon/cache/move_report.h"

namespace kvtide {

class Mover {
 public:
  explicit Mover(CacheCore& core) : core_(core) {}
  ~Mover() { Stop(); }
  // Moves by policy on a thread of its own, until Stop.
  void Start();
  void Stop();

  // One new block of each layout, all in the fastest tier from `home` on that can take them. Waits for the
  // calls and moves of others when there is no room (CacheOptions::room_wait); ResourceExhausted with the
  // numbers. `want_bytes` is how much the caller will need in all: room is made in larger steps.
  absl::StatusOr<std::vector<WritingBlock>> Allocate(CacheLock& lock, int home,
                                                     std::span<const BlockLayout* const> layouts,
                                                     size_t want_bytes);
  // A new block in this tier, or an empty guard.
  WritingBlock AllocateIn(CacheLock& lock, int tier, int home, const BlockLayout* layout, size_t want_bytes);
  // The block's bytes to a place of the same layout; the bytes of both are the caller's to keep.
  absl::Status Copy(CacheLock& lock, const Place& from, const Place& to);
  // Returns when the block is not being moved; Aborted after room_wait.
  absl::Status WaitUntilStill(CacheLock& lock, const Block& block) const;
  // "no room for N bytes: tier 'device' has ..."
  static std::string RoomText(const CacheState& state, size_t bytes);

  absl::StatusOr<MoveReport> Evict(std::span<const SequenceId> ids, int tier, const CallContext& context);
  absl::StatusOr<MoveReport> EvictAll(int tier, const CallContext& context);
  absl::StatusOr<MoveReport> Prefetch(std::span<const SequenceId> ids, const CallContext& context);
  MoveReport RunOnce();

 private:
  struct CopyJob {
    int from = 0, to = 0;  // tiers
    const std::byte* source = nullptr;
    std::byte* target = nullptr;
    size_t bytes = 0;
    absl::Status status;
  };
  struct Running;

  // Moves blocks out of the tier that were touched before `serial`; true if something moved.
  bool MakeRoom(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial);
  Snapshot RoomSnapshot(const CacheState& state, int tier, size_t bytes, uint64_t before_serial) const;
  static BlockView View(const Block& block, absl::Time now);
  MoveReport Execute(CacheLock& lock, const std::vector<Move>& moves, bool read_too);
  void FinishRound(CacheLock& lock, std::vector<Running>& running, MoveReport& report);
  // Moves the blocks to `tier`, making room there, until the call is no longer wanted.
  MoveReport MoveTo(CacheLock& lock, const std::vector<HeldBlock>& blocks, int tier, uint64_t before_serial,
                    const CallContext& context);
  absl::StatusOr<MoveReport> EvictSequences(CacheLock& lock, const std::vector<SequencePtr>& sequences,
                                            int tier, const CallContext& context);
  void CopyAll(std::span<CopyJob> jobs) const;  // without the mutex
  void Run();

  CacheCore& core_;
  CondVar wake_;           // the mover stops
  bool stopping_ = false;  // under the cache's mutex
  std::thread thread_;
};

}  // namespace kvtide
