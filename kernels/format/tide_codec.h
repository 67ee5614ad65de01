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
void EncodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, const float* rows,
                    int tokens, std::byte* half);
void DecodeTideHalf(CacheType type, const HalfLayout& layout, const HeadProfile& head, const std::byte* half,
                    float* rows);

// What attention works on: scale times level, [64][stored_dim].
void DecodeTideLevels(const HalfLayout& layout, const uint8_t* widths, const std::byte* half, float* rows);
// The query that meets it, [stored_dim], from one of head_dim values: its dot product with such a row is that
// with the key minus the mean.
void TurnTideQuery(CacheType type, int head_dim, const HeadProfile& head, const float* q, float* turned);

}  // namespace kvtide
