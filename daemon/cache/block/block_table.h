// The block table of one layer group of a sequence: block number -> block, as a row of chunks that forks
// share, and the snapshot that readers take of it. Guarded by the cache's mutex.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/cache/block/block_store.h"
#include "daemon/cache/block/table_snapshot.h"

namespace kvtide {

class BlockTable;

// The tables that may share chunks: that of a sequence and those of its forks. It knows which of them keep a
// snapshot, so that a block that moves makes them stale.
class TableFamily {
 public:
  void DropSnapshots();

 private:
  friend class BlockTable;
  std::vector<BlockTable*> with_snapshot_;
};

class BlockTable {
 public:
  // `keeper`: the sequence does not allow drops.
  BlockTable(BlockStore* store, bool keeper);
  ~BlockTable() { Clear(); }
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;

  // An equal table for a fork: shares every chunk.
  std::unique_ptr<BlockTable> Fork() const;

  bool empty() const { return first_ == end_; }
  int64_t first() const { return first_; }  // block number of the first entry
  int64_t end() const { return end_; }      // one beyond the last
  Block* at(int64_t index) const {
    return chunks_[ChunkOf(index)]->blocks[static_cast<size_t>(index % kChunkBlocks)];
  }
  template <class F>
  void ForEach(F f) const {
    for (int64_t index = first_; index < end_; index++) f(at(index));
  }

  // Changes. A block that is put in goes by the record from then on.
  void PushBack(Block* block, const RecencyPtr& record);
  void Replace(int64_t index, Block* block, const RecencyPtr& record);
  void PopBack();
  void PopFront();
  void Clear();                 // the next block has number 0
  void StartAt(int64_t index);  // an empty table: the next block has this number
  // What was shown of this block is not kept, because its profile has changed or to see who still reads it.
  void MakeStale(int64_t index);

  // What the table shows now, made anew only if it has changed. A snapshot is let go under the mutex.
  const std::shared_ptr<const TableSnapshot>& Snapshot();

  const std::vector<Chunk*>& chunks() const { return chunks_; }
  // Block number of the first slot of chunk `i`.
  int64_t ChunkBegin(size_t i) const { return (first_chunk_ + static_cast<int64_t>(i)) * kChunkBlocks; }

 private:
  friend class TableFamily;
  size_t ChunkOf(int64_t index) const { return static_cast<size_t>(index / kChunkBlocks - first_chunk_); }
  // The chunk of this block as this table's own, about to be changed.
  Chunk& Own(int64_t index);
  void DropSnapshot();

  BlockStore* const store_;
  const bool keeper_;
  std::shared_ptr<TableFamily> family_;
  std::vector<Chunk*> chunks_;
  int64_t first_chunk_ = 0;
  int64_t first_ = 0, end_ = 0;
  std::shared_ptr<const TableSnapshot> snapshot_;
  size_t family_slot_ = 0;  // in TableFamily::with_snapshot_, while snapshot_ is set
};

}  // namespace kvtide
