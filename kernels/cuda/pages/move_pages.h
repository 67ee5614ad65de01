// Kernels between an engine's pages and dense memory, all layers of many chunks in one launch
// (kernels/page_copier.h says what pages, chunks and payloads are).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/base/data_type.h"

namespace kvtide::cuda {

// The engine's side: page `ids[i - skip]` of every layer is page i of the chunks at hand, for i from `skip`
// on and below `end`.
struct PagesOnDevice {
  std::byte* const* layers = nullptr;  // device memory
  int64_t stride = 0;                  // bytes from a page to the next
  const int32_t* ids = nullptr;        // device memory
  int layer_count = 0, chunk_pages = 0;
  int skip = 0, end = 0;
};

// Bytes [chunks][layers][chunk_pages][page_bytes] from the pages or to them. `wide`: everything lies at
// multiples of 16.
cudaError_t LaunchMoveBytes(const PagesOnDevice& pages, std::byte* dense, size_t page_bytes, int chunks,
                            bool wide, bool to_pages, cudaStream_t stream);

// One side of rows; strides in elements, as PageRows has them.
struct RowsOnDevice {
  int64_t first = 0, token = 0, head = 0, dim = 1;
  int head_dim = 0, stored_dim = 0;
  bool wide = false;  // 8 values of a row lie side by side, at a multiple of 16 bytes
};
struct RowMove {
  PagesOnDevice pages;
  RowsOnDevice k, v;
  DataType type = DataType::kBf16;
  int tokens = 0;        // of a page of the engine
  int chunk_tokens = 0;  // of a chunk, a multiple of 64
  int heads = 0;
  // Records are counted over all chunks: [chunks][layers][chunk_tokens / 64][heads].
  int64_t first_record = 0;
};

// Rows of `count` records into f16 pages: record r of the launch at target + r * record_bytes, V at v_offset
// in it. bad[chunk] becomes 1 where a value is beyond f16 or no number.
cudaError_t LaunchGatherRows(const RowMove& move, std::byte* target, size_t record_bytes, size_t v_offset,
                             int32_t* bad, int count, cudaStream_t stream);
// Rows in f32 into pages, rounded to the engine's type, f16 held to +-65504: record r has K at
// source + r * record_floats, [64][head_dim], and V behind it.
cudaError_t LaunchScatterRows(const RowMove& move, const float* source, size_t record_floats, int count,
                              cudaStream_t stream);

}  // namespace kvtide::cuda
