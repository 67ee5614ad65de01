// Makes profiles from keys: from the first block of a sequence or from a calibration text. Pure functions;
// the same keys give the same profile on every machine (sums in one order, square roots and divisions only).
//
// The gain of a channel is rms^-1 (kFull) or rms^-1/2 (kRoot), scaled so that the keys keep their mean
// energy. Channels that RoPE turns together share one gain, because which of the two carries an outlier
// depends on the position; the sum of their squares does not. A channel without energy gets the gain of one
// at 1/64 of the head's rms, so gains are finite and positive for all-zero keys too.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/format/profile.h"
#include "kernels/format/rope.h"

namespace kvtide {

struct ProfileOptions {
  bool mean = false;
  Equalise equalise = Equalise::kNone;
  RopePairs pairs = RopePairs::kHalves;
  bool operator==(const ProfileOptions&) const = default;
};

// What keys of this type want when a profile is made for them. beside_exact: whether exact keys stand in the
// same softmax, as they do in every sequence with a tail. Where all keys are coded (an evaluation mode),
// nothing is equalised: the clipped part of outlier channels is then common to all keys and hidden by
// softmax, and the gain would only move the noise to the strong channels (README.md).
ProfileOptions DefaultProfileOptions(CacheType key_type, bool beside_exact = true);

// The profile of one head from `tokens` rows; row t starts at rows[t * stride]. tokens >= 1, values finite.
HeadProfile MakeKeyProfile(const float* rows, int tokens, size_t stride, int head_dim,
                           const ProfileOptions& options);

// The profile of a layer group; keys[layer] is [tokens][kv_heads][head_dim_k], as Backend::Decode gives them.
// With neither mean nor equalisation the result is empty and its hash 0. V gets no data.
Profile MakeProfile(const GroupShape& shape, std::span<const float* const> keys, int tokens,
                    const ProfileOptions& options);

// The profile of a layer group with these means of keys, [layers][kv_heads][head_dim_k], and nothing else.
Profile MakeMeanProfile(const GroupShape& shape, std::span<const float> means);

}  // namespace kvtide
