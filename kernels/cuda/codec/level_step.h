// Which code a scaled value of a codebook type takes, by one rounding: the value times kPerUnit plus kMagic,
// rounded up to whole numbers, is kMagic plus its *step*, and a step belongs to one code. The borders between
// codes are whole steps; kPerUnit lies below steps by so little that a value on a border, of either sign,
// falls to the code nearer to zero, as CodebookCodec::EncodeGroup wants it, and its neighbour does not.
// Uniform levels have a step for each code.
#pragma once

#include <cstdint>

#include "kernels/format/codebook.h"

namespace kvtide::cuda {

template <class C>
struct LevelSteps {
  static constexpr bool kUniform = requires { requires C::Book::kStep == 16; };
  // Borders are multiples of one half or of 16, with two bits the only one is 39: few steps, for tables in
  // few banks.
  static constexpr float kPerUnit = kUniform ? 0x1.fffffep-5f : C::kBits == 2 ? 0x1.a41a4p-3f : 0x1.fffffep0f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  static constexpr uint32_t kMagicBits = 0x4b400000u;
  // Steps lie below: of a group of 128 equal to one value, sqrt(128) sigmas.
  static constexpr int kSteps = (static_cast<int>(C::Book::kSigma * 11.33f * kPerUnit) + 16) / 16 * 16;

  // The lowest step that takes a code; the steps from there to the next code's are its own.
  static KVTIDE_HD int FirstStep(int code) {
    if (code == 0) return -kSteps;
    return code > C::kHalf    ? Border(code - C::kHalf - 1) + 1
           : code == C::kHalf ? 1
                              : 1 - Border(C::kHalf - 1 - code);
  }

 private:
  // Between levels m and m + 1 above zero.
  static KVTIDE_HD int Border(int m) {
    return kUniform ? m + 1 : C::kBits == 2 ? 8 : C::Book::Positive(m) + C::Book::Positive(m + 1);
  }
};

}  // namespace kvtide::cuda
