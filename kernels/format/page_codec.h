// From 64 rows of one KV head to the bytes of half a page and back. This is the definition of the bytes:
// every encoder, on any machine, gives what EncodeHalf gives. Plain code; the backends have faster ones.
//
// Keys of coded types are stored as k' = (k - mean) * gain, padded with zeros to the stored dim, rotated, cut
// into groups of C::kGroup (the last may be shorter), quantised. f16 and bf16 rows are stored as they are: a
// profile changes nothing there, and an attention over them adds no q.mean. Values never use a profile.
// Calibrated types (tide.h) are coded by tide_codec.h and need a profile's transform.
//
// The templates run on CPU and GPU; EncodeHalf and DecodeHalf are for the CPU and may be called from any
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/format/block_layout.h"
#include "kernels/format/page_order.h"
#include "kernels/format/profile.h"

namespace kvtide {

// The `bits` words of a lane's quad from its 32 codes, codes[8 * unit + element] (page_order.h says which bit
// is whose).
template <int kBits>
KVTIDE_HD inline void PackQuad(const uint8_t* codes, uint32_t* words) {
  static_assert(kBits == 8 || kBits == 5 || kBits == 4 || kBits == 3 || kBits == 2);
  for (int w = 0; w < kBits; w++) words[w] = 0;
  for (int e = 0; e < 8; e++) {
    const uint32_t a = codes[e], b = codes[8 + e], c = codes[16 + e], d = codes[24 + e];
    const int s = 4 * e;
    if constexpr (kBits == 8) {
      const int h = e / 4, t = 8 * (e % 4);
      words[h] |= a << t;
      words[2 + h] |= b << t;
      words[4 + h] |= c << t;
      words[6 + h] |= d << t;
    } else if constexpr (kBits == 5) {
      words[0] |= (a & 15u) << s;
      words[1] |= (b & 15u) << s;
      words[2] |= (c & 15u) << s;
      words[3] |= (d & 15u) << s;
      words[4] |= (a >> 4 | b >> 4 << 1 | c >> 4 << 2 | d >> 4 << 3) << s;
    } else if constexpr (kBits == 4) {
      words[0] |= a << s;
      words[1] |= b << s;
      words[2] |= c << s;
      words[3] |= d << s;
    } else if constexpr (kBits == 3) {
      words[0] |= (a | (d & 1u) << 3) << s;
      words[1] |= (b | (d >> 1 & 1u) << 3) << s;
      words[2] |= (c | (d >> 2) << 3) << s;
    } else {
      words[0] |= (a | b << 2) << s;
      words[1] |= (c | d << 2) << s;
    }
  }
}

// The inverse of PackQuad.
template <int kBits>
KVTIDE_HD inline void UnpackQuad(const uint32_t* words, uint8_t* codes) {
  static_assert(kBits == 8 || kBits == 5 || kBits == 4 || kBits == 3 || kBits == 2);
  for (int unit = 0; unit < 4; unit++)
    for (int e = 0; e < 8; e++) {
      const int s = 4 * e;
      uint32_t code = 0;
      if constexpr (kBits == 8) {
        code = words[2 * unit + e / 4] >> (8 * (e % 4)) & 255u;
      } else if constexpr (kBits == 5) {
        code = (words[unit] >> s & 15u) | (words[4] >> (s + unit) & 1u) << 4;
      } else if constexpr (kBits == 4) {
        code = words[unit] >> s & 15u;
      } else if constexpr (kBits == 3) {
        code = unit < 3 ? words[unit] >> s & 7u
                        : (words[0] >> (s + 3) & 1u) | (words[1] >> (s + 3) & 1u) << 1 |
                              (words[2] >> (s + 3) & 1u) << 2;
      } else {
        code = words[unit / 2] >> (s + 2 * (unit % 2)) & 3u;
      }
      codes[8 * unit + e] = static_cast<uint8_t>(code);
    }
}

// One word of a code plane; planes are at least 4-byte aligned.
KVTIDE_HD inline uint32_t LoadWord(const std::byte* plane, int word, int lane) {
  uint32_t value;
  memcpy(&value,
         static_cast<const std::byte*>(__builtin_assume_aligned(plane + LaneWordOffset(word, lane), 4)), 4);
  return value;
}
KVTIDE_HD inline void StoreWord(std::byte* plane, int word, int lane, uint32_t value) {
  memcpy(static_cast<std::byte*>(__builtin_assume_aligned(plane + LaneWordOffset(word, lane), 4)), &value, 4);
}

// One code of a plane. StoreCode rewrites the words that it touches: no two threads may store into one quad
// of a lane.
template <int kBits>
KVTIDE_HD inline int LoadCode(const std::byte* plane, CodePlace place) {
  uint32_t words[kBits];
  uint8_t codes[32];
  for (int w = 0; w < kBits; w++) words[w] = LoadWord(plane, place.quad * kBits + w, place.lane);
  UnpackQuad<kBits>(words, codes);
  return codes[8 * place.unit + place.element];
}
template <int kBits>
KVTIDE_HD inline void StoreCode(std::byte* plane, CodePlace place, int code) {
  uint32_t words[kBits];
  uint8_t codes[32];
  for (int w = 0; w < kBits; w++) words[w] = LoadWord(plane, place.quad * kBits + w, place.lane);
  UnpackQuad<kBits>(words, codes);
  codes[8 * place.unit + place.element] = static_cast<uint8_t>(code);
  PackQuad<kBits>(codes, words);
  for (int w = 0; w < kBits; w++) StoreWord(plane, place.quad * kBits + w, place.lane, words[w]);
}

// Rotates one padded vector in place and quantises it: stored_dim codes, one scale per group.
template <class C>
KVTIDE_HD inline void EncodeVector(float* y, int stored_dim, Side side, uint8_t* codes, uint16_t* scales) {
  C::Rotation::Forward(y, stored_dim);
  for (int g = 0, begin = 0; begin < stored_dim; g++, begin += C::kGroup) {
    const int n = stored_dim - begin < C::kGroup ? stored_dim - begin : C::kGroup;
    scales[g] = C::EncodeGroup(y + begin, n, side, codes + begin);
  }
}

// Encodes `tokens` rows [tokens][head_dim] (finite, within f16) into `half`, half.bytes long. Tokens from
// `tokens` on are stored as zero vectors of the coded frame. `profile` may be null. `position` is that of the
// half's first token in its sequence; only calibrated types look at it.
void EncodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                int64_t position, const float* rows, int tokens, std::byte* half);

// Decodes all 64 rows [64][head_dim] in the original frame: rotation, gain and mean are taken back.
// `position` as for EncodeHalf.
void DecodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                int64_t position, const std::byte* half, float* rows);

// The same for types to which no position matters, which is checked.
void EncodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                const float* rows, int tokens, std::byte* half);
void DecodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                const std::byte* half, float* rows);

// Decodes all 64 rows [64][stored_dim] as they are stored: scale * level in the rotated frame, padding
// included. For f16 and bf16 the values themselves. Not for calibrated types.
void DecodeHalfRotated(CacheType type, Side side, const HalfLayout& layout, const std::byte* half,
                       float* rows);

// Turns a vector of stored_dim values into a type's rotated frame and back, in place; nothing for types
// without rotation. Not for calibrated types.
void RotateForward(CacheType type, float* x, int stored_dim);
void RotateInverse(CacheType type, float* x, int stored_dim);

}  // namespace kvtide
