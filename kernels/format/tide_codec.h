// Half pages of calibrated keys: the definition of the bytes of tide4, tide3 and tide2 (tide.h). Plain code
// for the CPU; may be called from any thread. EncodeHalf and DecodeHalf of page_codec.h end here for these
// types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

// As EncodeHalf and DecodeHalf; the head has a transform and widths (CheckProfileFor).
void EncodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, int64_t position,
                    const float* rows, int tokens, std::byte* half);
void DecodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, int64_t position,
                    const std::byte* half, float* rows);

}  // namespace kvtide
