// The GPUs of this machine as the planner sees them, asked through NVML, which is opened at run time: the
// command needs no CUDA to build or to start.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/device.h"

namespace kvtide::cli {

// All of them, in the driver's order. NotFound when there is no NVIDIA driver or no GPU.
absl::StatusOr<std::vector<planner::DeviceBudget>> DetectDevices();

// True for "auto", "auto:1" and these with ",key=value,..." behind, as in auto,count=2.
bool IsAutomatic(const std::string& device);

// The GPU that such a text means: that of the index, else the one with the least free memory, so that what
// fits there fits on every one.
absl::StatusOr<planner::DeviceBudget> DetectDevice(const std::string& device);

// MemAvailable of this machine; 0 when unknown.
int64_t AvailableHostBytes();

}  // namespace kvtide::cli
