// A block of 64 tokens of one sequence and layer group, and the place where its bytes lie. Both belong to the
// BlockStore and are guarded by the cache's mutex; the bytes are read and written without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>

#include "absl/time/time.h"
#include "daemon/cache/block/chunk_list.h"
#include "daemon/cache/block/ladder.h"
#include "daemon/cache/block/recency.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/tenants.h"
#include "daemon/cache/tier/block_id.h"
#include "daemon/cache/tier/extent_allocator.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

struct PrefixSpace;

// An extent of a tier's slab. Its bytes neither move nor are reused while a picture names it (chunk pictures,
// which readers hold) or a running copy works on it: a place that its block has left lives on until then.
struct Place {
  // What was written there, in a tier of I/O; null: nothing, or memory.
  struct Writing {
    uint64_t write_id = 0;
    uint64_t profile_hash = 0;  // the profile that it was coded with,
    uint64_t checksum = 0;      // and XXH3
    int keeps = 0;              // durable manifests that name the place
  };

  size_t offset = 0;
  std::unique_ptr<Writing> writing;
  TenantAccount* account = nullptr;  // where its extent is counted; null: nowhere
  uint32_t extent_units = 0;         // that are taken, in ExtentAllocator::kAlignment bytes
  // Of the block that lies here; none: reserved by a move. Retired: of the one whose bytes, as they are now,
  // lie here too.
  uint32_t block = kNoSlot;
  int pictures = 0;
  int pins = 0;               // copies and seals that run
  uint32_t slot = kNoSlot;    // its own
  uint16_t pair_index = 0;    // PairIndexOf, for statistics
  int8_t tier = 0;            // index into CacheOptions::tiers
  bool retired : 1 = false;   // no block uses it; freed with the last picture, pin and keep
  bool compared : 1 = false;  // its bytes with the checksum, by a load in place

  size_t extent() const { return extent_units * ExtentAllocator::kAlignment; }
  int keeps() const { return Written().keeps; }
  const Writing& Written() const {
    static const Writing kNothing;
    return writing != nullptr ? *writing : kNothing;
  }
  Writing& Written() {
    if (writing == nullptr) writing = std::make_unique<Writing>();
    return *writing;
  }
};
// A million of them are common: what few have goes beside them.
static_assert(sizeof(Place) == 48);

// What a block's bytes are.
struct BlockForm {
  const BlockLayout* layout = nullptr;  // null: bytes that mean nothing to us
  size_t bytes = 0;
  BlockForm(const BlockLayout* of) : layout(of), bytes(of->block_bytes()) {}  // NOLINT: implicit on purpose
  static BlockForm Opaque(size_t bytes) { return BlockForm(bytes); }

 private:
  explicit BlockForm(size_t opaque_bytes) : bytes(opaque_bytes) {}
};

// Index of a pair in Tier::pairs, and that of bytes which have none.
inline size_t PairIndex(CachePair pair) {
  return static_cast<size_t>(pair.k) * static_cast<size_t>(kCacheTypes) + static_cast<size_t>(pair.v);
}
constexpr size_t kOpaquePairIndex = static_cast<size_t>(kCacheTypes) * static_cast<size_t>(kCacheTypes);
inline size_t PairIndexOf(const BlockForm& form) {
  return form.layout != nullptr ? PairIndex(form.layout->pair()) : kOpaquePairIndex;
}

// What the blocks of one layer group of a sequence, or of one namespace, have in common. The store has each
// kind once and counts its blocks; a block's kind changes as a whole (BlockStore::SetKind).
struct BlockKind {
  const BlockLayout* layout = nullptr;     // null: opaque
  const Ladder* ladder = nullptr;          // of coded blocks that may be recoded for room; null: not these
  std::shared_ptr<const Profile> profile;  // of coded blocks
  size_t bytes = 0;
  int home = 0;                            // device of the first tier that its sequences live on
  std::shared_ptr<TenantAccount> account;  // of the tenant that wrote it
  PrefixSpace* prefix = nullptr;  // where the index of prefixes finds it (prefix_index.h); null: it does not
  // Whose bytes these are; checked when they come back from a place that others can write to.
  uint64_t model_hash = 0;       // of its name and geometry
  uint64_t name_space_hash = 0;  // XXH3
  int group = 0;
  bool stamped_with_key = false;  // Block::key says it too
  mutable uint64_t blocks = 0;    // that are of it, counted by the store

  auto What() const {
    return std::make_tuple(layout, ladder, profile.get(), bytes, home, account.get(), prefix, model_hash,
                           name_space_hash, group, stamped_with_key);
  }
  bool operator==(const BlockKind& other) const { return What() == other.What(); }
  // What its blocks are recoded as next; null: nothing.
  const BlockLayout* NextRung() const { return ladder != nullptr ? ladder->Below(layout) : nullptr; }
  // They were recoded to fewer bits than their owners asked for.
  bool IsDegraded() const { return ladder != nullptr && layout != ladder->rungs.front(); }
  template <class H>
  friend H AbslHashValue(H h, const BlockKind& kind) {
    return H::combine(std::move(h), kind.What());
  }
};

struct Block {
  BlockId id = 0;  // never used again
  const BlockKind* kind = nullptr;
  Place* place = nullptr;   // null: dropped
  SequenceId sequence = 0;  // the one that wrote it; forks share the block
  // By which it is found, or was, or would be: in its namespace, or as a block of a prefix.
  BlockKey key;
  uint64_t checksum = 0;  // XXH3 of the bytes, computed on arrival in a tier that wants it; always with I/O
  // The block lives while it is in a chunk, has a direct entry, is a block of a prefix or is held.
  ChunkList chunks;             // that have it
  int32_t index = 0;            // block number in the sequence that wrote it
  RecordSlot record = kNoSlot;  // none: not in a table yet, or dropped
  // In the list of its record and tier.
  uint32_t previous = kNoSlot, next = kNoSlot;
  int leases = 0;  // of clients that are about to load it: not dropped
  int holds = 0;   // running calls that have the pointer
  // Entries in no chunk, of which there are not more than sequences: twins of seal_at_once, and that of the
  // index of keys; and those of sequences that do not allow drops.
  uint64_t direct_entries : 24 = 0;
  uint64_t direct_keepers : 24 = 0;
  bool keyed : 1 = false;    // it has a direct entry of the index of keys (keyed_index.h)
  bool durable : 1 = false;  // keyed: a place of it is kept for a restart
  bool checked : 1 = true;   // keyed or cached prefix: false after a restart, until its label was seen
  bool offered : 1 = false;  // to the remote tier, because it is about to be dropped here
  bool writing : 1 = false;  // an append or seal fills it; not moved, not dropped
  bool moving : 1 = false;   // being copied to another tier; not written
  bool copy_before_write : 1 = false;  // a reader may still see rows that were truncated away: whoever writes
                                       // next copies the block while it is read
  bool has_checksum : 1 = false;
  bool has_backup : 1 = false;  // a place with the same bytes, kept by manifests (BlockStore::Backup)

  const BlockLayout* layout() const { return kind->layout; }
  const std::shared_ptr<const Profile>& profile() const { return kind->profile; }
  size_t bytes() const { return kind->bytes; }
  int home() const { return kind->home; }
  TenantAccount* account() const { return kind->account.get(); }
  PrefixSpace* prefix() const { return kind->prefix; }
  int group() const { return kind->group; }

  // Entries of all tables, and those of sequences that do not allow drops.
  int references() const {
    int count = static_cast<int>(direct_entries);
    for (const Chunk* chunk : chunks) count += chunk->owners;
    return count;
  }
  int keepers() const {
    int count = static_cast<int>(direct_keepers);
    for (const Chunk* chunk : chunks) count += chunk->keepers;
    return count;
  }
  // By tables, by its key or as a prefix: it is wanted.
  bool used() const { return prefix() != nullptr || references() > 0; }
  // One table has it and nobody finds it: who writes into it changes no other's tokens.
  bool owned() const { return references() == 1 && prefix() == nullptr; }
  bool droppable() const { return used() && keepers() == 0 && leases == 0; }
  BlockForm form() const { return layout() != nullptr ? BlockForm(layout()) : BlockForm::Opaque(bytes()); }
};
static_assert(sizeof(Block) == 96);

// Counts the place for a tenant, once.
inline void Charge(Place* place, TenantAccount* account) {
  if (account == nullptr || place->account != nullptr) return;
  place->account = account;
  account->tier_bytes[static_cast<size_t>(place->tier)] += place->extent();
  account->places++;
}

}  // namespace kvtide
