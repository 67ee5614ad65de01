// Products of up to 8 rows with one f16 or bf16 page, in f32: logits from K, output from V. Included once for
// each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_HALF_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_HALF_PRODUCTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_HALF_PRODUCTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_HALF_PRODUCTS_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/page/simd_page-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

// The XOR on the 16-byte chunk index of a token's row (page_order.h), for token 8 * octet + parity + 2 * i.
HWY_INLINE constexpr int ChunkXor(bool by_64, int parity, int i) { return by_64 ? parity + 2 * i : i; }

// Sums of the lanes of four vectors, stored next to each other.
HWY_INLINE void StoreSums(VecF32 a, VecF32 b, VecF32 c, VecF32 d, float* HWY_RESTRICT out) {
  const TagF32 f32;
  const hn::Repartition<double, TagF32> f64;
  const VecF32 ab = hn::Add(hn::InterleaveLower(f32, a, b), hn::InterleaveUpper(f32, a, b));
  const VecF32 cd = hn::Add(hn::InterleaveLower(f32, c, d), hn::InterleaveUpper(f32, c, d));
  const VecF32 low = hn::BitCast(f32, hn::InterleaveLower(f64, hn::BitCast(f64, ab), hn::BitCast(f64, cd)));
  const VecF32 high = hn::BitCast(f32, hn::InterleaveUpper(f64, hn::BitCast(f64, ab), hn::BitCast(f64, cd)));
  const VecF32 sum = hn::Add(low, high);
  StoreBlockSum(sum, out);
}

constexpr int kChunkVectors = kLanes < 8 ? 8 / kLanes : 1;  // vectors of a chunk of 8 values

// The XOR on the index of a vector that makes that on the index of its chunk.
HWY_INLINE constexpr int VectorXor(int chunk_xor) {
  return kWide ? chunk_xor >> 1 : chunk_xor * kChunkVectors;
}

// q: [rows][dim]; swapped: the same with neighbouring chunks of 8 exchanged (512-bit vectors span two
// chunks).
template <int kRows, bool kBf16>
HWY_NOINLINE void KeyDotsHalf(const HalfView& k, const float* q, const float* swapped,
                              float* HWY_RESTRICT dots) {
  constexpr int kStep = std::min(kRows, kManyRegisters ? 4 : 2);
  const TagF32 f32;
  const auto* values = reinterpret_cast<const uint16_t*>(k.codes);
  const bool by_64 = k.dim % 64 == 0;
  const int vectors = k.dim / kLanes;
  for (int octet = 0; octet < 8; octet++)
    for (int parity = 0; parity < 2; parity++) {
      const uint16_t* row[4];
      const float* query[4];
      int flip[4];  // XOR on the vector index
      for (int i = 0; i < 4; i++) {
        const int x = ChunkXor(by_64, parity, i);
        row[i] = values + (8 * octet + parity + 2 * i) * k.dim;
        flip[i] = VectorXor(x);
        query[i] = kWide && (x & 1) ? swapped : q;
      }
      k.prefetch->Step();
      for (int r0 = 0; r0 < kRows; r0 += kStep) {
        VecF32 acc[4][kStep];
        KVTIDE_UNROLL
        for (int i = 0; i < 4; i++) KVTIDE_UNROLL
        for (int r = 0; r < kStep; r++) acc[i][r] = hn::Zero(f32);
        if (by_64) {
          const float* shared = query[0] + r0 * k.dim;
          for (int j = 0; j < vectors; j += kChunkVectors) KVTIDE_UNROLL
          for (int c = 0; c < kChunkVectors; c++) {
            VecF32 x[4];
            KVTIDE_UNROLL
            for (int i = 0; i < 4; i++) x[i] = LoadHalf(row[i] + (j ^ flip[i]) * kLanes + c * kLanes, kBf16);
            KVTIDE_UNROLL
            for (int r = 0; r < kStep; r++) {
              const VecF32 query_r = hn::LoadU(f32, shared + r * k.dim + j * kLanes + c * kLanes);
              KVTIDE_UNROLL
              for (int i = 0; i < 4; i++) acc[i][r] = hn::MulAdd(x[i], query_r, acc[i][r]);
            }
          }
        } else {
          for (int j = 0; j < vectors; j++) KVTIDE_UNROLL
          for (int i = 0; i < 4; i++) {
            const VecF32 x = LoadHalf(row[i] + (j ^ flip[i]) * kLanes, kBf16);
            KVTIDE_UNROLL
            for (int r = 0; r < kStep; r++)
              acc[i][r] = hn::MulAdd(x, hn::LoadU(f32, query[i] + (r0 + r) * k.dim + j * kLanes), acc[i][r]);
          }
        }
        KVTIDE_UNROLL
        for (int r = 0; r < kStep; r++)
          StoreSums(acc[0][r], acc[1][r], acc[2][r], acc[3][r],
                    dots + (r0 + r) * kBlockTokens + 8 * octet + 4 * parity);
      }
    }
}

// Adds weight * V of tokens [first_token, last_token) to kVectors vectors of kStep rows.
template <int kStep, int kVectors, bool kBf16>
HWY_INLINE void ValueBlockHalf(const HalfView& v, const float* weights, const PageFactors* page,
                               int first_token, int last_token, int first_vector, float* HWY_RESTRICT out) {
  const TagF32 f32;
  const auto* values = reinterpret_cast<const uint16_t*>(v.codes);
  const bool by_64 = v.dim % 64 == 0;
  VecF32 acc[kVectors][kStep];
  KVTIDE_UNROLL
  for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    acc[i][r] =
        hn::Mul(hn::Load(f32, out + r * v.dim + (first_vector + i) * kLanes), hn::Set(f32, page[r].keep));
  // Tokens whose chunks lie in order, then (512 bits) those whose neighbouring chunks are exchanged.
  for (int swap = 0; swap < (kWide ? 2 : 1); swap++) {
    if (swap == 1) {
      KVTIDE_UNROLL
      for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
      for (int i = 0; i < kVectors; i++) acc[i][r] = SwapChunks(acc[i][r]);
    }
    for (int position = 0; position < kBlockTokens; position++) {
      if (position % 4 == 0) v.prefetch->Step();
      const int i = position % 4, parity = position / 4 % 2;
      const int token = TokenAtPosition(position), x = ChunkXor(by_64, parity, i);
      if ((kWide && (x & 1) != swap) || token < first_token || token >= last_token) continue;
      const int flip = VectorXor(x);
      const uint16_t* row = values + token * v.dim;
      VecF32 value[kVectors];
      KVTIDE_UNROLL
      for (int c = 0; c < kVectors; c++)
        value[c] = LoadHalf(row + ((first_vector + c / kChunkVectors * kChunkVectors) ^ flip) * kLanes +
                                c % kChunkVectors * kLanes,
                            kBf16);
      KVTIDE_UNROLL
      for (int r = 0; r < kStep; r++) {
        const VecF32 weight = hn::Set(f32, weights[r * kBlockTokens + position]);
        KVTIDE_UNROLL
        for (int c = 0; c < kVectors; c++) acc[c][r] = hn::MulAdd(value[c], weight, acc[c][r]);
      }
    }
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kStep; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    hn::Store(kWide ? SwapChunks(acc[i][r]) : acc[i][r], f32, out + r * v.dim + (first_vector + i) * kLanes);
}

template <int kRows, bool kBf16>
HWY_NOINLINE void ValueSumsHalf(const HalfView& v, float* HWY_RESTRICT weights, const PageFactors* page,
                                int first_token, int last_token, float* HWY_RESTRICT out) {
  constexpr int kStep = std::min(kRows, kManyRegisters ? 4 : 2);
  constexpr int kVectors = kChunkVectors > 1 && kStep <= 2 ? 8 : 4;
  const TagF32 f32;
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < kPageVectors; i++) {
      float* w = weights + r * kBlockTokens + i * kLanes;
      hn::Store(hn::Mul(hn::Load(f32, w), hn::Set(f32, page[r].page)), f32, w);
    }
  const int vectors = v.dim / kLanes;
  for (int r = 0; r < kRows; r += kStep) {
    int first = 0;
    for (; first + kVectors <= vectors; first += kVectors) {
      ValueBlockHalf<kStep, kVectors, kBf16>(v, weights + r * kBlockTokens, page + r, first_token, last_token,
                                             first, out + r * v.dim);
    }
    for (; first < vectors; first += 2)
      ValueBlockHalf<kStep, 2, kBf16>(v, weights + r * kBlockTokens, page + r, first_token, last_token, first,
                                      out + r * v.dim);
  }
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
