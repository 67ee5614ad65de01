#include "clients/engine/key_calibration.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/tide.h"

namespace kvtide::engine {
namespace {

GroupShape ShapeOf(const KvGeometry& g) { return {g.layers, g.kv_heads, g.head_dim, g.head_dim}; }

// Sum over keys of e' M e, with e the error of coding or, for leaving out, the key minus its mean, both
// turned back.
class Harm {
 public:
  Harm(std::vector<double> metric, const HeadProfile& head) : metric_(std::move(metric)), head_(head) {}

  double OfCoding(CacheType type, const HeldKeys& keys) const {
    const std::vector<float>& rows = keys.rows;
    const int d = static_cast<int>(head_.mean.size()), tokens = static_cast<int>(rows.size()) / d;
    const HalfLayout layout = MakeHalfLayout(type, d);
    // Planes are read in 16-byte words.
    std::vector<std::max_align_t> half(layout.bytes / sizeof(std::max_align_t));
    auto* bytes = reinterpret_cast<std::byte*>(half.data());
    std::vector<float> page(static_cast<size_t>(kBlockTokens * d));
    double sum = 0;
    for (int t = 0; t < tokens; t += kBlockTokens) {
      const int n = std::min<int>(kBlockTokens, tokens - t);
      const float* own = rows.data() + static_cast<size_t>(t) * static_cast<size_t>(d);
      const int64_t position = keys.position + t;
      EncodeHalf(type, Side::kKey, layout, &head_, position, own, n, bytes);
      DecodeHalf(type, Side::kKey, layout, &head_, position, bytes, page.data());
      for (int i = 0; i < n * d; ++i) page[static_cast<size_t>(i)] -= own[i];
      for (int i = 0; i < n; ++i) {
        float* const error = page.data() + static_cast<size_t>(i * d);
        TurnKey(head_.rope, position, i, true, error);
        sum += Of(error, d);
      }
    }
    return sum;
  }
  double OfLeavingOut(const HeldKeys& keys) const {
    const size_t d = head_.mean.size();
    double sum = 0;
    std::vector<float> x(d);
    for (size_t t = 0; t < keys.rows.size() / d; ++t) {
      std::copy_n(keys.rows.data() + t * d, d, x.begin());
      TurnKey(head_.rope, keys.position + static_cast<int64_t>(t), 0, true, x.data());
      for (size_t i = 0; i < d; ++i) x[i] -= head_.centre[i];
      sum += Of(x.data(), static_cast<int>(d));
    }
    return sum;
  }

 private:
  double Of(const float* e, int d) const {
    double sum = 0;
    for (int i = 0; i < d; ++i) {
      double row = 0;
      for (int j = 0; j < d; ++j) row += metric_[static_cast<size_t>(i * d + j)] * static_cast<double>(e[j]);
      sum += row * static_cast<double>(e[i]);
    }
    return sum;
  }

  const std::vector<double> metric_;
  const HeadProfile& head_;
};

}  // namespace

KeyCalibration::KeyCalibration(const KvGeometry& geometry, KeysAt keys, ThreadPool& pool)
    : geometry_(geometry),
      keys_(keys),
      pool_(pool),
      held_(static_cast<size_t>(geometry.layers * geometry.kv_heads)) {
  for (int layer = 0; layer < geometry.layers; ++layer)
    heads_.insert(heads_.end(), static_cast<size_t>(geometry.kv_heads),
                  KeyStatistics(geometry.head_dim, keys == KeysAt::kAfterRope || geometry.ropes.empty()
                                                       ? Rope()
                                                       : geometry.ropes[static_cast<size_t>(layer)]));
  held_heads_ = heads_;
}

void KeyCalibration::Add(int layer, int64_t position, int n, const float* q, const float* k) {
  const int d = geometry_.head_dim, group = geometry_.query_heads / geometry_.kv_heads;
  pool_.ParallelFor(geometry_.kv_heads, [&](int64_t h) {
    KeyStatistics& head = heads_[static_cast<size_t>(layer * geometry_.kv_heads + h)];
    head.AddKeys(k + h * d, n, geometry_.kv_width(), position);
    for (int64_t i = h * group; i < (h + 1) * group; ++i)
      head.AddQueries(q + i * d, n, geometry_.query_width(), position);
  });
}

void KeyCalibration::HoldBack(int layer, int64_t position, int n, const float* q, const float* k) {
  const int d = geometry_.head_dim, group = geometry_.query_heads / geometry_.kv_heads;
  pool_.ParallelFor(geometry_.kv_heads, [&](int64_t h) {
    const auto index = static_cast<size_t>(layer * geometry_.kv_heads + h);
    for (int64_t i = h * group; i < (h + 1) * group; ++i)
      held_heads_[index].AddQueries(q + i * d, n, geometry_.query_width(), position);
    HeldKeys& keys = held_[index].emplace_back(HeldKeys{position, {}});
    for (int t = 0; t < n; ++t) {
      const float* row = k + static_cast<size_t>(t) * geometry_.kv_width() + h * d;
      keys.rows.insert(keys.rows.end(), row, row + d);
    }
  });
}

std::vector<std::vector<float>> KeyCalibration::means() const {
  std::vector<std::vector<float>> means(static_cast<size_t>(geometry_.layers));
  for (size_t h = 0; h < heads_.size(); ++h) {
    KVTIDE_CHECK(heads_[h].keys() > 0, "head ", h, " was given no tokens");
    for (const double mean : heads_[h].Mean())
      means[h / static_cast<size_t>(geometry_.kv_heads)].push_back(static_cast<float>(mean));
  }
  return means;
}

std::vector<KeyTypeError> KeyCalibration::Measure(const Profile& profile) const {
  std::vector<KeyTypeError> errors;
  for (const CacheType type : CalibratedTypes()) {
    const std::string beside = absl::StrCat("turbo", Info(type).bits);
    const CacheType turbo = *ParseCacheType(beside);
    struct Sums {
      double own = 0, beside = 0, all = 0;
    };
    std::vector<Sums> sums(held_.size());
    pool_.ParallelFor(static_cast<int64_t>(held_.size()), [&](int64_t h) {
      const auto index = static_cast<size_t>(h);
      const Harm harm(held_heads_[index].QueryMetric(), profile.k[index]);
      for (const HeldKeys& keys : held_[index]) {
        sums[index].own += harm.OfCoding(type, keys);
        sums[index].beside += harm.OfCoding(turbo, keys);
        sums[index].all += harm.OfLeavingOut(keys);
      }
    });
    Sums total;
    for (const Sums& sum : sums) {
      total.own += sum.own;
      total.beside += sum.beside;
      total.all += sum.all;
    }
    errors.push_back({Name(type), beside, total.own / total.all, total.beside / total.all});
  }
  return errors;
}

absl::Status KeyCalibration::AddTransforms(KeyProfile* profile, std::vector<KeyTypeError>* errors) const {
  KVTIDE_ASSIGN_OR_RETURN(const Profile made, MakeTideProfile(ShapeOf(geometry_), heads_));
  if (held_.front().empty())
    return absl::InvalidArgumentError("no tokens were held back to measure the transforms");
  *errors = Measure(made);
  for (const KeyTypeError& error : *errors) {
    if (error.error < error.beside_error) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("on the tokens that were held back ", error.type, " changes logits by ", error.error,
                     ", ", error.beside, " by ", error.beside_error,
                     " of their variance: use a longer text, of the kind that the model will see"));
  }
  for (size_t first = 0; first < made.k.size(); first += static_cast<size_t>(geometry_.kv_heads)) {
    Profile layer;
    layer.shape = made.shape;
    const auto begin = made.k.begin() + static_cast<std::ptrdiff_t>(first);
    layer.k.assign(begin, begin + geometry_.kv_heads);
    KeyTransforms& transforms = profile->transforms.emplace_back(TransformsOf(layer));
    if (geometry_.ropes.empty()) continue;
    const Rope& rope = geometry_.ropes[first / static_cast<size_t>(geometry_.kv_heads)];
    transforms.pairs = rope.pairs;
    transforms.frequencies = rope.frequencies;
  }
  profile->after_rope = keys_ == KeysAt::kAfterRope;
  return absl::OkStatus();
}

}  // namespace kvtide::engine
