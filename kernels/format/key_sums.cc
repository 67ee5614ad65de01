#include "kernels/format/key_sums.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/tide.h"

namespace kvtide {

// Sum over keys of e' M e, with e the error of coding or, for leaving out, the key minus its mean, both
// turned back.
class KeySums::Harm {
 public:
  Harm(std::vector<double> metric, const HeadProfile& head) : metric_(std::move(metric)), head_(head) {}

  double OfCoding(CacheType type, const HeldKeys& keys) const {
    const size_t d = head_.mean.size();
    const int dim = static_cast<int>(d), tokens = static_cast<int>(keys.positions.size());
    const HalfLayout layout = MakeHalfLayout(type, dim);
    // Planes are read in 16-byte words.
    std::vector<std::max_align_t> half(layout.bytes / sizeof(std::max_align_t));
    auto* bytes = reinterpret_cast<std::byte*>(half.data());
    std::vector<float> own(static_cast<size_t>(kBlockTokens) * d), page(own.size());
    double sum = 0;
    for (int t = 0; t < tokens; t += kBlockTokens) {
      const int n = std::min<int>(kBlockTokens, tokens - t);
      const int64_t* const positions = keys.positions.data() + t;
      std::copy_n(keys.rows.data() + static_cast<size_t>(t) * d, static_cast<size_t>(n) * d, own.begin());
      // Tokens of a page follow each other: calibrated types, to which positions matter, get keys that are
      // turned so that these do.
      if (Info(type).calibrated)
        for (int i = 0; i < n; ++i) {
          if (positions[i] == positions[0] + i) continue;
          float* const row = own.data() + static_cast<size_t>(i) * d;
          TurnKey(head_.rope, positions[i], 0, true, row);
          TurnKey(head_.rope, positions[0], i, false, row);
        }
      EncodeHalf(type, Side::kKey, layout, &head_, positions[0], own.data(), n, bytes);
      DecodeHalf(type, Side::kKey, layout, &head_, positions[0], bytes, page.data());
      for (int i = 0; i < n; ++i) {
        float* const error = page.data() + static_cast<size_t>(i) * d;
        for (size_t c = 0; c < d; ++c) error[c] -= own[static_cast<size_t>(i) * d + c];
        if (Info(type).calibrated)
          TurnKey(head_.rope, positions[0], i, true, error);
        else
          TurnKey(head_.rope, positions[i], 0, true, error);
        sum += Of(error);
      }
    }
    return sum;
  }
  double OfLeavingOut(const HeldKeys& keys) const {
    const size_t d = head_.mean.size();
    double sum = 0;
    std::vector<float> x(d);
    for (size_t t = 0; t < keys.positions.size(); ++t) {
      std::copy_n(keys.rows.data() + t * d, d, x.begin());
      TurnKey(head_.rope, keys.positions[t], 0, true, x.data());
      for (size_t i = 0; i < d; ++i) x[i] -= head_.centre[i];
      sum += Of(x.data());
    }
    return sum;
  }

 private:
  double Of(const float* e) const {
    const size_t d = head_.mean.size();
    double sum = 0;
    for (size_t i = 0; i < d; ++i) {
      double row = 0;
      for (size_t j = 0; j < d; ++j) row += metric_[i * d + j] * static_cast<double>(e[j]);
      sum += row * static_cast<double>(e[i]);
    }
    return sum;
  }

  const std::vector<double> metric_;
  const HeadProfile& head_;
};

absl::Status CompareKeyTypes(std::span<const KeyTypeHarm> harms, std::vector<KeyTypeError>* errors) {
  errors->clear();
  for (const KeyTypeHarm& harm : harms)
    errors->push_back({Name(harm.type), Name(harm.beside), harm.own / harm.of_leaving_out,
                       harm.of_beside / harm.of_leaving_out});
  for (size_t i = 0; i < harms.size(); i++) {
    const KeyTypeError& error = (*errors)[i];
    if (error.error < error.beside_error || Info(harms[i].beside).bits > Info(harms[i].type).bits) continue;
    return absl::InvalidArgumentError(absl::StrCat("on the tokens that were held back ", error.type,
                                                   " changes logits by ", error.error, ", ", error.beside,
                                                   " by ", error.beside_error, " of their variance"));
  }
  return absl::OkStatus();
}

KeySums::KeySums(const GroupShape& shape, int query_heads, std::span<const Rope> ropes, ThreadPool* pool,
                 int64_t held_back_tokens)
    : shape_(shape),
      query_heads_(query_heads),
      held_back_tokens_(static_cast<size_t>(held_back_tokens)),
      pool_(pool) {
  const size_t kv_heads = static_cast<size_t>(shape.kv_heads);
  heads_.reserve(static_cast<size_t>(shape.layers) * kv_heads);
  for (size_t layer = 0; layer < static_cast<size_t>(shape.layers); ++layer)
    heads_.insert(heads_.end(), kv_heads,
                  KeyStatistics(shape.head_dim_k, ropes.empty() ? Rope() : ropes[layer]));
  held_heads_ = heads_;
  held_.resize(heads_.size());
}

double KeySums::Bytes(const GroupShape& shape, int64_t held_back_tokens) {
  const double dim = shape.head_dim_k, heads = double{1} * shape.layers * shape.kv_heads;
  const double products = 3 * dim * dim + 4 * dim;  // of keys and queries, and of queries held back
  const double held = static_cast<double>(held_back_tokens) * (dim * sizeof(float) + sizeof(int64_t));
  return heads * (products * sizeof(double) + dim * sizeof(float) + held);
}

void KeySums::EachHead(int layer, absl::FunctionRef<void(int64_t, size_t)> body) const {
  const int64_t first = int64_t{1} * layer * shape_.kv_heads;
  pool_->ParallelFor(shape_.kv_heads, [&](int64_t h) { body(h, static_cast<size_t>(first + h)); });
}

void KeySums::AddKeys(int layer, int64_t position, int n, const float* k) {
  const int d = shape_.head_dim_k;
  EachHead(layer, [&](int64_t h, size_t index) {
    heads_[index].AddKeys(k + h * d, n, static_cast<size_t>(shape_.kv_heads * d), position);
  });
}

void KeySums::AddQueries(int layer, int64_t position, int n, const float* q) {
  const int d = shape_.head_dim_k, group = query_heads_ / shape_.kv_heads;
  EachHead(layer, [&](int64_t h, size_t index) {
    heads_[index].AddQueries(q + h * group * d, n, static_cast<size_t>(query_heads_ * d), position, group);
  });
}

void KeySums::HoldBackQueries(int layer, int64_t position, int n, const float* q) {
  const int d = shape_.head_dim_k, group = query_heads_ / shape_.kv_heads;
  EachHead(layer, [&](int64_t h, size_t index) {
    held_heads_[index].AddQueries(q + h * group * d, n, static_cast<size_t>(query_heads_ * d), position,
                                  group);
  });
}

void KeySums::HoldBackKeys(int layer, int64_t position, int n, const float* k) {
  const int d = shape_.head_dim_k;
  EachHead(layer, [&](int64_t h, size_t index) {
    HeldKeys& keys = held_[index];
    if (keys.positions.empty()) {
      keys.positions.reserve(held_back_tokens_);
      keys.rows.reserve(held_back_tokens_ * static_cast<size_t>(d));
    }
    for (int t = 0; t < n; ++t) {
      const float* const row = k + static_cast<size_t>(t * shape_.kv_heads + h) * static_cast<size_t>(d);
      keys.positions.push_back(position + t);
      keys.rows.insert(keys.rows.end(), row, row + d);
    }
  });
}

std::vector<float> KeySums::Means(int layer) const {
  std::vector<float> means;
  for (int h = 0; h < shape_.kv_heads; ++h)
    for (const double mean : (&HeadOf(layer))[h].Mean()) means.push_back(static_cast<float>(mean));
  return means;
}

absl::StatusOr<std::vector<KeyTypeHarm>> KeySums::Measure(const Profile& profile) const {
  if (held_.front().positions.empty())
    return absl::InvalidArgumentError("no tokens were held back to measure the transforms");
  std::vector<KeyTypeHarm> harms;
  for (const CacheType type : CalibratedTypes()) {
    KeyTypeHarm total;
    total.type = type;
    KVTIDE_ASSIGN_OR_RETURN(total.beside, ParseCacheType(absl::StrCat("turbo", std::max(2, Info(type).bits))));
    std::vector<KeyTypeHarm> sums(held_.size());
    pool_->ParallelFor(static_cast<int64_t>(held_.size()), [&](int64_t h) {
      const auto index = static_cast<size_t>(h);
      const Harm harm(held_heads_[index].QueryMetric(), profile.k[index]);
      sums[index].own = harm.OfCoding(type, held_[index]);
      sums[index].of_beside = harm.OfCoding(total.beside, held_[index]);
      sums[index].of_leaving_out = harm.OfLeavingOut(held_[index]);
    });
    for (const KeyTypeHarm& sum : sums) {
      total.own += sum.own;
      total.of_beside += sum.of_beside;
      total.of_leaving_out += sum.of_leaving_out;
    }
    harms.push_back(total);
  }
  return harms;
}

}  // namespace kvtide
