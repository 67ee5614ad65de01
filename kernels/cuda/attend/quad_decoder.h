// Turns one quad of codes (page_order.h) into the B fragments of four m16n8k32 tiles: level bytes in
// registers, by byte permutes on tables of at most 16 levels.
//
// A PRMT looks up four 8-entry tables at once; a selector nibble with bit 3 set gives the sign of the byte
// instead, which is how 16 levels take two tables: the lower one is asked with the codes, the upper one,
// stored backwards, with their complements. Both hold level + 64, so that the idle one answers 0 and a sum
// joins them; the offset is taken back by the start value of the products (kOffset).
// Uniform levels (format/wht4.h) need no table: a mask turns 8 nibbles into 4 level bytes, those of the codes
// in odd places, and after a shift those in even places. Even codes are then the first half of the products'
// depth and odd ones the second, and what they meet has to be in that order too (kInterleaved).
// Permutes, shifts and logic share the ALU pipe, which is the bottleneck. Complements and sums are therefore
// written as arithmetic (W::Complement, W::Plus), which the compiler spreads over the ALU and the
// multiplication pipe.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/warp.h"
#include "kernels/format/codec.h"

namespace kvtide::cuda {

template <class W, class Codec>
struct QuadDecoder {
  static constexpr int kBits = Codec::kBits;
  static constexpr bool kUniform = requires { requires Codec::Book::kStep == 16; };
  static constexpr bool kInterleaved = kUniform;
  static constexpr int kOffset = kBits == 4 && !kUniform ? 64 : 0;

  uint32_t table[4];

  static constexpr int kTableBytes = 64;

  // 0xffffffff, or the top bits of nibbles and bytes, but not a constant to the compiler
  uint32_t pattern;

  // One lane of the CTA writes the tables to shared memory, all lanes read them after a barrier. Constants,
  // and values that are the same in all lanes, would be moved to a register again before every permute; so
  // there is a copy for the even and one for the odd lanes, which the compiler cannot know to be equal.
  static KVTIDE_DEVICE void WriteTables(typename W::Shared area) {
    uint32_t words[4] = {0, 0, 0, 0};
    constexpr int kEntries = kUniform ? 0 : kBits == 4 ? 16 : kBits == 3 ? 8 : kBits == 2 ? 4 : 0;
#pragma unroll
    for (int i = 0; i < kEntries; i++) {
      const int code = i < 8 ? i : 23 - i;
      const int level = Codec::Level(code) + kOffset;
      words[i / 4] |= static_cast<uint32_t>(level & 255) << (8 * (i % 4));
    }
    if constexpr (kBits == 5) {  // the lower four bits of a code stand for themselves
      words[0] = 0x03020100u;
      words[1] = 0x07060504u;
      words[2] = 0x0c0d0e0fu;
      words[3] = 0x08090a0bu;
    }
    for (int copy = 0; copy < 2; copy++) {
      W::Store64(area + 32 * copy, words[0], words[1]);
      W::Store64(area + 32 * copy + 8, words[2], words[3]);
      W::Store64(area + 32 * copy + 16, kUniform ? 0x88888888u : 0xffffffffu, 0u);
    }
  }
  KVTIDE_DEVICE void Init(typename W::Shared area) {
    const typename W::Shared from = area + 32 * (W::Lane() & 1);
    if constexpr (kBits <= 5) {
      uint32_t rest[2];
      if constexpr (!kUniform) W::Load128(from, table);
      W::Load64(from + 16, rest);
      pattern = rest[0];
    }
  }

  KVTIDE_DEVICE uint32_t Not(uint32_t w) const { return W::Complement(w, pattern); }
  KVTIDE_DEVICE uint32_t Sum(uint32_t x, uint32_t y) const { return W::Plus(x, y); }

  // 8 codes in nibbles with bit 3 clear.
  KVTIDE_DEVICE void Octet(uint32_t u, uint32_t (&b)[2]) const {
    b[0] = W::Prmt(table[0], table[1], u);
    b[1] = W::Prmt(table[0], table[1], u >> 16);
  }

  KVTIDE_DEVICE void Decode(const uint32_t* w, uint32_t (&b)[4][2]) const {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        b[i][0] = w[2 * i];
        b[i][1] = w[2 * i + 1];
      }
    } else if constexpr (kUniform) {
      static_assert(kBits == 4);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        b[i][0] = (w[i] << 4 & 0xf0f0f0f0u) ^ pattern;
        b[i][1] = (w[i] & 0xf0f0f0f0u) ^ pattern;
      }
    } else if constexpr (kBits == 4 || kBits == 5) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t h = w[i] >> 16;
        const uint32_t low0 = W::Prmt(table[0], table[1], w[i]), low1 = W::Prmt(table[0], table[1], h);
        const uint32_t high0 = W::Prmt(table[2], table[3], Not(w[i])),
                       high1 = W::Prmt(table[2], table[3], Not(h));
        if constexpr (kBits == 4) {
          b[i][0] = Sum(low0, high0);
          b[i][1] = Sum(low1, high1);
        } else {  // bit 4 clear: level = nibble - 16
          const uint32_t fifth = (w[4] >> i) & 0x11111111u;
          b[i][0] = low0 | high0 | W::Prmt(0x000000f0u, 0, fifth);
          b[i][1] = low1 | high1 | W::Prmt(0x000000f0u, 0, fifth >> 16);
        }
      }
    } else if constexpr (kBits == 3) {
#pragma unroll
      for (int i = 0; i < 3; i++) Octet(w[i] & 0x77777777u, b[i]);
      Octet(((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u), b[3]);
    } else {
      static_assert(kBits == 2);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Octet(w[h] & 0x33333333u, b[2 * h]);
        Octet((w[h] >> 2) & 0x33333333u, b[2 * h + 1]);
      }
    }
  }
};

}  // namespace kvtide::cuda
