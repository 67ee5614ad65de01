#include <algorithm>

#include "kernels/base/finite.h"
#include "kernels/base/float16.h"
#include "kernels/cuda/pages/move_pages.h"
#include "kernels/format/page_order.h"

namespace kvtide::cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kSliceBytes = size_t{16} << 10;  // of a page, for one CTA

struct BytesMove {
  PagesOnDevice pages;
  std::byte* dense;
  size_t page_bytes;
};

// CTA (x, y): slice y of page x of [chunks][layers][chunk_pages].
template <class T, bool kToPages>
__global__ void __launch_bounds__(kThreads) MoveBytes(const __grid_constant__ BytesMove move) {
  const PagesOnDevice& pages = move.pages;
  const int item = static_cast<int>(blockIdx.x), in_chunk = item % pages.chunk_pages;
  const int layer = item / pages.chunk_pages % pages.layer_count;
  const int page = item / pages.chunk_pages / pages.layer_count * pages.chunk_pages + in_chunk;
  if (page < pages.skip || page >= pages.end) return;
  auto* const engine =
      reinterpret_cast<T*>(pages.layers[layer] + pages.ids[page - pages.skip] * pages.stride);
  auto* const dense = reinterpret_cast<T*>(move.dense + static_cast<size_t>(item) * move.page_bytes);
  const size_t count = move.page_bytes / sizeof(T), slice = kSliceBytes / sizeof(T);
  const size_t begin = blockIdx.y * slice, end = min(begin + slice, count);
  for (size_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if constexpr (kToPages) {
      engine[i] = dense[i];
    } else {
      dense[i] = engine[i];
    }
  }
}

// Where a record of the launch comes from.
struct RecordPlace {
  int chunk, layer, first_token, head;
};
__device__ RecordPlace PlaceOf(const RowMove& move, int64_t record) {
  const int pages = move.chunk_tokens / kBlockTokens;
  RecordPlace place;
  place.head = static_cast<int>(record % move.heads);
  record /= move.heads;
  place.first_token = static_cast<int>(record % pages) * kBlockTokens;
  record /= pages;
  place.layer = static_cast<int>(record % move.pages.layer_count);
  place.chunk = static_cast<int>(record / move.pages.layer_count);
  return place;
}

// The page's byte of a row's first value; null where the page is none of those at hand.
__device__ std::byte* RowAt(const RowMove& move, const RowsOnDevice& side, const RecordPlace& place,
                            int token, int element) {
  const int in_chunk = place.first_token + token;
  const int page = place.chunk * move.pages.chunk_pages + in_chunk / move.tokens;
  if (page < move.pages.skip || page >= move.pages.end) return nullptr;
  const int64_t at = side.first + in_chunk % move.tokens * side.token + place.head * side.head;
  return move.pages.layers[place.layer] + move.pages.ids[page - move.pages.skip] * move.pages.stride +
         at * element;
}

__device__ float Value(const std::byte* at, DataType type) {
  if (type == DataType::kF32) return *reinterpret_cast<const float*>(at);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
  return type == DataType::kF16 ? F16ToF32(bits) : Bf16ToF32(bits);
}

// Eight values of a row.
__device__ void ReadEight(const std::byte* at, const RowsOnDevice& side, DataType type, float (&x)[8]) {
  if (!side.wide) {
    const int element = type == DataType::kF32 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = Value(at + i * side.dim * element, type);
    return;
  }
  if (type == DataType::kF32) {
    const float4 low = reinterpret_cast<const float4*>(at)[0], high = reinterpret_cast<const float4*>(at)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    return;
  }
  const uint4 bits = *reinterpret_cast<const uint4*>(at);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    x[i] = type == DataType::kF16 ? F16ToF32(half) : Bf16ToF32(half);
  }
}

__device__ void WriteEight(std::byte* at, const RowsOnDevice& side, DataType type, const float (&x)[8]) {
  const auto narrow = [type](float value) -> uint32_t {
    return type == DataType::kF16 ? F32ToF16(fminf(fmaxf(value, -kMaxF16), kMaxF16)) : F32ToBf16(value);
  };
  if (!side.wide) {
    const int element = type == DataType::kF32 ? 4 : 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      std::byte* const to = at + i * side.dim * element;
      if (type == DataType::kF32)
        *reinterpret_cast<float*>(to) = x[i];
      else
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(narrow(x[i]));
    }
    return;
  }
  if (type == DataType::kF32) {
    reinterpret_cast<float4*>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
  *reinterpret_cast<uint4*>(at) =
      make_uint4(narrow(x[1]) << 16 | narrow(x[0]), narrow(x[3]) << 16 | narrow(x[2]),
                 narrow(x[5]) << 16 | narrow(x[4]), narrow(x[7]) << 16 | narrow(x[6]));
}

struct GatherParams {
  RowMove move;
  std::byte* target;
  size_t record_bytes, v_offset;
  int32_t* bad;
};

// CTA (x, y): record x, K or V. A thread takes eight values, which are neighbours in a row and in an f16
// page.
__global__ void __launch_bounds__(kThreads) GatherRows(const __grid_constant__ GatherParams params) {
  const RowMove& move = params.move;
  const RowsOnDevice& side = blockIdx.y == 0 ? move.k : move.v;
  const RecordPlace place = PlaceOf(move, move.first_record + blockIdx.x);
  auto* const half = reinterpret_cast<uint16_t*>(params.target + blockIdx.x * params.record_bytes +
                                                 (blockIdx.y == 0 ? 0 : params.v_offset));
  const int element = move.type == DataType::kF32 ? 4 : 2, chunks = side.stored_dim / 8;
  bool bad = false;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * chunks; i += kThreads) {
    const int token = i / chunks, dim = i % chunks * 8;
    float x[8] = {};
    if (dim < side.head_dim) {
      const std::byte* const row = RowAt(move, side, place, token, element);
      if (row != nullptr) ReadEight(row + dim * side.dim * element, side, move.type, x);
    }
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      bad = bad || !(fabsf(x[2 * j]) <= kMaxF16) || !(fabsf(x[2 * j + 1]) <= kMaxF16);
      packed[j] = static_cast<uint32_t>(F32ToF16(x[2 * j + 1])) << 16 | F32ToF16(x[2 * j]);
    }
    *reinterpret_cast<uint4*>(half + HalfPrecisionIndex(token, dim, side.stored_dim)) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
  if (bad) params.bad[place.chunk] = 1;
}

struct ScatterParams {
  RowMove move;
  const float* source;
  size_t record_floats;
};

__global__ void __launch_bounds__(kThreads) ScatterRows(const __grid_constant__ ScatterParams params) {
  const RowMove& move = params.move;
  const RowsOnDevice& side = blockIdx.y == 0 ? move.k : move.v;
  const RecordPlace place = PlaceOf(move, move.first_record + blockIdx.x);
  const float* const rows = params.source + blockIdx.x * params.record_floats +
                            (blockIdx.y == 0 ? 0 : kBlockTokens * move.k.head_dim);
  const int element = move.type == DataType::kF32 ? 4 : 2, chunks = side.head_dim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * chunks; i += kThreads) {
    const int token = i / chunks, dim = i % chunks * 8;
    std::byte* const row = RowAt(move, side, place, token, element);
    if (row == nullptr) continue;
    const auto* const from = reinterpret_cast<const float4*>(rows + token * side.head_dim + dim);
    const float4 low = from[0], high = from[1];
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    WriteEight(row + dim * side.dim * element, side, move.type, x);
  }
}

template <class T>
cudaError_t LaunchBytes(const BytesMove& move, int chunks, bool to_pages, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(chunks * move.pages.layer_count * move.pages.chunk_pages),
                  static_cast<unsigned>((move.page_bytes + kSliceBytes - 1) / kSliceBytes));
  if (to_pages)
    MoveBytes<T, true><<<grid, kThreads, 0, stream>>>(move);
  else
    MoveBytes<T, false><<<grid, kThreads, 0, stream>>>(move);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchMoveBytes(const PagesOnDevice& pages, std::byte* dense, size_t page_bytes, int chunks,
                            bool wide, bool to_pages, cudaStream_t stream) {
  if (chunks == 0) return cudaSuccess;
  const BytesMove move{pages, dense, page_bytes};
  return wide ? LaunchBytes<uint4>(move, chunks, to_pages, stream)
              : LaunchBytes<uint8_t>(move, chunks, to_pages, stream);
}

cudaError_t LaunchGatherRows(const RowMove& move, std::byte* target, size_t record_bytes, size_t v_offset,
                             int32_t* bad, int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  GatherRows<<<dim3(static_cast<unsigned>(count), 2), kThreads, 0, stream>>>(
      {move, target, record_bytes, v_offset, bad});
  return cudaGetLastError();
}

cudaError_t LaunchScatterRows(const RowMove& move, const float* source, size_t record_floats, int count,
                              cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  ScatterRows<<<dim3(static_cast<unsigned>(count), 2), kThreads, 0, stream>>>({move, source, record_floats});
  return cudaGetLastError();
}

}  // namespace kvtide::cuda
