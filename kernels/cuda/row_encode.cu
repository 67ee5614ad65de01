#include "kernels/cuda/row_codec.cuh"

namespace kvtide::cuda {
namespace {

// Shared memory of an encoder: nibble words of rows (values only), nibble words by unit, the values of one
// run.
constexpr int kRunBytes = kBlockTokens * 128 * 4;    // f32 rows; f16 pages take half
constexpr int RowWords(int d) { return d / 8 + 1; }  // odd steps between rows where it matters
template <class C>
int SharedBytes(int d, Side side, RowSource source) {
  const int units = kPlanes<C> * 2 * (d / 32) * 32 * 16,
            rows = side == Side::kValue ? kPlanes<C> * kBlockTokens * RowWords(d) * 4 : 0;
  return units + (rows + 15) / 16 * 16 + (source == RowSource::kF32Rows ? kRunBytes : kBlockTokens * d * 2);
}

template <class C, Side kSide, RowSource kSource>
__global__ void __launch_bounds__(kRowThreads, 6)
    EncodeRows(const CodecJob* jobs, int count, HalfShape shape) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ typename TablesOf<C>::Type tables;
  __shared__ float mean[128], gain[128];
  __shared__ __align__(16) uint8_t queue[4][sizeof(CodecJob)];  // of this round, the next, the one after
  const auto job_of = [&](int round) { return *reinterpret_cast<const CodecJob*>(queue[round % 4]); };
  const int t = static_cast<int>(threadIdx.x), d = shape.stored_dim, quads = 2 * (d / 32);
  // A token's place among the units of keys; lanes and quads of values come with the transposition.
  const CodePlace place = KeyPlace(t, 0, d);
  auto* const units = reinterpret_cast<uint32_t*>(shared);  // [plane][quad][lane][unit]
  const int plane_words = quads * 128;
  auto* const row_words = units + kPlanes<C> * plane_words;  // [plane][token][RowWords]
  const int row_plane = kBlockTokens * RowWords(d);
  uint8_t* const values = shared + kPlanes<C> * plane_words * 4 +
                          (kSide == Side::kValue ? (kPlanes<C> * row_plane * 4 + 15) / 16 * 16 : 0);
  tables.Write();
  const auto queue_job = [&](int round) {
    const int64_t index = blockIdx.x + static_cast<int64_t>(round) * gridDim.x;
    if (index < count && t < static_cast<int>(sizeof(CodecJob)) / 16)
      CopyAsync(queue[round % 4] + t * 16, reinterpret_cast<const uint8_t*>(jobs + index) + t * 16);
  };
  queue_job(0);
  queue_job(1);
  const auto fetch_page = [&](const CodecJob& job) {
    for (int i = t; i < kBlockTokens * d / 8; i += kRowThreads)
      CopyAsync(values + i * 16, job.source + i * 16);
  };
  if constexpr (kSource == RowSource::kF16Page) fetch_page(jobs[blockIdx.x]);
  int round = 0;
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < count;
       index += static_cast<int>(gridDim.x), round++) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const CodecJob job = job_of(round);
    queue_job(round + 2);
    auto* const scales = reinterpret_cast<uint16_t*>(job.target + shape.code_bytes);
    ForEachRun(d, [&](auto length, int begin) {
      constexpr int N = decltype(length)::value;
      float y[N];
      if (job.mean != nullptr || job.gain != nullptr) {
        __syncthreads();  // the last run has read its own
        for (int i = t; i < N; i += kRowThreads) {
          mean[i] = job.mean != nullptr && begin + i < shape.head_dim ? job.mean[begin + i] : 0.0f;
          gain[i] = job.gain != nullptr && begin + i < shape.head_dim ? job.gain[begin + i] : 1.0f;
        }
        __syncthreads();
      }
      if constexpr (kSource == RowSource::kF32Rows) {
        __syncthreads();
        for (int i = t; i < kBlockTokens * N / 4; i += kRowThreads) {
          const int row = i / (N / 4), chunk = i % (N / 4), dim = begin + 4 * chunk;
          uint4 x = make_uint4(0, 0, 0, 0);
          if (row < job.tokens && dim < shape.head_dim)
            x = *reinterpret_cast<const uint4*>(reinterpret_cast<const float*>(job.source) +
                                                static_cast<int64_t>(row) * job.row_stride + dim);
          *reinterpret_cast<uint4*>(values + row * N * 4 + (chunk ^ (row & 7)) * 16) = x;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < N / 4; k++) {
          const float4 x = *reinterpret_cast<const float4*>(values + t * N * 4 + (k ^ (t & 7)) * 16);
          y[4 * k] = x.x;
          y[4 * k + 1] = x.y;
          y[4 * k + 2] = x.z;
          y[4 * k + 3] = x.w;
        }
      } else {
        uint8_t* const row = values + (t * d + begin) * 2;
        if (t >= job.tokens)
          for (int k = 0; k < N / 8; k++) *reinterpret_cast<uint4*>(row + k * 16) = make_uint4(0, 0, 0, 0);
        const int swizzle = d % 64 == 0 ? t & 7 : t >> 1 & 3;
#pragma unroll
        for (int k = 0; k < N / 8; k++) {
          const uint4 x = *reinterpret_cast<const uint4*>(row + (k ^ swizzle) * 16);
          const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int e = 0; e < 8; e++) y[8 * k + e] = HalfToFloat(words[e / 2] >> (16 * (e % 2)) & 0xffffu);
        }
      }
      if ((job.mean != nullptr || job.gain != nullptr) && t < job.tokens) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
          const float4 m = *reinterpret_cast<const float4*>(mean + i),
                       g = *reinterpret_cast<const float4*>(gain + i);
          y[i] = Mul(y[i] - m.x, g.x);
          y[i + 1] = Mul(y[i + 1] - m.y, g.y);
          y[i + 2] = Mul(y[i + 2] - m.z, g.z);
          y[i + 3] = Mul(y[i + 3] - m.w, g.w);
        }
      }
      if constexpr (kSource == RowSource::kF16Page) {
        // The last run has taken its values out: the next page may come.
        if (begin + N == d && index + static_cast<int>(gridDim.x) < count) {
          __syncthreads();
          fetch_page(job_of(round + 1));
        }
      }

      RotateRun<typename C::Rotation, false>(y);
      uint32_t low[N / 8];
      [[maybe_unused]] uint32_t high[N / 8];
      if constexpr (HasBook<C>) {
        scales[begin / C::kGroup * kBlockTokens + t] = EncodeBook<C, N>(y, kSide, tables, low);
      } else {
        scales[(begin / 32) * kBlockTokens + t] = EncodeUniform<C, 0, N>(y, low, high);
        if constexpr (N > 32)
          scales[(begin / 32 + 1) * kBlockTokens + t] = EncodeUniform<C, 32, N>(y, low, high);
        if constexpr (N > 64)
          scales[(begin / 32 + 2) * kBlockTokens + t] = EncodeUniform<C, 64, N>(y, low, high);
        if constexpr (N > 96)
          scales[(begin / 32 + 3) * kBlockTokens + t] = EncodeUniform<C, 96, N>(y, low, high);
      }
#pragma unroll
      for (int o = 0; o < N / 8; o++) {
        if constexpr (kSide == Side::kKey) {
          const int quad = place.quad + begin / 32 + o / 4,
                    at = (quad * 32 + place.lane + o % 4) * 4 + place.unit;
          units[at] = low[o];
          if constexpr (kPlanes<C> == 2) units[plane_words + at] = high[o];
        } else {
          const int at = t * RowWords(d) + begin / 8 + o;
          row_words[at] = low[o];
          if constexpr (kPlanes<C> == 2) row_words[row_plane + at] = high[o];
        }
      }
    });
    __syncthreads();
    if constexpr (kSide == Side::kValue) {
      // 8 tokens x 8 dims at a time.
      for (int i = t; i < d; i += kRowThreads) {
        const int tokens = i % 8, dims = i / 8;
#pragma unroll
        for (int plane = 0; plane < kPlanes<C>; plane++) {
          uint32_t w[8];
#pragma unroll
          for (int j = 0; j < 8; j++)
            w[j] = row_words[plane * row_plane + (8 * tokens + j) * RowWords(d) + dims];
          TransposeNibbles(w);
          const int quad = dims / 4 * 2 + tokens / 4;
#pragma unroll
          for (int n = 0; n < 8; n++)
            units[plane * plane_words + (quad * 32 + 4 * n + tokens % 4) * 4 + dims % 4] = w[n];
        }
      }
      __syncthreads();
    }
    // Four quads of a lane are whole slots of 16 bytes at every width.
    constexpr int kBits = C::kBits;
    const int lane_words = LaneWords(kBits, d);
    for (int i = t; i < (quads + 3) / 4 * 32; i += kRowThreads) {
      const int first = i / 32 * 4, lane = i % 32;
      uint32_t words[4 * kBits] = {};
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (first + q < quads) {
          const int at = ((first + q) * 32 + lane) * 4;
          const uint4 low = *reinterpret_cast<const uint4*>(units + at);
          uint4 high = low;
          if constexpr (kPlanes<C> == 2) high = *reinterpret_cast<const uint4*>(units + plane_words + at);
          PackNibbles<kBits>(low, high, words + q * kBits);
        }
#pragma unroll
      for (int slot = 0; slot < kBits; slot++) {
        const int word = first * kBits + 4 * slot;
        if (word < lane_words)
          *reinterpret_cast<uint4*>(job.target + LaneWordOffset(word, lane)) =
              make_uint4(words[4 * slot], words[4 * slot + 1], words[4 * slot + 2], words[4 * slot + 3]);
      }
    }
    __syncthreads();
  }
}

template <class C, Side kSide, RowSource kSource>
cudaError_t Launch(const HalfLayout& layout, const CodecJob* jobs, int count, int processors,
                   cudaStream_t stream) {
  const int bytes = SharedBytes<C>(layout.stored_dim, kSide, kSource);
  const cudaError_t set =
      cudaFuncSetAttribute(EncodeRows<C, kSide, kSource>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return set;
  const int per_processor = std::clamp(220 * 1024 / (bytes + 4096), 1, 6);
  EncodeRows<C, kSide, kSource><<<static_cast<unsigned>(std::min(count, processors * per_processor)),
                                  kRowThreads, static_cast<size_t>(bytes), stream>>>(
      jobs, count, {layout.head_dim, layout.stored_dim, layout.groups, static_cast<int>(layout.code_bytes)});
  return cudaGetLastError();
}

template <class C>
cudaError_t LaunchFor(Side side, const HalfLayout& layout, RowSource source, const CodecJob* jobs, int count,
                      int processors, cudaStream_t stream) {
  constexpr Side kKey = Side::kKey, kValue = Side::kValue;
  constexpr RowSource kPage = RowSource::kF16Page, kRows = RowSource::kF32Rows;
  if (source == kPage)
    return side == kKey ? Launch<C, kKey, kPage>(layout, jobs, count, processors, stream)
                        : Launch<C, kValue, kPage>(layout, jobs, count, processors, stream);
  return side == kKey ? Launch<C, kKey, kRows>(layout, jobs, count, processors, stream)
                      : Launch<C, kValue, kRows>(layout, jobs, count, processors, stream);
}

}  // namespace

cudaError_t LaunchRowEncode(CacheType type, Side side, const HalfLayout& layout, RowSource source,
                            const CodecJob* jobs, int count, int processors, cudaStream_t stream) {
  return VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (kHasRowCodec<C>) {
      return LaunchFor<C>(side, layout, source, jobs, count, processors, stream);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace kvtide::cuda
