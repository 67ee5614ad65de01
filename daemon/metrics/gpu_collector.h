// GPUs of the machine as NVIDIA's management library (NVML) tells: memory and utilisation, of all processes
// together. The library is looked for when the daemon runs (libnvidia-ml.so.1 comes with the driver); without
// it, or without a GPU, there are no families.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace kvtide::metrics {

class GpuCollector final : public prometheus::Collectable {
 public:
  explicit GpuCollector(const std::string& library = "libnvidia-ml.so.1");
  ~GpuCollector() override;
  std::vector<prometheus::MetricFamily> Collect() const override;
  // Memory of all GPUs that this process holds; nullopt where the driver does not tell, as in a PID namespace
  // of its own.
  std::optional<int64_t> BytesOfThisProcess() const;

 private:
  struct Nvml;
  std::unique_ptr<const Nvml> nvml_;  // null: none
};

}  // namespace kvtide::metrics
