// Structs of the prefill kernels, in device memory, and the cut of the work. A *group* is one (item, KV head,
// tile of PrefillKernel::rows query rows); a *part* is a group over some pages of decoded tiles, computed by
// one CTA, which leaves one partial state in the slot of its
// index. Parts of a group are merged into the output, in place, launch after launch; a part that is all of
// its group so far writes the output itself.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/prefill/prefill_map.h"
#include "kernels/cuda/prefill/prefill_pages.h"

namespace kvtide::cuda {

struct alignas(16) PrefillPart {
  const std::byte* tiles = nullptr;    // K of page 0, V of page 0, K of page 1, ...: where tiles are decoded
  const PagePlace* pages = nullptr;    // elsewhere: of its pages
  const float* query = nullptr;        // head vector of row 0 of query 0
  int64_t query_stride = 0;            // values from one query token to the next
  int32_t page_count = 0, tokens = 0;  // tokens that count, from page 0 on
  int32_t first_row = 0, rows = 0;     // row = query * rows_per_query + head within the group
  int32_t rows_per_query = 1;
  // Query i sees tokens [window_begin + i, min(tokens, causal_end + i)), counted from page 0; limits where
  // unused.
  int32_t causal_end = 0, window_begin = 0;
  int32_t group = -1;  // the group whose output it writes, or -1
};

struct alignas(16) PrefillGroup {
  float* output = nullptr;  // of row 0 of query 0
  float* lse = nullptr;
  const float* sinks = nullptr;               // of head 0 of the group, or null
  int64_t output_stride = 0, lse_stride = 0;  // values from one query to the next
  uint32_t first_slot = 0, slots = 0;         // in the launch's list of slots
  int32_t first_row = 0, rows = 0, rows_per_query = 1;
  int32_t fresh = 1;  // nothing merged before: output and lse are not read
};

struct PrefillParams {
  PageMaps maps;                       // where the kernel reads pages
  const PrefillPart* parts = nullptr;  // one for each CTA
  const PrefillGroup* groups = nullptr;
  float* outputs = nullptr;             // [parts][rows][D], unnormalised
  float2* sums = nullptr;               // [parts][rows]: reference exponent (base 2) and sum of weights
  int32_t head_dim = 0, value_dim = 0;  // of K and of V, not padded
  float scale = 0;                      // softmax scale times log2(e)
  float softcap = 0;                    // times log2(e); 0 = none
};

struct PrefillMergeParams {
  const PrefillGroup* groups = nullptr;
  const uint32_t* slots = nullptr;
  const float* outputs = nullptr;
  const float2* sums = nullptr;
  int32_t group_count = 0;
  int32_t head_dim = 0;  // of V, not padded
  int32_t rows = 0;      // of a slot
};

// Kernels of one head dim. `warpgroups`: for compute capability 9.x only; its CTAs share out the parts,
// others compute one each.
struct PrefillKernel {
  int dim = 0;
  bool warpgroups = false;
  int rows = 0;        // query rows of a part
  int tile_pages = 1;  // computed together: parts should have a multiple
  int threads = 0, shared_bytes = 0, ctas_per_processor = 1;
  const void* attend = nullptr;  // (PrefillParams)
  const void* merge = nullptr;   // (PrefillMergeParams), one warp for each row, kMergeWarps a CTA
};
constexpr int kMergeWarps = 4;
const std::vector<PrefillKernel>& AllPrefillKernels();
// The narrowest kernel for head vectors of `dim`, or null.
const PrefillKernel* FindPrefillKernel(int dim, bool warpgroups);

}  // namespace kvtide::cuda
