#include "kernels/format/profile_maker.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/base/check.h"

namespace kvtide {
namespace {

constexpr double kFloor = 1.0 / 64;  // of the rms of the head: weaker channels are amplified no further

// Index of the channel that shares the gain of channel i.
size_t Partner(size_t i, size_t head_dim, RopePairs pairs) {
  if (pairs == RopePairs::kHalves) return i < head_dim / 2 ? i + head_dim / 2 : i - head_dim / 2;
  if (pairs == RopePairs::kNeighbours) return i ^ 1;
  return i;
}

}  // namespace

ProfileOptions DefaultProfileOptions(CacheType key_type, bool beside_exact) {
  ProfileOptions options;
  if (beside_exact) options.equalise = Info(key_type).keys;
  return options;
}

HeadProfile MakeKeyProfile(const float* rows, int tokens, size_t stride, int head_dim,
                           const ProfileOptions& options) {
  KVTIDE_CHECK(tokens >= 1 && head_dim >= 2 && head_dim % 2 == 0, tokens, " tokens, dim ", head_dim);
  const size_t d = static_cast<size_t>(head_dim), n = static_cast<size_t>(tokens);
  HeadProfile profile;
  std::vector<double> mean(d, 0.0), square(d, 0.0);
  if (options.mean) {
    for (size_t t = 0; t < n; t++)
      for (size_t i = 0; i < d; i++) mean[i] += static_cast<double>(rows[t * stride + i]);
    for (double& m : mean) m = static_cast<double>(static_cast<float>(m / static_cast<double>(n)));
    profile.mean.assign(mean.begin(), mean.end());
  }
  if (options.equalise == Equalise::kNone) return profile;

  double total = 0;
  for (size_t t = 0; t < n; t++)
    for (size_t i = 0; i < d; i++) {
      const double x = static_cast<double>(rows[t * stride + i]) - mean[i];
      square[i] += x * x;
    }
  for (const double s : square) total += s;
  if (!(total > 0)) {
    profile.gain.assign(d, 1.0f);
    return profile;
  }
  const double floor = kFloor * kFloor * total / static_cast<double>(d);
  std::vector<double> gain(d);
  double after = 0;
  for (size_t i = 0; i < d; i++) {
    const double shared = std::max(floor, (square[i] + square[Partner(i, d, options.pairs)]) / 2);
    const double rms = std::sqrt(shared);
    gain[i] = 1 / (options.equalise == Equalise::kFull ? rms : std::sqrt(rms));
    after += gain[i] * gain[i] * shared;
  }
  const double keep = std::sqrt(total / after);
  profile.gain.resize(d);
  for (size_t i = 0; i < d; i++) profile.gain[i] = static_cast<float>(gain[i] * keep);
  return profile;
}

Profile MakeProfile(const GroupShape& shape, std::span<const float* const> keys, int tokens,
                    const ProfileOptions& options) {
  KVTIDE_CHECK(keys.size() == static_cast<size_t>(shape.layers), keys.size(), " layers of keys for ",
               shape.layers);
  Profile profile;
  profile.shape = shape;
  if (!options.mean && options.equalise == Equalise::kNone) return profile;
  const size_t d = static_cast<size_t>(shape.head_dim_k), heads = static_cast<size_t>(shape.kv_heads);
  for (const float* layer : keys)
    for (size_t h = 0; h < heads; h++)
      profile.k.push_back(MakeKeyProfile(layer + h * d, tokens, heads * d, shape.head_dim_k, options));
  profile.hash = HashProfile(profile);
  return profile;
}

Profile MakeMeanProfile(const GroupShape& shape, std::span<const float> means) {
  const size_t d = static_cast<size_t>(shape.head_dim_k);
  const size_t heads = static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads);
  KVTIDE_CHECK(means.size() == heads * d, means.size(), " means for ", heads, " heads of ", d);
  Profile profile;
  profile.shape = shape;
  profile.k.resize(heads);
  for (size_t h = 0; h < heads; h++)
    profile.k[h].mean.assign(means.begin() + static_cast<std::ptrdiff_t>(h * d),
                             means.begin() + static_cast<std::ptrdiff_t>((h + 1) * d));
  profile.hash = HashProfile(profile);
  return profile;
}

}  // namespace kvtide
