// What attention reads of a calibrated KV head (attend/tide_tile.h): its inverse transform as fragments of
// m16n8k16 products, RoPE of the 64 tokens of a page, the mean, and where its bit planes are. Made on the
// host once for a profile and a type; pure, so that tests on a CPU use the same.
//
// Channels stand in *pairs*: those that RoPE turns together, then what it leaves alone, two and two, which
// turn by 0. Pairs 8s .. 8s + 7 are one step of the tile: a tile of 8 columns of their first channels and one
// of their second ones, so that a thread holds both channels of a pair.
//
// Numbers are those of the tile: coefficients 2^-4 times what they are (kCoefficientUnit), the inverse
// 2^-b times what it is, so that its largest value is between 1/2 and 1; rebuilt keys are then 2^-(b + 4) of
// what they are, which queries take back (`unit`).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/host_device.h"
#include "kernels/format/profile.h"

namespace kvtide::cuda {

inline constexpr float kCoefficientUnit = 0.0625f;

// Offsets of a head's tables, for keys of `D` stored values. Lanes are 4n + c as in the fragment maps.
template <int D>
struct TideTables {
  static constexpr int kSteps = D / 16;       // of 8 pairs of channels
  static constexpr int kGroupSteps = D / 32;  // of 4 groups of coefficients, two products of 16 each
  // Steps follow each other; what a step has is 16 bytes for each lane:
  // [product]: the two B registers of first channels, then of second ones. The products of 32 coefficients
  // take 8c + {0, 4, 1, 5} and 8c + {2, 6, 3, 7} of a lane's group.
  static constexpr int kInverse = 0;
  // [quarter of the page]: cosines and sines, as halves, of pairs 8s + 2c and the next, of tokens n and n + 8
  // of the quarter (TokenOf).
  static constexpr int kRope = kInverse + kSteps * 512;
  // [first or second channels]: the mean of pairs 8s + 2c and the next, as products begin: a a' a a'.
  static constexpr int kCentre = kRope + 4 * 512;
  static constexpr int kStepBytes = kCentre + 2 * 512;
  static constexpr int kPhases = kSteps * kStepBytes;  // uint64_t [D / 2], PerPosition
  // uint32_t [c][4]: of group 4i + c, the first unit, and 8 bits higher the width, and 16 bits higher the
  // largest width of the four groups of the step.
  static constexpr int kGroups = kPhases + D / 2 * 8;
  static constexpr int kPlaces =
      kGroups + 64;  // uint16_t [D]: where a channel's query is (PlaceOf), in floats
  static constexpr int kUnit = kPlaces + D * 2;  // float: what 1 of a rebuilt key is worth
  static constexpr int kUsed = kUnit + 4;        // int32_t: steps of groups with bits, at least 1
  static constexpr int kBytes = (kUsed + 4 + 127) / 128 * 128;
  static_assert(kGroupSteps <= 4);

  // Token of row n, or n + 8 with `high`, of quarter m of a page: the order of a key plane (page_order.h).
  static KVTIDE_HD constexpr int TokenOf(int m, int n, bool high) {
    return m / 2 * 32 + 8 * (n >> 1) + 2 * (m % 2 * 2 + (high ? 1 : 0)) + (n & 1);
  }
  // Of channel `second` of a pair, in the fragment of query row 0.
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
