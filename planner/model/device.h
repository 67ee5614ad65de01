// The memory that a plan may use: one kind of GPU, how many of them, and the host behind it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::planner {

// Where a device's memory lies.
enum class DeviceMemory {
  kOwn,      // on the card
  kUnified,  // shared with the CPU (Apple, GB10, Jetson, Strix Halo): there is no host tier besides it
  kHost,     // no GPU: the CPU computes
};

struct DeviceBudget {
  std::string name;
  DeviceMemory memory = DeviceMemory::kOwn;
  std::string arch;                  // "sm_89", "gfx942", "apple", "xe2", "cpu"; empty = unknown
  int64_t vram_bytes = 0;            // per device
  int64_t driver_reserve_bytes = 0;  // nominal size minus what the driver reports
  bool driver_reserve_is_guess = false;
  std::string assumption;          // what a name was taken for, when several devices have it; empty = nothing
  int64_t in_use_bytes = 0;        // taken by others already (desktop, other processes)
  double bandwidth_gb_s = 0;       // device memory, 10^9 bytes per second; 0 = unknown
  double pcie_gb_s = 0;            // one direction, theoretical; 0 = unknown
  int count = 1;                   // equal devices, tensor parallel (llama.cpp: layers split)
  int64_t host_bytes = 0;          // host memory for KV; 0 = no host tier
  double host_bandwidth_gb_s = 0;  // 0 = 80, an assumption that the plan states

  // Compute capability of an NVIDIA GPU times ten; 0 = unknown or of another maker.
  int ComputeCapability() const;

  int64_t UsableBytes() const { return vram_bytes - driver_reserve_bytes - in_use_bytes; }
};

// "16GiB", "14.4GB", "512MiB", "1500000" (bytes). Negative, empty and overflowing sizes are errors, and
// numbers below 1 MiB without a unit: "16" may be GiB or bits, but hardly bytes.
absl::StatusOr<int64_t> ParseBytes(const std::string& text);

// "960GB/s" or "960".
absl::StatusOr<double> ParseBandwidth(const std::string& text);

// "vram=16GiB,bandwidth=960GB/s,pcie=32GB/s,count=2,used=1GiB,host=64GiB,host_bandwidth=80GB/s", a catalogue
// name, or a name with changes: "RTX 5080,used=700MiB", "cpu,ram=64GiB". Several equal ones: "8xH100",
// "2x RTX 3090", "H100 x8". Unknown keys and unknown names are errors that list the known.
absl::StatusOr<DeviceBudget> ParseDevice(const std::string& text);

}  // namespace kvtide::planner
