// Encoding and decoding with one thread for each token: a run of up to 128 values of a row lies in registers,
// so rotations and sums need no other lane, and signs and table places are known when the code is compiled.
// The order of every sum is that of format/page_codec.h; compiled without contraction.
//
// Codes travel as *nibble words*: 8 codes of 4 bits, low plane and, above 4 bits, a second word with the
// rest. A unit of a quad (format/page_order.h) is one such word per plane.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/codec_kernels.h"
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
// Types whose rotation is unrolled here; others go through the general kernels of codec_kernels.cu.
template <class C>
constexpr bool kHasRowCodec =
    std::is_same_v<C, Turbo2> || std::is_same_v<C, Turbo3> || std::is_same_v<C, Turbo4> ||
    std::is_same_v<C, Q8_0> || std::is_same_v<C, Q5_0> || std::is_same_v<C, Q4_0>;
template <class C>
constexpr int kPlanes = C::kBits > 4 ? 2 : 1;

// Values [kBegin, kBegin + kLength) of y: the transform of Hadamard::Butterfly.
template <int kBegin, int kLength, int N>
__device__ __forceinline__ void Butterfly(float (&y)[N]) {
#pragma unroll
  for (int h = 1; h < kLength; h *= 2)
#pragma unroll
    for (int k = 0; k < kLength / 2; k++) {
      const int j = kBegin + k / h * 2 * h + k % h;
      const float a = y[j], b = y[j + h];
      y[j] = a + b;
      y[j + h] = a - b;
    }
  constexpr float kFactor = kLength == 128  ? 0.08838834764831845f
                            : kLength == 64 ? 0.125f
                                            : 0.17677669529663687f;
#pragma unroll
  for (int i = 0; i < kLength; i++) y[kBegin + i] = Mul(y[kBegin + i], kFactor);
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
#pragma unroll
      for (int i = 0; i < 32; i++) {
        const float third = Mul(y[i] + y[i + 32] + y[i + 64], 2.0f / 3.0f);
        y[i] -= third;
        y[i + 32] -= third;
        y[i + 64] -= third;
      }
    } else {
      Butterfly<0, N>(y);
    }
    Flip<kInverse ? 0 : 1>(y);
  } else {
    static_assert(std::is_same_v<Rotation, NoRotation>);
  }
}

// The end of TreeSum.
template <int kHalf = 16>
__device__ __forceinline__ float Halve(float (&partial)[32]) {
#pragma unroll
  for (int l = 0; l < kHalf; l++) partial[l] += partial[l + kHalf];
  if constexpr (kHalf > 1) {
    return Halve<kHalf / 2>(partial);
  } else {
    return partial[0];
  }
}

// In shared memory: four times the level above zero that a magnitude falls on, by the magnitude in half units
// rounded up, and levels by that number. Borders are multiples of one half, so no value is in doubt. Entry 0,
// which only a value of zero has, gives it the first level below zero.
template <class C>
struct LevelTables {
  static constexpr int kSteps = 1024;
  uint8_t above[kSteps];
  float level[16];

  __device__ void Write() {
    for (int i = static_cast<int>(threadIdx.x); i < kSteps; i += kRowThreads) {
      int m = 0;
      for (int k = 0; k + 1 < C::kHalf; k++) m += i > C::Book::Positive(k) + C::Book::Positive(k + 1) ? 1 : 0;
      above[i] = static_cast<uint8_t>(4 * (i == 0 ? 2 * C::kHalf - 1 : m));
    }
    if (threadIdx.x < 16)
      level[threadIdx.x] =
          static_cast<float>(threadIdx.x < C::kHalf ? C::Book::Positive(static_cast<int>(threadIdx.x)) : 0);
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

// C::EncodeGroup for sums outside the range in which the fast way holds.
template <class C, int N>
__device__ __noinline__ uint16_t EncodeUnusual(const float* y, Side side, uint32_t* low) {
  uint8_t codes[N];
  const uint16_t scale = C::EncodeGroup(y, N, side, codes);
  for (int o = 0; o < N / 8; o++) {
    low[o] = 0;
    for (int e = 0; e < 8; e++) low[o] |= static_cast<uint32_t>(codes[8 * o + e]) << (4 * e);
  }
  return scale;
}

// C::EncodeGroup of a codebook type on a whole run.
template <class C, int N>
__device__ __forceinline__ uint16_t EncodeBook(const float (&y)[N], Side side, const LevelTables<C>& tables,
                                               uint32_t (&low)[N / 8]) {
  float partial[32];
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float square = Mul(y[i], y[i]);
    partial[i % 32] = i < 32 ? square : partial[i % 32] + square;
  }
  const float energy = Halve(partial);
  constexpr uint32_t kAllHalf = 0x11111111u * C::kHalf;
  if (!(energy > 0)) {
#pragma unroll
    for (int o = 0; o < N / 8; o++) low[o] = kAllHalf;
    return 0;
  }
  if (!(energy > 1e-24f && energy < 1e30f)) {
    float copy[N];
    uint32_t words[N / 8];
#pragma unroll
    for (int i = 0; i < N; i++) copy[i] = y[i];
    const uint16_t scale = EncodeUnusual<C, N>(copy, side, words);
#pragma unroll
    for (int o = 0; o < N / 8; o++) low[o] = words[o];
    return scale;
  }
  const float to_level = C::Book::kSigma / sqrtf(energy / static_cast<float>(N));
#pragma unroll
  for (int o = 0; o < N / 8; o++) {
    uint32_t numbers[2] = {0, 0}, sign = 0;  // of elements 0-3 and 4-7, times 4
#pragma unroll
    for (int e = 7; e >= 0; e--) {
      const int i = 8 * o + e;
      const float v = __fmaf_rn(y[i], to_level, 0.0f);  // the product; zero has no sign
      constexpr float kMagic = 4194304.0f;              // 2^22: one unit in the last place is one half
      const uint32_t step = __float_as_uint(__fadd_ru(fabsf(v), kMagic)) - __float_as_uint(kMagic);
      const uint32_t above = tables.above[step];
      numbers[e / 4] = numbers[e / 4] * 16 + above;
      sign = __funnelshift_l(__float_as_uint(v), sign, 4);
      const float level =
          *reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(tables.level) + above);
      const float term = Mul(fabsf(y[i]), level);
      partial[i % 32] = i < 32 ? term : partial[i % 32] + term;
    }
    // Below zero the code is kHalf - 1 - number, above it kHalf + number.
    const uint32_t below = (sign >> 3 & 0x11111111u) * (2 * C::kHalf - 1);
    low[o] = (numbers[0] >> 2 | numbers[1] << 14) ^ kAllHalf ^ below;
  }
  const float dot = Halve(partial);
  return ScaleBits(Mul(energy / dot, 1.0f / C::kLevelUnit));
}

// The same for groups of 32 of the uniform types; words of values kBegin ..
template <class C, int kBegin, int N>
__device__ __forceinline__ uint16_t EncodeUniform(const float (&y)[N], uint32_t (&low)[N / 8],
                                                  uint32_t (&high)[N / 8]) {
  constexpr int kHalfRange = 1 << (C::kBits - 1);
  float best = 0, magnitude = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const float a = fabsf(y[kBegin + i]);
    if (a > magnitude) best = y[kBegin + i];
    magnitude = fmaxf(magnitude, a);
  }
  if (magnitude < 1e-30f) best = magnitude = 0;
  float inverse;
  if constexpr (C::kBits == 8) {
    inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
  } else {
    inverse = best != 0 ? static_cast<float>(-kHalfRange) / best : 0.0f;
  }
  float energy[32], dot[32];
#pragma unroll
  for (int o = 0; o < 4; o++) {
    uint32_t low_word = 0, high_word = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float x = y[kBegin + 8 * o + e];
      int code;
      if constexpr (C::kBits == 8) {
        const float v = Mul(x, inverse);
        code = v < 0 ? -static_cast<int>(0.5f - v) : static_cast<int>(v + 0.5f);
      } else {
        code = min(static_cast<int>(MulAdd(x, inverse, static_cast<float>(kHalfRange) + 0.5f)),
                   2 * kHalfRange - 1);
        energy[8 * o + e] = Mul(x, x);
        dot[8 * o + e] = Mul(x, static_cast<float>(code - kHalfRange));
      }
      low_word |= static_cast<uint32_t>(code & 15) << (4 * e);
      if constexpr (C::kBits > 4) high_word |= static_cast<uint32_t>(code >> 4 & 15) << (4 * e);
    }
    low[kBegin / 8 + o] = low_word;
    if constexpr (C::kBits > 4) high[kBegin / 8 + o] = high_word;
  }
  if constexpr (C::kBits == 8) return ScaleBits(magnitude / 127.0f);
  if (best == 0) return 0;
  return ScaleBits(Halve(energy) / Halve(dot));
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

// 4 nibbles to 4 bytes.
__device__ __forceinline__ uint32_t Spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}
// PackQuad on nibble words of the four units.
template <int kBits>
__device__ __forceinline__ void PackNibbles(const uint4& low, const uint4& high, uint32_t* words) {
  const uint32_t l[4] = {low.x, low.y, low.z, low.w}, h[4] = {high.x, high.y, high.z, high.w};
  if constexpr (kBits == 8) {
#pragma unroll
    for (int u = 0; u < 4; u++) {
      words[2 * u] = Spread(l[u] & 0xffffu) | Spread(h[u] & 0xffffu) << 4;
      words[2 * u + 1] = Spread(l[u] >> 16) | Spread(h[u] >> 16) << 4;
    }
  } else if constexpr (kBits >= 4) {
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

// Calls f(integral_constant<int, N>, first dim) for every run of a row.
template <class F>
__device__ __forceinline__ void ForEachRun(int stored_dim, F f) {
  int begin = 0;
#pragma unroll 1
  for (; begin + 128 <= stored_dim; begin += 128) f(std::integral_constant<int, 128>{}, begin);
  if (stored_dim - begin == 96) f(std::integral_constant<int, 96>{}, begin);
  if (stored_dim - begin == 64) f(std::integral_constant<int, 64>{}, begin);
  if (stored_dim - begin == 32) f(std::integral_constant<int, 32>{}, begin);
}

}  // namespace kvtide::cuda
