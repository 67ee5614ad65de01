// Means and gains of profiles in device memory, sent once for all plans that name them: kept by content (the
// hash of the profile), shared by plans, and for a while after the last of them. Thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <unordered_map>

#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/device/device.h"
#include "kernels/format/profile.h"

namespace kvtide::cuda {

// [layers][kv_heads][head_dim_k] on the device; null where no head of the profile has any.
class DeviceProfile {
 public:
  absl::Status Send(const Profile& profile);
  const float* mean() const { return mean_; }
  const float* gain() const { return gain_; }
  size_t bytes() const { return memory_.bytes(); }

 private:
  DeviceBuffer memory_;
  const float *mean_ = nullptr, *gain_ = nullptr;
};

class ProfileStore {
 public:
  // Profiles that no plan holds are kept up to `spare_bytes`.
  explicit ProfileStore(size_t spare_bytes = size_t{64} << 20) : spare_bytes_(spare_bytes) {}
  absl::StatusOr<std::shared_ptr<const DeviceProfile>> Get(const Profile& profile);
  size_t count() const;

 private:
  struct Entry {
    uint64_t hash = 0;
    GroupShape shape;
    std::shared_ptr<const DeviceProfile> profile;
  };
  void DropSpare() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t spare_bytes_;
  mutable Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // last used first
  std::unordered_map<uint64_t, std::list<Entry>::iterator> by_hash_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::cuda
