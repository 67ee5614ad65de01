#include "kernels/cuda/codec/row_codec.cuh"

namespace kvtide::cuda {
namespace {

// A CTA encodes a page, a warp 32 or 16 tokens of it on its own, with one or two lanes a token: its rows come
// by one copy while it computes those of the page before. Where tokens of several warps share words the warps
// meet.

template <class C>
constexpr bool kHadamard = std::is_same_v<typename C::Rotation, Hadamard>;
// Two lanes take 16 % more instructions and need half the registers, which pays for values in whole runs. For
// keys it does not: there both lanes would have to take away the mean.
template <class C>
bool TakesTwoLanes(Side side, RowSource source, int stored_dim) {
  return kHadamard<C> && side == Side::kValue && source == RowSource::kF16Page && stored_dim % 128 == 0;
}
template <int kLanes>
constexpr int kTokens = 32 / kLanes;  // of a warp
template <int kLanes>
constexpr int kThreads = kBlockTokens* kLanes;
template <class C, int kLanes>
constexpr int kPages = kLanes == 2  ? 4
                       : HasBook<C> ? 6
                                    : 8;  // CTAs of a multiprocessor

// Bytes of a quad of words of 4 bits in shared memory: 16 more, so that neighbours lie in different banks.
constexpr int kQuadBytes = 512 + 16;
// Words of a row of codes waiting for transposition: an odd number.
template <class C>
__host__ __device__ constexpr int RowWords(int d) {
  return (C::kBits == 8 ? d / 4 : d / 8) + 1;
}
// Widths whose quads are whole slots of 16 bytes.
template <class C>
constexpr bool kWholeSlots = C::kBits == 4 || C::kBits == 8;

// What a warp has beside its rows: jobs of this round, the next, the one after; a profile's part for a run.
template <bool kProfiles>
struct alignas(16) Desk {
  CodecJob queue[4];
  float mean[kProfiles ? 128 : 4], gain[kProfiles ? 128 : 4];
  uint64_t arrival;
};
// Shared memory, in bytes.
struct SharedLayout {
  int desk, rows;     // of a warp
  int waiting;        // codes of a page, a plane
  int plane, planes;  // of quads
  int warps;
  __host__ __device__ int total() const { return warps * (desk + rows) + (waiting + plane) * planes; }
};
template <class C, Side kSide, RowSource kSource, int kLanes>
__host__ __device__ constexpr SharedLayout LayoutOf(int d) {
  SharedLayout layout{};
  layout.desk = static_cast<int>(sizeof(Desk<kSide == Side::kKey>));
  layout.rows = kTokens<kLanes> * (kSource == RowSource::kF32Rows ? 128 * 4 : d * 2);
  layout.warps = kThreads<kLanes> / 32;
  layout.planes = C::kBits > 4 ? 2 : 1;
  if (kSide == Side::kValue)
    layout.waiting = (kBlockTokens * RowWords<C>(d) * 4 / (C::kBits == 8 ? 2 : 1) + 15) / 16 * 16;
  if (kSide == Side::kValue || !kWholeSlots<C>) layout.plane = 2 * (d / 32) * kQuadBytes;
  return layout;
}

// Lane 4n + c's slot of 16 bytes among those of a quad.
__device__ __forceinline__ int SlotOf(int n, int c) { return 8 * c + (n ^ 2 * c); }

template <class C, Side kSide, RowSource kSource, int kLanes>
__global__ void __launch_bounds__(kThreads<kLanes>, kPages<C, kLanes>)
    EncodeRows(const CodecJob* jobs, int count, HalfShape shape, uint32_t hidden) {
  constexpr int kBits = C::kBits;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ typename TablesOf<C>::Type tables;
  __shared__ __align__(128) uint8_t zeros[512];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int t = static_cast<int>(threadIdx.x) / kLanes, d = shape.stored_dim, quads = 2 * (d / 32);
  const int second = kLanes == 2 ? lane % 2 : 0;
  [[maybe_unused]] const float odd = second != 0 ? -1.0f : 1.0f;
  const SharedLayout layout = LayoutOf<C, kSide, kSource, kLanes>(d);
  uint8_t* const rows = shared + warp * layout.rows;
  auto& desk =
      *reinterpret_cast<Desk<kSide == Side::kKey>*>(shared + layout.warps * layout.rows + warp * layout.desk);
  uint8_t* const planes = shared + layout.warps * (layout.rows + layout.desk);
  auto* const waiting = reinterpret_cast<uint32_t*>(planes + layout.planes * layout.plane);
  const uint32_t arrival = SharedAddress(&desk.arrival), rows_address = SharedAddress(rows);
  const auto meet = [] {
    if constexpr (kWholeSlots<C>)
      __syncwarp();
    else
      __syncthreads();
  };

  const auto job_of = [&](int round) { return desk.queue + round % 4; };
  const auto index_of = [](int round) { return static_cast<int64_t>(round) * gridDim.x + blockIdx.x; };
  const auto queue_job = [&](int round) {
    if (index_of(round) < count && lane < static_cast<int>(sizeof(CodecJob)) / 16)
      CopyAsync(reinterpret_cast<uint8_t*>(job_of(round)) + lane * 16,
                reinterpret_cast<const uint8_t*>(jobs + index_of(round)) + lane * 16);
  };
  const auto fetch_rows = [&](const std::byte* source) {
    if (IsCopyingLane())
      CopyPiece(rows_address, source + warp * layout.rows, static_cast<uint32_t>(layout.rows), arrival);
  };
  if (lane == 0) Barrier::Init(arrival, kCopyArrivals);
  Barrier::FenceInit();
  __syncwarp();
  queue_job(0);
  queue_job(1);
  if constexpr (kSource == RowSource::kF16Page) fetch_rows(jobs[blockIdx.x].source);
  tables.Write();
  if (threadIdx.x < 32) *reinterpret_cast<uint4*>(zeros + 16 * threadIdx.x) = make_uint4(0, 0, 0, 0);
  __syncthreads();

#pragma unroll 1
  for (int round = 0; index_of(round) < count; round++) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    const CodecJob& job = *job_of(round);  // read when needed: registers are few
    const auto target = [&] {
      auto* const to = reinterpret_cast<uint8_t*>(job.target);
      __builtin_assume(__isGlobal(to));
      return to;
    };
    queue_job(round + 2);
    if constexpr (kSource == RowSource::kF16Page) Barrier::Wait(arrival, static_cast<uint32_t>(round & 1));
    const bool has_profile = job.mean != nullptr || job.gain != nullptr;
    const auto encode_run = [&](auto length, auto profiled, int begin) {
      constexpr int N = decltype(length)::value;
      const bool shift = profiled && has_profile;
      if (shift) {
        __syncwarp();  // the last run has read its own
        for (int i = lane; i < N; i += 32) {
          desk.mean[i] = job.mean != nullptr && begin + i < shape.head_dim ? job.mean[begin + i] : 0.0f;
          desk.gain[i] = job.gain != nullptr && begin + i < shape.head_dim ? job.gain[begin + i] : 1.0f;
        }
        __syncwarp();
      }
      if constexpr (kSource == RowSource::kF32Rows) {
        __syncwarp();
        for (int i = lane; i < kTokens<kLanes> * N / 4; i += 32) {
          const int row = i / (N / 4), chunk = i % (N / 4), dim = begin + 4 * chunk,
                    token = kTokens<kLanes> * warp + row;
          uint4 x = make_uint4(0, 0, 0, 0);
          if (token < job.tokens && dim < shape.head_dim)
            x = *reinterpret_cast<const uint4*>(reinterpret_cast<const float*>(job.source) +
                                                static_cast<int64_t>(token) * job.row_stride + dim);
          *reinterpret_cast<uint4*>(rows + row * N * 4 + (chunk ^ (row & 7)) * 16) = x;
        }
        __syncwarp();
      }
      // Rows behind the last token, and what is taken from them, are zero.
      const bool present = t < job.tokens;
      const int own_row = t % kTokens<kLanes>;
      const uint8_t* row = zeros;
      if (present)
        row = rows + (kSource == RowSource::kF32Rows ? own_row * N * 4 : (own_row * d + begin / 64 * 64) * 2);
      // Chunk k of a row stands where its number is XORed with `swizzle`. Rows begin at 64 bytes: of the
      // number the lowest two bits are XORed into addresses, the third chooses between two of them.
      const int swizzle =
          kSource == RowSource::kF32Rows ? own_row & 7 : (d % 64 == 0 ? t & 7 : t >> 1 & 3) ^ (begin / 8 & 7);
      const uint32_t chunks[2] = {SharedAddress(row) + (swizzle & 3) * 16 + (swizzle & 4) * 16,
                                  SharedAddress(row) + (swizzle & 3) * 16 + ((swizzle & 4) ^ 4) * 16};
      const auto chunk = [&](int k) {
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"((chunks[k / 4 % 2] ^ (k % 4 * 16)) + k / 8 * 128)
                     : "memory");
        return x;
      };
      const float* const mean = present ? desk.mean : reinterpret_cast<const float*>(zeros);
      float y[N / kLanes];
#pragma unroll
      for (int i = 0; i < N / 8; i++) {
        const int k = N == 128 ? i / 2 + i % 2 * 8 : i;  // what is 128 bytes apart shares an address
        float v[8];
        if constexpr (kSource == RowSource::kF32Rows) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint4 x = chunk(2 * k + h);
            v[4 * h] = __uint_as_float(x.x);
            v[4 * h + 1] = __uint_as_float(x.y);
            v[4 * h + 2] = __uint_as_float(x.z);
            v[4 * h + 3] = __uint_as_float(x.w);
          }
        } else {
          const uint4 x = chunk(k);
          const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int e = 0; e < 8; e++) v[e] = HalfToFloat(words[e / 2] >> (16 * (e % 2)) & 0xffffu);
        }
        if (shift) {
#pragma unroll
          for (int e = 0; e < 8; e++) v[e] = Mul(v[e] - mean[8 * k + e], desk.gain[8 * k + e]);
        }
#pragma unroll
        for (int e = 0; e < 8; e += kLanes) {
          if constexpr (kLanes == 2)
            y[4 * k + e / 2] = FirstStep(8 * k + e, v[e], v[e + 1], odd);
          else
            y[8 * k + e] = v[e];
        }
      }
      if constexpr (kSource == RowSource::kF16Page) {
        // The last run has taken its values out: the next page may come.
        if (begin + N == d) {
          LetCopiesOverwrite();
          if (index_of(round + 1) < count) fetch_rows(job_of(round + 1)->source);
        }
      }

      if constexpr (kLanes == 2)
        FurtherSteps(y, odd);
      else
        RotateRun<typename C::Rotation, false>(y);
      // A token's codes of dims 8o .. 8o + 7, o = at + number; the second word is that of the second plane.
      // Among those of keys they stand at own ^ 32c, plus 128c, c = o % 4.
      const auto store = [&](int at, int number, uint32_t low, [[maybe_unused]] uint32_t high) {
        if constexpr (kSide == Side::kValue) {
          uint32_t* const to = waiting + t * RowWords<C>(d) + (begin / 8 + number) * (kBits == 8 ? 2 : 1);
          if constexpr (kBits == 8) {
            to[2 * at] = low;
            to[2 * at + 1] = high;
          } else {
            to[at] = low;
            if constexpr (kBits == 5) to[layout.waiting / 4 + at] = high;
          }
        } else {
          constexpr int kStride = kWholeSlots<C> ? 128 * kBits : kQuadBytes;
          const CodePlace place = KeyPlace(t, begin, d);
          const int own =
              place.lane / 4 * 16 + (kBits == 8 ? place.unit / 2 * 512 + place.unit % 2 * 8 : place.unit * 4);
          uint8_t* const to = (kWholeSlots<C> ? target() : planes) + place.quad * kStride +
                              ((own ^ 32 * number ^ 32 * (at % 4)) + 128 * number) +
                              (128 * (at % 4) + at / 4 * kStride);
          if constexpr (kBits == 8) {
            *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(to) = low;
            if constexpr (kBits == 5) *reinterpret_cast<uint32_t*>(to + layout.plane) = high;
          }
        }
      };
      uint16_t scale;
      if constexpr (HasBook<C>) {
        const bool done = EncodeBook<C, N>(y, tables, hidden, &scale,
                                           [&](int m, uint32_t word) { store(kLanes * m, second, word, 0); });
        // f16 values alone have no such sums.
        if constexpr (profiled || kSource == RowSource::kF32Rows) {
          if (__any_sync(0xffffffffu, !done)) {
            __syncwarp();
            if (!done) {
              uint32_t words[C::kGroup / 8];
              scale = EncodeUnusual<C>(job, kSource == RowSource::kF16Page, shape, t, begin, N, kSide, words);
#pragma unroll 1
              for (int o = 0; o < N / 8; o++) store(o, 0, words[o], 0);
            }
            __syncwarp();
          }
        }
      } else {
        scale = EncodeUniform<C>(y, [&](int o, uint32_t low, uint32_t high) { store(o, 0, low, high); });
      }
      if (second == 0)
        reinterpret_cast<uint16_t*>(target() + shape.code_bytes)[begin / C::kGroup * kBlockTokens + t] =
            scale;
    };
    // Code of its own for rows without a profile, where registers are few; values never have one.
    constexpr bool kTwice = kSide == Side::kKey && kSource == RowSource::kF16Page;
    const auto encode_rows = [&](auto profiled) {
      if constexpr (kLanes == 2) {
#pragma unroll 1
        for (int begin = 0; begin < d; begin += 128)
          encode_run(std::integral_constant<int, 128>{}, profiled, begin);
      } else {
        ForEachRun<!HasBook<C>>(d, [&](auto length, int begin) { encode_run(length, profiled, begin); });
      }
    };
    if (kTwice && !has_profile)
      encode_rows(std::false_type{});
    else
      encode_rows(std::bool_constant<kSide == Side::kKey>{});

    if constexpr (kSide == Side::kValue) {
      __syncwarp();
      // 8 tokens x 8 dims at a time.
      constexpr int kGroups = kTokens<kLanes> / 8;
      const int group = warp * kGroups + lane % kGroups, c = group % 4;
#pragma unroll 2
      for (int o = lane / kGroups; o < d / 8; o += 32 / kGroups) {
        uint8_t* const quad = planes + (o / 4 * 2 + group / 4) * kQuadBytes;
        const uint32_t* const from = waiting + 8 * group * RowWords<C>(d);
        const int unit = o % 4;
        if constexpr (kBits == 8) {
          uint32_t w[16];
#pragma unroll
          for (int j = 0; j < 8; j++) {
            w[2 * j] = from[j * RowWords<C>(d) + 2 * o];
            w[2 * j + 1] = from[j * RowWords<C>(d) + 2 * o + 1];
          }
          TransposeBytes(w);
#pragma unroll
          for (int n = 0; n < 8; n++)
            *reinterpret_cast<uint2*>(quad + unit / 2 * layout.plane + SlotOf(n, c) * 16 + unit % 2 * 8) =
                make_uint2(w[2 * n], w[2 * n + 1]);
        } else {
#pragma unroll
          for (int plane = 0; plane < kPlanes<C>; plane++) {
            uint32_t w[8];
#pragma unroll
            for (int j = 0; j < 8; j++) w[j] = from[plane * layout.waiting / 4 + j * RowWords<C>(d) + o];
            TransposeNibbles(w);
#pragma unroll
            for (int n = 0; n < 8; n++)
              *reinterpret_cast<uint32_t*>(quad + plane * layout.plane + SlotOf(n, c) * 16 + unit * 4) = w[n];
          }
        }
      }
    }
    if constexpr (kWholeSlots<C>) {
      if constexpr (kSide == Side::kValue) {
        __syncwarp();
        // A warp has all slots of every second quad, or one half of them.
        constexpr int kOwn = 32 / kLanes;
        const int slot = (kLanes == 2 ? warp % 2 * kOwn : 0) + lane % kOwn;
#pragma unroll 4
        for (int q = warp / kLanes + 2 * (lane / kOwn); q < quads; q += 2 * kLanes)
#pragma unroll
          for (int plane = 0; plane < kPlanes<C>; plane++)
            *reinterpret_cast<uint4*>(target() + (q * kPlanes<C> + plane) * 512 + slot * 16) =
                *reinterpret_cast<const uint4*>(planes + plane * layout.plane + q * kQuadBytes + slot * 16);
        __syncwarp();
      }
    } else {
      meet();
      // Four quads of a lane are whole slots at every width.
      const int lane_words = LaneWords(kBits, d);
#pragma unroll 1
      for (int first = 4 * warp; first < quads; first += kThreads<kLanes> / 8) {
        uint32_t words[4 * kBits] = {};
#pragma unroll
        for (int q = 0; q < 4; q++)
          if (first + q < quads) {
            const uint8_t* const from = planes + (first + q) * kQuadBytes + lane * 16;
            const uint4 low = *reinterpret_cast<const uint4*>(from);
            uint4 high = low;
            if constexpr (kPlanes<C> == 2) high = *reinterpret_cast<const uint4*>(from + layout.plane);
            PackNibbles<kBits>(low, high, words + q * kBits);
          }
#pragma unroll
        for (int slot = 0; slot < kBits; slot++) {
          const int word = first * kBits + 4 * slot;
          if (word < lane_words)
            *reinterpret_cast<uint4*>(target() + word / 4 * 512 + lane * 16) =
                make_uint4(words[4 * slot], words[4 * slot + 1], words[4 * slot + 2], words[4 * slot + 3]);
        }
      }
      meet();
    }
  }
}

template <class C, Side kSide, RowSource kSource, int kLanes>
cudaError_t Launch(const HalfLayout& layout, const CodecJob* jobs, int count, int processors,
                   cudaStream_t stream) {
  const int bytes = LayoutOf<C, kSide, kSource, kLanes>(layout.stored_dim).total();
  const cudaError_t set = cudaFuncSetAttribute(EncodeRows<C, kSide, kSource, kLanes>,
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return set;
  const int per_processor = std::clamp(220 * 1024 / (bytes + 3 * 1024), 1, kPages<C, kLanes>);
  EncodeRows<C, kSide, kSource, kLanes><<<static_cast<unsigned>(std::min(count, processors * per_processor)),
                                          kThreads<kLanes>, static_cast<size_t>(bytes), stream>>>(
      jobs, count, {layout.head_dim, layout.stored_dim, layout.groups, static_cast<int>(layout.code_bytes)},
      0);
  return cudaGetLastError();
}

template <class C>
cudaError_t LaunchFor(Side side, const HalfLayout& layout, RowSource source, const CodecJob* jobs, int count,
                      int processors, cudaStream_t stream) {
  constexpr Side kKey = Side::kKey, kValue = Side::kValue;
  constexpr RowSource kPage = RowSource::kF16Page, kRows = RowSource::kF32Rows;
  if constexpr (kHadamard<C>) {
    if (TakesTwoLanes<C>(side, source, layout.stored_dim))
      return Launch<C, kValue, kPage, 2>(layout, jobs, count, processors, stream);
  }
  if (source == kPage)
    return side == kKey ? Launch<C, kKey, kPage, 1>(layout, jobs, count, processors, stream)
                        : Launch<C, kValue, kPage, 1>(layout, jobs, count, processors, stream);
  if constexpr (kHasFloatRows<C>) {
    return side == kKey ? Launch<C, kKey, kRows, 1>(layout, jobs, count, processors, stream)
                        : Launch<C, kValue, kRows, 1>(layout, jobs, count, processors, stream);
  } else {
    return cudaErrorInvalidValue;
  }
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
