// Profiles in device memory, sent once for all calls and plans that name them: kept by content (the hash of
// the profile), shared, and for a while after the last of their holders. Thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/tide_head.h"
#include "kernels/format/profile.h"

namespace kvtide::cuda {

// What is sent of a profile: means and gains, for keys of most types; what encoders and decoders of
// calibrated keys read; or what attention reads of keys of one calibrated type (tide_tables.h; of keys that
// are coded after RoPE, level_tables.h).
enum class ProfilePart : int { kMeans, kTransforms, kTables4, kTables3, kTables2, kTables1 };
inline ProfilePart TablesOf(CacheType calibrated) {
  return static_cast<ProfilePart>(static_cast<int>(ProfilePart::kTables4) + CalibratedIndex(calibrated));
}

// One part of a profile, on the device.
class DeviceProfile {
 public:
  // Every head has a transform (CheckProfileFor), if more than means is asked for; the head dim has tables.
  absl::Status Send(const Profile& profile, ProfilePart part);
  // Of kMeans, [layers][kv_heads][head_dim_k]; null where no head of the profile has any.
  const float* mean() const { return mean_; }
  const float* gain() const { return gain_; }
  // Of kTransforms, [layers][kv_heads].
  const TideHead* heads() const { return heads_; }
  // Of tables, [layers][kv_heads] of TideTableBytes or LevelTableBytes.
  const std::byte* tables() const { return memory_.data(); }
  size_t bytes() const { return memory_.bytes(); }

 private:
  absl::Status SendMeans(const Profile& profile);
  absl::Status SendTransforms(const Profile& profile);
  absl::Status SendTables(const Profile& profile, ProfilePart part);

  DeviceBuffer memory_;
  const float *mean_ = nullptr, *gain_ = nullptr;
  const TideHead* heads_ = nullptr;
};

class ProfileStore {
 public:
  // Parts that nobody holds are kept up to `spare_bytes`.
  explicit ProfileStore(size_t spare_bytes = size_t{64} << 20) : spare_bytes_(spare_bytes) {}
  absl::StatusOr<std::shared_ptr<const DeviceProfile>> Get(const Profile& profile,
                                                           ProfilePart part = ProfilePart::kMeans);
  size_t count() const;

 private:
  using Key = std::pair<uint64_t, ProfilePart>;
  struct Entry {
    Key key;
    GroupShape shape;
    std::shared_ptr<const DeviceProfile> profile;
  };
  void DropSpare() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t spare_bytes_;
  mutable Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // last used first
  std::map<Key, std::list<Entry>::iterator> by_key_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::cuda
