// Decode speed by a roofline: t = t0 + bytes / (eta x bandwidth) per step, plus what crosses PCIe or is read
// by the CPU. The constants are fitted to published measurements (speed.cc lists them); the band around a
// prediction is as wide as the worst of them. Prefill is not predicted.
#pragma once

#include <cstdint>

#include "planner/model/geometry.h"
#include "planner/plan/device.h"

namespace kvtide::planner {

struct Speed {
  bool known = false;           // false when the bandwidth or the weights are unknown
  double tokens_per_s = 0;      // all sequences together
  double tokens_per_s_low = 0;  // error band
  double tokens_per_s_high = 0;
  double step_ms = 0;
};

struct StepTraffic {
  int64_t weight_bytes = 0;       // read per step and device
  int64_t kv_bytes = 0;           // read per step and device
  int64_t scratch_bytes = 0;      // f16 copies: written once and read once per step
  int64_t host_attend_bytes = 0;  // KV that the CPU reads in place
  int64_t host_weight_bytes = 0;  // weights that the CPU reads
  int64_t pcie_bytes = 0;         // moved to the device every step
};

// Bytes of the weights that one step with `batch` sequences reads: all of a dense model; of a mixture the
// shared part and the experts that the batch touches.
int64_t ActiveWeightBytes(const ModelGeometry& model, int64_t weight_bytes, int batch);

Speed PredictSpeed(const ModelGeometry& model, const DeviceBudget& device, const StepTraffic& traffic,
                   int batch);

}  // namespace kvtide::planner
