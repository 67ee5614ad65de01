// Cache types f16 and bf16: values as they are, 16 bits each, no scales. The exact window and the tail of
// every sequence are f16.
#pragma once

#include "kernels/format/codec.h"

namespace kvtide {

struct F16 {
  static constexpr char kName[] = "f16";
  static constexpr Storage kStorage = Storage::kHalf;
  static constexpr int kBits = 16, kGroup = 0, kVersion = 1;
  static KVTIDE_HD uint16_t Pack(float x) { return F32ToF16(x); }
  static KVTIDE_HD float Unpack(uint16_t bits) { return F16ToF32(bits); }
};

struct Bf16 {
  static constexpr char kName[] = "bf16";
  static constexpr Storage kStorage = Storage::kHalf;
  static constexpr int kBits = 16, kGroup = 0, kVersion = 1;
  static KVTIDE_HD uint16_t Pack(float x) { return F32ToBf16(x); }
  static KVTIDE_HD float Unpack(uint16_t bits) { return Bf16ToF32(bits); }
};

}  // namespace kvtide
