#include "kernels/format/profile.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

template <class T>
void Update(XXH3_state_t* state, const std::vector<T>& values) {
  const uint64_t count = values.size();
  XXH3_64bits_update(state, &count, sizeof(count));
  if (!values.empty()) XXH3_64bits_update(state, values.data(), values.size() * sizeof(T));
}

constexpr float kMostEntry = 1e6f;  // of a transform: coefficients of f16 rows stay far inside f32

// Gauss-Jordan with pivots, in place: rows [n][2n] of a matrix and the unit matrix. False if it is singular.
bool Invert(size_t n, std::vector<double>& rows) {
  const size_t width = 2 * n;
  for (size_t c = 0; c < n; c++) {
    size_t pivot = c;
    for (size_t r = c + 1; r < n; r++)
      if (std::abs(rows[r * width + c]) > std::abs(rows[pivot * width + c])) pivot = r;
    if (!(std::abs(rows[pivot * width + c]) > 1e-30)) return false;
    for (size_t i = 0; i < width && pivot != c; i++) std::swap(rows[pivot * width + i], rows[c * width + i]);
    const double factor = 1 / rows[c * width + c];
    for (size_t i = 0; i < width; i++) rows[c * width + i] *= factor;
    for (size_t r = 0; r < n; r++) {
      const double f = rows[r * width + c];
      if (r == c || f == 0) continue;
      for (size_t i = c; i < width; i++) rows[r * width + i] -= f * rows[c * width + i];
    }
  }
  return true;
}

// Of the widths of so many heads, the types that they are for; 0 if they are for none.
size_t CountTypes(size_t widths, size_t heads, int stored_dim) {
  const size_t each = heads * static_cast<size_t>(stored_dim / kTideGroup);
  for (size_t types = kLeastTideTypes; types <= kTideTypes; types++)
    if (widths == types * each) return types;
  return 0;
}

}  // namespace

absl::Status CheckProfileFor(CacheType key_type, const GroupShape& shape, const Profile* profile) {
  const CacheTypeInfo& info = Info(key_type);
  if (!info.calibrated) return absl::OkStatus();
  const size_t heads = static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads);
  const size_t dim = static_cast<size_t>(shape.head_dim_k);
  const bool fits = profile != nullptr && profile->k.size() == heads &&
                    std::all_of(profile->k.begin(), profile->k.end(), [&](const HeadProfile& head) {
                      return (head.mean.empty() || head.mean.size() == dim) && head.centre.size() == dim &&
                             head.transform.size() == dim * dim && head.inverse.size() == dim * dim &&
                             CountTypes(head.widths.size(), 1, StoredDim(shape.head_dim_k)) > 0;
                    });
  const bool old = fits && std::any_of(profile->k.begin(), profile->k.end(), [&](const HeadProfile& head) {
                     return !HasWidthsOf(key_type, head.widths.size(), 1, StoredDim(shape.head_dim_k));
                   });
  if (old)
    return absl::InvalidArgumentError(
        absl::StrCat(info.name, " keys: this profile is older than the type and has no widths for it; make it "
                                "anew with `kvtide calibrate`"));
  const bool alike = fits && std::all_of(profile->k.begin(), profile->k.end(), [&](const HeadProfile& head) {
                       return head.turned_back() == profile->keys_turned_back();
                     });
  if (alike) return absl::OkStatus();
  if (fits)
    return absl::InvalidArgumentError(absl::StrCat(
        info.name,
        " keys: this profile codes some heads before RoPE and others after it; make one for each"));
  return absl::InvalidArgumentError(
      absl::StrCat(info.name,
                   profile == nullptr ? " keys need a profile of the model"
                                      : " keys need transforms, which this profile has not for every head",
                   ": make one with `kvtide calibrate`, or choose another K type"));
}

bool HasWidthsOf(CacheType type, size_t widths, size_t heads, int stored_dim) {
  return CountTypes(widths, heads, stored_dim) > static_cast<size_t>(CalibratedIndex(type));
}

bool HasWidthsOf(CacheType type, const GroupShape& shape, const KeyTransforms& transforms) {
  return HasWidthsOf(type, transforms.widths.size(),
                     static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads),
                     StoredDim(shape.head_dim_k));
}

std::span<const uint8_t> WidthsOf(CacheType type, const HeadProfile& head) {
  const size_t groups = static_cast<size_t>(StoredDim(static_cast<int>(head.centre.size())) / kTideGroup);
  KVTIDE_CHECK(HasWidthsOf(type, head.widths.size(), 1, static_cast<int>(groups) * kTideGroup), Name(type),
               " without widths");
  return std::span(head.widths).subspan(groups * static_cast<size_t>(CalibratedIndex(type)), groups);
}

absl::Status CompleteTransform(int head_dim, HeadProfile& head) {
  const size_t n = static_cast<size_t>(head_dim),
               groups = static_cast<size_t>(StoredDim(head_dim) / kTideGroup);
  const auto bad = [](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("profile of keys: ", what...));
  };
  if (!head.mean.empty() && head.mean.size() != n) return bad(head.mean.size(), " means for head dim ", n);
  if (head.centre.size() != n) return bad(head.centre.size(), " means of coded keys for head dim ", n);
  for (const float x : head.centre)
    if (!(std::abs(x) <= kMostEntry)) return bad("a mean of coded keys of ", x);
  if (2 * head.rope.frequencies.size() > n ||
      (head.rope.pairs == RopePairs::kNone && !head.rope.frequencies.empty()))
    return bad(head.rope.frequencies.size(), " frequencies of RoPE for head dim ", n);
  for (const float x : head.rope.frequencies)
    if (!(x >= 0 && x <= kMostFrequency))
      return bad("a frequency of RoPE of ", x, ", must be 0 to ", kMostFrequency, " radians a position");
  if (head.transform.size() != n * n)
    return bad("a transform of ", head.transform.size(), " values for head dim ", n, ", must be ", n * n);
  if (CountTypes(head.widths.size(), 1, StoredDim(head_dim)) == 0)
    return bad(head.widths.size(), " widths for head dim ", n, ", must be ", kTideTypes * groups);
  if (!head.gain.empty()) return bad("gains beside a transform");
  for (const float x : head.transform)
    if (!(std::abs(x) <= kMostEntry))
      return bad("a value of ", x, " in a transform, must be within +-", kMostEntry);
  for (const CacheType type : CalibratedTypes()) {
    if (!HasWidthsOf(type, head.widths.size(), 1, StoredDim(head_dim))) continue;
    const std::span<const uint8_t> widths = WidthsOf(type, head);
    int sum = 0;
    for (size_t g = 0; g < groups; g++) {
      if (widths[g] > kMostTideWidth || (widths[g] > 0 && g >= n / kTideGroup))
        return bad("a width of ", int{widths[g]}, " for group ", g, " of ", Name(type));
      sum += widths[g];
    }
    const int most = TideUnits(Info(type).bits, StoredDim(head_dim));
    if (sum > most) return bad("widths of ", Name(type), " add up to ", sum, ", more than ", most);
  }
  std::vector<double> rows(2 * n * n, 0.0);
  for (size_t i = 0; i < n; i++) {
    for (size_t j = 0; j < n; j++) rows[i * 2 * n + j] = static_cast<double>(head.transform[j * n + i]);
    rows[i * 2 * n + n + i] = 1;
  }
  if (!Invert(n, rows)) return bad("a transform without an inverse");
  head.inverse.resize(n * n);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++) {
      const auto x = static_cast<float>(rows[i * 2 * n + n + j]);
      if (!(std::abs(x) <= kMostEntry)) return bad("a transform whose inverse has a value of ", x);
      head.inverse[i * n + j] = x;
    }
  return absl::OkStatus();
}

uint64_t HashProfile(const Profile& profile) {
  XXH3_state_t* state = XXH3_createState();
  XXH3_64bits_reset(state);
  const int shape[4] = {profile.shape.layers, profile.shape.kv_heads, profile.shape.head_dim_k,
                        profile.shape.head_dim_v};
  XXH3_64bits_update(state, shape, sizeof(shape));
  for (const auto* side : {&profile.k, &profile.v}) {
    const uint64_t heads = side->size();
    XXH3_64bits_update(state, &heads, sizeof(heads));
    for (const HeadProfile& head : *side) {
      Update(state, head.mean);
      Update(state, head.gain);
      const auto pairs = static_cast<uint8_t>(head.rope.pairs);
      XXH3_64bits_update(state, &pairs, sizeof(pairs));
      Update(state, head.rope.frequencies);
      Update(state, head.centre);
      Update(state, head.transform);
      Update(state, head.inverse);
      Update(state, head.widths);
    }
  }
  const uint64_t hash = XXH3_64bits_digest(state);
  XXH3_freeState(state);
  return hash == 0 ? 1 : hash;
}

}  // namespace kvtide
