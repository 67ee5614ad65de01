// A block of 64 tokens of one sequence and layer group, and the place where its bytes lie. Both belong to the
// BlockStore and are guarded by the cache's mutex; the bytes are read and written without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/container/inlined_vector.h"
#include "absl/time/time.h"
#include "daemon/cache/block_id.h"
#include "daemon/cache/cache_stats.h"
#include "daemon/cache/chunk.h"
#include "daemon/cache/recency.h"
#include "daemon/cache/tenants.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

struct Block;
struct PrefixSpace;

// An extent of a tier's slab. Its bytes neither move nor are reused while a picture names it (chunk pictures,
// which readers hold) or a running copy works on it: a place that its block has left lives on until then.
struct Place {
  int tier = 0;  // index into CacheOptions::tiers
  size_t offset = 0;
  size_t bytes = 0;           // of the block
  size_t extent = 0;          // that are taken for it
  std::byte* data = nullptr;  // perhaps a device pointer; null in a tier of I/O
  uint64_t write_id = 0;      // of what was written there, in a tier of I/O,
  uint64_t profile_hash = 0;  // the profile that it was coded with,
  uint64_t checksum = 0;      // and XXH3
  int pictures = 0;
  int pins = 0;                      // copies and seals that run
  int keeps = 0;                     // durable manifests that name it
  bool retired = false;              // no block uses it; freed with the last picture, pin and keep
  size_t pair_index = 0;             // PairIndexOf, for statistics
  Block* block = nullptr;            // that lies here; null: reserved by a move, or retired
  TenantAccount* account = nullptr;  // where its extent is counted; null: nowhere
  Block* backup_of = nullptr;        // retired: the block whose bytes, as they are now, lie here too
};

// Whose bytes these are; checked when they come back from a place that others can write to.
struct OwnerStamp {
  uint64_t model_hash = 0;       // of its name and geometry
  SequenceId sequence = 0;       // the one that wrote it; forks share the block
  uint64_t name_space_hash = 0;  // XXH3
  int group = 0;
  int64_t index = 0;
  BlockKey key;  // of a block that is found by key; zeros: it is not
  bool operator==(const OwnerStamp&) const = default;
};

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

struct Block {
  BlockId id = 0;                          // never used again
  const BlockLayout* layout = nullptr;     // null: opaque
  std::shared_ptr<const Profile> profile;  // of coded blocks
  size_t bytes = 0;
  Place* place = nullptr;   // null: dropped
  Place* backup = nullptr;  // with the same bytes, kept by manifests
  int home = 0;             // device of the first tier that its sequences live on
  // The block lives while it is in a chunk, has a direct entry, is a block of a prefix or is held.
  bool keyed = false;             // it has a direct entry of the index of keys (keyed_index.h)
  PrefixSpace* prefix = nullptr;  // where the index of prefixes finds it (prefix_index.h); null: it does not,
  BlockKey prefix_key;            // and by what
  bool durable = false;           // keyed: a place of it is kept for a restart
  bool checked = true;            // keyed or cached prefix: false after a restart, until its label was seen
  int leases = 0;                 // of clients that are about to load it: not dropped
  absl::InlinedVector<Chunk*, 1> chunks;  // that have it
  int direct_entries = 0;                 // twins of seal_at_once, which are in no chunk
  int direct_keepers = 0;                 // of these, of sequences that do not allow drops
  int holds = 0;                          // running calls that have the pointer
  bool writing = false;                   // an append or seal fills it; not moved, not dropped
  bool moving = false;                    // being copied to another tier; not written
  // Rows that a reader may still see were truncated away; the next writer copies the block while it is read.
  bool copy_before_write = false;
  OwnerStamp stamp;
  TenantAccount* account = nullptr;  // of the tenant that wrote it
  int codec_version_k = 0, codec_version_v = 0;
  bool has_checksum = false;
  uint64_t checksum = 0;  // XXH3 of the bytes, computed on arrival in a tier that wants it; always with I/O
  // In the list of its record and tier; null record: not in a table yet, or dropped.
  RecencyPtr record;
  Block* previous = nullptr;
  Block* next = nullptr;

  // Entries of all tables, and those of sequences that do not allow drops.
  int references() const {
    int count = direct_entries;
    for (const Chunk* chunk : chunks) count += chunk->owners;
    return count;
  }
  int keepers() const {
    int count = direct_keepers;
    for (const Chunk* chunk : chunks) count += chunk->keepers;
    return count;
  }
  // By tables, by its key or as a prefix: it is wanted.
  bool used() const { return prefix != nullptr || references() > 0; }
  // One table has it and nobody finds it: who writes into it changes no other's tokens.
  bool owned() const { return references() == 1 && prefix == nullptr; }
  bool droppable() const { return used() && keepers() == 0 && leases == 0; }
  BlockForm form() const { return layout != nullptr ? BlockForm(layout) : BlockForm::Opaque(bytes); }
};

// Counts the place for a tenant, once.
inline void Charge(Place* place, TenantAccount* account) {
  if (account == nullptr || place->account != nullptr) return;
  place->account = account;
  account->tier_bytes[static_cast<size_t>(place->tier)] += place->extent;
  account->places++;
}

}  // namespace kvtide
