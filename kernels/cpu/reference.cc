#include "kernels/cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/base/status.h"
#include "kernels/format/page_codec.h"

namespace kvtide {
namespace {

// All tokens of an item's runs for one KV head, in the original frame.
struct Tokens {
  std::vector<double> k, v;  // [tokens][head_dim]
  std::vector<int64_t> positions;
};

Tokens DecodeRuns(const AttendItem& item, int layer, int kv_head) {
  Tokens all;
  for (const BlockRun& run : item.runs) {
    const BlockLayout& layout = *run.layout;
    const size_t dk = static_cast<size_t>(layout.shape().head_dim_k),
                 dv = static_cast<size_t>(layout.shape().head_dim_v);
    std::vector<float> k(kBlockTokens * dk), v(kBlockTokens * dv);
    const HeadProfile* profile = run.profile == nullptr ? nullptr : &run.profile->key(layer, kv_head);
    for (int64_t first = 0; first < run.tokens; first += kBlockTokens) {
      const std::byte* record =
          run.blocks[static_cast<size_t>(first / kBlockTokens)] + layout.RecordOffset(layer, kv_head);
      DecodeHalf(layout.pair().k, Side::kKey, layout.k(), profile, run.first_position + first, record,
                 k.data());
      DecodeHalf(layout.pair().v, Side::kValue, layout.v(), nullptr, record + layout.v_codes(), v.data());
      const int64_t count = std::min<int64_t>(kBlockTokens, run.tokens - first);
      all.k.insert(all.k.end(), k.begin(), k.begin() + count * static_cast<int64_t>(dk));
      all.v.insert(all.v.end(), v.begin(), v.begin() + count * static_cast<int64_t>(dv));
      for (int64_t t = 0; t < count; t++) all.positions.push_back(run.first_position + first + t);
    }
  }
  return all;
}

// Internal where a backend's f32 logits cannot stand for the row's.
absl::Status AttendRow(const AttendArgs& args, const Tokens& tokens, const float* q, int dk, int dv,
                       int64_t position, const float* sink, float* out, float* lse) {
  std::vector<double> logits(tokens.positions.size(), -INFINITY);
  double maximum = sink == nullptr ? -INFINITY : static_cast<double>(*sink);
  for (size_t t = 0; t < logits.size(); t++) {
    if (args.causal && tokens.positions[t] > position) continue;
    if (args.window > 0 && tokens.positions[t] <= position - args.window) continue;
    double dot = 0;
    for (int d = 0; d < dk; d++)
      dot += static_cast<double>(q[d]) * tokens.k[t * static_cast<size_t>(dk) + static_cast<size_t>(d)];
    logits[t] = dot * static_cast<double>(args.scale);
    const double cap = static_cast<double>(args.softcap);
    if (cap > 0) logits[t] = cap * std::tanh(logits[t] / cap);
    maximum = std::max(maximum, logits[t]);
  }
  std::fill_n(out, dv, 0.0f);
  *lse = -INFINITY;
  if (maximum == -INFINITY) return absl::OkStatus();
  if (std::fabs(maximum) > static_cast<double>(kMaxF32))
    return absl::InternalError(absl::StrCat("a logit of ", maximum, " does not fit f32"));
  double sum = sink == nullptr ? 0.0 : std::exp(static_cast<double>(*sink) - maximum);
  std::vector<double> total(static_cast<size_t>(dv), 0.0);
  for (size_t t = 0; t < logits.size(); t++) {
    if (logits[t] == -INFINITY) continue;
    const double weight = std::exp(logits[t] - maximum);
    sum += weight;
    for (size_t d = 0; d < total.size(); d++) total[d] += weight * tokens.v[t * total.size() + d];
  }
  for (size_t d = 0; d < total.size(); d++) out[d] = static_cast<float>(total[d] / sum);
  *lse = static_cast<float>(maximum + std::log(sum));
  return absl::OkStatus();
}

}  // namespace

absl::Status ReferenceAttend(const AttendArgs& args) {
  for (const AttendItem& item : args.items) {
    if (item.runs.empty()) return absl::InvalidArgumentError("the reference needs a run in every item");
    const GroupShape& shape = item.runs.front().layout->shape();
    const int group = args.heads / shape.kv_heads;
    for (int kv_head = 0; kv_head < shape.kv_heads; kv_head++) {
      const Tokens tokens = DecodeRuns(item, args.layer, kv_head);
      for (int query = 0; query < item.queries; query++)
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
          const size_t row =
              static_cast<size_t>(query) * static_cast<size_t>(args.heads) + static_cast<size_t>(head);
          const absl::Status status =
              AttendRow(args, tokens, item.q + row * static_cast<size_t>(shape.head_dim_k), shape.head_dim_k,
                        shape.head_dim_v, item.first_query_position + query,
                        args.sinks == nullptr ? nullptr : args.sinks + head,
                        item.out + row * static_cast<size_t>(shape.head_dim_v), item.lse + row);
          if (!status.ok())
            return Annotate(
                status, absl::StrCat("item ", &item - args.items.data(), ", query ", query, ", head ", head));
        }
    }
  }
  return absl::OkStatus();
}

}  // namespace kvtide
