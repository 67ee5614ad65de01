// Half pages of calibrated keys: the definition of the bytes of tide4 to tide1 (tide.h). Plain code
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

// Gain times level of every coefficient, [64][stored_dim], 0 where there is no token or no bit: what queries
// meet that were turned into the frame of keys coded after RoPE (TurnTideQuery).
void DecodeTideLevels(CacheType type, const HalfLayout& layout, const HeadProfile& head,
                      const std::byte* half, float* rows);

// A query [stored_dim] into that frame, in place: for every coefficient its sum over the inverse, divided by
// the level of one standard deviation; 0 where there are no bits. Returns q . centre, which belongs to the
// product with every key. The head is not turned back.
float TurnTideQuery(CacheType type, const HeadProfile& head, int stored_dim, float* query);

}  // namespace kvtide
