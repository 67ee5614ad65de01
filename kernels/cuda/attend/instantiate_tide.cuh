// Entries of the kernel list for calibrated keys.
#pragma once

#include "kernels/cuda/attend/instantiate.cuh"
#include "kernels/cuda/attend/tide_tile.h"

namespace kvtide::cuda {

// Halves of a page that are rebuilt at once, and warps whose registers hold them.
template <int D, int MT>
inline constexpr int kTideHalves = 1;
template <int D, int MT>
inline constexpr int kTideWarps = MT == 1 ? 12 : 8;

// Queries for keys that are rebuilt.
template <int D, int kRowsT>
struct TideQueryKind {
  static constexpr int kDim = D, kRows = kRowsT;
  static constexpr int kFragmentBytes = kRows / 8 * TideTables<D>::kSteps * TideTables<D>::kQueryStepBytes;
  static constexpr int kUnitAt = kFragmentBytes + kRows * 8;
  using OwnUnit = TideUnit;
  static constexpr int kOwnUnitAt = kUnitAt + static_cast<int>(sizeof(UnitRange));
  static constexpr int kBytes = kOwnUnitAt + static_cast<int>(sizeof(OwnUnit));
  static_assert(kUnitAt % 16 == 0);

  static KVTIDE_DEVICE OwnUnit UnitOf(const AttendParams& params, const AttendUnit& unit) {
    return {unit.tables + params.table_offset, unit.position};
  }
  static KVTIDE_DEVICE float WriteRow(const AttendParams& params, const AttendUnit& unit, WarpRow<D>& row,
                                      int r, uint32_t area) {
    return WriteTideQuery<TideWarp, D>(row, params.key_scale, r, unit.tables + params.table_offset, area);
  }
};

template <class W, int kKeyBits, class VCodec, int DK, int DV, int MT, int kHalves>
struct TileInfo<TideTile<W, kKeyBits, VCodec, DK, DV, MT, kHalves>> {
  using Tile = TideTile<W, kKeyBits, VCodec, DK, DV, MT, kHalves>;
  static constexpr int kDk = DK, kDv = DV, kTiles = MT;
  static constexpr bool kCoded = true, kRebuilt = true;
  static constexpr int kScratchBytes = Tile::kScratchBytes;
  static constexpr int kWarps = kTideWarps<DK, MT>;
  using Query = TideQueryKind<DK, Tile::kRows>;
};

template <Form kForm, int kKeyBits, class V, int D, int MT>
void AddTideTile(std::vector<AttendKernel>* list) {
  using VS = typename V::Stored;
  using Tile = TideTile<TideWarp, kKeyBits, VS, D, D, MT, kTideHalves<D, MT>>;
  ForEachSharedLimit([list](auto limit) {
    list->push_back(MakeEntry<Tile, decltype(limit)::value>(kForm, FormOfCodec<VS>()));
  });
}
// Calibrated keys with turbo values of the same bits, tide1 with turbo2.
template <int D>
void AddTidePairs(std::vector<AttendKernel>* list) {
  AddTideTile<Form::kTide4, 4, Turbo4, D, 1>(list);
  AddTideTile<Form::kTide4, 4, Turbo4, D, 2>(list);
  AddTideTile<Form::kTide3, 3, Turbo3, D, 1>(list);
  AddTideTile<Form::kTide3, 3, Turbo3, D, 2>(list);
  AddTideTile<Form::kTide2, 2, Turbo2, D, 1>(list);
  AddTideTile<Form::kTide2, 2, Turbo2, D, 2>(list);
  AddTideTile<Form::kTide1, 1, Turbo2, D, 1>(list);
  AddTideTile<Form::kTide1, 1, Turbo2, D, 2>(list);
}

}  // namespace kvtide::cuda
