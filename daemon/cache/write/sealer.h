// What follows an append: the profile from the first block, blocks that fell out of a sliding window,
// sealing, and entering what was sealed into the index of prefixes. All of it may wait for the next append
// when there is no room; nothing here fails a call. The caller is the sequence's writer.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "daemon/cache/move/mover.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

class Sealer {
 private:
  struct Work;

 public:
  // A block on its way into its cache types. Made and destroyed under the mutex.
  struct Seal {
    Sequence* sequence = nullptr;
    int group = 0;
    int64_t index = 0;
    PinnedPlace source;
    WritingBlock target;
    std::shared_ptr<const Profile> profile;
    absl::Status status;
    Work* work = nullptr;  // null: whoever started it looks after it
    GroupTable& table() const { return sequence->groups[static_cast<size_t>(group)]; }
  };

  Sealer(CacheCore& core, Mover& mover) : core_(core), mover_(mover) {}

  // For the sequences of one call. Their blocks are coded together: one Recode for each tier and round. A
  // call that is not wanted any more, if `context` is not null, leaves further rounds to the next append.
  void Settle(CacheLock& lock, std::span<const SequencePtr> sequences, const CallContext* context);

  // Enters what is sealed by now into the index of prefixes.
  void Register(CacheState& state, std::span<const SequencePtr> sequences);

  // Where somebody else codes: room for at most so many blocks of the sequences that wait to be coded. Each
  // ends with Publish, when its bytes are written, or TakeBack.
  std::vector<Seal> Start(CacheLock& lock, std::span<const SequencePtr> sequences, size_t most);
  void Publish(CacheState& state, Seal& seal);
  static void TakeBack(Seal& seal);

 private:
  // A table with blocks to code: those of [table.sealed, end).
  struct Work {
    Sequence* sequence = nullptr;
    int group = 0;
    int64_t end = 0;
    bool stuck = false;  // no room, or an error: the rest waits for the next append
    GroupTable& table() const { return sequence->groups[static_cast<size_t>(group)]; }
  };

  void SettleTable(CacheLock& lock, Sequence& sequence, int group, std::vector<Work>& work);
  bool BringIn(CacheLock& lock, const GroupTable& table, int64_t index);
  bool MakeFirstBlockProfile(CacheLock& lock, GroupTable& table, int64_t end);
  // No room: blocks up to `end` stay exact until the next append.
  static void Defer(CacheState& state, GroupTable& table, int64_t end);
  void FreeFallenBlocks(CacheState& state, Sequence& sequence, GroupTable& table);
  // False when nothing is left to do.
  bool SealRound(CacheLock& lock, std::vector<Work>& work);
  void StartSeals(CacheLock& lock, Work& work, int64_t most, std::vector<Seal>& seals);
  void Recode(std::vector<Seal>& seals);

  CacheCore& core_;
  Mover& mover_;
};

}  // namespace kvtide
