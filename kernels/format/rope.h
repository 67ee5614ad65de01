// RoPE of keys as calibrated types take it back before they code a key and give it again when they rebuild
// it, in exact integer phases and sums of fixed order, so that every backend makes the same bytes.
//
// Rotary position embedding (Su et al., arXiv 2104.09864): at position p, channels (a, b) of pair i become
//     (a cos - b sin, b cos + a sin)   of the angle p * frequency[i].
// An angle is a 32-bit fraction of a turn. In half a page that begins at `position`, token t has
//     phase = high 32 bits of (PerPosition(frequency) * position) + t * (high 32 bits of
//     PerPosition(frequency))
// with products mod 2^64 and the sum mod 2^32: no large angle is ever a float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/format/codec.h"

namespace kvtide {

// Which channels RoPE turns together, of `turned` channels from the first on.
enum class RopePairs : uint8_t {
  kNone,
  kHalves,      // i and i + turned / 2 (Llama and most Hugging Face models)
  kNeighbours,  // 2i and 2i + 1 (GPT-J, DeepSeek)
};

// RoPE of one layer. Channels behind the pairs are not turned, without frequencies none is.
struct Rope {
  RopePairs pairs = RopePairs::kHalves;
  std::vector<float> frequencies;  // radians a position, of each pair; 0..kMostFrequency
  bool operator==(const Rope&) const = default;
};

constexpr float kMostFrequency = 3.0f;  // less than half a turn

// Turns a position, in 2^-64 of a turn.
KVTIDE_HD inline uint64_t PerPosition(float frequency) {
  return static_cast<uint64_t>(static_cast<double>(frequency) * 2.9358905032820012e18);  // 2^64 / (2 pi)
}
KVTIDE_HD inline uint32_t PhaseOf(uint64_t per_position, int64_t position, int token) {
  return static_cast<uint32_t>((per_position * static_cast<uint64_t>(position)) >> 32) +
         static_cast<uint32_t>(token) * static_cast<uint32_t>(per_position >> 32);
}

// Polynomials on an eighth of a turn either side (Cephes, sinf.c); errors below 2e-7.
constexpr float kSine1 = -1.6666654611e-1f, kSine2 = 8.3321608736e-3f, kSine3 = -1.9515295891e-4f;
constexpr float kCosine1 = 4.166664568298827e-2f, kCosine2 = -1.388731625493765e-3f,
                kCosine3 = 2.443315711809948e-5f;
constexpr float kRadians = 1.4629180792671596e-9f;  // of 2^-32 of a turn

struct CosSin {
  float cos, sin;
};
KVTIDE_HD inline CosSin CosSinOf(uint32_t phase) {
  const uint32_t quarter = (phase + 0x20000000u) >> 30;
  const auto rest = static_cast<int32_t>(phase - (quarter << 30));
  const float x = Mul(static_cast<float>(rest), kRadians), z = Mul(x, x);
  const float s = MulAdd(Mul(MulAdd(MulAdd(kSine3, z, kSine2), z, kSine1), z), x, x);
  const float c = MulAdd(z, MulAdd(MulAdd(MulAdd(kCosine3, z, kCosine2), z, kCosine1), z, -0.5f), 1.0f);
  const float cosine = quarter % 2 == 0 ? c : s, sine = quarter % 2 == 0 ? s : c;
  return {quarter == 1 || quarter == 2 ? -cosine : cosine, quarter >= 2 ? -sine : sine};
}

// The channels of pair i of n.
KVTIDE_HD constexpr int PairFirstChannel(RopePairs pairs, int i) {
  return pairs == RopePairs::kNeighbours ? 2 * i : i;
}
KVTIDE_HD constexpr int PairSecondChannel(RopePairs pairs, int i, int n) {
  return pairs == RopePairs::kNeighbours ? 2 * i + 1 : i + n;
}

// Turns a pair by an angle, or back by the negative sine.
KVTIDE_HD inline void TurnPair(CosSin angle, float* a, float* b) {
  const float x = *a, y = *b;
  *a = MulAdd(-y, angle.sin, Mul(x, angle.cos));
  *b = MulAdd(x, angle.sin, Mul(y, angle.cos));
}

// Turns the key of a token of half a page that begins at `position`, or turns it back.
inline void TurnKey(const Rope& rope, int64_t position, int token, bool back, float* row) {
  const int n = static_cast<int>(rope.frequencies.size());
  for (int i = 0; i < n; i++) {
    CosSin angle = CosSinOf(PhaseOf(PerPosition(rope.frequencies[static_cast<size_t>(i)]), position, token));
    if (back) angle.sin = -angle.sin;
    TurnPair(angle, row + PairFirstChannel(rope.pairs, i), row + PairSecondChannel(rope.pairs, i, n));
  }
}

}  // namespace kvtide
