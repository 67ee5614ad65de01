// The one place that knows which backends this build has and which of them a device name means.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/direct_device.h"

namespace kvtide {

// How other processes map the memory of devices.
struct PoolSharing {
  bool cpu = false;         // that of CPU devices can be mapped; that of GPUs always
  std::string gpu = "ipc";  // "ipc", "descriptors", "auto" (kernels/cuda/cuda_backend.h)
  bool host = false;        // the host tier can be mapped for reading: it has a backend of its own
};

// The backends of the tiers. Without a GPU the host tier is served by the first device's backend: one CPU.
struct Backends {
  std::vector<std::unique_ptr<Backend>> devices;  // of the first tier, in the order asked for
  int cpu_devices = 0;                            // of these, host memory that plays a device
  std::unique_ptr<Backend> host;                  // null: devices[0] serves the host tier too
  std::string note;                               // why "auto" chose as it did; empty otherwise
  Backend* Host() const { return host ? host.get() : devices.front().get(); }
  // Registers memory of the host with the GPUs, for as long as the object lives: attention over tensors that
  // lie there copies nothing. Null without GPUs. ResourceExhausted where locked memory is limited.
  absl::StatusOr<std::shared_ptr<void>> Pin(std::byte* data, size_t bytes) const;
};

// `devices` as ParseDevices (config.h) gives them. An error for a GPU that this build or machine does not
// have, or that is named twice; "auto" falls back to the CPU and says why in `note`. CPU devices share the
// threads.
absl::StatusOr<Backends> MakeBackends(const std::vector<std::string>& devices, int compute_threads,
                                      const PoolSharing& sharing = {});

// Where an engine of this process computes over a mapped pool: "cpu" (with so many threads, 0 = one for each
// processor), "cuda:0" or "cuda:GPU-...". InvalidArgument for other names, Unavailable for CUDA in a build
// without it.
absl::StatusOr<std::unique_ptr<DirectDevice>> MakeDirectDevice(const std::string& device, int threads);

// "cpu" or "cpu, cuda".
std::string KnownBackends();

}  // namespace kvtide
