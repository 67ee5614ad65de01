// A block of 64 tokens of one sequence and layer group, and the place where its bytes lie. Both belong to the
// BlockStore and are guarded by the cache's mutex; the bytes are read and written without it, under pins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/time/time.h"
#include "daemon/cache/cache_stats.h"
#include "daemon/cache/eviction_policy.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

struct Block;

// An extent of a tier's slab. Pinned bytes neither move nor are reused: a place that its block has left lives
// on until the last pin falls.
struct Place {
  int tier = 0;  // index into CacheOptions::tiers
  size_t offset = 0;
  size_t bytes = 0;
  std::byte* data = nullptr;  // perhaps a device pointer
  int pins = 0;
  bool retired = false;    // no block uses it; freed with the last pin
  CachePair pair;          // for statistics
  Block* block = nullptr;  // that lies here; null: reserved by a move, or retired
};

// Whose bytes these are; checked when they come back from a place that others can write to.
struct OwnerStamp {
  ModelId model = 0;
  SequenceId sequence = 0;  // the one that wrote it; forks share the block
  uint64_t name_space_hash = 0;
  int group = 0;
  int64_t index = 0;
  bool operator==(const OwnerStamp&) const = default;
};

struct Block {
  BlockId id = 0;  // never used again
  const BlockLayout* layout = nullptr;
  std::shared_ptr<const Profile> profile;  // of coded blocks
  Place* place = nullptr;                  // null: dropped
  int home = 0;                            // device of the first tier that its sequences live on
  // The block lives while refs + holds > 0; its bytes while refs > 0, something pins them, or they are being
  // moved.
  int refs = 0;          // entries in block tables
  int keepers = 0;       // of these, sequences that do not allow drops
  int holds = 0;         // running calls that have the pointer
  bool writing = false;  // an append or seal fills it; not moved, not dropped
  bool moving = false;   // being copied to another tier; not written
  bool wanted = false;   // in the list of blocks that attention wants in a faster tier
  // Rows that a reader may still see were truncated away; the next writer copies the block while it is
  // pinned.
  bool copy_before_write = false;
  OwnerStamp stamp;
  int codec_version_k = 0, codec_version_v = 0;
  bool has_checksum = false;
  uint64_t checksum = 0;  // XXH3 of the bytes, computed on arrival in a tier that wants it
  uint64_t touch_serial = 0;
  absl::Time last_touched;
};

}  // namespace kvtide
