#include "planner/plan/speed.h"

#include <algorithm>
#include <cmath>

namespace kvtide::planner {
namespace {

// Fitted to published decode speeds (llama.cpp, one sequence; tests/planner/speed_test.cc holds the points):
// gemma-4-26B-A4B on an RTX 3090, 189.6 tok/s at depth 0 and 152.5 at 32768, gives eta 0.80 and 2.4-2.5 ms of
// fixed cost over 30 layers; dense models fit eta 0.80 with 20 us per layer.
constexpr double kEta = 0.80;
constexpr double kFixedMsPerLayerMoe = 0.080;
constexpr double kFixedMsPerLayerDense = 0.020;
constexpr double kEtaPcie = 0.78;  // 25 of 32 GB/s
constexpr double kEtaHost = 0.80;
constexpr double kDefaultHostGbS = 80;  // two channels of DDR5; an assumption that the plan states
// The worst points lie 27 % below and 5 % above the prediction.
constexpr double kBandLow = 0.72;
constexpr double kBandHigh = 1.15;

double Milliseconds(int64_t bytes, double gb_s) {
  return gb_s > 0 ? static_cast<double>(bytes) / (gb_s * 1e6) : 0;
}

}  // namespace

int64_t ActiveWeightBytes(const ModelGeometry& model, int64_t weight_bytes, int batch) {
  if (model.params_active <= 0 || model.params_total <= model.params_active) return weight_bytes;
  const double total = static_cast<double>(model.params_total),
               active = static_cast<double>(model.params_active);
  double touched = active / total;
  if (batch > 1 && model.n_experts > 0 && model.n_experts_used > 0) {
    // active = shared + used/all * experts; total = shared + experts.
    const double used = static_cast<double>(model.n_experts_used) / model.n_experts;
    const double experts = std::min(total, (total - active) / (1 - used));
    const double shared = total - experts;
    touched = (shared + experts * (1 - std::pow(1 - used, batch))) / total;
  } else if (batch > 1) {
    touched = std::min(1.0, touched * batch);
  }
  return static_cast<int64_t>(static_cast<double>(weight_bytes) * touched);
}

Speed PredictSpeed(const ModelGeometry& model, const DeviceBudget& device, const StepTraffic& traffic,
                   int batch) {
  Speed speed;
  if (device.bandwidth_gb_s <= 0 || traffic.weight_bytes + traffic.host_weight_bytes <= 0) return speed;
  if (traffic.pcie_bytes > 0 && device.pcie_gb_s <= 0) return speed;
  const bool moe = model.params_active > 0 && model.params_active < model.params_total;
  const double layers = static_cast<double>(model.layers.size());
  const double host = device.host_bandwidth_gb_s > 0 ? device.host_bandwidth_gb_s : kDefaultHostGbS;
  double ms = layers * (moe ? kFixedMsPerLayerMoe : kFixedMsPerLayerDense);
  ms += Milliseconds(traffic.weight_bytes + traffic.kv_bytes + 2 * traffic.scratch_bytes,
                     kEta * device.bandwidth_gb_s);
  ms += Milliseconds(traffic.host_attend_bytes + traffic.host_weight_bytes, kEtaHost * host);
  ms += Milliseconds(traffic.pcie_bytes, kEtaPcie * device.pcie_gb_s);
  speed.known = true;
  speed.step_ms = ms;
  speed.tokens_per_s = batch * 1000.0 / ms;
  speed.tokens_per_s_low = speed.tokens_per_s * kBandLow;
  speed.tokens_per_s_high = speed.tokens_per_s * kBandHigh;
  return speed;
}

}  // namespace kvtide::planner
