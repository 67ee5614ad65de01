// Cache type wht4: the Walsh-Hadamard rotation of turbo4 with 16 uniform levels, one scale for 128 values.
// The levels are the odd multiples of 8, so a decoder needs no table: a nibble in the upper half of a byte
// with its top bit turned, and 8 below, is the level as a signed byte,
//     (word & 0xf0f0f0f0) ^ 0x88888888      for the codes in odd places of a word,
// the same after a shift by 4 for those in even places. That is 3 instructions for 8 codes where tables of 16
// levels take 9. Rotation with uniform levels is what QuaRot (Ashkboos et al., arXiv 2404.00456) does to KV
// caches; there is no zero level, for no value of a rotated vector is likelier than its neighbours.
//
// Steps are a third of the rms: the best step for N(0,1) and the unbiased scale is 0.3352, and 1/3 loses
// 0.03 % against it. The squared error is .0117, that of Lloyd-Max levels .0095 (at equal bits and scale).
#pragma once

#include "kernels/format/turbo.h"

namespace kvtide {

struct UniformBook4 {
  static constexpr float kSigma = 48.0f;
  static constexpr float kLevelUnit = 0.125f;
  static constexpr int kStep = 16;  // between levels; borders between codes are multiples of it
  static KVTIDE_HD int Positive(int i) { return kStep * i + kStep / 2; }
};

struct Wht4 : CodebookCodec<4, Hadamard, UniformBook4> {
  static constexpr char kName[] = "wht4";
};

}  // namespace kvtide
