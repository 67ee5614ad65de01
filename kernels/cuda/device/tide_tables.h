// What attention reads of a calibrated KV head (attend/tide_tile.h): its inverse transform as fragments of
// integer products, RoPE of the 32 tokens of half a page, the mean, and where the bit planes are. Made on the
// host once for a profile and a type; pure, so that tests on a CPU use the same.
//
// Channels stand in *pairs*: those that RoPE turns together, then what it leaves alone, two and two, which
// turn by 0. Pairs 8s .. 8s + 7 are one step of the tile: a tile of 8 columns of their first channels and one
// of their second ones, so that a thread holds both channels of a pair.
//
// The inverse is rounded to 8 bits with one scale for a pair of channels, which commutes with RoPE, so that
// queries can take it. What it meets are levels (RebuiltLevel): the smaller those of narrow groups are, the
// larger is what meets them beside the rest of a channel, and the less its rounding is worth. A key is then
// an integer below 2^21; as a float it is kKeyUnit times that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/host_device.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// The levels that stand for those of the format, of the same sign and order: exact multiples for widths 1 and
// 2 (and 5 and 6, which are those of the format), within 0.7 and 0.9 % of a standard deviation for 3 and 4.
KVTIDE_HD constexpr int RebuiltPositive(int width, int i) {
  const uint8_t levels[16] = {0, 8, 3, 10, 3, 9, 16, 26, 3, 9, 15, 22, 29, 37, 47, 62};
  return width > 4 ? TidePositive(width, i) : levels[width == 0 ? 0 : (1 << (width - 1)) + i];
}
KVTIDE_HD constexpr int RebuiltLevel(int width, int code) {
  if (width == 0) return 0;
  const int half = 1 << (width - 1);
  return code >= half ? RebuiltPositive(width, code - half) : -RebuiltPositive(width, half - 1 - code);
}
// Of such levels, that of one standard deviation: the factor to TideLevel / TideSigma with the least squares
// for N(0,1).
KVTIDE_HD constexpr float RebuiltSigma(int width) {
  const float sigma[5] = {1.0f, 10.02652f, 6.621667f, 11.98938f, 22.88767f};
  return width > 4 ? TideSigma(width) : sigma[width];
}

// Added to levels of group steps whose widest group has 4 bits, all of which are then between 0 and 127: a
// byte permute that does not mean a code answers 0, and two of them are joined by an or.
inline constexpr int kJoinedOffset = 64;

// Keys are made with sums that begin at the bits of kKeyStart, so that their bits are a float: kKeyStart plus
// kKeyUnit times the sum. Small enough for halves whatever the gain, and 2^-2 of a unit is left of those.
inline constexpr float kKeyStart = 3.0f, kKeyUnit = 0x1p-22f;

// Offsets of a head's tables, for keys of `D` stored values. Lanes are 4n + c as in the fragment maps.
template <int D>
struct TideTables {
  static constexpr int kSteps = D / 16;       // of 8 pairs of channels
  static constexpr int kGroupSteps = D / 32;  // of 4 groups of coefficients
  // Steps follow each other. What a step has, 16 bytes for each lane:
  // [group step]: the two B registers of first channels, then of second ones. Groups are in the order of
  // falling widths; lane c has group 4i + c of it, coefficients as in LevelTables::CoefficientOf.
  static constexpr int kInverse = 0;
  // [2]: cosines and sines, as halves, of pairs 8s + 2c and the next, of tokens 4n + i and 4n + 2 + i.
  static constexpr int kRope = kInverse + kGroupSteps * 512;
  static constexpr int kStepBytes = kRope + 2 * 512;
  // Of pairs 8s + 2c and the next, [4s + c] of 32 bytes: 4 floats to add to first and second channels (a a' b
  // b'), which take kKeyStart and what kJoinedOffset made of it; then their means as halves, and 8 bytes.
  static constexpr int kBack = kSteps * kStepBytes, kBackBytes = 32;
  static constexpr int kPhases = kBack + D / 4 * kBackBytes;  // uint64_t [D / 2], PerPosition
  // uint32_t [c][4]: of group step i, bytes of the first unit of lane c's group, exclusive or
  // 4 * (group % 4) (TideByte), and 16 bits higher 32 * its width.
  static constexpr int kSlots = kPhases + D / 2 * 8;
  static constexpr int kPlaces = kSlots + 64;      // uint16_t [D]: where a channel's query is, in halves
  static constexpr int kScales = kPlaces + D * 2;  // float [D]: what a channel's integers are worth
  static constexpr int kWidths = kScales + D * 4;  // uint8_t [4]: the largest width of each group step
  static constexpr int kBytes = (kWidths + 4 + 127) / 128 * 128;
  static_assert(kGroupSteps <= 4);

  static constexpr int kQueryStepBytes = 256;  // of 8 query rows
  // Of channel `second` of a pair, in the fragment of query row 0, in halves.
  static KVTIDE_HD constexpr int PlaceOf(int pair, int second) {
    return pair / 8 * 128 + pair % 8 / 2 * 4 + second * 2 + pair % 2;
  }
};

constexpr size_t TideTableBytes(int stored_dim) {
  return static_cast<size_t>(stored_dim == 64 ? TideTables<64>::kBytes : TideTables<128>::kBytes);
}
// [layers][kv_heads] tables for keys of a calibrated type; every head has a transform.
std::vector<std::byte> MakeTideTables(const Profile& profile, CacheType type);

}  // namespace kvtide::cuda
