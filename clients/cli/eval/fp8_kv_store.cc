#include "clients/cli/eval/fp8_kv_store.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/e4m3.h"

namespace kvtide::cli {
namespace {

constexpr std::pair<Fp8Side, const char*> kNames[] = {
    {Fp8Side::kExact, "f16"}, {Fp8Side::kUnity, "fp8"}, {Fp8Side::kCalibrated, "fp8_calibrated"}};

std::optional<Fp8Side> SideOf(const std::string& name) {
  for (const auto& [side, known] : kNames)
    if (name == known) return side;
  return std::nullopt;
}

const char* NameOf(Fp8Side side) { return kNames[static_cast<size_t>(side)].second; }

float Largest(const std::vector<float>& values) {
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

class Fp8KvStore : public engine::KvStore {
 public:
  Fp8KvStore(const engine::KvGeometry& geometry, const Fp8Pair& pair, const std::vector<Fp8Scales>& scales,
             ThreadPool& pool)
      : pair_(pair), scales_(scales), store_(geometry, DataType::kF32, pool) {}

  const engine::KvGeometry& geometry() const override { return store_.geometry(); }
  absl::StatusOr<engine::SequenceId> CreateSequence() override { return store_.CreateSequence(); }
  absl::StatusOr<engine::SequenceId> Fork(engine::SequenceId sequence) override {
    return store_.Fork(sequence);
  }
  absl::Status Truncate(engine::SequenceId sequence, int64_t length) override {
    return store_.Truncate(sequence, length);
  }
  absl::Status Close(engine::SequenceId sequence) override { return store_.Close(sequence); }

  absl::Status AppendAttend(engine::SequenceId sequence, int layer, int64_t start, int n_tokens,
                            const float* q, const float* k, const float* v, float* out) override {
    const Fp8Scales scales = layer >= 0 && static_cast<size_t>(layer) < scales_.size()
                                 ? scales_[static_cast<size_t>(layer)]
                                 : Fp8Scales{};
    const size_t values = static_cast<size_t>(std::max(0, n_tokens)) * geometry().kv_width();
    Round(k, values, pair_.k, scales.k, &keys_);
    Round(v, values, pair_.v, scales.v, &values_);
    return store_.AppendAttend(sequence, layer, start, n_tokens, q, keys_.data(), values_.data(), out);
  }

 private:
  static void Round(const float* from, size_t count, Fp8Side side, float scale, std::vector<float>* to) {
    to->resize(count);
    if (side == Fp8Side::kUnity) scale = 1;
    for (size_t i = 0; i < count; ++i) {
      (*to)[i] = side == Fp8Side::kExact ? F16ToF32(F32ToF16(from[i])) : RoundToE4m3(from[i], scale);
    }
  }

  const Fp8Pair pair_;
  const std::vector<Fp8Scales> scales_;
  engine::LocalKvStore store_;
  std::vector<float> keys_, values_;  // of one call
};

}  // namespace

std::string Fp8Pair::Name() const { return absl::StrCat(NameOf(k), "/", NameOf(v)); }

double Fp8Pair::bits() const {
  const auto bits = [](Fp8Side side) { return side == Fp8Side::kExact ? 16.0 : 8.0; };
  return (bits(k) + bits(v)) / 2;
}

absl::StatusOr<std::optional<Fp8Pair>> ParseFp8Pair(const std::string& text) {
  const size_t slash = text.find('/');
  if (slash == std::string::npos) return std::optional<Fp8Pair>();
  const std::optional<Fp8Side> k = SideOf(text.substr(0, slash)), v = SideOf(text.substr(slash + 1));
  const auto fp8 = [](const std::optional<Fp8Side>& side) {
    return side.has_value() && *side != Fp8Side::kExact;
  };
  if (!fp8(k) && !fp8(v)) return std::optional<Fp8Pair>();
  if (!k.has_value() || !v.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "pair '", text, "': fp8 is measured beside fp8, fp8_calibrated or f16, it is no type of the pools"));
  }
  return std::optional<Fp8Pair>({*k, *v});
}

std::vector<Fp8Scales> CalibratedScales(const std::vector<LayerVectors>& layers) {
  std::vector<Fp8Scales> scales;
  const auto scale = [](const std::vector<float>& values) {
    const float largest = Largest(values);
    return largest > 0 ? largest / kLargestE4m3 : 1.0f;
  };
  scales.reserve(layers.size());
  for (const LayerVectors& layer : layers) scales.push_back({scale(layer.k), scale(layer.v)});
  return scales;
}

std::unique_ptr<engine::KvStore> MakeFp8KvStore(const engine::KvGeometry& geometry, const Fp8Pair& pair,
                                                const std::vector<Fp8Scales>& scales, ThreadPool& pool) {
  return std::make_unique<Fp8KvStore>(geometry, pair, scales, pool);
}

}  // namespace kvtide::cli
