#include "kernels/cpu/page/plain_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/tide_codec.h"

namespace kvtide {
namespace {

// Online softmax of one row: the running maximum, the sum of weights and the weighted sum of V.
struct RowState {
  float maximum = -INFINITY, sum = 0;
};

// Adds tokens [first, last) of a decoded page to a row's state.
void AttendTokens(const QueryRows& rows, int row, const float* k, int dim_k, const float* v, int dim_v,
                  int first, int last, RowState& state, float* out) {
  float logits[kBlockTokens];
  float page_maximum = -INFINITY;
  const float* q = rows.q + static_cast<size_t>(row) * static_cast<size_t>(dim_k);
  for (int t = first; t < last; t++) {
    float dot = rows.bias == nullptr ? 0.0f : rows.bias[row];
    for (int d = 0; d < dim_k; d++) dot += q[d] * k[t * dim_k + d];
    float logit = dot * rows.scale;
    if (rows.softcap > 0) logit = rows.softcap * std::tanh(logit / rows.softcap);
    logits[t] = logit;
    page_maximum = std::max(page_maximum, logit);
  }
  if (page_maximum > state.maximum) {
    const float factor = std::exp(state.maximum - page_maximum);
    for (int d = 0; d < dim_v; d++) out[d] *= factor;
    state.sum *= factor;
    state.maximum = page_maximum;
  }
  for (int t = first; t < last; t++) {
    const float weight = std::exp(logits[t] - state.maximum);
    state.sum += weight;
    for (int d = 0; d < dim_v; d++) out[d] += weight * v[t * dim_v + d];
  }
}

// Keys that a calibrated type coded before RoPE as they were, [64][stored_dim].
void RebuildKeys(const BlockLayout& layout, const HeadProfile& head, int64_t position, const std::byte* half,
                 float* k) {
  const auto dim = static_cast<size_t>(layout.k().head_dim),
             stored = static_cast<size_t>(layout.k().stored_dim);
  std::vector<float> rows(kBlockTokens * dim);
  DecodeHalf(layout.pair().k, Side::kKey, layout.k(), &head, position, half, rows.data());
  std::fill_n(k, kBlockTokens * stored, 0.0f);
  for (size_t t = 0; t < kBlockTokens; t++) std::copy_n(rows.data() + t * dim, dim, k + t * stored);
}

void Attend(const PageSegment& segment, const QueryRows& rows, float* out, float* lse) {
  const BlockLayout& layout = *segment.layout;
  const int dim_k = layout.k().stored_dim, dim_v = layout.v().stored_dim;
  std::vector<float> k(static_cast<size_t>(kBlockTokens * dim_k)),
      v(static_cast<size_t>(kBlockTokens * dim_v));
  std::vector<RowState> states(static_cast<size_t>(rows.rows));
  std::fill_n(out, static_cast<size_t>(rows.rows) * static_cast<size_t>(dim_v), 0.0f);
  for (size_t b = 0; b < segment.blocks.size(); b++) {
    const int64_t position = segment.first_position + static_cast<int64_t>(b) * kBlockTokens;
    const int64_t valid = std::min<int64_t>(kBlockTokens, segment.first_position + segment.tokens - position);
    bool decoded = false;
    for (int r = 0; r < rows.rows; r++) {
      const int first = static_cast<int>(std::clamp<int64_t>(rows.begin[r] - position, 0, kBlockTokens));
      const int last = static_cast<int>(std::clamp<int64_t>(rows.end[r] - position, 0, valid));
      if (first >= last) continue;
      if (!decoded) {
        const std::byte* record = segment.blocks[b] + segment.record_offset;
        if (segment.k.table->calibrated && segment.profile->turned_back()) {
          RebuildKeys(layout, *segment.profile, position, record, k.data());
        } else if (segment.k.table->calibrated) {
          DecodeTideLevels(layout.pair().k, layout.k(), *segment.profile, record, k.data());
        } else {
          DecodeHalfRotated(layout.pair().k, Side::kKey, layout.k(), record, k.data());
        }
        DecodeHalfRotated(layout.pair().v, Side::kValue, layout.v(), record + layout.v_codes(), v.data());
        decoded = true;
      }
      AttendTokens(rows, r, k.data(), dim_k, v.data(), dim_v, first, last, states[static_cast<size_t>(r)],
                   out + static_cast<size_t>(r) * static_cast<size_t>(dim_v));
    }
  }
  for (int r = 0; r < rows.rows; r++) {
    const RowState& state = states[static_cast<size_t>(r)];
    // Logits beyond f32 have made the sum NaN, and so they make the result.
    lse[r] = state.sum == 0 ? -INFINITY : state.maximum + std::log(state.sum);
    if (state.sum == 0) continue;
    float* row = out + static_cast<size_t>(r) * static_cast<size_t>(dim_v);
    for (int d = 0; d < dim_v; d++) row[d] /= state.sum;
  }
}

void Rotate(CacheType type, bool inverse, float* x, int stored_dim) {
  inverse ? RotateInverse(type, x, stored_dim) : RotateForward(type, x, stored_dim);
}

void Widen(TensorView from, size_t first, size_t count, float* to) {
  for (size_t i = 0; i < count; i++) to[i] = from.At(first + i);
}

void Narrow(const float* from, size_t count, MutableTensorView to, size_t first) {
  for (size_t i = 0; i < count; i++) StoreElement(from[i], to, first + i);
}

void StoreRows(CacheType type, const HalfLayout& layout, TensorView rows, size_t first_element, size_t stride,
               int first_token, int tokens, std::byte* half) {
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kHalf) {
      for (int i = 0; i < tokens; i++)
        for (int d = 0; d < layout.stored_dim; d++) {
          const size_t element = first_element + static_cast<size_t>(i) * stride + static_cast<size_t>(d);
          const uint16_t bits = C::Pack(d < layout.head_dim ? rows.At(element) : 0.0f);
          const int index = HalfPrecisionIndex(first_token + i, d, layout.stored_dim);
          std::memcpy(half + static_cast<size_t>(index) * 2, &bits, 2);
        }
    } else {
      KVTIDE_CHECK(false, "rows cannot be appended to pages of ", C::kName);
    }
  });
}

}  // namespace

const PageKernels& PlainKernels() {
  static const PageKernels kKernels{.name = "plain",
                                    .level = SimdLevel::kPlain,
                                    .attend = Attend,
                                    .attend_many = Attend,
                                    .rotate = Rotate,
                                    .turn_query = TurnTideQuery,
                                    .widen = Widen,
                                    .narrow = Narrow,
                                    .store_rows = StoreRows,
                                    .encode = EncodeHalf,
                                    .decode = DecodeHalf};
  return kKernels;
}

}  // namespace kvtide
