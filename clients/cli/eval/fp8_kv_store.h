// Keys and values as vLLM and SGLang keep them with an fp8 cache: E4M3 with one scale for K and one for V of
// a layer, coded before anything attends over them. Rounded in this process; no daemon has such a type.
// Queries and attention weights stay exact, which the kernels of these engines do not promise.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_layers.h"
#include "clients/engine/local_kv_store.h"
#include "kernels/base/thread_pool.h"

namespace kvtide::cli {

// What one side is rounded to.
enum class Fp8Side {
  kExact,       // "f16"
  kUnity,       // "fp8": scale 1.0, what the engines take when a checkpoint has no scales
  kCalibrated,  // "fp8_calibrated": the largest value of a calibration over 448
};

struct Fp8Pair {
  Fp8Side k = Fp8Side::kExact;
  Fp8Side v = Fp8Side::kExact;
  std::string Name() const;
  // Bits per value of both sides together, scales not counted.
  double bits() const;
};

// nullopt for pairs of cache types of kvtide; INVALID_ARGUMENT when one side is fp8 and the other no partner
// for it.
absl::StatusOr<std::optional<Fp8Pair>> ParseFp8Pair(const std::string& text);

struct Fp8Scales {
  float k = 1, v = 1;
};
// Of each layer, from what it saw of a text.
std::vector<Fp8Scales> CalibratedScales(const std::vector<LayerVectors>& layers);

// `scales` is of each layer, or empty when neither side is calibrated. The pool is borrowed.
std::unique_ptr<engine::KvStore> MakeFp8KvStore(const engine::KvGeometry& geometry, const Fp8Pair& pair,
                                                const std::vector<Fp8Scales>& scales, ThreadPool& pool);

}  // namespace kvtide::cli
