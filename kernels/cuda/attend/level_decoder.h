// Bit planes of calibrated keys (format/tide.h) to levels of 8 bits, as a warp's integer products want them:
// a lane of a step of four groups (LevelTables) has one for 8 tokens, 4 of each half of the page, and makes
// of them both words of a B fragment of m16n8k32 for each token (token n of a tile, four coefficients a
// word). Two such fragments are an A fragment of 16 tokens.
//
// Of 4 tokens a lane has a word of each bit plane, which are made nibbles of codes by exchanges of index bits
// between words. One byte permute takes the four codes of a word of a fragment together, another looks their
// levels up in a table of 8 entries that depends on the lane's own width (bits above it are ignored, so that
// lanes of a step may differ). Codes of 4 bits are looked up in two tables, of which the one that is not
// meant answers 0 or -1 (quad_decoder.h). Codes of 5 and 6 bits are looked up in shared memory, two at a
// time. Planes above a lane's width are read all the same, up to 320 bytes behind the keys.
#pragma once

#include "kernels/cuda/device/warp.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// Levels of every width, whatever is above a code's bits.
struct LevelBytes {
  int8_t of[kMostTideWidth + 1][1 << kMostTideWidth] = {};
};
template <class LevelOf>
constexpr LevelBytes MakeLevelBytes(const LevelOf& level_of) {
  LevelBytes levels;
  for (int width = 0; width <= kMostTideWidth; width++)
    for (int code = 0; code < 1 << kMostTideWidth; code++)
      levels.of[width][code] = static_cast<int8_t>(level_of(width, code & ((1 << width) - 1)));
  return levels;
}

// Levels::Of(width): int8_t [64] of device memory; Levels::kOffset: 0, or what levels of codes of 4 bits and
// fewer have more in steps whose widest group has 4 bits, so that none is negative: those are joined, then.
template <class W, class Levels>
struct LevelDecoder {
  using Shared = typename W::Shared;
  static constexpr bool kJoined = Levels::kOffset != 0;
  // Lookup. For every width a row: 8 entries for codes of 4 bits below 8, of those above, and for codes of 3
  // bits, in which bits above the width are ignored; then for two codes of any width the bits of planes 4 and
  // 5 that are meant, and where such codes begin, in 256 words. Then the masks, and zeros. Then the
  // levels of two codes, whose bits take turns: of 6 and of 5 bits, and of every other width as if they
  // had 4.
  static constexpr int kRowBytes = 32, kMasksAt = (kMostTideWidth + 1) * kRowBytes, kZerosAt = kMasksAt + 16,
                       kTwosAt = kZerosAt + 16, kSixes = 4096, kFives = 1024, kOthers = 256,
                       kTwos = kSixes + kFives + 5 * kOthers, kBytes = kTwosAt + kTwos * 2;

  Shared lookup;
  // 0x55555555, 0x33333333 and 0x0f0f0f0f, from shared memory: a choice by a constant takes the compiler two
  // instructions instead of one.
  uint32_t even_bits, even_pairs, even_nibbles;

  // Entry `i` of a row of 8-entry tables. Of narrower codes both tables of codes of 4 bits mean the same
  // level; the one that is not asked adds the sign, -1 or 0, or, where levels are joined, nothing.
  static KVTIDE_DEVICE int RowEntry(int width, int i) {
    if (i >= 24) {
      if (i < 28) return width == 6 ? 0x0f : width == 5 ? 0x03 : 0;
      return (width == 6 ? 0 : width == 5 ? kSixes : kSixes + kFives + width * kOthers) / 256;
    }
    if (width > 4) return 0;
    const int8_t* const levels = Levels::Of(width);
    if (i >= 16) return width > 3 ? 0 : levels[i - 16];
    const int level = levels[i < 8 ? i : width == 4 ? 23 - i : 15 - i];
    if constexpr (kJoined) return level + Levels::kOffset;
    return level + (width == 4 ? (i < 8 ? 0 : 1) : (level < 0 ? 1 : 0));
  }
  // Every other bit of 12, from the first on.
  static KVTIDE_DEVICE int EvenBits(int x) {
    x &= 0x555;
    x = (x | x >> 1) & 0x333;
    x = (x | x >> 2) & 0x30f;
    return (x | x >> 4) & 0x3f;
  }
  // Thread `thread` of `threads` writes its part.
  static KVTIDE_DEVICE void Write(Shared at, int thread, int threads) {
    if (thread == 0) {
      W::Store64(at + kMasksAt, 0x55555555u, 0x33333333u);
      W::Store64(at + kMasksAt + 8, 0x0f0f0f0fu, 0);
      W::Store64(at + kZerosAt, 0, 0);
      W::Store64(at + kZerosAt + 8, 0, 0);
    }
    for (int i = thread; i < kMasksAt / 4; i += threads) {
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < 4; e++)
        word |= static_cast<uint32_t>(RowEntry(4 * i / kRowBytes, 4 * i % kRowBytes + e) & 255) << (8 * e);
      W::Store32(at + 4 * i, word);
    }
    // Four pairs of codes at a time, of which only the lowest bits differ.
    for (int i = 4 * thread; i < kTwos; i += 4 * threads) {
      const bool six = i < kSixes, five = !six && i < kSixes + kFives;
      const int rest = i - kSixes - kFives,
                width = six    ? 6
                        : five ? 5
                               : rest / kOthers,
                bits = six    ? i
                       : five ? i - kSixes
                              : rest % kOthers;
      const int8_t *const first = Levels::Of(width) + EvenBits(bits), *const second = Levels::Of(width) +
                                                                                      EvenBits(bits >> 1);
      const auto two = static_cast<uint32_t>((first[0] & 255) | (first[1] & 255) << 16);
      W::Store64(at + kTwosAt + 2 * i, two | static_cast<uint32_t>(second[0] & 255) * 0x01000100u,
                 two | static_cast<uint32_t>(second[1] & 255) * 0x01000100u);
    }
  }
  KVTIDE_DEVICE void Init(Shared at) {
    lookup = at;
    uint32_t masks[4];
    W::Load128(lookup + kMasksAt, masks);
    even_bits = masks[0];
    even_pairs = masks[1];
    even_nibbles = masks[2];
  }

  // Bits of a where the mask has ones, else of b.
  static KVTIDE_DEVICE uint32_t Choose(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
  }
  // Of kWidth planes with bits (other bits, e1, e0): codes of (other bits, b1, b0) in nibbles, by 2 * e1 +
  // e0.
  template <int kWidth>
  KVTIDE_DEVICE void Transpose(const uint32_t* planes, uint32_t (&codes)[4]) const {
    if constexpr (kWidth == 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) codes[i] = planes[0] >> i & 0x11111111u;
    } else {
      const uint32_t x = Choose(even_bits, planes[0], planes[1] << 1),
                     y = Choose(even_bits, planes[0] >> 1, planes[1]);
      if constexpr (kWidth == 2) {
        codes[0] = x & 0x33333333u;
        codes[1] = y & 0x33333333u;
        codes[2] = x >> 2 & 0x33333333u;
        codes[3] = y >> 2 & 0x33333333u;
      } else {
        uint32_t above, beside;
        if constexpr (kWidth == 4) {
          above = Choose(even_bits, planes[2], planes[3] << 1);
          beside = Choose(even_bits, planes[2] >> 1, planes[3]);
        } else {
          above = planes[2] & 0x55555555u;
          beside = planes[2] >> 1 & 0x55555555u;
        }
        codes[0] = Choose(even_pairs, x, above << 2);
        codes[1] = Choose(even_pairs, y, beside << 2);
        codes[2] = Choose(even_pairs, x >> 2, above);
        codes[3] = Choose(even_pairs, y >> 2, beside);
      }
    }
  }
  // Of six planes: eight bits of codes 2i and 2i + 1, of planes 0 to 3, in the bytes of low[i], and four of
  // planes 4 and 5 in those of high[i].
  KVTIDE_DEVICE void TransposeWide(const uint32_t* planes, uint32_t meant, uint32_t begin, uint32_t (&low)[4],
                                   uint32_t (&high)[4]) const {
    uint32_t even[3], odd[3];  // in nibbles
#pragma unroll
    for (int i = 0; i < 3; i++) {
      even[i] = Choose(even_pairs, planes[2 * i], planes[2 * i + 1] << 2);
      odd[i] = Choose(even_pairs, planes[2 * i] >> 2, planes[2 * i + 1]);
    }
    low[0] = Choose(even_nibbles, even[0], even[1] << 4);
    low[1] = Choose(even_nibbles, odd[0], odd[1] << 4);
    low[2] = Choose(even_nibbles, even[0] >> 4, even[1]);
    low[3] = Choose(even_nibbles, odd[0] >> 4, odd[1]);
    high[0] = (even[2] & meant) | begin;
    high[1] = (odd[2] & meant) | begin;
    high[2] = (even[2] >> 4 & meant) | begin;
    high[3] = (odd[2] >> 4 & meant) | begin;
  }

  // A lane's part of a step: its tables, and the fragments of 4 tokens.
  template <int kWidth>
  struct Group {
    Shared planes;
    uint32_t table[kWidth == 4 ? 4 : 2];  // of a row: for codes of 4 bits, of 3, or of two codes of any width
  };
  // planes: where the lane's first plane is; row: where its lookup is, from the begin on.
  template <int kWidth>
  KVTIDE_DEVICE Group<kWidth> GroupOf(Shared planes, uint32_t row) const {
    const Shared at = lookup + static_cast<int>(row);
    Group<kWidth> group;
    group.planes = planes;
    if constexpr (kWidth == 4)
      W::Load128(at, group.table);
    else
      W::Load64(at + (kWidth > 4 ? 24 : 16), group.table);
    return group;
  }
  // add(j, b0, b1) takes token j's levels; unless they are joined, those of codes of 4 bits in two parts
  // whose sum they are. complement(x): ~x.
  template <int kWidth, class Complement, class Adds>
  KVTIDE_DEVICE void Decode(const Group<kWidth>& group, int half, const Complement& complement,
                            const Adds& add) const {
    uint32_t plane[kWidth];
#pragma unroll
    for (int b = 0; b < kWidth; b++) plane[b] = W::Load32(group.planes + b * kTideUnitBytes + half * 32);
    if constexpr (kWidth > 4) {
      uint32_t low[4], high[4];
      TransposeWide(plane, group.table[0], group.table[1], low, high);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        // Byte j of both, and zeros: the sign of the second.
        const auto bytes = static_cast<uint32_t>(0xcc40 + 0x1111 * j);
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          two[i] = W::Load16(lookup + kTwosAt + 2 * static_cast<int>(W::Prmt(low[i], high[i], bytes)));
        add(j, W::Prmt(two[0], two[1], 0x5410u), W::Prmt(two[2], two[3], 0x5410u));
      }
    } else {
      uint32_t codes[4];
      Transpose<kWidth>(plane, codes);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const auto byte = static_cast<uint32_t>(0x40 + 0x11 * j);
        const uint32_t first = W::Prmt(codes[0], codes[1], byte), second = W::Prmt(codes[2], codes[3], byte);
        uint32_t b0 = W::Prmt(group.table[0], group.table[1], first),
                 b1 = W::Prmt(group.table[0], group.table[1], second);
        if constexpr (kWidth == 4) {
          const uint32_t rest0 = W::Prmt(group.table[2], group.table[3], complement(first)),
                         rest1 = W::Prmt(group.table[2], group.table[3], complement(second));
          if constexpr (kJoined) {
            b0 |= rest0;
            b1 |= rest1;
          } else {
            add(j, rest0, rest1);
          }
        }
        add(j, b0, b1);
      }
    }
  }
};

}  // namespace kvtide::cuda
