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

// What a thread knows while its CTA encodes pages, and the steps of a page in their order. A page's codes go
// to its block as soon as they are words: those of keys are when they are found, if their width fills slots;
// values are transposed first, codes of other widths packed.
template <class C, Side kSide, RowSource kSource, int kLanes>
class PageEncoder {
 public:
  static constexpr int kBits = C::kBits;
  static constexpr bool kValues = kSide == Side::kValue, kFloatRows = kSource == RowSource::kF32Rows;
  using Tables = typename TablesOf<C>::Type;

  __device__ __forceinline__ PageEncoder(const CodecJob* jobs, int count, const HalfShape& shape,
                                         uint32_t hidden, uint8_t* shared, Tables& tables, uint8_t* zeros)
      : jobs_(jobs),
        count_(count),
        shape_(shape),
        hidden_(hidden),
        tables_(tables),
        zeros_(zeros),
        layout_(LayoutOf<C, kSide, kSource, kLanes>(shape.stored_dim)),
        rows_(shared + warp_ * layout_.rows),
        desk_(*reinterpret_cast<WarpDesk*>(shared + layout_.warps * layout_.rows + warp_ * layout_.desk)),
        planes_(shared + layout_.warps * (layout_.rows + layout_.desk)),
        waiting_(reinterpret_cast<uint32_t*>(planes_ + layout_.planes * layout_.plane)),
        arrival_(SharedAddress(&desk_.arrival)),
        rows_address_(SharedAddress(rows_)) {}

  // Every gridDim.x-th page, from that of the CTA's number on.
  __device__ __forceinline__ void EncodePages() {
    Begin();
#pragma unroll 1
    for (int round = 0; IndexOf(round) < count_; round++) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncwarp();
      const CodecJob& job = *JobOf(round);  // read when needed: registers are few
      QueueJob(round + 2);
      if constexpr (!kFloatRows) Barrier::Wait(arrival_, static_cast<uint32_t>(round & 1));
      EncodeRows(job, round);
      if constexpr (kValues) TransposeCodes();
      if constexpr (kWholeSlots<C>) {
        if constexpr (kValues) CopySlots(job);
      } else {
        PackSlots(job);
      }
    }
  }

 private:
  using WarpDesk = Desk<kSide == Side::kKey>;

  __device__ __forceinline__ int64_t IndexOf(int round) const {
    return static_cast<int64_t>(round) * gridDim.x + blockIdx.x;
  }
  __device__ __forceinline__ CodecJob* JobOf(int round) const { return desk_.queue + round % 4; }
  __device__ __forceinline__ static uint8_t* TargetOf(const CodecJob& job) {
    auto* const to = reinterpret_cast<uint8_t*>(job.target);
    __builtin_assume(__isGlobal(to));
    return to;
  }

  // Jobs and rows of the first rounds, tables of the CTA.
  __device__ __forceinline__ void Begin() {
    if (lane_ == 0) Barrier::Init(arrival_, kCopyArrivals);
    Barrier::FenceInit();
    __syncwarp();
    QueueJob(0);
    QueueJob(1);
    if constexpr (!kFloatRows) FetchRows(jobs_[blockIdx.x].source);
    tables_.Write();
    if (threadIdx.x < 32) *reinterpret_cast<uint4*>(zeros_ + 16 * threadIdx.x) = make_uint4(0, 0, 0, 0);
    __syncthreads();
  }
  __device__ __forceinline__ void QueueJob(int round) const {
    if (IndexOf(round) < count_ && lane_ < static_cast<int>(sizeof(CodecJob)) / 16)
      CopyAsync(reinterpret_cast<uint8_t*>(JobOf(round)) + lane_ * 16,
                reinterpret_cast<const uint8_t*>(jobs_ + IndexOf(round)) + lane_ * 16);
  }
  __device__ __forceinline__ void FetchRows(const std::byte* source) const {
    if (IsCopyingLane())
      CopyPiece(rows_address_, source + warp_ * layout_.rows, static_cast<uint32_t>(layout_.rows), arrival_);
  }

  // All runs of the warp's rows. Code of its own for rows without a profile, where registers are few; values
  // never have one.
  __device__ __forceinline__ void EncodeRows(const CodecJob& job, int round) {
    const bool has_profile = job.mean != nullptr || job.gain != nullptr;
    constexpr bool kTwice = !kValues && !kFloatRows;
    if (kTwice && !has_profile)
      EncodeRuns(job, round, std::false_type{}, has_profile);
    else
      EncodeRuns(job, round, std::bool_constant<!kValues>{}, has_profile);
  }
  template <class Profiled>
  __device__ __forceinline__ void EncodeRuns(const CodecJob& job, int round, Profiled profiled,
                                             bool has_profile) {
    if constexpr (kLanes == 2) {
#pragma unroll 1
      for (int begin = 0; begin < d_; begin += 128) EncodeRun<128>(job, round, profiled, has_profile, begin);
    } else {
      ForEachRun<!HasBook<C>>(d_, [&](auto length, int begin) {
        EncodeRun<decltype(length)::value>(job, round, profiled, has_profile, begin);
      });
    }
  }

  // Dims [begin, begin + N) of the warp's rows.
  template <int N, class Profiled>
  __device__ __forceinline__ void EncodeRun(const CodecJob& job, int round, Profiled profiled,
                                            bool has_profile, int begin) {
    const bool shift = profiled && has_profile;
    if (shift) LoadProfile<N>(job, begin);
    if constexpr (kFloatRows) LoadFloatRows<N>(job, begin);
    float y[N / kLanes];
    ReadRow<N>(job, shift, begin, y);
    if constexpr (!kFloatRows) {
      // The last run has taken its values out: the next page may come.
      if (begin + N == d_) {
        LetCopiesOverwrite();
        if (IndexOf(round + 1) < count_) FetchRows(JobOf(round + 1)->source);
      }
    }
    if constexpr (kLanes == 2)
      FurtherSteps(y, odd_);
    else
      RotateRun<typename C::Rotation, false>(y);
    uint16_t scale;
    if constexpr (HasBook<C>) {
      const bool done = EncodeBook<C, N>(y, tables_, hidden_, &scale, [&](int m, uint32_t word) {
        StoreCodes(job, begin, kLanes * m, second_, word, 0);
      });
      // f16 values alone have no such sums.
      if constexpr (profiled || kFloatRows) {
        if (__any_sync(0xffffffffu, !done)) {
          __syncwarp();
          if (!done) {
            uint32_t words[C::kGroup / 8];
            scale = EncodeUnusual<C>(job, !kFloatRows, shape_, t_, begin, N, kSide, words);
#pragma unroll 1
            for (int o = 0; o < N / 8; o++) StoreCodes(job, begin, o, 0, words[o], 0);
          }
          __syncwarp();
        }
      }
    } else {
      scale = EncodeUniform<C>(
          y, [&](int o, uint32_t low, uint32_t high) { StoreCodes(job, begin, o, 0, low, high); });
    }
    if (second_ == 0)
      reinterpret_cast<uint16_t*>(TargetOf(job) + shape_.code_bytes)[begin / C::kGroup * kBlockTokens + t_] =
          scale;
  }

  // The run's means and gains, for all rows of the warp.
  template <int N>
  __device__ __forceinline__ void LoadProfile(const CodecJob& job, int begin) {
    __syncwarp();  // the last run has read its own
    for (int i = lane_; i < N; i += 32) {
      desk_.mean[i] = job.mean != nullptr && begin + i < shape_.head_dim ? job.mean[begin + i] : 0.0f;
      desk_.gain[i] = job.gain != nullptr && begin + i < shape_.head_dim ? job.gain[begin + i] : 1.0f;
    }
    __syncwarp();
  }
  // The run's values of rows in f32, which no bulk copy brings.
  template <int N>
  __device__ __forceinline__ void LoadFloatRows(const CodecJob& job, int begin) {
    __syncwarp();
    for (int i = lane_; i < kTokens<kLanes> * N / 4; i += 32) {
      const int row = i / (N / 4), chunk = i % (N / 4), dim = begin + 4 * chunk,
                token = kTokens<kLanes> * warp_ + row;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (token < job.tokens && dim < shape_.head_dim)
        x = *reinterpret_cast<const uint4*>(reinterpret_cast<const float*>(job.source) +
                                            static_cast<int64_t>(token) * job.row_stride + dim);
      *reinterpret_cast<uint4*>(rows_ + row * N * 4 + (chunk ^ (row & 7)) * 16) = x;
    }
    __syncwarp();
  }

  // The token's values of the run, profile taken away; with two lanes a token, after the transform's first
  // step.
  template <int N>
  __device__ __forceinline__ void ReadRow(const CodecJob& job, bool shift, int begin,
                                          float (&y)[N / kLanes]) const {
    // Rows behind the last token, and what is taken from them, are zero.
    const bool present = t_ < job.tokens;
    const int own_row = t_ % kTokens<kLanes>;
    const uint8_t* row = zeros_;
    if (present) row = rows_ + (kFloatRows ? own_row * N * 4 : (own_row * d_ + begin / 64 * 64) * 2);
    // Chunk k of a row stands where its number is XORed with `swizzle`. Rows begin at 64 bytes: of the number
    // the lowest two bits are XORed into addresses, the third chooses between two of them.
    const int swizzle = kFloatRows ? own_row & 7 : (d_ % 64 == 0 ? t_ & 7 : t_ >> 1 & 3) ^ (begin / 8 & 7);
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
    const float* const mean = present ? desk_.mean : reinterpret_cast<const float*>(zeros_);
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
      const int k = N == 128 ? i / 2 + i % 2 * 8 : i;  // what is 128 bytes apart shares an address
      float v[8];
      if constexpr (kFloatRows) {
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
        for (int e = 0; e < 8; e++) v[e] = Mul(v[e] - mean[8 * k + e], desk_.gain[8 * k + e]);
      }
#pragma unroll
      for (int e = 0; e < 8; e += kLanes) {
        if constexpr (kLanes == 2)
          y[4 * k + e / 2] = FirstStep(8 * k + e, v[e], v[e + 1], odd_);
        else
          y[8 * k + e] = v[e];
      }
    }
  }

  // The token's codes of dims begin + 8o .. 8o + 7, o = at + number; the second word is that of the second
  // plane. Among those of keys they stand at own ^ 32c, plus 128c, c = o % 4.
  __device__ __forceinline__ void StoreCodes(const CodecJob& job, int begin, int at, int number, uint32_t low,
                                             [[maybe_unused]] uint32_t high) const {
    if constexpr (kValues) {
      uint32_t* const to = waiting_ + t_ * RowWords<C>(d_) + (begin / 8 + number) * (kBits == 8 ? 2 : 1);
      if constexpr (kBits == 8) {
        to[2 * at] = low;
        to[2 * at + 1] = high;
      } else {
        to[at] = low;
        if constexpr (kBits == 5) to[layout_.waiting / 4 + at] = high;
      }
    } else {
      constexpr int kStride = kWholeSlots<C> ? 128 * kBits : kQuadBytes;
      const CodePlace place = KeyPlace(t_, begin, d_);
      const int own =
          place.lane / 4 * 16 + (kBits == 8 ? place.unit / 2 * 512 + place.unit % 2 * 8 : place.unit * 4);
      uint8_t* const to = (kWholeSlots<C> ? TargetOf(job) : planes_) + place.quad * kStride +
                          ((own ^ 32 * number ^ 32 * (at % 4)) + 128 * number) +
                          (128 * (at % 4) + at / 4 * kStride);
      if constexpr (kBits == 8) {
        *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(to) = low;
        if constexpr (kBits == 5) *reinterpret_cast<uint32_t*>(to + layout_.plane) = high;
      }
    }
  }

  // Codes of values from rows to quads, 8 tokens x 8 dims at a time.
  __device__ __forceinline__ void TransposeCodes() const {
    __syncwarp();
    constexpr int kGroups = kTokens<kLanes> / 8;
    const int group = warp_ * kGroups + lane_ % kGroups, c = group % 4;
#pragma unroll 2
    for (int o = lane_ / kGroups; o < d_ / 8; o += 32 / kGroups) {
      uint8_t* const quad = planes_ + (o / 4 * 2 + group / 4) * kQuadBytes;
      const uint32_t* const from = waiting_ + 8 * group * RowWords<C>(d_);
      const int unit = o % 4;
      if constexpr (kBits == 8) {
        uint32_t w[16];
#pragma unroll
        for (int j = 0; j < 8; j++) {
          w[2 * j] = from[j * RowWords<C>(d_) + 2 * o];
          w[2 * j + 1] = from[j * RowWords<C>(d_) + 2 * o + 1];
        }
        TransposeBytes(w);
#pragma unroll
        for (int n = 0; n < 8; n++)
          *reinterpret_cast<uint2*>(quad + unit / 2 * layout_.plane + SlotOf(n, c) * 16 + unit % 2 * 8) =
              make_uint2(w[2 * n], w[2 * n + 1]);
      } else {
#pragma unroll
        for (int plane = 0; plane < kPlanes<C>; plane++) {
          uint32_t w[8];
#pragma unroll
          for (int j = 0; j < 8; j++) w[j] = from[plane * layout_.waiting / 4 + j * RowWords<C>(d_) + o];
          TransposeNibbles(w);
#pragma unroll
          for (int n = 0; n < 8; n++)
            *reinterpret_cast<uint32_t*>(quad + plane * layout_.plane + SlotOf(n, c) * 16 + unit * 4) = w[n];
        }
      }
    }
  }

  // Quads of whole slots to the block. A warp has all slots of every second quad, or one half of them.
  __device__ __forceinline__ void CopySlots(const CodecJob& job) const {
    __syncwarp();
    constexpr int kOwn = 32 / kLanes;
    const int slot = (kLanes == 2 ? warp_ % 2 * kOwn : 0) + lane_ % kOwn;
#pragma unroll 4
    for (int q = warp_ / kLanes + 2 * (lane_ / kOwn); q < quads_; q += 2 * kLanes)
#pragma unroll
      for (int plane = 0; plane < kPlanes<C>; plane++)
        *reinterpret_cast<uint4*>(TargetOf(job) + (q * kPlanes<C> + plane) * 512 + slot * 16) =
            *reinterpret_cast<const uint4*>(planes_ + plane * layout_.plane + q * kQuadBytes + slot * 16);
    __syncwarp();
  }

  // The same where words of several warps make a slot: four quads of a lane are whole slots at every width.
  __device__ __forceinline__ void PackSlots(const CodecJob& job) const {
    __syncthreads();
    const int lane_words = LaneWords(kBits, d_);
#pragma unroll 1
    for (int first = 4 * warp_; first < quads_; first += kThreads<kLanes> / 8) {
      uint32_t words[4 * kBits] = {};
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (first + q < quads_) {
          const uint8_t* const from = planes_ + (first + q) * kQuadBytes + lane_ * 16;
          const uint4 low = *reinterpret_cast<const uint4*>(from);
          uint4 high = low;
          if constexpr (kPlanes<C> == 2) high = *reinterpret_cast<const uint4*>(from + layout_.plane);
          PackNibbles<kBits>(low, high, words + q * kBits);
        }
#pragma unroll
      for (int slot = 0; slot < kBits; slot++) {
        const int word = first * kBits + 4 * slot;
        if (word < lane_words)
          *reinterpret_cast<uint4*>(TargetOf(job) + word / 4 * 512 + lane_ * 16) =
              make_uint4(words[4 * slot], words[4 * slot + 1], words[4 * slot + 2], words[4 * slot + 3]);
      }
    }
    __syncthreads();
  }

  const CodecJob* const jobs_;
  const int count_;
  const HalfShape& shape_;
  const uint32_t hidden_;
  Tables& tables_;
  uint8_t* const zeros_;  // a row of them
  const int warp_ = static_cast<int>(threadIdx.x) / 32, lane_ = static_cast<int>(threadIdx.x) % 32;
  const int t_ = static_cast<int>(threadIdx.x) / kLanes;  // the thread's token
  const int d_ = shape_.stored_dim, quads_ = 2 * (d_ / 32);
  const int second_ = kLanes == 2 ? lane_ % 2 : 0;  // of the two lanes of a token
  const float odd_ = second_ != 0 ? -1.0f : 1.0f;
  const SharedLayout layout_;
  uint8_t* const rows_;  // of the warp
  WarpDesk& desk_;
  uint8_t* const planes_;
  uint32_t* const waiting_;
  const uint32_t arrival_, rows_address_;
};

template <class C, Side kSide, RowSource kSource, int kLanes>
__global__ void __launch_bounds__(kThreads<kLanes>, kPages<C, kLanes>)
    EncodeRows(const CodecJob* jobs, int count, HalfShape shape, uint32_t hidden) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ typename TablesOf<C>::Type tables;
  __shared__ __align__(128) uint8_t zeros[512];
  PageEncoder<C, kSide, kSource, kLanes>(jobs, count, shape, hidden, shared, tables, zeros).EncodePages();
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
