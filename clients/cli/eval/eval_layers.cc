#include "clients/cli/eval/eval_layers.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "clients/engine/capture_kv_store.h"
#include "clients/engine/local_kv_store.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/page_codec.h"

namespace kvtide::cli {
namespace {

constexpr int kLateQueries = 64;

// One head's rows out of [tokens][heads][d].
std::vector<float> HeadRows(const std::vector<float>& x, int heads, int head, int d) {
  const size_t tokens = x.size() / (static_cast<size_t>(heads) * d);
  std::vector<float> rows(tokens * d);
  for (size_t t = 0; t < tokens; ++t) std::copy_n(&x[(t * heads + head) * d], d, &rows[t * d]);
  return rows;
}

std::vector<float> CodeAndDecode(const std::vector<float>& rows, int d, CacheType type, Side side,
                                 const HeadProfile* profile) {
  const HalfLayout layout = MakeHalfLayout(type, d);
  // Planes are read in 16-byte words.
  std::vector<std::max_align_t> half((layout.bytes + sizeof(std::max_align_t) - 1) /
                                     sizeof(std::max_align_t));
  auto* bytes = reinterpret_cast<std::byte*>(half.data());
  const int tokens = static_cast<int>(rows.size() / d);
  std::vector<float> page(static_cast<size_t>(kBlockTokens) * d), decoded(rows.size());
  for (int t = 0; t < tokens; t += kBlockTokens) {
    const int n = std::min<int>(kBlockTokens, tokens - t);
    EncodeHalf(type, side, layout, profile, t, rows.data() + static_cast<size_t>(t) * d, n, bytes);
    DecodeHalf(type, side, layout, profile, t, bytes, page.data());
    std::copy_n(page.begin(), static_cast<size_t>(n) * d,
                decoded.begin() + static_cast<std::ptrdiff_t>(t) * d);
  }
  return decoded;
}

// Partial sums that compilers put into vector lanes.
float Dot(const float* a, const float* b, int n) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  double sum = 0;
  for (const float s : sums) sum += s;
  return static_cast<float>(sum);
}

float Cap(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

struct Ratio {
  double error = 0, size = 0;
  void Add(double e, double exact) {
    error += e * e;
    size += exact * exact;
  }
  void Add(const std::vector<float>& exact, const std::vector<float>& coded) {
    for (size_t i = 0; i < exact.size(); ++i) Add(static_cast<double>(coded[i]) - exact[i], exact[i]);
  }
  void Merge(const Ratio& other) {
    error += other.error;
    size += other.size;
  }
  double Root() const { return size > 0 ? std::sqrt(error / size) : 0; }
};

}  // namespace

struct LayerProbe::Sums {
  Ratio key, value, logit, output;
  double cosine = 0, weight_kld = 0;
  int64_t same_top = 0, queries = 0;

  void Merge(const Sums& other) {
    key.Merge(other.key);
    value.Merge(other.value);
    logit.Merge(other.logit);
    output.Merge(other.output);
    cosine += other.cosine;
    weight_kld += other.weight_kld;
    same_top += other.same_top;
    queries += other.queries;
  }
};

LayerError MeanError(std::span<const LayerError> layers) {
  LayerError mean{0, 0, 0, 0, 0, 0, 0};
  const double n = static_cast<double>(layers.size());
  for (const LayerError& layer : layers) {
    mean.key += layer.key / n;
    mean.value += layer.value / n;
    mean.logit += layer.logit / n;
    mean.output += layer.output / n;
    mean.output_cosine += layer.output_cosine / n;
    mean.weight_kld += layer.weight_kld / n;
    mean.weight_top1 += layer.weight_top1 / n;
  }
  return mean;
}

LayerShape ShapeOf(const engine::KvGeometry& g, int layer) {
  return {g.query_heads, g.kv_heads, g.head_dim, g.head_dim, g.scale(), g.window(layer), g.softcap};
}

absl::StatusOr<std::vector<LayerVectors>> CaptureVectors(const engine::LlamaModel& model, ThreadPool& pool,
                                                         std::span<const int32_t> tokens) {
  engine::LocalKvStore exact(model.kv_geometry(), DataType::kF32, pool);
  std::vector<LayerVectors> layers(model.kv_geometry().layers);
  const engine::KvGeometry g = model.kv_geometry();
  engine::CaptureKvStore capture(
      exact, [&](int layer, int64_t, int n, const float* q, const float* k, const float* v) {
        layers[layer].q.assign(q, q + n * g.query_width());
        layers[layer].k.assign(k, k + n * g.kv_width());
        layers[layer].v.assign(v, v + n * g.kv_width());
      });
  KVTIDE_ASSIGN_OR_RETURN(const engine::SequenceId sequence, capture.CreateSequence());
  std::vector<float> hidden;
  KVTIDE_RETURN_IF_ERROR(model.Forward(capture, sequence, 0, tokens, &hidden));
  return layers;
}

LayerProbe::LayerProbe(const LayerShape& shape, const LayerVectors& vectors, ThreadPool& pool)
    : shape_(shape),
      tokens_(static_cast<int>(vectors.k.size() / (static_cast<size_t>(shape.kv_heads) * shape.head_dim_k))),
      sinks_(vectors.sinks),
      heads_(static_cast<size_t>(shape.kv_heads)) {
  const int dk = shape_.head_dim_k, group = shape_.query_heads / shape_.kv_heads;
  const int queries = static_cast<int>(vectors.q.size() / (static_cast<size_t>(shape_.query_heads) * dk));
  KVTIDE_CHECK(tokens_ > 0 && queries > 0 && queries <= tokens_, "tokens ", tokens_, ", queries ", queries);
  if (sinks_.empty()) sinks_.assign(static_cast<size_t>(shape_.query_heads), -INFINITY);
  pool.ParallelFor(shape_.kv_heads, [&](int64_t h) {
    Head& head = heads_[static_cast<size_t>(h)];
    head.k = HeadRows(vectors.k, shape_.kv_heads, static_cast<int>(h), dk);
    head.v = HeadRows(vectors.v, shape_.kv_heads, static_cast<int>(h), shape_.head_dim_v);
    head.exact.resize(static_cast<size_t>(group));
    for (int i = 0; i < group; ++i) {
      const int query_head = static_cast<int>(h) * group + i;
      head.q.push_back(HeadRows(vectors.q, shape_.query_heads, query_head, dk));
      for (int n = std::max(0, queries - kLateQueries); n < queries; ++n) {
        head.exact[static_cast<size_t>(i)].push_back(
            Attend(head, head.q.back().data() + static_cast<size_t>(n) * dk, tokens_ - queries + n,
                   sinks_[static_cast<size_t>(query_head)]));
      }
    }
  });
}

LayerProbe::Query LayerProbe::Attend(const Head& head, const float* q, int position, float sink) const {
  const int dk = shape_.head_dim_k, dv = shape_.head_dim_v;
  Query query;
  query.q = q;
  query.position = position;
  if (shape_.sliding_window > 0)
    query.first = static_cast<int>(std::max<int64_t>(0, position + 1 - shape_.sliding_window));
  float maximum = sink;
  for (int t = query.first; t <= position; ++t) {
    query.raw.push_back(shape_.scale * Dot(q, head.k.data() + static_cast<size_t>(t) * dk, dk));
    query.logits.push_back(Cap(query.raw.back(), shape_.softcap));
    maximum = std::max(maximum, query.logits.back());
  }
  query.top =
      static_cast<int>(std::max_element(query.logits.begin(), query.logits.end()) - query.logits.begin());
  double sum = std::exp(static_cast<double>(sink) - maximum);
  for (const float logit : query.logits) sum += std::exp(static_cast<double>(logit) - maximum);
  query.lse = maximum + std::log(sum);
  query.output.assign(static_cast<size_t>(dv), 0.0f);
  for (int t = query.first; t <= position; ++t) {
    const float weight = static_cast<float>(std::exp(query.logits[t - query.first] - query.lse));
    const float* v = head.v.data() + static_cast<size_t>(t) * dv;
    for (int c = 0; c < dv; ++c) query.output[c] += weight * v[c];
  }
  return query;
}

void LayerProbe::Compare(const Query& query, const std::vector<float>& key_error,
                         const std::vector<float>& mixed_v, const std::vector<char>& exact_token, float sink,
                         Sums* sums) const {
  const int dk = shape_.head_dim_k, dv = shape_.head_dim_v;
  const int seen = query.position - query.first + 1;
  std::vector<float> error(static_cast<size_t>(seen)), mixed(static_cast<size_t>(seen));
  double exact_mean = 0, error_mean = 0;
  float maximum = sink;
  for (int i = 0; i < seen; ++i) {
    const size_t t = static_cast<size_t>(query.first + i);
    const float raw_error = shape_.scale * Dot(query.q, key_error.data() + t * dk, dk);
    error[i] =
        shape_.softcap > 0 ? Cap(query.raw[i] + raw_error, shape_.softcap) - query.logits[i] : raw_error;
    mixed[i] = query.logits[i] + (exact_token[t] ? 0.0f : error[i]);
    maximum = std::max(maximum, mixed[i]);
    exact_mean += query.logits[i] / static_cast<double>(seen);
    error_mean += error[i] / static_cast<double>(seen);
  }
  double sum = std::exp(static_cast<double>(sink) - maximum);
  for (int i = 0; i < seen; ++i) {
    sums->logit.Add(error[i] - error_mean, query.logits[i] - exact_mean);
    sum += std::exp(static_cast<double>(mixed[i]) - maximum);
  }
  const double lse = maximum + std::log(sum);
  // The sink's share is a weight like the others.
  double kld = std::isinf(sink) ? 0 : std::exp(sink - query.lse) * (lse - query.lse);
  std::vector<float> output(static_cast<size_t>(dv), 0.0f);
  for (int i = 0; i < seen; ++i) {
    const double exact_log = query.logits[i] - query.lse, mixed_log = mixed[i] - lse;
    kld += std::exp(exact_log) * (exact_log - mixed_log);
    const float weight = static_cast<float>(std::exp(mixed_log));
    const float* v = mixed_v.data() + static_cast<size_t>(query.first + i) * dv;
    for (int c = 0; c < dv; ++c) output[c] += weight * v[c];
  }
  double dot = 0, exact_square = 0, output_square = 0;
  for (int c = 0; c < dv; ++c) {
    sums->output.Add(static_cast<double>(output[c]) - query.output[c], query.output[c]);
    dot += static_cast<double>(output[c]) * query.output[c];
    exact_square += static_cast<double>(query.output[c]) * query.output[c];
    output_square += static_cast<double>(output[c]) * output[c];
  }
  const double sizes = std::sqrt(exact_square) * std::sqrt(output_square);
  sums->cosine += sizes > 0 ? dot / sizes : exact_square == output_square ? 1 : 0;
  sums->weight_kld += std::max(0.0, kld);
  sums->same_top += std::max_element(mixed.begin(), mixed.end()) - mixed.begin() == query.top;
  ++sums->queries;
}

LayerError LayerProbe::Measure(CachePair pair, const ProfileOptions& key_profile, const WindowPolicy& policy,
                               ThreadPool& pool, std::span<const HeadProfile> calibrated) const {
  const int dk = shape_.head_dim_k, dv = shape_.head_dim_v, group = shape_.query_heads / shape_.kv_heads;
  std::vector<char> exact_token(static_cast<size_t>(tokens_));
  for (int t = 0; t < tokens_; ++t)
    exact_token[static_cast<size_t>(t)] = policy.IsExact(t / kBlockTokens, tokens_ / kBlockTokens);
  std::vector<Sums> sums(heads_.size());
  pool.ParallelFor(shape_.kv_heads, [&](int64_t h) {
    const Head& head = heads_[static_cast<size_t>(h)];
    Sums& sum = sums[static_cast<size_t>(h)];
    const int profile_tokens = std::min<int>(kBlockTokens, tokens_);
    const HeadProfile profile = calibrated.empty() ? MakeKeyProfile(head.k.data(), profile_tokens,
                                                                    static_cast<size_t>(dk), dk, key_profile)
                                                   : calibrated[static_cast<size_t>(h)];
    std::vector<float> k = CodeAndDecode(head.k, dk, pair.k, Side::kKey, &profile);
    std::vector<float> v = CodeAndDecode(head.v, dv, pair.v, Side::kValue, nullptr);
    sum.key.Add(head.k, k);
    sum.value.Add(head.v, v);
    for (size_t i = 0; i < k.size(); ++i) k[i] -= head.k[i];
    for (size_t t = 0; t < exact_token.size(); ++t) {
      if (exact_token[t])
        std::copy_n(head.v.begin() + static_cast<std::ptrdiff_t>(t) * dv, dv,
                    v.begin() + static_cast<std::ptrdiff_t>(t) * dv);
    }
    for (int i = 0; i < group; ++i) {
      const float sink = sinks_[static_cast<size_t>(h) * group + i];
      for (const Query& query : head.exact[static_cast<size_t>(i)])
        Compare(query, k, v, exact_token, sink, &sum);
    }
  });
  Sums total;
  for (const Sums& sum : sums) total.Merge(sum);
  const double queries = static_cast<double>(total.queries);
  return {total.key.Root(),
          total.value.Root(),
          total.logit.Root(),
          total.output.Root(),
          total.cosine / queries,
          total.weight_kld / queries,
          static_cast<double>(total.same_top) / queries};
}

}  // namespace kvtide::cli
