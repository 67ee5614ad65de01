// Tiles of f16 rows, as blocks are decoded to for a prefill: sub-tiles of 64 dims, rows of 128 bytes, their
// 16-byte chunks XORed with the row.
#pragma once

#include "kernels/base/host_device.h"

namespace kvtide::cuda {

// Index of an f16 value in a tile of `rows` rows.
KVTIDE_HD constexpr int TileIndex(int row, int dim, int rows) {
  return dim / 64 * rows * 64 + row * 64 + ((dim % 64 / 8) ^ (row & 7)) * 8 + dim % 8;
}

}  // namespace kvtide::cuda
