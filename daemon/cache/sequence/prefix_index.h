// The index of prefixes: sealed blocks of sequences whose token ids are known, found by the hash of all
// tokens up to their end (token_chain.h). The index keeps a block alive and allows drops: when
// the last sequence that has the block is closed, it stays as a cached prefix until the policy drops it.
// Guarded by the cache's mutex (it is part of CacheState).
//
// What hashes are unique in is a space: tenant, model, salt, and everything that decides what bytes a token
// becomes (pairs, exact window, profile, codec versions, layouts). Spaces are told apart by all of it, not by
// a hash, and share nothing. The coded blocks of a prefix have one profile, as those of any sequence do, so
// that an engine that attends by itself reads them with one: where equal tokens gave other keys, and these
// another mean, what came first is found, and the rest of the other ones is not.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "daemon/cache/block/blocks_by_key.h"
#include "daemon/cache/block/priority_records.h"
#include "daemon/cache/block/unsent_blocks.h"
#include "daemon/cache/sequence/sequence.h"

namespace kvtide {

struct PrefixSpace {
  explicit PrefixSpace(const BlockStore* store) : blocks(store) {}

  std::string identity;
  int home = 0;       // device of the first tier where its blocks live
  uint64_t seed = 0;  // of the hashes; the same on every device
  std::shared_ptr<const ModelState> model;
  std::string tenant;
  std::vector<int64_t> windows;  // by layer group
  BlocksByKey blocks;
};

// Part of a manifest of a sequence that was closed: blocks of a prefix that are there after a restart.
struct PrefixRun {
  uint64_t id = 0;      // in the durable index
  int64_t written = 0;  // Unix nanoseconds
  // Its blocks, of which some may be no more, and where the durable tier keeps them for it: a block may have
  // been written there once more since.
  std::vector<std::pair<BlockId, Place*>> blocks;
  size_t live = 0;  // of them
};

class PrefixIndex {
 public:
  explicit PrefixIndex(BlockStore* store);

  // The space of a sequence's blocks on its device, made if it is not there.
  PrefixSpacePtr Open(const Sequence& sequence);
  // The same on another device; null where nothing is cached.
  PrefixSpacePtr Find(const Sequence& like, int home) const;
  // Seed of the hashes in the sequence's space.
  static uint64_t Seed(const Sequence& sequence);
  static std::string Identity(const Sequence& sequence);
  // What a coded block of its tokens takes in all layer groups.
  static uint64_t BlockBytes(const Sequence& sequence);

  // Null if it is not there.
  static Block* Get(const PrefixSpace& space, const BlockKey& key, int group) {
    return space.blocks.Find(key, group);
  }
  // A block of a sequence, which is in no space yet: found from now on.
  void Insert(PrefixSpace& space, const BlockKey& key, int group, Block* block);
  // The sealed blocks of the sequence that are new: found from now on; where others have the same tokens the
  // sequence gets theirs, and its own go. At most `most` blocks are found in all. The caller is its writer.
  // `unsent`, if it is not null, hears of what was not found before. Returns how many were dropped to make
  // place.
  uint64_t Register(Sequence& sequence, uint64_t most, UnsentBlocks* unsent);
  // Where equal tokens have two copies, the sequence's own is found from now on if it is better and the other
  // is not.
  void Prefer(const Sequence& sequence, absl::FunctionRef<bool(const Block&)> better);
  // The hash of a full block of the sequence's known tokens, and of all of them. Of old blocks it is kept by
  // the block, in a group without a sliding window; where all groups have one, by the chain.
  static BlockKey KeyOf(const Sequence& sequence, int64_t index);
  static std::vector<BlockKey> KeysOf(const Sequence& sequence);
  // The chain forgets the hashes of what was registered, as its blocks have them.
  static void ForgetKeys(Sequence& sequence);
  // The most full blocks from the first one on that a sequence can begin with: of every group those that the
  // next token would see.
  struct Prefix {
    int64_t blocks = 0;         // full ones, from the first one on
    std::vector<Block*> there;  // of the keys that were looked up: group by group for each; null: not there
  };
  static Prefix Longest(const PrefixSpace& space, std::span<const BlockKey> keys);
  // A block of a prefix: there or not, with which profile if it is coded. A prefix has one profile.
  struct Presence {
    bool there = false, coded = false;
    uint64_t profile = 0;
  };
  static Presence PresenceOf(const Block* block);  // null: it is not there
  // The same for blocks 0 to count - 1 of which presence(index, group) tells.
  template <class Ask>
  static int64_t Longest(const PrefixSpace& space, size_t count, const Ask& presence) {
    int64_t longest = 0;
    absl::InlinedVector<int64_t, 2> there(space.windows.size(), 0);  // up to here, without a gap
    absl::InlinedVector<Presence, 2> coded(space.windows.size());    // the last one
    for (int64_t i = 0; i < static_cast<int64_t>(count); i++) {
      bool whole = true, any = false;
      for (size_t g = 0; g < there.size(); g++) {
        const Presence block = presence(static_cast<size_t>(i), g);
        any = any || block.there;
        there[g] = block.there ? there[g] + 1 : 0;
        if (block.there && block.coded) {
          if (coded[g].there && coded[g].profile != block.profile) there[g] = 1;
          coded[g] = block;
        }
        whole = whole && there[g] >= i + 1 - FirstBlock(space, static_cast<int>(g), i + 1);
      }
      if (!any) break;
      if (whole) longest = i + 1;
    }
    return longest;
  }
  // First block that a prefix of so many blocks has in the group.
  static int64_t FirstBlock(const PrefixSpace& space, int group, int64_t blocks);
  // What nobody else has goes by this order from now on: the end of a prefix before its beginning. Each block
  // keeps its priority.
  void Order(std::span<Block* const> blocks, PriorityRecords* records);

  // Forgets what belongs to the model, and says which runs are over.
  void Forget(const ModelState& model);

  uint64_t blocks() const { return blocks_; }
  uint64_t durable_blocks() const { return runs_of_.size(); }
  size_t spaces() const { return spaces_.size(); }
  // A run whose places are kept for it (BlockStore::Keep).
  void EnterRun(std::unique_ptr<PrefixRun> run);
  bool IsDurable(const Block& block) const { return runs_of_.contains(block.id); }
  bool HasRun(uint64_t id) const { return runs_.contains(id); }
  // The one that was written first; 0: there is none but `besides`.
  uint64_t OldestRun(uint64_t besides) const;
  // Nothing is kept for it any more.
  void LeaveRun(uint64_t id);
  // Runs without blocks: to be taken from the durable index.
  std::vector<uint64_t> TakeDeadRuns() { return std::exchange(dead_runs_, {}); }
  void GiveDeadRuns(std::span<const uint64_t> ids) {
    dead_runs_.insert(dead_runs_.end(), ids.begin(), ids.end());
  }

  void CheckInvariants() const;
  // Gives everything back. No call may be running.
  void Clear();

 private:
  using Name = std::pair<std::string, int>;  // identity, home

  bool Continues(const Sequence& sequence, size_t group, int64_t index) const;
  // A block that is about to be dropped, or is not wanted any more, is not found from now on.
  void Leave(Block* block);
  void SetSpace(Block* block, PrefixSpace* space);
  // Drops the coldest block that no sequence has.
  bool DropColdest();

  BlockStore* const store_;
  std::map<Name, PrefixSpacePtr> spaces_;
  size_t sweep_at_ = 64;
  uint64_t blocks_ = 0;
  std::map<uint64_t, std::unique_ptr<PrefixRun>> runs_;
  struct Kept {
    PrefixRun* run = nullptr;
    Place* place = nullptr;
  };
  std::set<std::pair<int64_t, uint64_t>> ages_;  // of runs: when written, id
  absl::flat_hash_map<BlockId, absl::InlinedVector<Kept, 1>> runs_of_;
  std::vector<uint64_t> dead_runs_;
};

}  // namespace kvtide
