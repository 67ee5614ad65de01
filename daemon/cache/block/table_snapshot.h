// TableSnapshot: an immutable picture of a block table, with which readers work while the mutex is free. It
// is made of chunk pictures, one for each chunk; a change makes only the pictures of its chunks anew. Places
// that a picture names keep their bytes. The last owner of a snapshot or picture lets it go under the mutex.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/call_once.h"
#include "daemon/cache/block/block.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

class BlockStore;

class ChunkPicture {
 public:
  // Neighbours of equal layout, profile and tier.
  struct Run {
    int first = 0, count = 0;  // slots of the chunk
    const BlockLayout* layout = nullptr;
    std::shared_ptr<const Profile> profile;
    int tier = 0;  // kDropped: blocks without bytes
  };
  static constexpr int kDropped = -1;

  ChunkPicture(BlockStore* store, const Chunk& chunk);
  ~ChunkPicture();
  ChunkPicture(const ChunkPicture&) = delete;
  ChunkPicture& operator=(const ChunkPicture&) = delete;

  const std::vector<Run>& runs() const { return runs_; }
  Place* place(int slot) const { return places_[static_cast<size_t>(slot)]; }

 private:
  BlockStore* const store_;
  std::vector<Run> runs_;
  std::array<Place*, kChunkBlocks> places_{};
};

// Consecutive blocks of equal layout, profile and tier, ready to attend.
struct SnapshotRun {
  const BlockLayout* layout = nullptr;
  std::shared_ptr<const Profile> profile;
  int tier = 0;             // ChunkPicture::kDropped: blocks without bytes, whose `blocks` are null
  int64_t first_block = 0;  // block number of blocks[0]
  std::span<std::byte* const> blocks;
  int64_t end_block() const { return first_block + static_cast<int64_t>(blocks.size()); }
};

class TableSnapshot {
 public:
  TableSnapshot(BlockStore* store, int64_t first_block, int64_t end_block,
                std::vector<std::shared_ptr<const ChunkPicture>> pictures);
  ~TableSnapshot();
  TableSnapshot(const TableSnapshot&) = delete;
  TableSnapshot& operator=(const TableSnapshot&) = delete;

  // Names the content: no other snapshot has it.
  uint64_t serial() const { return serial_; }
  int64_t first_block() const { return first_block_; }
  int64_t end_block() const { return end_block_; }
  // In order and without gaps from first_block to end_block; merged over the borders of chunks. Made once, by
  // whoever asks first, without the mutex.
  std::span<const SnapshotRun> runs() const;
  // The runs that have blocks of [begin, end).
  std::span<const SnapshotRun> RunsOf(int64_t begin, int64_t end) const;

 private:
  BlockStore* const store_;
  const uint64_t serial_;
  const int64_t first_block_, end_block_;
  const std::vector<std::shared_ptr<const ChunkPicture>> pictures_;
  mutable absl::once_flag once_;  // the standard's wakes waiters by a system call, though there are none
  mutable std::vector<std::byte*> blocks_;
  mutable std::vector<SnapshotRun> runs_;
};

}  // namespace kvtide
