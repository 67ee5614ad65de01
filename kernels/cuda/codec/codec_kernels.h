// Kernels that write and read stored pages: append, encode, decode. Bytes are those of EncodeHalf
// (format/page_codec.h), bit by bit: the arithmetic is never fused and sums have one order, whatever the
// number of threads. One job is one half (K or V) of one record; all jobs of a launch share type, side and
// shape.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/base/data_type.h"
#include "kernels/cuda/device/tide_head.h"
#include "kernels/format/block_layout.h"

namespace kvtide::cuda {

// One half of a record as the kernels see it.
struct HalfShape {
  int head_dim, stored_dim, groups;
  int code_bytes;
};

struct alignas(16) CodecJob {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  union {
    const float* mean = nullptr;  // [head_dim] or null, of keys of coded types
    const TideHead* tide;         // of keys of calibrated types
  };
  const float* gain = nullptr;
  int32_t tokens = kBlockTokens;  // tokens that count (encode)
  int32_t row_stride = 0;         // floats from row to row, where rows are f32
  int64_t position = 0;           // of the page's first token, for keys of calibrated types
};

// What an encoder reads: an f16 page of the same shape, or f32 rows in the original frame.
enum class RowSource { kF16Page, kF32Rows };
// What a decoder writes: f32 rows, or an f16 page or tile (f16_tile.h) of `page_dim` stored values a row
// (padding zero).
enum class RowTarget { kF32Rows, kF16Page, kF16Tile };

cudaError_t LaunchEncode(CacheType type, Side side, const HalfLayout& layout, RowSource source,
                         const CodecJob* jobs, int count, cudaStream_t stream);
cudaError_t LaunchDecode(CacheType type, Side side, const HalfLayout& layout, RowTarget target, int page_dim,
                         const CodecJob* jobs, int count, cudaStream_t stream);

// The same for the types that row_codec.cuh has code for (HasRowCodec; of rows in f32 HasFloatRows too),
// cudaErrorInvalidValue for others; `processors` of the device.
cudaError_t LaunchRowEncode(CacheType type, Side side, const HalfLayout& layout, RowSource source,
                            const CodecJob* jobs, int count, int processors, cudaStream_t stream);
cudaError_t LaunchRowDecode(CacheType type, Side side, const HalfLayout& layout, RowTarget target,
                            int page_dim, const CodecJob* jobs, int count, int processors,
                            cudaStream_t stream);
bool HasRowCodec(CacheType type);
bool HasFloatRows(CacheType type);
// The same for keys of calibrated types; jobs name their heads and positions.
cudaError_t LaunchTideEncode(CacheType type, const HalfLayout& layout, RowSource source, const CodecJob* jobs,
                             int count, cudaStream_t stream);
cudaError_t LaunchTideDecode(CacheType type, const HalfLayout& layout, RowTarget target, int page_dim,
                             const CodecJob* jobs, int count, cudaStream_t stream);

// Copies rows of tensors [rows][heads][dim] into f16 or bf16 pages, K and V by one launch.
struct alignas(16) AppendJob {
  std::byte* target = nullptr;  // the record of head 0
  int64_t first_row = 0;        // of K and of V
  int32_t first_token = 0, tokens = 0;
  int64_t padding = 0;
};
struct AppendSide {
  const void* rows = nullptr;
  int32_t head_dim = 0, stored_dim = 0;
  int32_t offset = 0;  // of the half in a record
  bool bf16 = false;   // of the page, else f16
};
struct AppendParams {
  AppendSide k, v;
  const AppendJob* jobs = nullptr;
  DataType type = DataType::kF32;  // of all rows
  int32_t heads = 0;
  uint64_t record_bytes = 0;
};
// most_tokens: of a job. Rows begin at multiples of 16 bytes.
cudaError_t LaunchAppend(const AppendParams& params, int count, int most_tokens, cudaStream_t stream);

}  // namespace kvtide::cuda
