// A chunk: the entries of a block table for 64 consecutive block numbers. All forks whose tables are equal
// there have the same chunk; whoever changes its own table first gets a copy of it (block_table.h). So forks,
// reference counts and statistics cost what chunks there are, not what blocks.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "absl/container/inlined_vector.h"

namespace kvtide {

struct Block;
class ChunkPicture;
class TableFamily;

constexpr int kChunkBlocks = 64;

struct BlockCount {
  uint64_t blocks = 0, bytes = 0;
};

struct Chunk {
  std::array<Block*, kChunkBlocks> blocks{};    // by block number % kChunkBlocks; null: no entry
  int count = 0;                                // entries
  int sole = 0;                                 // of these, blocks whose only entry in any chunk this is
  int dropped = 0;                              // of these, blocks without bytes
  int degraded = 0;                             // of these, blocks with bytes of fewer bits than asked for
  absl::InlinedVector<BlockCount, 2> tiers;     // of the entries, where they lie
  int owners = 0;                               // tables that have it
  int keepers = 0;                              // of these, of sequences that do not allow drops
  std::shared_ptr<const ChunkPicture> picture;  // null: stale, made again when somebody reads
  TableFamily* family = nullptr;                // the tables that may have it
};

}  // namespace kvtide
