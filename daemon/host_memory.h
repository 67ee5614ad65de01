// How much host memory can still be had: what the kernel counts as available, within the limits of every
// control group that this process is in. Tiers in host memory take address space at start and pages as they
// are first used, so a daemon that was given more than is there would be killed later; it is refused at
// start.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace kvtide {

struct HostMemory {
  int64_t total = 0;      // bytes of the machine or of the tightest limit; 0 = unknown
  int64_t available = 0;  // of these, free or free at once (page cache)
  std::string source;     // the file that says so
};

// Reads /proc/meminfo, /proc/self/cgroup and the limits of control groups (version 2 and 1) under `root`,
// which tests set.
HostMemory ReadHostMemory(const std::string& root = "");

// InvalidArgument with the numbers if `wanted` bytes are not available.
absl::Status CheckHostMemory(int64_t wanted, const HostMemory& memory);

}  // namespace kvtide
