#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/codec/f16_tile.h"
#include "kernels/cuda/codec/row_codec.cuh"
#include "kernels/format/page_codec.h"

namespace kvtide::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// The rows of a half in shared memory; the odd stride keeps columns free of bank conflicts.
struct Rows {
  float* base;
  int stride;
  __device__ float* row(int t) const { return base + t * stride; }
};

__device__ float SumOverWarp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAll, x, mask);
  return x;
}

// Hadamard::Forward or Inverse of row `x`, by one warp; lane l holds values l, l + 32, ... of each run.
template <bool kInverse>
__device__ void HadamardRow(float* x, int stored_dim) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int run = 0; run < stored_dim; run += 128) {
    const int n = min(128, stored_dim - run), words = n / 32;
    float y[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < 4; w++)
      if (w < words) {
        y[w] = x[run + 32 * w + lane];
        if (Hadamard::Sign(kInverse ? 1 : 0, w) >> lane & 1u) y[w] = -y[w];
      }
#pragma unroll
    for (int h = 1; h < 32; h *= 2)
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float other = __shfl_xor_sync(kAll, y[w], h);
        y[w] = lane & h ? other - y[w] : y[w] + other;
      }
    if (n == 64 || n == 128) {
      const float a = y[0], b = y[1], c = y[2], d = y[3];
      y[0] = a + b;
      y[1] = a - b;
      y[2] = c + d;
      y[3] = c - d;
    }
    if (n == 128) {
      const float a = y[0], b = y[1], c = y[2], d = y[3];
      y[0] = a + c;
      y[1] = b + d;
      y[2] = a - c;
      y[3] = b - d;
    }
    const float factor = n == 128 ? 0.08838834764831845f : n == 64 ? 0.125f : 0.17677669529663687f;
#pragma unroll
    for (int w = 0; w < 4; w++) y[w] = Mul(y[w], factor);
    if (n == 96) {
      const float third = Mul(y[0] + y[1] + y[2], 2.0f / 3.0f);
      y[0] -= third;
      y[1] -= third;
      y[2] -= third;
    }
#pragma unroll
    for (int w = 0; w < 4; w++)
      if (w < words) {
        if (Hadamard::Sign(kInverse ? 0 : 1, w) >> lane & 1u) y[w] = -y[w];
        x[run + 32 * w + lane] = y[w];
      }
  }
}

template <class C, bool kInverse>
__device__ void RotateRows(const Rows& rows, int stored_dim) {
  using Rotation = typename C::Rotation;
  if constexpr (std::is_same_v<Rotation, Hadamard>) {
    for (int t = static_cast<int>(threadIdx.x >> 5); t < kBlockTokens; t += kWarps)
      HadamardRow<kInverse>(rows.row(t), stored_dim);
  } else if constexpr (!std::is_same_v<Rotation, NoRotation>) {
    if (threadIdx.x < kBlockTokens) {
      if constexpr (kInverse) {
        Rotation::Inverse(rows.row(static_cast<int>(threadIdx.x)), stored_dim);
      } else {
        Rotation::Forward(rows.row(static_cast<int>(threadIdx.x)), stored_dim);
      }
    }
  }
  __syncthreads();
}

// C::EncodeGroup of a codebook type, by one warp: the same values and sums, n of 32, 64, 96 or 128.
template <class C>
__device__ uint16_t EncodeGroupByWarp(const float* y, int n, uint8_t* codes, int stride) {
  using Book = typename C::Book;
  constexpr int kHalf = C::kHalf;
  const int lane = static_cast<int>(threadIdx.x & 31), words = n / 32;
  float v[4];
  float energy = 0;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    v[w] = w < words ? y[32 * w + lane] : 0.0f;
    if (w < words) energy = w == 0 ? Mul(v[0], v[0]) : energy + Mul(v[w], v[w]);
  }
  energy = SumOverWarp(energy);
  if (!(energy > 0)) {
    for (int w = 0; w < words; w++) codes[(32 * w + lane) * stride] = kHalf;
    return 0;
  }
  const float to_level = Book::kSigma / sqrtf(energy / static_cast<float>(n));
  float dot = 0;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if (w >= words) continue;
    const float x = Mul(v[w], to_level), magnitude = x < 0 ? -x : x;
    int above = 0, level = Book::Positive(0);
#pragma unroll
    for (int m = 0; m + 1 < kHalf; m++) {
      const bool beyond = magnitude > 0.5f * static_cast<float>(Book::Positive(m) + Book::Positive(m + 1));
      above = beyond ? m + 1 : above;
      level = beyond ? Book::Positive(m + 1) : level;
    }
    codes[(32 * w + lane) * stride] = static_cast<uint8_t>(x > 0 ? kHalf + above : kHalf - 1 - above);
    const float term = Mul(v[w], static_cast<float>(x > 0 ? level : -level));
    dot = w == 0 ? term : dot + term;
  }
  dot = SumOverWarp(dot);
  return ScaleBits(Mul(energy / dot, 1.0f / C::kLevelUnit));
}

__device__ CodeOwner OwnerOf(Side side, CodePlace place, int stored_dim) {
  return side == Side::kKey ? KeyOwner(place, stored_dim) : ValueOwner(place, stored_dim);
}

// Where codes wait for being packed; V's stride of 68 bytes keeps lanes in different banks.
constexpr int kValueStride = 68;
struct CodeStage {
  uint8_t* base;
  int token_stride, dim_stride;
  __device__ uint8_t* at(int token, int dim) const { return base + token * token_stride + dim * dim_stride; }
};

template <class C>
__global__ void __launch_bounds__(kThreads)
    EncodeKernel(const CodecJob* jobs, HalfShape shape, Side side, RowSource source) {
  extern __shared__ __align__(16) float memory[];
  const CodecJob job = jobs[blockIdx.x];
  const int d = shape.stored_dim;
  const Rows rows{memory, d + 1};
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31);
  const auto put = [&](int t, int dim, float x) {
    if (t >= job.tokens || dim >= shape.head_dim) {
      x = 0;
    } else if constexpr (C::kStorage == Storage::kCodes) {
      if (job.mean != nullptr) x -= job.mean[dim];
      if (job.gain != nullptr) x *= job.gain[dim];
    }
    rows.row(t)[dim] = x;
  };
  if (source == RowSource::kF16Page) {  // 16 bytes a load, several under way
    constexpr int kAtOnce = 4;
    const auto* chunks = reinterpret_cast<const uint4*>(job.source);
    const int per_row = d / 8, count = kBlockTokens * per_row;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kAtOnce * kThreads) {
      uint4 loaded[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (i + k * kThreads < count) loaded[k] = chunks[i + k * kThreads];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        if (i + k * kThreads >= count) continue;
        const int t = (i + k * kThreads) / per_row, stored = (i + k * kThreads) % per_row;
        const int chunk =
            HalfPrecisionIndex(t, stored * 8, d) / 8 - t * per_row;  // the swizzle undoes itself
        const uint32_t words[4] = {loaded[k].x, loaded[k].y, loaded[k].z, loaded[k].w};
#pragma unroll
        for (int e = 0; e < 8; e++)
          put(t, chunk * 8 + e, HalfToFloat(words[e / 2] >> (16 * (e % 2)) & 0xffffu));
      }
    }
  } else {
    for (int t = warp; t < kBlockTokens; t += kWarps)
      for (int dim = lane; dim < d; dim += 32)
        put(t, dim,
            t < job.tokens && dim < shape.head_dim
                ? reinterpret_cast<const float*>(job.source)[static_cast<int64_t>(t) * job.row_stride + dim]
                : 0.0f);
  }
  __syncthreads();
  if constexpr (C::kStorage == Storage::kHalf) {
    auto* values = reinterpret_cast<uint16_t*>(job.target);
    for (int t = warp; t < kBlockTokens; t += kWarps)
      for (int dim = lane; dim < d; dim += 32)
        values[HalfPrecisionIndex(t, dim, d)] = C::Pack(rows.row(t)[dim]);
  } else {
    RotateRows<C, false>(rows, d);
    // The 8 codes of a unit lie side by side: keys by token, values by dim.
    const CodeStage stage{reinterpret_cast<uint8_t*>(memory + kBlockTokens * (d + 1)),
                          side == Side::kKey ? d : 1, side == Side::kKey ? 1 : kValueStride};
    auto* scales = reinterpret_cast<uint16_t*>(job.target + shape.code_bytes);
    if constexpr (HasBook<C>) {
      for (int i = static_cast<int>(threadIdx.x >> 5); i < kBlockTokens * shape.groups; i += kWarps) {
        const int t = i % kBlockTokens, group = i / kBlockTokens, begin = group * C::kGroup;
        const uint16_t scale = EncodeGroupByWarp<C>(rows.row(t) + begin, min(C::kGroup, d - begin),
                                                    stage.at(t, begin), stage.dim_stride);
        if (lane == 0) scales[i] = scale;
      }
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * shape.groups; i += kThreads) {
        const int t = i % kBlockTokens, group = i / kBlockTokens, begin = group * C::kGroup;
        uint8_t own[kMaxGroup];
        const int n = min(C::kGroup, d - begin);
        scales[i] = C::EncodeGroup(rows.row(t) + begin, n, side, own);
        for (int e = 0; e < n; e++) *stage.at(t, begin + e) = own[e];
      }
    }
    __syncthreads();
    constexpr int kBits = C::kBits;
    const int lane_words = LaneWords(kBits, d);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * (d / 32) * 32; i += kThreads) {
      const int quad = i / 32;
      uint8_t own[32];
      uint32_t words[kBits];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const CodeOwner owner = OwnerOf(side, {quad, lane, u, 0}, d);
        const auto* unit = reinterpret_cast<const uint32_t*>(stage.at(owner.token, owner.dim));
        const uint32_t first = unit[0], second = unit[1];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          own[8 * u + e] = static_cast<uint8_t>(first >> (8 * e));
          own[8 * u + 4 + e] = static_cast<uint8_t>(second >> (8 * e));
        }
      }
      PackQuad<kBits>(own, words);
#pragma unroll
      for (int w = 0; w < kBits; w++) StoreWord(job.target, quad * kBits + w, lane, words[w]);
    }
    // Words that fill the last slot up.
    const int used = 2 * (d / 32) * kBits;
    for (int i = static_cast<int>(threadIdx.x); i < (lane_words - used) * 32; i += kThreads)
      StoreWord(job.target, used + i / 32, i % 32, 0);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    DecodeKernel(const CodecJob* jobs, HalfShape shape, Side side, RowTarget target, int page_dim) {
  extern __shared__ __align__(16) float memory[];
  const CodecJob job = jobs[blockIdx.x];
  const int d = shape.stored_dim;
  const Rows rows{memory, d + 1};
  if constexpr (C::kStorage == Storage::kHalf) {
    const auto* values = reinterpret_cast<const uint16_t*>(job.source);
    for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * d; i += kThreads)
      rows.row(i / d)[i % d] = C::Unpack(values[HalfPrecisionIndex(i / d, i % d, d)]);
    __syncthreads();
  } else {
    constexpr int kBits = C::kBits;
    const auto* scales = reinterpret_cast<const uint16_t*>(job.source + shape.code_bytes);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * (d / 32) * 32; i += kThreads) {
      const int quad = i / 32, lane = i % 32;
      uint8_t own[32];
      uint32_t words[kBits];
#pragma unroll
      for (int w = 0; w < kBits; w++) words[w] = LoadWord(job.source, quad * kBits + w, lane);
      UnpackQuad<kBits>(words, own);
#pragma unroll
      for (int u = 0; u < 4; u++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const CodeOwner owner = OwnerOf(side, {quad, lane, u, e}, d);
          const float scale =
              Mul(HalfToFloat(scales[owner.dim / C::kGroup * kBlockTokens + owner.token]), C::kLevelUnit);
          rows.row(owner.token)[owner.dim] = Mul(scale, static_cast<float>(C::Level(own[8 * u + e])));
        }
    }
    __syncthreads();
    RotateRows<C, true>(rows, d);
  }
  const int width = target == RowTarget::kF32Rows ? shape.head_dim : page_dim;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * width; i += kThreads) {
    const int t = i / width, dim = i % width;
    float x = 0;
    if (dim < shape.head_dim) {
      x = rows.row(t)[dim];
      if constexpr (C::kStorage == Storage::kCodes) {
        if (job.gain != nullptr) x /= job.gain[dim];
        if (job.mean != nullptr) x += job.mean[dim];
      }
    }
    if (target == RowTarget::kF32Rows)
      reinterpret_cast<float*>(job.target)[static_cast<int64_t>(t) * job.row_stride + dim] = x;
    else
      reinterpret_cast<uint16_t*>(
          job.target)[target == RowTarget::kF16Page ? HalfPrecisionIndex(t, dim, page_dim)
                                                    : TileIndex(t, dim, kBlockTokens)] =
          F32ToF16(fminf(fmaxf(x, -65504.0f), 65504.0f));
  }
}

// The same for types without codes and f16 targets: chunks of 8 values find their new place.
template <class C>
__global__ void __launch_bounds__(kThreads)
    MoveHalves(const CodecJob* jobs, HalfShape shape, RowTarget target, int page_dim) {
  const CodecJob job = jobs[blockIdx.x];
  const int per_row = page_dim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * per_row; i += kThreads) {
    const int t = i / per_row, dim = i % per_row * 8;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (dim < shape.head_dim) {
      x = *reinterpret_cast<const uint4*>(job.source + 2 * HalfPrecisionIndex(t, dim, shape.stored_dim));
      // Finite even where no token is: a weight of 0 must give 0.
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (uint32_t& word : words) {
        if constexpr (std::is_same_v<C, F16>) {
          __half2 pair;
          memcpy(&pair, &word, 4);
          pair = __hmin2(__hmax2(pair, __float2half2_rn(-65504.0f)), __float2half2_rn(65504.0f));
          memcpy(&word, &pair, 4);
        } else {
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; e++)
            pair[e] = fminf(fmaxf(C::Unpack(static_cast<uint16_t>(word >> (16 * e))), -65504.0f), 65504.0f);
          word = DeviceWarp::Pack<false>(pair[0], pair[1]);
        }
      }
      x = make_uint4(words[0], words[1], words[2], words[3]);
    }
    const int at = target == RowTarget::kF16Page ? HalfPrecisionIndex(t, dim, page_dim)
                                                 : TileIndex(t, dim, kBlockTokens);
    *reinterpret_cast<uint4*>(job.target + 2 * at) = x;
  }
}

// An f16 page as one of a type without codes: the same places.
template <class C>
__global__ void __launch_bounds__(kThreads) StoreHalves(const CodecJob* jobs, HalfShape shape) {
  const CodecJob job = jobs[blockIdx.x];
  const int per_row = shape.stored_dim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * per_row; i += kThreads) {
    const int t = i / per_row, dim = i % per_row * 8, at = HalfPrecisionIndex(t, dim, shape.stored_dim);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (t < job.tokens && dim < shape.head_dim) x = *reinterpret_cast<const uint4*>(job.source + 2 * at);
    if constexpr (!std::is_same_v<C, F16>) {
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (uint32_t& word : words)
        word = C::Pack(HalfToFloat(word & 0xffffu)) | static_cast<uint32_t>(C::Pack(HalfToFloat(word >> 16)))
                                                          << 16;
      x = make_uint4(words[0], words[1], words[2], words[3]);
    }
    *reinterpret_cast<uint4*>(job.target + 2 * at) = x;
  }
}

// Values 8 * chunk .. + 7 of a row, as f16 or bf16; zeros behind the head dim.
__device__ uint4 AppendedChunk(const AppendSide& side, DataType type, int64_t row, int chunk) {
  if (8 * chunk >= side.head_dim) return make_uint4(0, 0, 0, 0);
  const int64_t at = row * side.head_dim + 8 * chunk;
  float x[8];
  if (type == DataType::kF32) {
    const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(side.rows) + at);
    const float4 low = from[0], high = from[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(side.rows) + at);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      x[i] = type == DataType::kF16 ? F16ToF32(half) : Bf16ToF32(half);
    }
  }
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t low = side.bf16 ? Bf16::Pack(x[2 * i]) : F16::Pack(x[2 * i]),
                   high = side.bf16 ? Bf16::Pack(x[2 * i + 1]) : F16::Pack(x[2 * i + 1]);
    packed[i] = high << 16 | low;
  }
  return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// CTA (x, y): threads y of job x; 8 values each. One thread's values are neighbours in a page, as they are in
// a row.
__global__ void AppendKernel(const __grid_constant__ AppendParams params) {
  LetNextKernelStart();
  const AppendJob job = params.jobs[blockIdx.x];
  const int k_chunks = params.k.stored_dim / 8, chunks = k_chunks + params.v.stored_dim / 8;
  const int all = job.tokens * params.heads * chunks;
  for (int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); i < all;
       i += static_cast<int>(gridDim.y * blockDim.x)) {
    const int t = i / chunks / params.heads, head = i / chunks % params.heads, at = i % chunks;
    const bool key = at < k_chunks;
    const AppendSide& side = key ? params.k : params.v;
    const int chunk = key ? at : at - k_chunks;
    auto* const half = reinterpret_cast<uint16_t*>(
        job.target + static_cast<size_t>(head) * params.record_bytes + side.offset);
    *reinterpret_cast<uint4*>(half + HalfPrecisionIndex(job.first_token + t, 8 * chunk, side.stored_dim)) =
        AppendedChunk(side, params.type, (job.first_row + t) * params.heads + head, chunk);
  }
}

HalfShape ShapeOf(const HalfLayout& layout) {
  return {layout.head_dim, layout.stored_dim, layout.groups, static_cast<int>(layout.code_bytes)};
}

CacheType Canonical(CacheType type) {
  const char* alias = Info(type).alias_of;
  return alias == nullptr ? type : *ParseCacheType(alias);
}

int Processors() {
  int device = 0, count = 1;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace

cudaError_t LaunchEncode(CacheType type, Side side, const HalfLayout& layout, RowSource source,
                         const CodecJob* jobs, int count, cudaStream_t stream) {
  if (Info(type).calibrated) return LaunchTideEncode(type, layout, source, jobs, count, stream);
  if (source == RowSource::kF16Page ? HasRowCodec(type) : HasFloatRows(type))
    return LaunchRowEncode(Canonical(type), side, layout, source, jobs, count, Processors(), stream);
  return VisitCodec(Canonical(type), [&](auto codec) {
    using C = decltype(codec);
    if constexpr (kIsAlias<C> || kHasFloatRows<C>) {
      return cudaErrorInvalidValue;
    } else {
      if constexpr (C::kStorage == Storage::kHalf) {
        if (source == RowSource::kF16Page) {
          StoreHalves<C><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(jobs, ShapeOf(layout));
          return cudaGetLastError();
        }
      }
      const int d = layout.stored_dim, bytes = kBlockTokens * (d + 1) * 4 + kValueStride * d;
      const cudaError_t set =
          cudaFuncSetAttribute(EncodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (set != cudaSuccess) return set;
      EncodeKernel<C><<<static_cast<unsigned>(count), kThreads, static_cast<size_t>(bytes), stream>>>(
          jobs, ShapeOf(layout), side, source);
      return cudaGetLastError();
    }
  });
}

cudaError_t LaunchDecode(CacheType type, Side side, const HalfLayout& layout, RowTarget target, int page_dim,
                         const CodecJob* jobs, int count, cudaStream_t stream) {
  if (Info(type).calibrated) return LaunchTideDecode(type, layout, target, page_dim, jobs, count, stream);
  if (target != RowTarget::kF32Rows ? HasRowCodec(type) : HasFloatRows(type))
    return LaunchRowDecode(Canonical(type), side, layout, target, page_dim, jobs, count, Processors(),
                           stream);
  return VisitCodec(Canonical(type), [&](auto codec) {
    using C = decltype(codec);
    if constexpr (kIsAlias<C> || kHasFloatRows<C>) {
      return cudaErrorInvalidValue;
    } else {
      if constexpr (C::kStorage == Storage::kHalf) {
        if (target != RowTarget::kF32Rows) {
          MoveHalves<C><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(jobs, ShapeOf(layout), target,
                                                                               page_dim);
          return cudaGetLastError();
        }
      }
      const int bytes = kBlockTokens * (layout.stored_dim + 1) * 4;
      const cudaError_t set =
          cudaFuncSetAttribute(DecodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (set != cudaSuccess) return set;
      DecodeKernel<C><<<static_cast<unsigned>(count), kThreads, static_cast<size_t>(bytes), stream>>>(
          jobs, ShapeOf(layout), side, target, page_dim);
      return cudaGetLastError();
    }
  });
}

cudaError_t LaunchAppend(const AppendParams& params, int count, int most_tokens, cudaStream_t stream) {
  constexpr int kAppendThreads = 256;
  const int chunks = most_tokens * params.heads * (params.k.stored_dim + params.v.stored_dim) / 8;
  const int ctas = std::min((chunks + kAppendThreads - 1) / kAppendThreads, 32);
  AppendKernel<<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(ctas)), kAppendThreads, 0,
                 stream>>>(params);
  return cudaGetLastError();
}

}  // namespace kvtide::cuda
