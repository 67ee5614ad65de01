// Encoding and decoding with one or two lanes for each token: a run of up to 128 values of a row lies in
// registers, so rotations and sums need few other lanes, and signs and table places are known when the code
// is compiled. The order of every sum is that of format/page_codec.h; compiled without contraction.
//
// Two lanes: the first takes the values with even numbers, the second those with odd ones. The transform's
// first step mixes each pair, which both lanes load; everything after it happens within a lane but the last
// addition of a sum.
//
// Codes travel as *nibble words*: 8 codes of 4 bits, low plane and, above 4 bits, a second word with the
// rest. A unit of a quad (format/page_order.h) is one such word per plane. Words of 8 bits hold 4 codes.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/codec/level_step.h"
#include "kernels/cuda/device/pipeline.cuh"
#include "kernels/format/page_codec.h"

namespace kvtide::cuda {

constexpr int kRowThreads = kBlockTokens;

__device__ __forceinline__ float HalfToFloat(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <class C>
concept HasBook = requires {
  typename C::Book;
};
// Types whose rotation is unrolled here; others go through the general kernels of codec_kernels.cu. An alias
// has the same bytes: its own kernels are not compiled.
template <class C>
constexpr bool kIsAlias = requires {
  C::kAliasOf;
};
template <class C>
constexpr bool kHasRowRotation = [] {
  if constexpr (C::kStorage == Storage::kCodes) {
    using R = typename C::Rotation;
    return std::is_same_v<R, NoRotation> || std::is_same_v<R, Hadamard> || std::is_same_v<R, GivensPairs> ||
           std::is_same_v<R, Quaternions> || std::is_same_v<R, Rotors>;
  } else {
    return false;
  }
}();
template <class C>
constexpr bool kHasRowCodec = kHasRowRotation<C> && !kIsAlias<C>;
// Rows in f32 (recoding) have code here for the types that are used most; it is long.
template <class C>
constexpr bool kHasFloatRows = [] {
  if constexpr (kHasRowCodec<C>) {
    return std::is_same_v<typename C::Rotation, NoRotation> || std::is_same_v<typename C::Rotation, Hadamard>;
  } else {
    return false;
  }
}();
template <class C>
constexpr int kPlanes = C::kBits > 4 ? 2 : 1;

// Values [kBegin, kBegin + kLength) of y: the steps of Hadamard::Butterfly but its factor.
template <int kBegin, int kLength, int N>
__device__ __forceinline__ void Steps(float (&y)[N]) {
#pragma unroll
  for (int h = 1; h < kLength; h *= 2)
#pragma unroll
    for (int k = 0; k < kLength / 2; k++) {
      const int j = kBegin + k / h * 2 * h + k % h;
      const float a = y[j], b = y[j + h];
      y[j] = a + b;
      y[j + h] = a - b;
    }
}
constexpr float HadamardFactor(int length) {
  return length == 128 ? 0.08838834764831845f : length == 64 ? 0.125f : 0.17677669529663687f;
}
template <int kBegin, int kLength, int N>
__device__ __forceinline__ void Butterfly(float (&y)[N]) {
  Steps<kBegin, kLength>(y);
#pragma unroll
  for (int i = 0; i < kLength; i++) y[kBegin + i] = Mul(y[kBegin + i], HadamardFactor(kLength));
}
// The reflection across three transforms of a run of 96.
template <int N>
__device__ __forceinline__ void Reflect(float (&y)[N]) {
#pragma unroll
  for (int i = 0; i < N / 3; i++) {
    const float third = Mul(y[i] + y[i + N / 3] + y[i + 2 * N / 3], 2.0f / 3.0f);
    y[i] -= third;
    y[i + N / 3] -= third;
    y[i + 2 * N / 3] -= third;
  }
}
template <int kSide, int N>
__device__ __forceinline__ void Flip(float (&y)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++)
    if (Hadamard::Sign(kSide, i / 32) >> (i % 32) & 1u) y[i] = -y[i];
}
template <class Rotation, bool kInverse, int N>
__device__ __forceinline__ void RotateRun(float (&y)[N]) {
  if constexpr (std::is_same_v<Rotation, Hadamard>) {
    Flip<kInverse ? 1 : 0>(y);
    if constexpr (N == 96) {
      Butterfly<0, 32>(y);
      Butterfly<32, 32>(y);
      Butterfly<64, 32>(y);
      Reflect(y);
    } else {
      Butterfly<0, N>(y);
    }
    Flip<kInverse ? 0 : 1>(y);
  } else if constexpr (std::is_same_v<Rotation, GivensPairs>) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float c = GivensPairs::Entry(i / 2, 0), s = GivensPairs::Entry(i / 2, 1), a = y[i], b = y[i + 1];
      y[i] = kInverse ? Mul(c, a) + Mul(s, b) : Mul(c, a) - Mul(s, b);
      y[i + 1] = kInverse ? Mul(c, b) - Mul(s, a) : Mul(s, a) + Mul(c, b);
    }
  } else if constexpr (std::is_same_v<Rotation, Quaternions>) {
    constexpr float kSign = kInverse ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < N; i += 4)
      Quaternions::MultiplyLeft(Quaternions::Entry(i / 4, 0), kSign * Quaternions::Entry(i / 4, 1),
                                kSign * Quaternions::Entry(i / 4, 2), kSign * Quaternions::Entry(i / 4, 3),
                                y + i);
  } else if constexpr (std::is_same_v<Rotation, Rotors>) {
    constexpr float kSign = kInverse ? -1.0f : 1.0f;
#pragma unroll
    for (int g = 0; g < N / 3; g++)
      Rotors::Sandwich(Rotors::Entry(g, 0), kSign * Rotors::Entry(g, 1), kSign * Rotors::Entry(g, 2),
                       kSign * Rotors::Entry(g, 3), y + 3 * g);
  } else {
    static_assert(std::is_same_v<Rotation, NoRotation>);
  }
}

// The first step of Hadamard::Forward for a lane of two: of values i and i + 1 their sum, or with odd = -1
// their difference.
__device__ __forceinline__ float FirstStep(int i, float a, float b, float odd) {
  if (Hadamard::Sign(0, i / 32) >> (i % 32) & 1u) a = -a;
  if (Hadamard::Sign(0, i / 32) >> (i % 32 + 1) & 1u) b = -b;
  return __fmaf_rn(b, odd, a);
}
// What follows: y holds every other value of a run of 128.
__device__ __forceinline__ void FurtherSteps(float (&y)[64], float odd) {
  Steps<0, 64>(y);
  const float same = HadamardFactor(128), opposite = same * odd;
#pragma unroll
  for (int j = 0; j < 64; j++) {
    const bool even_negated = Hadamard::Sign(1, j / 16) >> (2 * j % 32) & 1u,
               odd_negated = Hadamard::Sign(1, j / 16) >> (2 * j % 32 + 1) & 1u;
    const float factor = even_negated == odd_negated ? same : opposite;
    y[j] = Mul(y[j], even_negated ? -factor : factor);
  }
}

// The end of TreeSum, or the same with another operation.
template <class F, int M, int kHalf = M / 2>
__device__ __forceinline__ float Halve(float (&partial)[M], F f) {
#pragma unroll
  for (int l = 0; l < kHalf; l++) partial[l] = f(partial[l], partial[l + kHalf]);
  if constexpr (kHalf > 1) {
    return Halve<F, M, kHalf / 2>(partial, f);
  } else {
    return partial[0];
  }
}
template <int M>
__device__ __forceinline__ float Halve(float (&partial)[M]) {
  const float sum = Halve(partial, [](float a, float b) { return a + b; });
  if constexpr (M == 16) return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum;
}

// In shared memory: four times the code of a value by its step (level_step.h), and levels by that number.
template <class C>
struct LevelTables {
  using Steps = LevelSteps<C>;
  uint8_t code[2 * Steps::kSteps];  // of step i - kSteps
  float level[2 * C::kHalf];

  __device__ void Write() {
#pragma unroll
    for (int c = 0; c < 2 * C::kHalf; c++) {
      const int end = c + 1 < 2 * C::kHalf ? Steps::FirstStep(c + 1) : Steps::kSteps;
#pragma unroll 1
      for (int i = Steps::FirstStep(c) + static_cast<int>(threadIdx.x); i < end;
           i += static_cast<int>(blockDim.x))
        code[i + Steps::kSteps] = static_cast<uint8_t>(4 * c);
    }
    if (threadIdx.x < 2 * C::kHalf)
      level[threadIdx.x] = static_cast<float>(C::Level(static_cast<int>(threadIdx.x)));
  }
};
struct NoTables {
  __device__ void Write() {}
};
template <class C, bool kBook = HasBook<C>>
struct TablesOf {
  using Type = NoTables;
};
template <class C>
struct TablesOf<C, true> {
  using Type = LevelTables<C>;
};

// ScaleBits by the GPU's own conversion, which rounds alike.
__device__ __forceinline__ uint16_t FastScaleBits(float scale) {
  return __half_as_ushort(__float2half_rn(fminf(fmaxf(scale, -65504.0f), 65504.0f)));
}

// C::EncodeGroup of a codebook type on a whole run of N values, of which y holds all or every other one.
// emit(m, word) takes the codes of 8 values, those from 8m on or with two lanes those from 16m + 8 * (own
// number) on. All lanes of the warp call. False where squares or products would leave the range of f32: such
// a run is written as zeros, and wants EncodeUnusual.
template <class C, int N, int M, class F>
__device__ __forceinline__ bool EncodeBook(float (&y)[M], const LevelTables<C>& tables, uint32_t hidden,
                                           uint16_t* scale, F emit) {
  using Steps = LevelSteps<C>;
  constexpr int kLanes = N / M, kPartial = 32 / kLanes;
  float partial[kPartial];
#pragma unroll
  for (int i = 0; i < M; i++) {
    const float square = Mul(y[i], y[i]);
    partial[i % kPartial] = i < kPartial ? square : partial[i % kPartial] + square;
  }
  const float energy = Halve(partial);
  const bool usual = energy > 1e-24f && energy < 1e30f;
  float to_level = C::Book::kSigma / sqrtf(energy / static_cast<float>(N));
  if (__any_sync(0xffffffffu, !usual)) {
    // Whatever they are, the lowest codes above zero come out.
#pragma unroll
    for (int i = 0; i < M; i++) y[i] = usual ? y[i] : 0.25f;
    to_level = usual ? to_level : 1.0f;
  }
  // The bits of a step's float are a constant plus the step: an address, less a constant. It is wider than
  // what a load adds to an address, and the compiler would add part of it to every one if it knew it.
  const uint32_t codes = SharedAddress(tables.code) + Steps::kSteps - (Steps::kMagicBits + hidden),
                 levels = SharedAddress(tables.level);
  // Four times the code of value i of y; i goes up by kPartial within a partial sum.
  const auto encode = [&](int i) {
    const float step = __fmaf_ru(Mul(y[i], to_level), Steps::kPerUnit, Steps::kMagic);
    uint32_t code;
    float level;
    asm("ld.shared.u8 %0,[%1];" : "=r"(code) : "r"(codes + __float_as_uint(step)));
    asm("ld.shared.f32 %0,[%1];" : "=f"(level) : "r"(levels + code));
    const float term = Mul(y[i], level);
    partial[i % kPartial] = i < kPartial ? term : partial[i % kPartial] + term;
    return code;
  };
  if constexpr (kLanes == 1) {
#pragma unroll
    for (int k = 0; k < N / 8; k++) {
      const int o = k % (N / 32) * 4 + k / (N / 32);
      uint32_t word = encode(8 * o + 7);
#pragma unroll
      for (int e = 6; e > 0; e--) word = word * 16 + encode(8 * o + e);
      emit(o, word * 4 + encode(8 * o) / 4);
    }
  } else {
    // The loads' uniform addresses do not outlive an exchange: exchanges come last.
    uint32_t halves[N / 8];  // bytes, of the even or odd values of 8
#pragma unroll
    for (int k = 0; k < N / 8; k++) {
      const int o = k % (N / 32) * 4 + k / (N / 32);
      halves[o] = encode(4 * o + 3);
#pragma unroll
      for (int e = 2; e >= 0; e--) halves[o] = halves[o] * 256 + encode(4 * o + e);
    }
    const bool second = threadIdx.x % 2 == 1;
#pragma unroll
    for (int m = 0; m < N / 16; m++) {
      const uint32_t a = halves[2 * m], b = halves[2 * m + 1], own = second ? b : a,
                     other = __shfl_xor_sync(0xffffffffu, second ? a : b, 1);
      emit(m, (second ? other : own) / 4 + (second ? own : other) * 4);
    }
  }
  const float dot = Halve(partial);
  *scale = usual ? FastScaleBits(Mul(energy / dot, 1.0f / C::kLevelUnit)) : uint16_t{0};
  return usual || !(energy > 0);
}

// The same for any sums, of one token's run by one lane, from where the values come from.
template <class C>
__device__ __noinline__ uint16_t EncodeUnusual(const CodecJob& job, bool halves, HalfShape shape, int token,
                                               int begin, int n, Side side, uint32_t* words) {
  float row[C::kGroup];
  uint8_t codes[C::kGroup];
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const int dim = begin + i;
    float x = 0;
    if (dim < shape.head_dim) {
      x = halves ? HalfToFloat(reinterpret_cast<const uint16_t*>(
                       job.source)[HalfPrecisionIndex(token, dim, shape.stored_dim)])
                 : reinterpret_cast<const float*>(
                       job.source)[static_cast<int64_t>(token) * job.row_stride + dim];
      if (job.mean != nullptr) x -= job.mean[dim];
      if (job.gain != nullptr) x = Mul(x, job.gain[dim]);
    }
    row[i] = x;
  }
  C::Rotation::Forward(row, n);
  const uint16_t scale = C::EncodeGroup(row, n, side, codes);
#pragma unroll 1
  for (int o = 0; o < n / 8; o++) {
    words[o] = 0;
    for (int e = 0; e < 8; e++) words[o] |= static_cast<uint32_t>(codes[8 * o + e]) << (4 * e);
  }
  return scale;
}

// The same for a group of 32 of the uniform types. Words are nibbles and, with 5 bits, their bits 4; with
// 8 bits they are bytes of values 0-3 and 4-7.
template <class C, class F>
__device__ __forceinline__ uint16_t EncodeUniform(const float (&y)[32], F emit) {
  constexpr int kHalfRange = 1 << (C::kBits - 1);
  constexpr float kOne = 8388608.0f;  // 2^23: one unit in the last place is one
  float values[32];
  const auto reduce = [&](auto of, auto f) {
#pragma unroll
    for (int i = 0; i < 32; i++) values[i] = of(y[i]);
    return Halve(values, f);
  };
  if constexpr (C::kBits == 8) {
    const float most = reduce([](float x) { return fabsf(x); }, [](float a, float b) { return fmaxf(a, b); });
    const float magnitude = most < 1e-30f ? 0.0f : most;
    const float inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
#pragma unroll
    for (int o = 0; o < 4; o++) {
      uint32_t codes[8];
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float v = Mul(y[8 * o + e], inverse);
        codes[e] = static_cast<uint32_t>(static_cast<int>(v + copysignf(0.5f, v)));
      }
      uint32_t words[2];
#pragma unroll
      for (int h = 0; h < 2; h++)
        words[h] = __byte_perm(__byte_perm(codes[4 * h], codes[4 * h + 1], 0x0040),
                               __byte_perm(codes[4 * h + 2], codes[4 * h + 3], 0x0040), 0x5410);
      emit(o, words[0], words[1]);
    }
    return FastScaleBits(magnitude / 127.0f);
  } else {
    // The value of largest magnitude; of two that differ in sign alone the first.
    const auto same = [](float x) { return x; };
    const float most = reduce(same, [](float a, float b) { return fmaxf(a, b); }),
                least = reduce(same, [](float a, float b) { return fminf(a, b); });
    float best = most > -least ? most : least;
    if (most == -least && best != 0) {
#pragma unroll
      for (int i = 31; i >= 0; i--) best = fabsf(y[i]) == most ? y[i] : best;
    }
    if (fabsf(best) < 1e-30f) best = 0;
    const float inverse = best != 0 ? static_cast<float>(-kHalfRange) / best : 0.0f;
    float energy[32], dot[32];
#pragma unroll
    for (int o = 0; o < 4; o++) {
      uint32_t even = 0, odd = 0;  // codes as bytes, below the bits of 2^23
#pragma unroll
      for (int e = 7; e >= 0; e--) {
        const int i = 8 * o + e;
        // All sums are positive: rounding down to one is the conversion.
        const float code =
            fminf(__fadd_rd(MulAdd(y[i], inverse, static_cast<float>(kHalfRange) + 0.5f), kOne),
                  kOne + static_cast<float>(2 * kHalfRange - 1));
        uint32_t& bytes = e % 2 == 0 ? even : odd;
        bytes = bytes * 256 + __float_as_uint(code);
        energy[i] = Mul(y[i], y[i]);
        dot[i] = Mul(y[i], code - (kOne + static_cast<float>(kHalfRange)));
      }
      even -= __float_as_uint(kOne);
      odd -= __float_as_uint(kOne);
      if constexpr (C::kBits == 4)
        emit(o, even | odd << 4, 0);
      else
        emit(o, (even & 0x0f0f0f0fu) | (odd & 0x0f0f0f0fu) << 4,
             (even >> 4 & 0x0f0f0f0fu) | (odd & 0xf0f0f0f0u));
    }
    if (best == 0) return 0;
    return FastScaleBits(Halve(energy) / Halve(dot));
  }
}

// Nibbles of 8 words, transposed: nibble n of word t to nibble t of word n.
__device__ __forceinline__ void TransposeNibbles(uint32_t (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t a = w[i], b = w[i + 4];
    w[i] = __byte_perm(a, b, 0x5410);
    w[i + 4] = __byte_perm(a, b, 0x7632);
  }
#pragma unroll
  for (int j = 0; j < 8; j += 4)
#pragma unroll
    for (int i = j; i < j + 2; i++) {
      const uint32_t a = w[i], b = w[i + 2];
      w[i] = __byte_perm(a, b, 0x6240);
      w[i + 2] = __byte_perm(a, b, 0x7351);
    }
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const uint32_t a = w[i], b = w[i + 1];
    w[i] = (a & 0x0f0f0f0fu) | (b & 0x0f0f0f0fu) << 4;
    w[i + 1] = (a >> 4 & 0x0f0f0f0fu) | (b & 0xf0f0f0f0u);
  }
}

// Bytes of 8 rows of two words, transposed: byte n of row t (in w[2t + n / 4]) to byte t of row n.
__device__ __forceinline__ void TransposeBytes(uint32_t (&w)[16]) {
  uint32_t to[16];
#pragma unroll
  for (int half = 0; half < 2; half++)  // of rows
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t* const from = w + 8 * half + h;
      const uint32_t a = __byte_perm(from[0], from[2], 0x5140), b = __byte_perm(from[4], from[6], 0x5140),
                     c = __byte_perm(from[0], from[2], 0x7362), d = __byte_perm(from[4], from[6], 0x7362);
      to[8 * h + half] = __byte_perm(a, b, 0x5410);
      to[8 * h + 2 + half] = __byte_perm(a, b, 0x7632);
      to[8 * h + 4 + half] = __byte_perm(c, d, 0x5410);
      to[8 * h + 6 + half] = __byte_perm(c, d, 0x7632);
    }
#pragma unroll
  for (int i = 0; i < 16; i++) w[i] = to[i];
}

// PackQuad on nibble words of the four units.
template <int kBits>
__device__ __forceinline__ void PackNibbles(const uint4& low, const uint4& high, uint32_t* words) {
  const uint32_t l[4] = {low.x, low.y, low.z, low.w}, h[4] = {high.x, high.y, high.z, high.w};
  if constexpr (kBits >= 4) {
#pragma unroll
    for (int u = 0; u < 4; u++) words[u] = l[u];
    if constexpr (kBits == 5) words[4] = h[0] | h[1] << 1 | h[2] << 2 | h[3] << 3;
  } else if constexpr (kBits == 3) {
#pragma unroll
    for (int u = 0; u < 3; u++) words[u] = l[u] | (l[3] >> u & 0x11111111u) << 3;
  } else {
    words[0] = l[0] | l[1] << 2;
    words[1] = l[2] | l[3] << 2;
  }
}

// 16 bytes to shared memory, asynchronously.
__device__ __forceinline__ void CopyAsync(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source)
               : "memory");
}

// Calls f(integral_constant<int, N>, first dim) for every run of a row: groups of 32, or what a rotation
// mixes.
template <bool kGroups, class F>
__device__ __forceinline__ void ForEachRun(int stored_dim, F f) {
  int begin = 0;
  if constexpr (kGroups) {
#pragma unroll 1
    for (; begin < stored_dim; begin += 32) f(std::integral_constant<int, 32>{}, begin);
  } else {
#pragma unroll 1
    for (; begin + 128 <= stored_dim; begin += 128) f(std::integral_constant<int, 128>{}, begin);
    if (stored_dim - begin == 96) f(std::integral_constant<int, 96>{}, begin);
    if (stored_dim - begin == 64) f(std::integral_constant<int, 64>{}, begin);
    if (stored_dim - begin == 32) f(std::integral_constant<int, 32>{}, begin);
  }
}

}  // namespace kvtide::cuda
