#include "kernels/cuda/attend/profile_store.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/base/status.h"

namespace kvtide::cuda {

absl::Status DeviceProfile::Send(const Profile& profile) {
  const auto has = [&](auto member) {
    return std::any_of(profile.k.begin(), profile.k.end(),
                       [&](const HeadProfile& head) { return !(head.*member).empty(); });
  };
  const bool means = has(&HeadProfile::mean), gains = has(&HeadProfile::gain);
  const size_t dim = static_cast<size_t>(profile.shape.head_dim_k), values = profile.k.size() * dim;
  std::vector<float> all;
  all.reserve((means ? values : 0) + (gains ? values : 0));
  const auto add = [&](auto member, float none) {
    for (const HeadProfile& head : profile.k) {
      const std::vector<float>& own = head.*member;
      all.insert(all.end(), own.begin(), own.end());
      all.resize((all.size() + dim - 1) / dim * dim + (own.empty() ? dim : 0), none);
    }
  };
  if (means) add(&HeadProfile::mean, 0.0f);
  if (gains) add(&HeadProfile::gain, 1.0f);
  if (all.empty()) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(memory_.Reserve(all.size() * sizeof(float)));
  KVTIDE_CUDA_RETURN_IF_ERROR(
      cudaMemcpy(memory_.data(), all.data(), all.size() * sizeof(float), cudaMemcpyHostToDevice));
  const auto* const first = reinterpret_cast<const float*>(memory_.data());
  if (means) mean_ = first;
  if (gains) gain_ = first + (means ? values : 0);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const DeviceProfile>> ProfileStore::Get(const Profile& profile) {
  const uint64_t hash = profile.hash != 0 ? profile.hash : HashProfile(profile);
  const MutexLock lock(mutex_);
  if (const auto found = by_hash_.find(hash);
      found != by_hash_.end() && found->second->shape == profile.shape) {
    entries_.splice(entries_.begin(), entries_, found->second);
    return entries_.front().profile;
  }
  auto sent = std::make_shared<DeviceProfile>();
  KVTIDE_RETURN_IF_ERROR(sent->Send(profile));
  if (const auto found = by_hash_.find(hash); found != by_hash_.end()) entries_.erase(found->second);
  entries_.push_front({hash, profile.shape, sent});
  by_hash_[hash] = entries_.begin();
  DropSpare();
  return std::shared_ptr<const DeviceProfile>(sent);
}

size_t ProfileStore::count() const {
  const MutexLock lock(mutex_);
  return entries_.size();
}

void ProfileStore::DropSpare() {
  size_t spare = 0;
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    const bool held = entry->profile.use_count() > 1;
    if (!held) spare += entry->profile->bytes();
    if (held || spare <= spare_bytes_) {
      ++entry;
      continue;
    }
    by_hash_.erase(entry->hash);
    entry = entries_.erase(entry);
  }
}

}  // namespace kvtide::cuda
