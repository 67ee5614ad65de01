// A calibrated KV head on the device, as the encoders and decoders of its keys read it (codec/tide_codec.cu):
// what HeadProfile says, with the inverse by coefficients, so that threads of neighbouring channels read
// neighbouring values.
#pragma once

#include <cstdint>

#include "kernels/format/rope.h"

namespace kvtide::cuda {

struct TideHead {
  const float* centre = nullptr;           // [head_dim]
  const float* transform = nullptr;        // [channel][coefficient]
  const float* inverse = nullptr;          // [coefficient][channel]
  const uint64_t* per_position = nullptr;  // [turned], PerPosition of each pair's frequency
  const uint8_t* widths = nullptr;         // [types][stored_dim / 8]
  int32_t turned = 0;                      // pairs of channels
  RopePairs pairs = RopePairs::kHalves;
};

}  // namespace kvtide::cuda
