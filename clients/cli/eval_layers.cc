#include "clients/cli/eval_layers.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "clients/engine/capture_kv_store.h"
#include "clients/engine/local_kv_store.h"
#include "kernels/base/status.h"
#include "kernels/format/page_codec.h"

namespace kvtide::cli {
namespace {

constexpr int kLateQueries = 64;

// One KV head's rows out of [tokens][heads][head_dim].
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
    EncodeHalf(type, side, layout, profile, rows.data() + static_cast<size_t>(t) * d, n, bytes);
    DecodeHalf(type, side, layout, profile, bytes, page.data());
    std::copy_n(page.begin(), static_cast<size_t>(n) * d,
                decoded.begin() + static_cast<std::ptrdiff_t>(t) * d);
  }
  return decoded;
}

struct Ratio {
  double error = 0, size = 0;
  void Add(const std::vector<float>& exact, const std::vector<float>& coded) {
    for (size_t i = 0; i < exact.size(); ++i) {
      const double e = static_cast<double>(coded[i]) - exact[i];
      error += e * e;
      size += static_cast<double>(exact[i]) * exact[i];
    }
  }
  double Root() const { return size > 0 ? std::sqrt(error / size) : 0; }
};

// Adds the logits of one query head's last queries.
void AddLogits(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& coded,
               int d, Ratio* ratio) {
  const int tokens = static_cast<int>(k.size() / d);
  std::vector<double> exact(tokens), error(tokens);
  for (int p = std::max(0, tokens - kLateQueries); p < tokens; ++p) {
    double exact_mean = 0, error_mean = 0;
    for (int t = 0; t <= p; ++t) {
      exact[t] = error[t] = 0;
      for (int c = 0; c < d; ++c) {
        const double x = q[static_cast<size_t>(p) * d + c], key = k[static_cast<size_t>(t) * d + c];
        exact[t] += x * key;
        error[t] += x * (coded[static_cast<size_t>(t) * d + c] - key);
      }
      exact_mean += exact[t] / (p + 1);
      error_mean += error[t] / (p + 1);
    }
    for (int t = 0; t <= p; ++t) {
      ratio->error += (error[t] - error_mean) * (error[t] - error_mean);
      ratio->size += (exact[t] - exact_mean) * (exact[t] - exact_mean);
    }
  }
}

}  // namespace

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

std::vector<LayerError> MeasureLayerErrors(const engine::KvGeometry& g, std::span<const LayerVectors> layers,
                                           CachePair pair, const ProfileOptions& key_profile,
                                           ThreadPool& pool) {
  std::vector<LayerError> errors(layers.size());
  pool.ParallelFor(static_cast<int64_t>(layers.size()), [&](int64_t l) {
    const LayerVectors& layer = layers[l];
    Ratio key, value, logit;
    for (int h = 0; h < g.kv_heads; ++h) {
      const std::vector<float> k = HeadRows(layer.k, g.kv_heads, h, g.head_dim);
      const std::vector<float> v = HeadRows(layer.v, g.kv_heads, h, g.head_dim);
      const int profile_tokens = static_cast<int>(std::min<size_t>(kBlockTokens, k.size() / g.head_dim));
      const HeadProfile profile =
          MakeKeyProfile(k.data(), profile_tokens, g.head_dim, g.head_dim, key_profile);
      const std::vector<float> coded = CodeAndDecode(k, g.head_dim, pair.k, Side::kKey, &profile);
      key.Add(k, coded);
      value.Add(v, CodeAndDecode(v, g.head_dim, pair.v, Side::kValue, nullptr));
      const int group = g.query_heads / g.kv_heads;
      for (int i = 0; i < group; ++i) {
        AddLogits(HeadRows(layer.q, g.query_heads, h * group + i, g.head_dim), k, coded, g.head_dim, &logit);
      }
    }
    errors[l] = {key.Root(), value.Root(), logit.Root()};
  });
  return errors;
}

}  // namespace kvtide::cli
