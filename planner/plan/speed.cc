#include "planner/plan/speed.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

namespace kvtide::planner {
namespace {

constexpr double kEtaPcie = 0.78;         // 25 of 32 GB/s
constexpr double kEtaHost = 0.80;         // attention over a cache in host memory
constexpr double kEtaHostWeights = 0.55;  // layers or experts on the CPU (llama.cpp --n-cpu-moe, llmfit #755)
constexpr double kHandOverMs = 0.1;       // to the CPU and back, per layer
constexpr double kHostLow = 0.7,
                 kHostHigh = 1.2;        // CPUs differ more than cards: the bars are this much wider
constexpr double kDefaultHostGbS = 80;   // two channels of DDR5; an assumption that the plan states
constexpr double kPerSequenceMs = 0.01;  // sampling and scheduling in servers
constexpr int kGpusOfOneHost = 8;
constexpr double kNetworkUs = 150;  // one exchange between hosts

struct Bars {
  double low, high;
  int points;
};

// One engine family on one class of cards.
struct Fit {
  bool server;  // vLLM, SGLang, kvtided; otherwise llama.cpp
  CardClass card;
  double eta_weights, eta_kv;  // of the bandwidth
  double dense_us, moe_us;     // fixed per layer
  double flops_per_byte;       // arithmetic of a batch, per byte/s of bandwidth
  double exchange_us, hop_ms;  // between GPUs: tensor parallel, twice a layer; layers split, once a GPU
  Bars dense, moe;
};

// Fitted by hand on the points of tests/golden/planner/speeds.csv: on each class first the slope between a
// small and a large file of one model, then the fixed part. The bars are the worst points and a little.
constexpr Fit kFits[] = {
    {false, CardClass::kGddr, .92, .80, 55, 80, 30, 45, .2, {.77, 1.27, 52}, {.68, 1.25, 8}},
    {false, CardClass::kHbm, .58, .50, 80, 150, 30, 12, .5, {.75, 1.30, 19}, {.68, 1.40, 1}},
    {false, CardClass::kInstinct, .50, .45, 90, 170, 30, 15, .5, {.50, 1.60, 0}, {.50, 1.60, 0}},
    {false, CardClass::kRadeon, .78, .65, 50, 90, 20, 60, .3, {.78, 1.25, 6}, {.75, 1.25, 2}},
    {false, CardClass::kApple, .76, .50, 80, 190, 12, 60, .5, {.58, 1.30, 14}, {.68, 1.38, 4}},
    {false, CardClass::kUnified, .86, .66, 55, 110, 70, 60, .5, {.80, 1.18, 15}, {.80, 1.28, 21}},
    {false, CardClass::kCpu, .72, .60, 20, 40, 10, 60, .5, {.70, 1.25, 3}, {.55, 1.50, 0}},
    {true, CardClass::kGddr, .88, .80, 55, 110, 80, 45, .2, {.62, 1.27, 2}, {.60, 1.40, 0}},
    {true, CardClass::kHbm, .90, .90, 45, 140, 120, 12, .5, {.68, 1.15, 5}, {.47, 1.30, 7}},
    {true, CardClass::kInstinct, .75, .80, 70, 220, 60, 15, .5, {.60, 1.40, 0}, {.65, 1.30, 2}},
    {true, CardClass::kRadeon, .70, .60, 80, 150, 40, 60, .3, {.50, 1.50, 0}, {.50, 1.50, 0}},
    {true, CardClass::kApple, .76, .50, 80, 190, 12, 60, .5, {.50, 1.50, 0}, {.50, 1.50, 0}},
    {true, CardClass::kUnified, .86, .70, 55, 120, 100, 60, .5, {.65, 1.30, 0}, {.75, 1.25, 1}},
    {true, CardClass::kCpu, .60, .50, 60, 120, 10, 60, .5, {.50, 1.50, 0}, {.50, 1.50, 0}},
};
// A batch adds arithmetic and, in a mixture, experts: what few points there are lie this much further out.
constexpr double kDenseBatchLow = 0.85, kDenseBatchHigh = 1.15;
constexpr double kMoeBatchLow = 0.80, kMoeBatchHigh = 1.35;

const Fit& FitOf(bool server, CardClass card) {
  for (const Fit& fit : kFits) {
    if (fit.server == server && fit.card == card) return fit;
  }
  return kFits[0];
}

double Milliseconds(int64_t bytes, double gb_s) {
  return gb_s > 0 ? static_cast<double>(bytes) / (gb_s * 1e6) : 0;
}

bool IsMixture(const ModelGeometry& model) {
  return model.params_active > 0 && model.params_active < model.params_total;
}

// The arithmetic of a step, on each of `devices` GPUs that share it.
double ComputeMs(const ModelGeometry& model, double bandwidth_gb_s, const Fit& fit, int batch, int devices) {
  const int64_t params = IsMixture(model) ? model.params_active : model.params_total;
  return 2.0 * static_cast<double>(params) * batch / devices / (fit.flops_per_byte * bandwidth_gb_s * 1e6);
}

}  // namespace

CardClass ClassOfCard(const DeviceBudget& device) {
  const std::string name = absl::AsciiStrToUpper(device.name);
  const auto has = [&](std::initializer_list<const char*> words) {
    return std::any_of(words.begin(), words.end(),
                       [&](const char* word) { return absl::StrContains(name, word); });
  };
  if (has({"APPLE", "M1 ", "M2 ", "M3 ", "M4 ", "M5 "})) return CardClass::kApple;
  if (has({"CPU", "EPYC", "XEON", "THREADRIPPER", "CORE I", "AMPEREONE"})) return CardClass::kCpu;
  if (has({"GB10", "SPARK", "THOR", "ORIN", "JETSON", "STRIX", "RYZEN AI", "8060S"}))
    return CardClass::kUnified;
  if (has({"MI50", "MI100", "MI210", "MI250", "MI300", "MI325", "MI350", "MI355"}))
    return CardClass::kInstinct;
  if (has({"RX ", "RADEON", "W7900", "W7800", "R9700", "ARC "})) return CardClass::kRadeon;
  if (has({"RTX", "GTX"})) return CardClass::kGddr;
  if (has({"A100", "A800", "A30", "H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "V100"}))
    return CardClass::kHbm;
  return device.bandwidth_gb_s > 1300 ? CardClass::kHbm : CardClass::kGddr;
}

const char* CardClassName(CardClass card) {
  switch (card) {
    case CardClass::kGddr:
      return "cards with GDDR memory";
    case CardClass::kHbm:
      return "NVIDIA cards with HBM";
    case CardClass::kInstinct:
      return "AMD Instinct cards";
    case CardClass::kRadeon:
      return "AMD Radeon cards";
    case CardClass::kApple:
      return "Apple GPUs";
    case CardClass::kUnified:
      return "GPUs on LPDDR memory";
    case CardClass::kCpu:
      return "CPUs";
  }
  return "unknown";
}

int64_t ActiveWeightBytes(const ModelGeometry& model, int64_t weight_bytes, int batch) {
  if (!IsMixture(model)) return weight_bytes;
  const double total = static_cast<double>(model.params_total),
               active = static_cast<double>(model.params_active);
  double touched = active / total;
  if (batch > 1 && model.n_experts > model.n_experts_used && model.n_experts_used > 0) {
    // active = shared + used/all * experts; total = shared + experts.
    const double used = static_cast<double>(model.n_experts_used) / model.n_experts;
    const double experts = std::min(total, (total - active) / (1 - used));
    const double shared = total - experts;
    touched = (shared + experts * (1 - std::pow(1 - used, std::pow(batch, 0.75)))) / total;
  } else if (batch > 1) {
    touched = std::min(1.0, touched * batch);
  }
  return static_cast<int64_t>(static_cast<double>(weight_bytes) * touched);
}

Speed PredictSpeed(const ModelGeometry& model, const DeviceBudget& device, const EngineOptions& engine,
                   const StepTraffic& traffic, int batch) {
  Speed speed;
  if (device.bandwidth_gb_s <= 0 || traffic.weight_bytes + traffic.host_weight_bytes <= 0) return speed;
  if (traffic.pcie_bytes > 0 && device.pcie_gb_s <= 0) return speed;
  const bool server = engine.engine != Engine::kLlamaCpp, moe = IsMixture(model);
  const Fit& fit = FitOf(server, ClassOfCard(device));
  const double layers = static_cast<double>(model.layers.size()), bandwidth = device.bandwidth_gb_s;
  const double host = device.host_bandwidth_gb_s > 0 ? device.host_bandwidth_gb_s : kDefaultHostGbS;
  double ms = layers * (moe ? fit.moe_us : fit.dense_us) / 1000;
  // A server's kernels hide arithmetic behind the weights; the small-batch kernels of llama.cpp do not.
  const double weights = Milliseconds(traffic.weight_bytes, fit.eta_weights * bandwidth);
  const double compute = ComputeMs(model, bandwidth, fit, server ? batch : batch - 1, traffic.tensor_devices);
  ms += server ? std::max(weights, compute) + kPerSequenceMs * batch : weights + compute;
  ms += Milliseconds(traffic.kv_bytes, fit.eta_kv * bandwidth);
  ms += 2 * Milliseconds(traffic.scratch_bytes, fit.eta_kv * bandwidth);
  ms += Milliseconds(traffic.host_attend_bytes, kEtaHost * host);
  ms += Milliseconds(traffic.host_weight_bytes, kEtaHostWeights * host) + kHandOverMs * traffic.host_layers;
  ms += Milliseconds(traffic.pcie_bytes, kEtaPcie * device.pcie_gb_s);
  ms += (traffic.serial_devices - 1) * fit.hop_ms;
  if (traffic.tensor_devices > 1) {
    ms += 2 * layers * (traffic.tensor_devices > kGpusOfOneHost ? kNetworkUs : fit.exchange_us) / 1000;
  }
  const Bars& bars = moe ? fit.moe : fit.dense;
  speed.known = true;
  speed.step_ms = ms;
  speed.tokens_per_s = batch * 1000.0 / ms;
  speed.per_sequence = 1000.0 / ms;
  speed.tokens_per_s_low = speed.tokens_per_s * bars.low *
                           (batch == 1 ? 1
                            : moe      ? kMoeBatchLow
                                       : kDenseBatchLow);
  speed.tokens_per_s_high = speed.tokens_per_s * bars.high *
                            (batch == 1 ? 1
                             : moe      ? kMoeBatchHigh
                                        : kDenseBatchHigh);
  if (traffic.host_attend_bytes + traffic.host_weight_bytes > 0) {
    speed.tokens_per_s_low *= kHostLow;
    speed.tokens_per_s_high *= kHostHigh;
  }
  speed.points = bars.points;
  return speed;
}

}  // namespace kvtide::planner
