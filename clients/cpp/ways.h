// By which ways a daemon can be reached from here, asked of it: for those who look after it.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace kvtide::client {

struct DaemonWays {
  absl::Status shared_memory;        // why not
  absl::Status direct;               // why its pool cannot be mapped
  std::vector<std::string> devices;  // where a pool lies that can: "cpu", UUIDs of GPUs
};

// InvalidArgument in both statuses for an address that is no Unix socket.
DaemonWays ProbeWays(const std::string& address);

}  // namespace kvtide::client
