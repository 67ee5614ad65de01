// What the attention kernels of one call read: plain structs in device memory, filled by the planner of attend_plan.cc
// (or on the device). A *unit* is one run of blocks of one sequence, one KV head and up to kRows query rows, read by one
// kernel launch. All pages of all units of a launch are numbered in a row; each of the persistent CTAs takes an equal
// contiguous share. A CTA that meets a unit leaves one partial state of it in slot (unit index + CTA index), which is
// unique because both only grow along the shares. Slots are merged by the combine kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <cuda_runtime.h>

namespace kvtide::cuda {

struct alignas(16) AttendUnit {
  const std::byte* const* blocks = nullptr;  // device memory: block of page 0, 1, ...
  uint64_t record_offset = 0;                // of the layer and KV head inside a block
  const void* query = nullptr;               // head vector of row 0 of query 0
  const float* gain = nullptr;               // [head_dim_k] or null = 1
  const float* mean = nullptr;               // [head_dim_k] or null = 0
  int64_t query_stride = 0;                  // elements from one query token to the next
  uint32_t first_page = 0, pages = 0;        // place in the launch
  int32_t tokens = 0;                        // tokens that count, from page 0 on
  int32_t first_row = 0, rows = 0;           // row = query * rows_per_query + head within the group
  int32_t rows_per_query = 1;
  // Query i sees tokens [window_begin + i, min(tokens, causal_end + i)), counted from page 0; limits where unused.
  int32_t causal_end = 0, window_begin = 0;
};

// What one CTA reads. Its first unit is repeated here: the loads that a CTA begins with then depend on one load only.
struct alignas(16) AttendShare {
  uint32_t begin = 0, end = 0;  // pages of the launch
  uint32_t unit = 0;            // index of the first unit
  uint32_t padding = 0;
  AttendUnit first;
};

enum class QueryType : int32_t { kF32, kF16, kBf16 };
// kMatrix: an n x n matrix for each run of 128 dims, stored by columns with a stride of 128, for rotations without code here.
enum class RotationKind : int32_t { kNone, kHadamard, kMatrix };
struct Rotation {
  RotationKind kind = RotationKind::kNone;
  int32_t padding = 0;
  const float* matrix = nullptr;
  bool operator==(const Rotation&) const = default;
};

struct AttendParams {
  const AttendUnit* units = nullptr;
  const AttendShare* shares = nullptr;  // one for each CTA
  float* outputs = nullptr;             // [slots][rows][DV], unnormalised
  float2* sums = nullptr;               // [slots][rows]: reference exponent (base 2) and sum of weights
  int32_t head_dim = 0;                 // of K, not padded
  QueryType query_type = QueryType::kF32;
  Rotation k_rotation;    // forward
  float scale = 0;        // softmax scale times log2(e)
  float softcap = 0;      // times log2(e); 0 = none
};

// A unit's slots, as the combine kernel sees them.
struct alignas(16) CombineSource {
  const float* outputs = nullptr;  // first slot
  const float2* sums = nullptr;
  uint32_t slots = 0;
  int32_t slot_rows = 0;
  Rotation v_rotation;    // inverse
};

// One (sequence, KV head, tile of rows): its sources and where its output goes.
struct alignas(16) CombineGroup {
  void* output = nullptr;      // of row 0 of query 0
  float* lse = nullptr;        // same
  const float* sinks = nullptr;  // of head 0 of the group, or null
  int64_t output_stride = 0, lse_stride = 0;  // elements from one query to the next
  uint32_t first_source = 0, sources = 0;
  int32_t first_row = 0, rows = 0;
  int32_t rows_per_query = 1;
  int32_t padding = 0;
};

// Numbers the pages of the units of a launch and returns their count.
uint32_t NumberPages(std::vector<AttendUnit>* units);
// Equal contiguous shares of the pages for up to `ctas` CTAs; none is empty.
std::vector<AttendShare> CutShares(const std::vector<AttendUnit>& units, int ctas);
// The slots of unit `index` in its launch.
struct SlotRange {
  uint32_t first = 0, count = 0;
};
SlotRange SlotsOf(const std::vector<AttendUnit>& units, size_t index, size_t shares);
inline size_t SlotCount(size_t units, size_t shares) { return units + shares; }

struct CombineParams {
  const CombineGroup* groups = nullptr;
  const CombineSource* sources = nullptr;
  int32_t group_count = 0;
  int32_t rows = 0;      // rows of the widest group
  int32_t head_dim = 0;  // of V, not padded
  QueryType output_type = QueryType::kF32;
};

}  // namespace kvtide::cuda
