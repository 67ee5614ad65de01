// What the attention kernels of one call read: plain structs in device memory, filled by the planner of
// attend_plan.cc (or on the device). A *unit* is one run of blocks of one sequence, one KV head and up to
// kRows query rows, read by one kernel launch. All pages of all units of a launch are numbered in a row, and
// every *worker*, a warp of a persistent CTA, takes an equal contiguous share. A worker that ends with a unit
// leaves a partial state of it in slot (unit index + worker index), which is unique because both only grow
// along the shares; the warps that end their CTA in the same unit leave one state together, in the slot of
// the first of them. Slots are merged by the combine kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/host_device.h"
#include "kernels/cuda/device/rotation.h"

namespace kvtide::cuda {

// What the attention kernel wants to know of a unit beside its pages and queries.
struct alignas(16) UnitRange {
  uint32_t first_page = 0, pages = 0;  // place in the launch
  int32_t tokens = 0;                  // tokens that count, from page 0 on
  int32_t first_row = 0, rows = 0;     // row = query * rows_per_query + head within the group
  int32_t rows_per_query = 1;
  // Query i sees tokens [window_begin + i, min(tokens, causal_end + i)), counted from page 0; limits where
  // unused.
  int32_t causal_end = 0, window_begin = 0;
};

struct alignas(16) AttendUnit : UnitRange {
  const std::byte* const* blocks = nullptr;  // device memory: block of page 0, 1, ...
  uint64_t record_offset = 0;   // of the KV head inside a block, beside AttendParams::layer_lines
  int64_t first_query = 0;      // element of AttendParams::query: row 0 of query 0
  const float* gain = nullptr;  // [head_dim_k] or null = 1, AttendParams::profile_offset values before
  const float* mean = nullptr;  // [head_dim_k] or null = 0, likewise
  int64_t query_stride = 0;     // elements from one query token to the next
  // Calibrated keys: the head's tables (tide_tables.h), AttendParams::table_offset before; and the position
  // of page 0's first token.
  const std::byte* tables = nullptr;
  int64_t position = 0;
};

inline constexpr int kMostWarps = 16;    // of an attention CTA
inline constexpr int kCombineWarps = 4;  // of a combine CTA

// Where a worker begins. Its first unit's block table and record offset are repeated here, so that its first
// copies wait for two loads only: this and the block's address.
struct alignas(16) AttendWorker {
  const std::byte* const* blocks = nullptr;  // address of the entry of page `begin`
  uint64_t record_offset = 0;                // beside AttendParams::layer_lines
  uint32_t begin = 0, end = 0;               // pages of the launch, which may be none
  uint32_t unit = 0;                         // index of the unit that page `begin` belongs to
  uint32_t unit_end = 0;                     // and that unit's last page + 1
  uint32_t last_unit = 0;                    // the unit of the last page of the worker's CTA
  // Of a joint launch: whether the CTA reads f16 pages, and its number among those that read the same form.
  uint32_t exact = 0, cta = 0;
  uint32_t padding = 0;
};

enum class QueryType : int32_t { kF32, kF16, kBf16 };

// One row of a partial state beside its unnormalised output.
struct alignas(8) StateHead {
  float reference, sum;  // exponent (base 2) that output and sum of weights are relative to
};

// What a launch is told beside its plan, which serves all layers of a group.
struct AttendParams {
  const AttendUnit* units = nullptr;
  const AttendWorker* workers = nullptr;  // one for each warp of each CTA
  std::byte* queries = nullptr;  // a query area for each unit, written by the query kernel (query_kernel.cuh)
  float* outputs = nullptr;      // [slots][rows][DV], unnormalised
  StateHead* sums = nullptr;     // [slots][rows]
  int32_t head_dim = 0;          // of K, not padded
  QueryType query_type = QueryType::kF32;
  Rotation k_rotation;  // forward
  float scale = 0;      // softmax scale times log2(e)
  float key_scale = 0;  // the same times AttendKernel::key_unit
  float softcap = 0;    // times log2(e); 0 = none
  // The layer: where its records begin in a block, in lines of 128 bytes, and how many values further on its
  // means and gains stand than those that the units name.
  uint32_t layer_lines = 0;
  int64_t profile_offset = 0;
  uint64_t table_offset = 0;    // bytes from the tables of calibrated keys that the units name
  const void* query = nullptr;  // what AttendUnit::first_query counts from
};
inline constexpr uint32_t kLineBytes = 128;

// A joint launch reads coded pages and f16 pages (joint_kernel.cuh): units, workers, slots and states are
// each form's own, but the workers stand in one table, kWarps of the coded kernel for each CTA.
struct JointParams {
  AttendParams coded, exact;
  const AttendWorker* workers = nullptr;
  uint32_t coded_units = 0;  // of the query kernel's CTAs, which are one for each unit; then come f16 units
};

// A unit's slots, as the combine kernel sees them.
struct alignas(16) CombineSource {
  uint64_t outputs = 0, sums = 0;       // slot 0 of the launch: bytes behind CombineParams::partials
  const uint32_t* slot_list = nullptr;  // which slots hold states of the unit
  uint32_t slots = 0;
  int32_t slot_rows = 0;
  Rotation v_rotation;           // inverse
  uint32_t first_slots[4] = {};  // the beginning of the list
};

// One (sequence, KV head, tile of rows): its sources and where its output goes. The first two sources, most
// often all, are repeated here, so that nothing but their states has to be waited for.
struct alignas(16) CombineGroup {
  int64_t first_output = 0, first_lse = 0;    // elements of CombineParams: row 0 of query 0
  int64_t output_stride = 0, lse_stride = 0;  // elements from one query to the next
  uint32_t first_source = 0, sources = 0;
  int32_t first_row = 0, rows = 0;
  int32_t rows_per_query = 1;
  int32_t team = 1;        // warps for each row
  int32_t first_head = 0;  // of the group, among the query heads
  int32_t padding = 0;
  CombineSource first[2];
};

// Numbers the pages of the units of a launch and returns their count.
uint32_t NumberPages(std::vector<AttendUnit>* units);
// Equal contiguous shares of the pages for the workers of up to `ctas` CTAs of `warps` warps; no CTA's share
// is empty.
std::vector<AttendWorker> CutShares(const std::vector<AttendUnit>& units, int ctas, int warps);
// Appends the slots that hold states of unit `index` when the launch is cut for `workers`, and returns their
// number.
uint32_t AppendSlots(const std::vector<AttendUnit>& units, size_t index, size_t workers, int warps,
                     std::vector<uint32_t>* slots);
// Worker i of `workers` reads pages WorkerBegin(i) .. WorkerBegin(i + 1); and the worker that reads a page.
KVTIDE_HD inline uint32_t WorkerBegin(uint64_t pages, uint64_t workers, uint64_t i) {
  return static_cast<uint32_t>(pages * i / workers);
}
KVTIDE_HD inline uint32_t WorkerOf(uint64_t pages, uint64_t workers, uint64_t page) {
  return static_cast<uint32_t>(((page + 1) * workers - 1) / pages);
}
inline size_t SlotCount(size_t units, size_t workers) { return units + workers; }

// How many of the CTAs (two or more) of a joint launch read its f16 pages, which are `exact_bytes` each: in
// proportion to what the pages cost, and at least one for each form that has pages. A coded page takes as
// long as 8/17 of its bytes and 3/17 of an f16 page's together would as an f16 page: narrow ones are bound by
// decoding, and of memory's bandwidth a CTA with coded pages gets more than one with f16 pages, having more
// warps. Measured with q8_0, turbo4 and turbo3.
KVTIDE_HD inline uint32_t ExactCtas(uint32_t ctas, uint64_t coded_pages, uint64_t coded_bytes,
                                    uint64_t exact_pages, uint64_t exact_bytes) {
  if (exact_pages == 0) return 0;
  if (coded_pages == 0) return ctas;
  const uint64_t exact = exact_pages * 17 * exact_bytes,
                 all = exact + coded_pages * (8 * coded_bytes + 3 * exact_bytes);
  const uint64_t share = (2 * exact * ctas + all) / (2 * all);
  return share < 1 ? 1 : share >= ctas ? ctas - 1 : static_cast<uint32_t>(share);
}
// The worker table of a joint launch: the CTAs of the coded form, then those of the f16 form, of which only
// the first `exact_warps` workers have work.
std::vector<AttendWorker> JoinWorkers(const std::vector<AttendWorker>& coded, int warps,
                                      const std::vector<AttendWorker>& exact, int exact_warps);
// Warps of the combine kernel that should share an output row when a unit has up to `slots` slots: 1, 2 or 4.
constexpr int CombineTeam(uint32_t slots) { return slots > 8 ? 4 : slots > 3 ? 2 : 1; }
// How many of a team's warps (two or more) take the second of a row's two sources: in proportion to the
// slots, and at least one for each.
KVTIDE_HD inline int SecondSourceWarps(int team, uint32_t first_slots, uint32_t second_slots) {
  const uint32_t all = first_slots + second_slots, warps = static_cast<uint32_t>(team);
  const uint32_t share = (2 * warps * second_slots + all) / (2 * all);
  return static_cast<int>(share < 1 ? 1 : share >= warps ? warps - 1 : share);
}

// What the tokens alone gave a row: a sum of weights, nothing, or logits beyond f32. Written when the row is.
enum class RowMark : uint8_t { kNothing, kSum, kBeyond };

struct CombineParams {
  const CombineGroup* groups = nullptr;
  const CombineSource* sources = nullptr;
  int32_t group_count = 0;
  int32_t rows = 0;      // rows of the widest group
  int32_t team = 1;      // the largest of any group
  int32_t head_dim = 0;  // of V, not padded
  QueryType output_type = QueryType::kF32;
  const std::byte* partials = nullptr;
  void* output = nullptr;
  float* lse = nullptr;
  RowMark* marks = nullptr;      // as lse, or null
  const float* sinks = nullptr;  // [query heads] or null
};

}  // namespace kvtide::cuda
