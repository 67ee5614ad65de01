#include "kernels/cuda/codec/f16_tile.h"
#include "kernels/cuda/codec/row_codec.cuh"

namespace kvtide::cuda {
namespace {

// The 8 codes of a unit: nibble words, or 4 bytes each at 8 bits.
template <int kBits>
__device__ __forceinline__ void LoadUnit(const uint8_t* plane, int quad, int lane, int unit, uint32_t* low,
                                         uint32_t* high) {
  const auto word = [&](int w) {
    return *reinterpret_cast<const uint32_t*>(plane + LaneWordOffset(quad * kBits + w, lane));
  };
  *high = 0;
  if constexpr (kBits == 8) {
    *low = word(2 * unit);
    *high = word(2 * unit + 1);
  } else if constexpr (kBits >= 4) {
    *low = word(unit);
    if constexpr (kBits == 5) *high = word(4) >> unit & 0x11111111u;
  } else if constexpr (kBits == 3) {
    if (unit < 3) {
      *low = word(unit) & 0x77777777u;
    } else {
      *low = (word(0) >> 3 & 0x11111111u) | (word(1) >> 2 & 0x22222222u) | (word(2) >> 1 & 0x44444444u);
    }
  } else {
    *low = word(unit / 2) >> (2 * (unit % 2)) & 0x33333333u;
  }
}
template <class C>
__device__ __forceinline__ float LevelOf(uint32_t low, uint32_t high, int element, const float* levels) {
  if constexpr (C::kBits == 8) {
    return static_cast<float>(static_cast<int8_t>((element < 4 ? low : high) >> (8 * (element % 4))));
  } else {
    uint32_t code = low >> (4 * element) & 15u;
    if constexpr (C::kBits == 5) code |= (high >> (4 * element) & 1u) << 4;
    if constexpr (HasBook<C>) return levels[code];
    return static_cast<float>(C::Level(static_cast<int>(code)));
  }
}

constexpr int kStageBytes = kBlockTokens * 128 * 4;
int StoredBytes(const HalfLayout& layout) {
  return static_cast<int>(layout.code_bytes) + layout.groups * kBlockTokens * 2;
}

template <class C, Side kSide, bool kF32>
__global__ void __launch_bounds__(kRowThreads, 6)
    DecodeRows(const CodecJob* jobs, int count, HalfShape shape, RowTarget target, int page_dim,
               int stored_bytes) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float levels[16];
  __shared__ float mean[128], gain[128];
  __shared__ __align__(16) uint8_t queue[4][sizeof(CodecJob)];  // of this round, the next, the one after
  const auto job_of = [&](int round) { return *reinterpret_cast<const CodecJob*>(queue[round % 4]); };
  const int t = static_cast<int>(threadIdx.x), d = shape.stored_dim;
  const CodePlace place = KeyPlace(t, 0, d);
  uint8_t* const stage = shared;
  uint8_t* const codes = shared + (kF32 ? kStageBytes : kStageBytes / 2);
  const auto* const scales = reinterpret_cast<const uint16_t*>(codes + shape.code_bytes);
  if constexpr (HasBook<C>) {
    if (t < 16) levels[t] = t < 2 * C::kHalf ? static_cast<float>(C::Level(t)) : 0.0f;
  }
  const auto fetch = [&](const CodecJob& job) {
    for (int i = t * 16; i < stored_bytes; i += kRowThreads * 16) CopyAsync(codes + i, job.source + i);
  };
  const auto queue_job = [&](int round) {
    const int64_t index = blockIdx.x + static_cast<int64_t>(round) * gridDim.x;
    if (index < count && t < static_cast<int>(sizeof(CodecJob)) / 16)
      CopyAsync(queue[round % 4] + t * 16, reinterpret_cast<const uint8_t*>(jobs + index) + t * 16);
  };
  queue_job(0);
  queue_job(1);
  fetch(jobs[blockIdx.x]);
  int round = 0;
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < count;
       index += static_cast<int>(gridDim.x), round++) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const CodecJob job = job_of(round);
    queue_job(round + 2);
    ForEachRun<false>(d, [&](auto length, int begin) {
      constexpr int N = decltype(length)::value;
      if (job.mean != nullptr || job.gain != nullptr) {
        for (int i = t; i < N; i += kRowThreads) {
          mean[i] = job.mean != nullptr && begin + i < shape.head_dim ? job.mean[begin + i] : 0.0f;
          gain[i] = job.gain != nullptr && begin + i < shape.head_dim ? job.gain[begin + i] : 1.0f;
        }
      }
      float y[N];
      float scale = 0;
#pragma unroll
      for (int o = 0; o < N / 8; o++) {
        if (8 * o % C::kGroup == 0)
          scale = Mul(HalfToFloat(scales[(begin + 8 * o) / C::kGroup * kBlockTokens + t]), C::kLevelUnit);
        uint32_t low, high;
        if constexpr (kSide == Side::kKey) {
          LoadUnit<C::kBits>(codes, place.quad + begin / 32 + o / 4, place.lane + o % 4, place.unit, &low,
                             &high);
#pragma unroll
          for (int e = 0; e < 8; e++) y[8 * o + e] = Mul(scale, LevelOf<C>(low, high, e, levels));
        } else {
#pragma unroll
          for (int n = 0; n < 8; n++) {
            LoadUnit<C::kBits>(codes, 2 * (begin / 32 + o / 4) + t / 32, 4 * n + t % 32 / 8, o % 4, &low,
                               &high);
            y[8 * o + n] = Mul(scale, LevelOf<C>(low, high, t % 8, levels));
          }
        }
      }
      RotateRun<typename C::Rotation, true>(y);
      __syncthreads();  // mean and gain are there, the stage is free, and after the last run so are the codes
      if (begin + N == d && index + static_cast<int>(gridDim.x) < count) fetch(job_of(round + 1));
      if (job.gain != nullptr)
#pragma unroll
        for (int i = 0; i < N; i++) y[i] /= gain[i];
      if (job.mean != nullptr)
#pragma unroll
        for (int i = 0; i < N; i++) y[i] += mean[i];
      if constexpr (kF32) {
#pragma unroll
        for (int k = 0; k < N / 4; k++)
          *reinterpret_cast<float4*>(stage + t * N * 4 + (k ^ (t & 7)) * 16) =
              make_float4(y[4 * k], y[4 * k + 1], y[4 * k + 2], y[4 * k + 3]);
      } else {
        constexpr float kMost = 65504.0f;
#pragma unroll
        for (int k = 0; k < N / 8; k++) {
          uint32_t words[4];
#pragma unroll
          for (int w = 0; w < 4; w++)
            words[w] = DeviceWarp::Pack<false>(fminf(fmaxf(y[8 * k + 2 * w], -kMost), kMost),
                                               fminf(fmaxf(y[8 * k + 2 * w + 1], -kMost), kMost));
          *reinterpret_cast<uint4*>(stage + t * N * 2 + (N % 64 == 0 ? k ^ (t & 7) : k ^ (t >> 1 & 3)) * 16) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      __syncthreads();
      constexpr int kPerChunk = kF32 ? 4 : 8, kChunks = N / kPerChunk;
      for (int i = t; i < kBlockTokens * kChunks; i += kRowThreads) {
        const int row = i / kChunks, chunk = i % kChunks, dim = begin + kPerChunk * chunk;
        const int swizzled = kF32 || N % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
        uint4 x = *reinterpret_cast<const uint4*>(stage + (row * kChunks + swizzled) * 16);
        if constexpr (kF32) {
          if (dim < shape.head_dim)
            *reinterpret_cast<uint4*>(reinterpret_cast<float*>(job.target) +
                                      static_cast<int64_t>(row) * job.row_stride + dim) = x;
        } else {
          if (dim >= shape.head_dim) x = make_uint4(0, 0, 0, 0);
          const int at = target == RowTarget::kF16Page ? HalfPrecisionIndex(row, dim, page_dim)
                                                       : TileIndex(row, dim, kBlockTokens);
          if (dim < page_dim) *reinterpret_cast<uint4*>(job.target + 2 * at) = x;
        }
      }
    });
    if constexpr (!kF32) {  // what the page is wider
      const int wider = (page_dim - d) / 8;
      for (int i = t; i < kBlockTokens * wider; i += kRowThreads) {
        const int row = i / wider, dim = d + i % wider * 8;
        const int at = target == RowTarget::kF16Page ? HalfPrecisionIndex(row, dim, page_dim)
                                                     : TileIndex(row, dim, kBlockTokens);
        *reinterpret_cast<uint4*>(job.target + 2 * at) = make_uint4(0, 0, 0, 0);
      }
    }
  }
}

template <class C, Side kSide, bool kF32>
cudaError_t Launch(const HalfLayout& layout, RowTarget target, int page_dim, const CodecJob* jobs, int count,
                   int processors, cudaStream_t stream) {
  const int bytes = StoredBytes(layout) + (kF32 ? kStageBytes : kStageBytes / 2);
  const cudaError_t set =
      cudaFuncSetAttribute(DecodeRows<C, kSide, kF32>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return set;
  const int per_processor = std::clamp(220 * 1024 / (bytes + 2048), 1, 6);
  DecodeRows<C, kSide, kF32><<<static_cast<unsigned>(std::min(count, processors * per_processor)),
                               kRowThreads, static_cast<size_t>(bytes), stream>>>(
      jobs, count, {layout.head_dim, layout.stored_dim, layout.groups, static_cast<int>(layout.code_bytes)},
      target, page_dim, StoredBytes(layout));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRowDecode(CacheType type, Side side, const HalfLayout& layout, RowTarget target,
                            int page_dim, const CodecJob* jobs, int count, int processors,
                            cudaStream_t stream) {
  return VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (kHasRowCodec<C>) {
      const auto launch = [&](auto f32) {
        constexpr bool kF32 = decltype(f32)::value;
        return side == Side::kKey
                   ? Launch<C, Side::kKey, kF32>(layout, target, page_dim, jobs, count, processors, stream)
                   : Launch<C, Side::kValue, kF32>(layout, target, page_dim, jobs, count, processors, stream);
      };
      if (target != RowTarget::kF32Rows) return launch(std::false_type{});
      if constexpr (kHasFloatRows<C>) return launch(std::true_type{});
      return cudaErrorInvalidValue;
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

bool HasRowCodec(CacheType type) {
  if (Info(type).calibrated) return false;
  return VisitCodec(type, [](auto codec) { return kHasRowRotation<decltype(codec)>; });
}
bool HasFloatRows(CacheType type) {
  if (Info(type).calibrated) return false;
  return VisitCodec(type, [](auto codec) { return kHasFloatRows<decltype(codec)>; });
}

}  // namespace kvtide::cuda
