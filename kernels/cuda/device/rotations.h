// Rotations of types for which the kernels have no code: as matrices in device memory, made once per type,
// stored dim and direction from the type's own functions. Thread-safe.
#pragma once

#include <map>
#include <tuple>

#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/rotation.h"
#include "kernels/format/catalogue.h"

namespace kvtide::cuda {

class Rotations {
 public:
  absl::StatusOr<Rotation> Get(CacheType type, int stored_dim, bool inverse);

 private:
  Mutex mutex_;
  std::map<std::tuple<int, int, bool>, DeviceBuffer> matrices_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::cuda
