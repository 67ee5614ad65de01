// Cache types turbo2, turbo3 and turbo4: a Walsh-Hadamard rotation with sign flips, Lloyd-Max levels, one
// scale for 128 values. After TurboQuant (Zandieh et al., arXiv 2504.19874) as llama.cpp forks store it;
// signs are those of TheTom/llama-cpp-turboquant, levels are the correct Lloyd-Max ones (its older 4-bit
// table loses half a bit).
//
// A head vector is cut into runs of 128 and a rest of 96, 64 or 32 values. Runs of a power of two: y = S2 H
// S1 x / sqrt(n). The rest of 96 (head dims 80 and 96): three transforms of 32, then the reflection I - 2/3 J
// across the three.
#pragma once

#include "kernels/format/codebook.h"

namespace kvtide {

struct Hadamard {
  // Bit j of word w is set where element 32w + j is negated.
  static KVTIDE_HD uint32_t Sign(int side, int word) {
    const uint32_t signs[2][4] = {{0xE46A0359u, 0x42F85949u, 0xA4C63BBBu, 0x49F250A9u},
                                  {0x16ACEE90u, 0x3F628FDCu, 0xB7A5357Au, 0xBEA56562u}};
    return signs[side][word];
  }
  static KVTIDE_HD void Flip(float* x, int n, int side) {
    for (int i = 0; i < n; i++)
      if (Sign(side, i / 32) >> (i % 32) & 1u) x[i] = -x[i];
  }
  // Natural order: strides 1, 2, 4, ...; then times 1/sqrt(n).
  static KVTIDE_HD void Butterfly(float* x, int n) {
    for (int h = 1; h < n; h *= 2)
      for (int i = 0; i < n; i += 2 * h)
        for (int j = i; j < i + h; j++) {
          const float a = x[j], b = x[j + h];
          x[j] = a + b;
          x[j + h] = a - b;
        }
    const float factor = n == 128 ? 0.08838834764831845f : n == 64 ? 0.125f : 0.17677669529663687f;
    for (int i = 0; i < n; i++) x[i] = Mul(x[i], factor);
  }
  static KVTIDE_HD void Mix(float* x, int n) {
    if (n != 96) {
      Butterfly(x, n);
      return;
    }
    for (int i = 0; i < 96; i += 32) Butterfly(x + i, 32);
    for (int i = 0; i < 32; i++) {
      const float third = Mul(x[i] + x[i + 32] + x[i + 64], 2.0f / 3.0f);
      x[i] -= third;
      x[i + 32] -= third;
      x[i + 64] -= third;
    }
  }
  static KVTIDE_HD void Forward(float* x, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 128) {
      const int n = stored_dim - i < 128 ? stored_dim - i : 128;
      Flip(x + i, n, 0);
      Mix(x + i, n);
      Flip(x + i, n, 1);
    }
  }
  // The Butterfly and the reflection are their own inverses and commute (they act on different indices).
  static KVTIDE_HD void Inverse(float* x, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 128) {
      const int n = stored_dim - i < 128 ? stored_dim - i : 128;
      Flip(x + i, n, 1);
      Mix(x + i, n);
      Flip(x + i, n, 0);
    }
  }
};

struct Turbo2 : CodebookCodec<2, Hadamard> {
  static constexpr char kName[] = "turbo2";
};
struct Turbo3 : CodebookCodec<3, Hadamard> {
  static constexpr char kName[] = "turbo3";
};
struct Turbo4 : CodebookCodec<4, Hadamard> {
  static constexpr char kName[] = "turbo4";
};

}  // namespace kvtide
