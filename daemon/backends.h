// The one place that knows which backends this build has and which of them a device name means.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace kvtide {

// The backends of the tiers. On device cpu both tiers share one, which then has all threads.
struct Backends {
  std::unique_ptr<Backend> device;
  std::unique_ptr<Backend> host;  // null: `device` serves the host tier too
  std::string note;               // why "auto" chose as it did; empty otherwise
};

// `device`: "cpu", "cuda:0", "cuda:GPU-..." (a UUID) or "auto". An error for a GPU that this build or machine
// does not have; "auto" falls back to the CPU and says why in `note`.
absl::StatusOr<Backends> MakeBackends(const std::string& device, int compute_threads);

// "cpu" or "cpu, cuda".
std::string KnownBackends();

}  // namespace kvtide
