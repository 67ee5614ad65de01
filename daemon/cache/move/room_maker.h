// Room: allocation that makes way by policy when a tier is full. What is free but in pieces is gathered by
// moving blocks inside of their tier; what is not free is demoted, the coldest first, or dropped where that
// is allowed.
#pragma once

#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/call/move_report.h"
#include "daemon/cache/move/move_batch.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/tier/hole_policy.h"

namespace kvtide {

class RoomMaker {
 public:
  explicit RoomMaker(CacheCore& core) : core_(core) {}

  // One new block of each layout, all in the fastest tier from `home` on that can take them. Waits for the
  // calls and moves of others when there is no room (CacheOptions::room_wait); ResourceExhausted with the
  // numbers. Tiers where the tenant's quota leaves no room are passed over. `want_bytes` is how much the
  // caller will need in all: room is made in larger steps.
  absl::StatusOr<std::vector<WritingBlock>> Allocate(CacheLock& lock, int home,
                                                     std::span<const BlockLayout* const> layouts,
                                                     size_t want_bytes, const TenantAccount* account);
  // A new block in this tier, or an empty guard.
  WritingBlock AllocateIn(CacheLock& lock, int tier, int home, const BlockLayout* layout, size_t want_bytes);

  // A new block of what is only cached, in the first tier below the devices that attends and has room, else
  // on `home`; what is colder makes way, and of the tenant's own cached blocks what its quota needs. Empty
  // where there is no room.
  WritingBlock AllocateCached(CacheLock& lock, const std::shared_ptr<TenantAccount>& account, int home,
                              const BlockForm& form, size_t want_bytes, bool* over_quota);

  // One free extent of `bytes` in the tier, made of blocks that were touched before `serial`: true if it got
  // nearer to that. Call it again until the bytes fit. `want_bytes` as above.
  bool MakeRoom(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial);
  // The same without an extent of that size: true if bytes became free, in pieces perhaps.
  bool MakeFree(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial);
  // Performs the moves that are still possible. `read_too`: blocks that are being read move as well. Where a
  // target is free in pieces only, what was touched before `serial` may go down to gather them.
  MoveReport Execute(CacheLock& lock, std::span<const Move> moves, bool read_too, uint64_t before_serial,
                     const Cancellation* cancellation = nullptr);

  static BlockView View(const BlockStore& store, const Block& block, absl::Time now);
  // Blocks of the tier that may be recoded, the coldest of the most bits, as many as would free `bytes`, by
  // where they lie.
  static std::vector<BlockView> ViewRecodable(const BlockStore& store, int tier, size_t bytes,
                                              uint64_t before_serial, absl::Time now);
  // Drops blocks of prefixes and of keys that the tenant has in this tier, and nobody uses, until its quota
  // leaves so many bytes there; none if they are not enough.
  bool DropCached(CacheState& state, const TenantAccount& account, int tier, size_t bytes) const;
  // What a tier may take, as the policy sees it.
  static void ViewRoom(const Tier& tier, bool gathered, TierView* view);
  // The same for what comes down into the tier: it leaves room to recode a block in, where there is nothing
  // below.
  static void ViewRoomBelow(const CacheState& state, int tier, bool gathered, TierView* view);

 private:
  enum class Free : uint8_t { kInOnePiece, kGathered };
  enum class Search : uint8_t { kNear, kWholeTier };

  Snapshot View(const CacheState& state, int tier, size_t bytes, uint64_t before_serial, Free free) const;
  bool Demote(CacheLock& lock, int tier, size_t bytes, size_t want_bytes, uint64_t before_serial, Free free);
  // Recodes what may be, if a new block of `bytes` would leave no room to recode another one.
  void KeepSpare(CacheLock& lock, int tier, size_t bytes);
  bool Drop(CacheState& state, const Move& move, MoveReport* report) const;
  void Recode(CacheLock& lock, const Move& move, uint64_t before_serial, MoveBatch& batch,
              MoveReport* report);
  // One free extent of `bytes` out of what is free already: blocks in the way move inside the tier, some of
  // those that were touched before `serial` may go down. True if the tier has it.
  bool MakeHole(CacheLock& lock, int tier, size_t bytes, Search search, uint64_t before_serial);
  StretchView ViewStretch(const CacheState& state, int tier, size_t from, size_t bytes,
                          uint64_t before_serial, size_t* next) const;
  void Dig(CacheLock& lock, int tier, const HolePlan& plan);

  CacheCore& core_;
  std::vector<size_t> next_stretch_;  // by tier: where the search for a hole goes on; under the mutex
};

// The device with most room.
int RoomiestHome(const BlockStore& store);

// Gives the mutex up long enough for another thread to get it: long work does so between its slices.
void LetOthers(CacheLock& lock);

}  // namespace kvtide
