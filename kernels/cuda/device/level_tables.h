// What attention reads of a calibrated KV head whose keys are coded after RoPE (attend/level_tile.h): the
// matrix that turns queries into the frame of the stored levels, the mean, and where the bit planes are. Made
// on the host once for a profile and a type; pure, so that tests on a CPU use the same.
//
// With levels L and gain g of a token, q . k = q . centre + g * sum_j q'_j L_j, and
// q'_j = sum_i q_i inverse[i][j] / TideSigma(width of j). Groups of coefficients are taken in *steps*, in the
// order of falling widths: two groups wider than 4 bits (or one and the next) are a *wide* step, then four a
// *quad*, of which each lane c of a fragment has one group; groups without bits are left out. What a step has
// is columns of the matrix in the order in which a thread has its levels (CoefficientOf).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/host_device.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

// Of a head, copied into the query area of every unit.
template <int D>
struct alignas(16) LevelUnit {
  // Steps, in the order of slots: quads whose widest group has 4, 3, 2 and 1 bits, after wide ones.
  int32_t quads[4] = {};
  // The group of lane c: bytes of its first unit from the code plane's begin on, exclusive or 4 * (group % 4)
  // (TideByte); 16 bits higher 32 * its width.
  uint32_t slots[D / kTideGroup / 2][4] = {};
  int32_t wide = 0;
  int32_t columns = 0;  // of the matrix that are used
};

template <int D>
struct LevelTables {
  static constexpr int kColumns = D + 16;                     // 16 for a wide step, 32 for a quad
  static constexpr int kMatrix = 0;                           // float [D channels][kColumns]
  static constexpr int kCentre = kMatrix + D * kColumns * 4;  // float [D]
  static constexpr int kUnit = kCentre + D * 4;               // LevelUnit<D>
  static constexpr int kBytes = (kUnit + static_cast<int>(sizeof(LevelUnit<D>)) + 127) / 128 * 128;
  // A fragment of 8 query rows: 256 bytes for a wide step, 512 for a quad.
  static constexpr int kQueryBytes = kColumns * 16;

  // Where word `word` (4 columns, high and low part 4 bytes each) of row n of a fragment of 8 rows is.
  static KVTIDE_HD constexpr int PlaceOf(int wide, int word, int n) {
    const int rest = word - 4 * wide;
    return rest < 0 ? word / 4 * 256 + (4 * n + word % 4) * 8
                    : wide * 256 + rest / 8 * 512 + (4 * n + rest % 8 / 2) * 16 + rest % 2 * 8;
  }
  // The coefficient of its group that byte `byte` of word `word` of a lane in a quad has.
  static KVTIDE_HD constexpr int CoefficientOf(int word, int byte) {
    return 2 * word + byte / 2 + byte % 2 * 4;
  }
};

// Whether there are such tables for keys of a stored dim.
constexpr size_t LevelTableBytes(int stored_dim) {
  return static_cast<size_t>(stored_dim == 64 ? LevelTables<64>::kBytes : LevelTables<128>::kBytes);
}
// [layers][kv_heads] tables for keys of a calibrated type and a stored dim of 64 or 128; every head has a
// transform, and none is turned back.
std::vector<std::byte> MakeLevelTables(const Profile& profile, CacheType type);

}  // namespace kvtide::cuda
