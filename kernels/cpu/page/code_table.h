// CodeTable: what the vector kernels need to know of a coded cache type: the width of a code, the group size
// and the level of every code. Kernels are compiled per width, not per type, so a new type of a known width
// needs no kernel.
#pragma once

#include <cstdint>

namespace kvtide {

enum class CacheType : uint8_t;  // catalogue.h, which the slowly compiled kernels do not include

struct CodeTable {
  int bits = 0;   // 0 for f16 and bf16
  int group = 0;  // values per scale
  float unit = 0;
  // Levels as words; index bits beyond the width are ignored by repetition.
  alignas(64) int16_t words[32] = {};
  // Levels as bytes, repeated likewise.
  alignas(32) int8_t bytes[32] = {};
  bool bf16 = false;
  // Keys of calibrated types (tide.h): bit planes, which become levels of 8 bits, and one gain a token.
  bool calibrated = false;

  bool coded() const { return bits != 0; }
};

// The table of a type. 8-bit types must have the two's complement byte as their level, for there is no table
// of 256.
const CodeTable& CodeTableOf(CacheType type);

// Codes lie in an order that suits vector lanes (page_order.h); kernels keep tokens and dims in that order,
// called position, until the end.
constexpr int TokenPosition(int token) { return token / 8 * 8 + token % 2 * 4 + token % 8 / 2; }
constexpr int TokenAtPosition(int position) { return position / 8 * 8 + position % 4 * 2 + position % 8 / 4; }
constexpr int DimPosition(int dim) { return dim / 32 * 32 + dim % 8 * 4 + dim % 32 / 8; }
constexpr int DimAtPosition(int position) {
  return position / 32 * 32 + position % 4 * 8 + position % 32 / 4;
}

// The vector kernels take the 8 codes of a unit as four pairs, one pair per 32-bit lane. Codes of pair p:
constexpr int PairFirst(int bits, int pair) { return bits == 8 ? pair / 2 * 4 + pair % 2 : pair; }
constexpr int PairSecond(int bits, int pair) { return PairFirst(bits, pair) + (bits == 8 ? 2 : 4); }

}  // namespace kvtide
