// What attention reads of a calibrated KV head whose keys are coded after RoPE (attend/level_tile.h): the
// matrix that turns queries into the frame of the stored levels, the mean, and where the bit planes are. Made
// on the host once for a profile and a type; pure, so that tests on a CPU use the same.
//
// With levels L and gain g of a token, q . k = q . centre + g * sum_j q'_j L_j, and
// q'_j = sum_i q_i inverse[i][j] / TideSigma(width of j). Groups of coefficients are taken in *steps*, in the
// order of falling widths; groups without bits are left out. A *quad* is four groups: lane c of a fragment
// has one of them for all tokens. A *pair* is two: lanes 2g and 2g + 1 have one of them, the first for the
// tokens of the page's first half, the other for the rest. There is a pair in front, of groups wider than 4
// bits (or one and the next), if they do not fill quads; then quads whose widest group has more than 4 bits,
// then 4, 3, 2 and 1; then a pair of what is left, if that is one or two. What a step has is columns of the
// matrix in the order in which a thread has its levels (CoefficientOf).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/host_device.h"
#include "kernels/format/profile.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

inline constexpr int kLevelQuads = 5;  // kinds of quads: more than 4 bits, then 4, 3, 2 and 1

// Of a head, copied into the query area of every unit.
template <int D>
struct alignas(16) LevelUnit {
  static constexpr int kSteps = D / kTideGroup / 4 + 1;  // at most
  int32_t quads[kLevelQuads] = {};                       // how many, by kind
  int32_t lead = 0;                                      // 1: there is a pair in front
  int32_t tail = 0;                                      // the width of the pair behind, or 0
  int32_t words = 0;                                     // of 4 columns, before the pair behind
  // The group of lane c: bytes of its first unit from the code plane's begin on, exclusive or 4 * (group % 4)
  // (TideByte); 16 bits higher 32 * its width.
  uint32_t slots[kSteps][4] = {};
};

template <int D>
struct LevelTables {
  static constexpr int kColumns = D;                          // 16 for a pair, 32 for a quad
  static constexpr int kMatrix = 0;                           // float [D channels][kColumns]
  static constexpr int kCentre = kMatrix + D * kColumns * 4;  // float [D]
  static constexpr int kUnit = kCentre + D * 4;               // LevelUnit<D>
  static constexpr int kBytes = (kUnit + static_cast<int>(sizeof(LevelUnit<D>)) + 127) / 128 * 128;
  // A fragment of 8 query rows: 256 bytes for a pair, 512 for a quad.
  static constexpr int kQueryBytes = kColumns * 16;

  // Where word `word` (4 columns, high and low part 4 bytes each) of row n of a fragment of 8 rows is; `lead`
  // and `words` as in LevelUnit.
  static KVTIDE_HD constexpr int PlaceOf(int lead, int words, int word, int n) {
    if (word < 4 * lead) return n * 32 + word * 8;
    if (word < words) {
      const int rest = word - 4 * lead;
      return lead * 256 + rest / 8 * 512 + n * 64 + rest % 8 * 8;
    }
    return words * 64 + n * 32 + (word - words) * 8;
  }
  // The coefficient of its group that byte `byte` of word `word` of a lane has; `wide`: in steps with groups
  // of more than 4 bits.
  static KVTIDE_HD constexpr int CoefficientOf(bool wide, int word, int byte) {
    return wide ? 4 * word + byte : 2 * word + byte / 2 + byte % 2 * 4;
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
