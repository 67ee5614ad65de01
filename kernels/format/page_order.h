// Where a code lies inside the code plane of a page half (64 tokens of one KV head, K or V). The order serves
// GPU fragments (one conflict-free 16-byte load per lane feeds four m16n8k32 tiles, without shuffles) and CPU
// lanes (64 consecutive bytes are 16 dwords of 8 codes each) alike.
//
// Words: a *unit* is 8 codes of one lane; a *quad* is the 4 units of one lane in one step of 32; lane = 4n +
// c.
//   K quad (J = token / 32, s = dim / 32): unit i holds token 32J + 8*(n>>1) + 2i + (n&1), dims 32s + 8c +
//   0..7.
//       Quad index J * (D/32) + s. The tokens of lane c's units are then the k-slots of the P fragment.
//   V quad (Jd = dim / 32, gr = token / 32): unit i holds dim 32Jd + 8i + n, tokens 32gr + 8c + 0..7.
//       Quad index 2 * Jd + gr, the order in which a kernel walks it.
// A quad of b bits is b words of a lane; the words of a lane are cut into slots of 16 bytes; slot x of all
// lanes forms chunk x of 512 bytes, in which a lane's slot stands at 8c + (n ^ 2c), so that the 8 lanes of a
// quarter-warp cover all 32 banks. Bits inside a quad:
//   8: unit i is words 2i, 2i+1, one byte a code.
//   5: words 0-3 as for 4 bits; bit 4 of code e of unit i at bit 4e+i of word 4.
//   4: unit i is word i, code e in bits 4e..4e+3.
//   3: units 0-2 in words 0-2, code e in bits 4e..4e+2; bit b of code e of unit 3 at bit 4e+3 of word b.
//   2: word h: code e of unit 2h in bits 4e..4e+1, of unit 2h+1 in bits 4e+2..4e+3.
// Golden tests freeze this order; it is versioned by kPageOrderVersion.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/host_device.h"

namespace kvtide {

constexpr int kBlockTokens = 64;
constexpr int kPageOrderVersion = 1;

// Head dims are stored in multiples of 32; the padding is zero before the rotation and is counted in all byte
// numbers.
KVTIDE_HD constexpr int StoredDim(int head_dim) { return (head_dim + 31) / 32 * 32; }

// Words of one lane in the code plane: 2 * D/32 quads of `bits` words, filled up to whole 16-byte slots.
KVTIDE_HD constexpr int LaneWords(int bits, int stored_dim) {
  return (2 * (stored_dim / 32) * bits + 3) / 4 * 4;
}
KVTIDE_HD constexpr size_t CodePlaneBytes(int bits, int stored_dim) {
  return static_cast<size_t>(LaneWords(bits, stored_dim)) * 32 * 4;
}

// A code's place: quad index, lane (4n + c), unit 0..3 and element 0..7 of the unit.
struct CodePlace {
  int quad, lane, unit, element;
};

KVTIDE_HD constexpr CodePlace KeyPlace(int token, int dim, int stored_dim) {
  const int t = token % 32, n = 2 * (t / 8) + (t & 1), c = dim % 32 / 8;
  return {token / 32 * (stored_dim / 32) + dim / 32, 4 * n + c, t % 8 / 2, dim % 8};
}

KVTIDE_HD constexpr CodePlace ValuePlace(int token, int dim, int /*stored_dim*/) {
  const int n = dim % 8, c = token % 32 / 8;
  return {dim / 32 * 2 + token / 32, 4 * n + c, dim % 32 / 8, token % 8};
}

// The way back: token and dim of a place.
struct CodeOwner {
  int token, dim;
};

KVTIDE_HD constexpr CodeOwner KeyOwner(CodePlace place, int stored_dim) {
  const int steps = stored_dim / 32, n = place.lane >> 2, c = place.lane & 3;
  return {place.quad / steps * 32 + 8 * (n >> 1) + 2 * place.unit + (n & 1),
          place.quad % steps * 32 + 8 * c + place.element};
}

KVTIDE_HD constexpr CodeOwner ValueOwner(CodePlace place, int /*stored_dim*/) {
  const int n = place.lane >> 2, c = place.lane & 3;
  return {place.quad % 2 * 32 + 8 * c + place.element, place.quad / 2 * 32 + 8 * place.unit + n};
}

// Byte offset of word `word` of `lane` inside the code plane.
KVTIDE_HD constexpr size_t LaneWordOffset(int word, int lane) {
  const int n = lane >> 2, c = lane & 3;
  return static_cast<size_t>(word / 4) * 512 + static_cast<size_t>(8 * c + (n ^ (2 * c))) * 16 +
         static_cast<size_t>(word % 4) * 4;
}

// The f16 page: 64 rows of D values; the 16-byte chunk of a row is XORed with the token, so that the same
// chunk of 8 neighbouring rows lies in 8 different bank groups. Returns the index (in values) of (token, dim)
// inside the plane.
KVTIDE_HD constexpr int HalfPrecisionIndex(int token, int dim, int stored_dim) {
  const int chunk = dim / 8;
  const int swizzled = stored_dim % 64 == 0 ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
  return token * stored_dim + swizzled * 8 + dim % 8;
}

}  // namespace kvtide
