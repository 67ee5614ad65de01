// The GPU of this machine as the planner sees it, asked through NVML, which is opened at run time: the
// command needs no CUDA to build or to start.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "planner/device.h"

namespace kvtide::cli {

// `changes` is empty or ",key=value,...", as in --device auto,count=2. NotFound when there is no NVIDIA
// driver.
absl::StatusOr<planner::DeviceBudget> DetectDevice(const std::string& changes);

// MemAvailable of this machine; 0 when unknown.
int64_t AvailableHostBytes();

}  // namespace kvtide::cli
