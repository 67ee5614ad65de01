// Keys of calibrated types to half pages and back (format/tide_codec.h), bit by bit: every coefficient and
// every channel is one thread's sum, in the order of the definition, four tokens at a time; compiled without
// contraction. A CTA has 16 tokens of a half.
#include <algorithm>

#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/codec/f16_tile.h"
#include "kernels/format/half.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {
namespace {

constexpr int kThreads = 256, kTokens = 16, kMostGroups = kMaxTideDim / kTideGroup;
constexpr int kCtasPerHalf = kBlockTokens / kTokens;

// What the threads of a CTA share beside its rows.
struct Tables {
  int first_unit[kMostGroups + 1];  // of a group; the last: units in use
  uint8_t widths[kMostGroups];
  // Level i above zero of a width, and the middle between it and the next: at 2^(width - 1) + i.
  float middle[64];
  uint8_t positive[64];
  uint8_t gains[kTokens];
};

__device__ void FillTables(const TideHead& head, int type_index, int groups, Tables& tables) {
  const int i = static_cast<int>(threadIdx.x);
  const uint8_t* const widths = head.widths + type_index * groups;
  if (i < groups) tables.widths[i] = widths[i];
  if (i >= 1 && i < 64) {
    const int width = 32 - __clz(i), level = i - (1 << (width - 1));
    tables.positive[i] = static_cast<uint8_t>(TidePositive(width, level));
    tables.middle[i] =
        level + 1 < 1 << (width - 1)
            ? 0.5f * static_cast<float>(TidePositive(width, level) + TidePositive(width, level + 1))
            : 0.0f;
  }
  if (i == 0) {
    int unit = 0;
    for (int g = 0; g < groups; g++) {
      tables.first_unit[g] = unit;
      unit += widths[g];
    }
    tables.first_unit[groups] = unit;
  }
}

// TurnKey of 16 tokens from `first` on, rows [channel][16].
__device__ void TurnRows(const TideHead& head, int64_t position, int first, bool back, float* rows) {
  for (int item = static_cast<int>(threadIdx.x); item < head.turned * kTokens; item += kThreads) {
    const int i = item / kTokens, t = item % kTokens;
    CosSin angle = CosSinOf(PhaseOf(head.per_position[i], position, first + t));
    if (back) angle.sin = -angle.sin;
    TurnPair(angle, rows + PairFirstChannel(head.pairs, i) * kTokens + t,
             rows + PairSecondChannel(head.pairs, i, head.turned) * kTokens + t);
  }
}

// to [n][16] = the sum over i of from [i][16] times matrix [i][n], from the first i to the last.
__device__ void Multiply(const float* from, const float* matrix, int n, float* to) {
  constexpr int kQuads = kTokens / 4;
  for (int item = static_cast<int>(threadIdx.x); item < n * kQuads; item += kThreads) {
    const int j = item % n, quad = item / n;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int i = 0; i < n; i++) {
      const float factor = matrix[i * n + j];
      const float4 x = *reinterpret_cast<const float4*>(from + i * kTokens + 4 * quad);
      sum.x = MulAdd(x.x, factor, sum.x);
      sum.y = MulAdd(x.y, factor, sum.y);
      sum.z = MulAdd(x.z, factor, sum.z);
      sum.w = MulAdd(x.w, factor, sum.w);
    }
    *reinterpret_cast<float4*>(to + j * kTokens + 4 * quad) = sum;
  }
}

__device__ void LoadRows(const CodecJob& job, const HalfShape& shape, RowSource source, int first,
                         float* rows) {
  const int dim = shape.head_dim;
  for (int item = static_cast<int>(threadIdx.x); item < dim / 2 * kTokens; item += kThreads) {
    const int t = item / (dim / 2), i = item % (dim / 2) * 2;
    float2 x;
    if (source == RowSource::kF16Page) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(
          job.source + 2 * HalfPrecisionIndex(first + t, i, shape.stored_dim));
      x = make_float2(F16::Unpack(static_cast<uint16_t>(pair)),
                      F16::Unpack(static_cast<uint16_t>(pair >> 16)));
    } else {
      x = *reinterpret_cast<const float2*>(reinterpret_cast<const float*>(job.source) +
                                           static_cast<int64_t>(first + t) * job.row_stride + i);
    }
    rows[i * kTokens + t] = x.x;
    rows[(i + 1) * kTokens + t] = x.y;
  }
}

// TideGainByte of 16 tokens, a warp for two of them.
__device__ void FindGains(const float* z, int groups, int tokens, Tables& tables) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int t = warp; t < kTokens; t += kThreads / 32) {
    float wanted = 1;
    for (int g = lane; g < groups; g += 32) {
      const float end = TideEnd(tables.widths[g]);
      if (end == 0) continue;
      float largest = 0;
      for (int e = 0; e < kTideGroup; e++) {
        const float value = z[(kTideGroup * g + e) * kTokens + t], magnitude = value < 0 ? -value : value;
        if (magnitude > largest) largest = magnitude;
      }
      if (largest / end > wanted) wanted = largest / end;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, wanted, mask);
      if (other > wanted) wanted = other;
    }
    if (lane != 0) continue;
    int low = 1, high = 255;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (TideGain(middle) >= wanted) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    tables.gains[t] = static_cast<uint8_t>(t < tokens ? low : 0);
  }
}

// TideCode.
__device__ int CodeOf(const Tables& tables, int width, float v) {
  const int half = 1 << (width - 1);
  const float magnitude = v < 0 ? -v : v;
  int low = 0, high = half - 1;
  while (low < high) {
    const int at = (low + high) / 2;
    if (magnitude > tables.middle[half + at]) {
      low = at + 1;
    } else {
      high = at;
    }
  }
  return v > 0 ? half + low : half - 1 - low;
}

__global__ void __launch_bounds__(kThreads)
    TideEncodeKernel(const CodecJob* jobs, HalfShape shape, int type_index, RowSource source) {
  extern __shared__ __align__(16) float memory[];
  __shared__ Tables tables;
  const CodecJob job = jobs[blockIdx.x];
  if (job.tide == nullptr) return;  // a seal that does not count
  const TideHead head = *job.tide;
  const int dim = shape.head_dim, groups = shape.stored_dim / kTideGroup,
            first = static_cast<int>(blockIdx.y) * kTokens, tokens = job.tokens - first;
  float *const rows = memory, *const z = memory + dim * kTokens;
  FillTables(head, type_index, groups, tables);
  LoadRows(job, shape, source, first, rows);
  __syncthreads();
  TurnRows(head, job.position, first, true, rows);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < dim * kTokens; i += kThreads)
    rows[i] -= head.centre[i / kTokens];
  __syncthreads();
  Multiply(rows, head.transform, dim, z);
  __syncthreads();
  FindGains(z, dim / kTideGroup, tokens, tables);
  __syncthreads();
  auto* const plane = reinterpret_cast<uint8_t*>(job.target);
  for (int item = static_cast<int>(threadIdx.x); item < groups * kTokens; item += kThreads) {
    const int g = item / kTokens, t = item % kTokens, width = tables.widths[g];
    if (width == 0) continue;
    uint8_t bytes[kMostTideWidth] = {};
    if (t < tokens) {
      const float to_level = TideSigma(width) / TideGain(tables.gains[t]);
      for (int e = 0; e < kTideGroup; e++) {
        const int code = CodeOf(tables, width, Mul(z[(kTideGroup * g + e) * kTokens + t], to_level));
#pragma unroll
        for (int b = 0; b < kMostTideWidth; b++)
          bytes[b] = static_cast<uint8_t>(bytes[b] | (code >> b & 1) << e);
      }
    }
    uint8_t* const to = plane + tables.first_unit[g] * kTideUnitBytes + TideByte(first + t, g);
#pragma unroll
    for (int b = 0; b < kMostTideWidth; b++)
      if (b < width) to[b * kTideUnitBytes] = bytes[b];
  }
  // Units that no group takes, and gains.
  const int units = shape.code_bytes / kTideUnitBytes, used = tables.first_unit[groups];
  for (int item = static_cast<int>(threadIdx.x); item < (units - used) * kTokens; item += kThreads)
    plane[(used + item / kTokens) * kTideUnitBytes + first + item % kTokens] = 0;
  if (threadIdx.x < kTokens) plane[shape.code_bytes + first + threadIdx.x] = tables.gains[threadIdx.x];
}

// The coefficients of 16 tokens, [coefficient][16].
__device__ void LoadCoefficients(const CodecJob& job, const HalfShape& shape, const Tables& tables, int first,
                                 float* z) {
  const auto* const plane = reinterpret_cast<const uint8_t*>(job.source);
  for (int item = static_cast<int>(threadIdx.x); item < shape.head_dim / kTideGroup * kTokens;
       item += kThreads) {
    const int g = item / kTokens, t = item % kTokens, width = tables.widths[g];
    const float gain = TideGain(plane[shape.code_bytes + first + t]), sigma = TideSigma(width);
    const uint8_t* const from = plane + tables.first_unit[g] * kTideUnitBytes + TideByte(first + t, g);
    uint8_t bytes[kMostTideWidth];
#pragma unroll
    for (int b = 0; b < kMostTideWidth; b++)
      bytes[b] = static_cast<uint8_t>(b < width ? from[b * kTideUnitBytes] : 0);
    const int half = width == 0 ? 0 : 1 << (width - 1);
    for (int e = 0; e < kTideGroup; e++) {
      int code = 0, level = 0;
#pragma unroll
      for (int b = 0; b < kMostTideWidth; b++) code |= (bytes[b] >> e & 1) << b;
      if (width > 0)
        level =
            code >= half ? tables.positive[code] : -static_cast<int>(tables.positive[2 * half - 1 - code]);
      z[(kTideGroup * g + e) * kTokens + t] = Mul(gain, static_cast<float>(level)) / sigma;
    }
  }
}

__device__ void StoreRows(const CodecJob& job, const HalfShape& shape, RowTarget target, int page_dim,
                          int first, const float* rows) {
  const int dim = shape.head_dim;
  if (target == RowTarget::kF32Rows) {
    auto* const to = reinterpret_cast<float*>(job.target);
    for (int item = static_cast<int>(threadIdx.x); item < dim * kTokens; item += kThreads)
      to[static_cast<int64_t>(first + item / dim) * job.row_stride + item % dim] =
          rows[item % dim * kTokens + item / dim];
    return;
  }
  auto* const to = reinterpret_cast<uint16_t*>(job.target);
  for (int item = static_cast<int>(threadIdx.x); item < page_dim / 2 * kTokens; item += kThreads) {
    const int t = item / (page_dim / 2), i = item % (page_dim / 2) * 2;
    uint32_t pair = 0;
    const auto half = [&](int channel) -> uint32_t {
      return F16::Pack(fminf(fmaxf(rows[channel * kTokens + t], -65504.0f), 65504.0f));
    };
    if (i < dim) pair = half(i) | half(i + 1) << 16;
    const int at = target == RowTarget::kF16Page ? HalfPrecisionIndex(first + t, i, page_dim)
                                                 : TileIndex(first + t, i, kBlockTokens);
    *reinterpret_cast<uint32_t*>(to + at) = pair;
  }
}

__global__ void __launch_bounds__(kThreads)
    TideDecodeKernel(const CodecJob* jobs, HalfShape shape, int type_index, RowTarget target, int page_dim) {
  extern __shared__ __align__(16) float memory[];
  __shared__ Tables tables;
  const CodecJob job = jobs[blockIdx.x];
  const TideHead head = *job.tide;
  const int dim = shape.head_dim, first = static_cast<int>(blockIdx.y) * kTokens;
  float *const z = memory, *const rows = memory + dim * kTokens;
  FillTables(head, type_index, shape.stored_dim / kTideGroup, tables);
  __syncthreads();
  LoadCoefficients(job, shape, tables, first, z);
  __syncthreads();
  Multiply(z, head.inverse, dim, rows);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < dim * kTokens; i += kThreads)
    rows[i] += head.centre[i / kTokens];
  __syncthreads();
  TurnRows(head, job.position, first, false, rows);
  __syncthreads();
  StoreRows(job, shape, target, page_dim, first, rows);
}

HalfShape ShapeOf(const HalfLayout& layout) {
  return {layout.head_dim, layout.stored_dim, layout.groups, static_cast<int>(layout.code_bytes)};
}

// Of a kernel: two arrays of rows.
template <class Kernel, class... Arguments>
cudaError_t Launch(Kernel kernel, int count, int dim, cudaStream_t stream, Arguments... arguments) {
  if (count == 0) return cudaSuccess;
  const int bytes = 2 * dim * kTokens * static_cast<int>(sizeof(float));
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               2 * kMaxTideDim * kTokens * static_cast<int>(sizeof(float)));
  if (set != cudaSuccess) return set;
  kernel<<<dim3(static_cast<unsigned>(count), kCtasPerHalf), kThreads, static_cast<size_t>(bytes), stream>>>(
      arguments...);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchTideEncode(CacheType type, const HalfLayout& layout, RowSource source, const CodecJob* jobs,
                             int count, cudaStream_t stream) {
  return Launch(TideEncodeKernel, count, layout.head_dim, stream, jobs, ShapeOf(layout),
                CalibratedIndex(type), source);
}

cudaError_t LaunchTideDecode(CacheType type, const HalfLayout& layout, RowTarget target, int page_dim,
                             const CodecJob* jobs, int count, cudaStream_t stream) {
  return Launch(TideDecodeKernel, count, layout.head_dim, stream, jobs, ShapeOf(layout),
                CalibratedIndex(type), target, page_dim);
}

}  // namespace kvtide::cuda
