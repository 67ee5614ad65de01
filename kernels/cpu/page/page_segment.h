// What a page kernel is given: the pages of one KV head in consecutive blocks, and the queries that look at
// it. Plain structs that name nothing of the catalogue, so that a new cache type does not compile the vector
// kernels again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cpu/page/code_table.h"
#include "kernels/format/rope.h"

namespace kvtide {

class BlockLayout;
struct HeadProfile;

// What keys of a calibrated type are rebuilt with (tide.h, rope.h), in place of a profile. Attention rebuilds
// those that were coded before RoPE; to others queries come in their own frame, as to every coded type.
struct KeyRebuild {
  int dim = 0;                         // of the head
  const uint8_t* widths = nullptr;     // [dim / 8]
  const float* inverse = nullptr;      // [dim][dim]
  const float* centre = nullptr;       // [dim]
  const float* frequencies = nullptr;  // [turned]
  int turned = 0;                      // pairs of channels
  RopePairs pairs = RopePairs::kHalves;
  bool before_rope() const { return turned > 0; }
};

// One half (K or V) of the records of a segment.
struct HalfShape {
  const CodeTable* table = nullptr;
  int dim = 0;                   // stored dim
  int groups = 0;                // scales per token, 0 for f16 and bf16
  size_t codes = 0, scales = 0;  // offsets inside a record
  KeyRebuild rebuild;            // of calibrated tables
};

struct PageSegment {
  const BlockLayout* layout = nullptr;  // for the plain kernels, as the profile of the head is
  const HeadProfile* profile = nullptr;
  HalfShape k, v;
  size_t record_bytes = 0;
  size_t record_offset = 0;  // of the KV head's record inside a block
  std::span<std::byte* const> blocks;
  int64_t first_position = 0;  // of the first token of blocks[0]
  int64_t tokens = 0;          // tokens that count, from there on
};

// The queries that look at one KV head, one row for each (query, query head), ascending by query.
struct QueryRows {
  int rows = 0;
  const float* q = nullptr;        // [rows][stored_dim_k], in the frame in which K is stored
  const float* bias = nullptr;     // [rows], added to q.k; null = none
  const int64_t* begin = nullptr;  // [rows] row r sees positions begin[r] <= p < end[r]
  const int64_t* end = nullptr;
  float scale = 0, softcap = 0;  // as in AttendArgs
};

}  // namespace kvtide
