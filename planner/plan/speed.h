// Decode speed by a roofline: a step costs a fixed time per layer, the bytes that it reads at the share of
// the bandwidth that kernels reach, and what several GPUs say to each other. Shares, fixed times and error
// bars are those of a kind of engine on a class of cards, fitted to published measurements
// (tests/golden/planner/speeds.csv); the bars hold all of them. Prefill is not predicted.
#pragma once

#include <cstdint>

#include "planner/engines/engine.h"
#include "planner/model/device.h"
#include "planner/model/geometry.h"

namespace kvtide::planner {

struct Speed {
  bool known = false;           // false when the bandwidth or the weights are unknown
  double tokens_per_s = 0;      // all sequences together
  double tokens_per_s_low = 0;  // error bars
  double tokens_per_s_high = 0;
  double per_sequence = 0;  // tokens_per_s / sequences
  double step_ms = 0;
  int points = 0;  // published measurements behind the bars; 0 = none of this kind, the bars are wide
};

// What a decode step reads on the GPU where it takes longest; where GPUs work one after another
// (serial_devices), what they read together.
struct StepTraffic {
  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;
  int64_t scratch_bytes = 0;      // f16 copies: written once and read once per step
  int64_t host_attend_bytes = 0;  // KV that the CPU reads in place
  int64_t host_weight_bytes = 0;  // weights that the CPU reads
  int64_t pcie_bytes = 0;         // moved to the device every step
  int host_layers = 0;            // layers that the GPU hands over to the CPU and back
  int serial_devices = 1;         // GPUs that hold layers one after another
  int tensor_devices = 1;         // GPUs that share every layer
};

// What a card does with its bandwidth, told by its name, without one by the bandwidth.
enum class CardClass { kGddr, kHbm, kInstinct, kRadeon, kApple, kUnified, kCpu };
CardClass ClassOfCard(const DeviceBudget& device);
const char* CardClassName(CardClass card);

// Bytes of the weights that one step with `batch` sequences reads: all of a dense model; of a mixture the
// shared part and the experts that the batch touches. Sequences of one batch share experts more often than
// chance: a batch of n touches as many as n^0.75 independent ones.
int64_t ActiveWeightBytes(const ModelGeometry& model, int64_t weight_bytes, int batch);

Speed PredictSpeed(const ModelGeometry& model, const DeviceBudget& device, const EngineOptions& engine,
                   const StepTraffic& traffic, int batch);

}  // namespace kvtide::planner
