#include "kernels/cuda/device/profile_store.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/cuda/device/tide_tables.h"

namespace kvtide::cuda {

absl::Status DeviceProfile::Send(const Profile& profile, ProfilePart part) {
  return part == ProfilePart::kMeans        ? SendMeans(profile)
         : part == ProfilePart::kTransforms ? SendTransforms(profile)
                                            : SendTables(profile, part);
}

absl::Status DeviceProfile::SendTables(const Profile& profile, ProfilePart part) {
  for (const CacheType type : CalibratedTypes()) {
    if (TablesOf(type) != part) continue;
    const std::vector<std::byte> tables =
        profile.keys_turned_back() ? MakeTideTables(profile, type) : MakeLevelTables(profile, type);
    KVTIDE_RETURN_IF_ERROR(memory_.Reserve(tables.size()));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(memory_.data(), tables.data(), tables.size()));
  }
  return absl::OkStatus();
}

absl::Status DeviceProfile::SendMeans(const Profile& profile) {
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
  KVTIDE_RETURN_IF_ERROR(CopyToDevice(memory_.data(), all.data(), all.size() * sizeof(float)));
  const auto* const first = reinterpret_cast<const float*>(memory_.data());
  if (means) mean_ = first;
  if (gains) gain_ = first + (means ? values : 0);
  return absl::OkStatus();
}

// The heads, then for each of them its arrays, at multiples of 16 bytes.
absl::Status DeviceProfile::SendTransforms(const Profile& profile) {
  const auto aligned = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  size_t bytes = aligned(profile.k.size() * sizeof(TideHead));
  for (const HeadProfile& head : profile.k)
    bytes += aligned(head.centre.size() * sizeof(float)) + aligned(head.transform.size() * sizeof(float)) +
             aligned(head.inverse.size() * sizeof(float)) +
             aligned(head.rope.frequencies.size() * sizeof(uint64_t)) + aligned(head.widths.size());
  KVTIDE_RETURN_IF_ERROR(memory_.Reserve(bytes));
  std::vector<std::byte> all(bytes);
  size_t used = aligned(profile.k.size() * sizeof(TideHead));
  const auto place = [&](const auto& values) {
    const size_t at = used, size = values.size() * sizeof(values[0]);
    if (size > 0) std::memcpy(all.data() + at, values.data(), size);
    used += aligned(size);
    return memory_.data() + at;
  };
  std::vector<TideHead> heads;
  for (const HeadProfile& head : profile.k) {
    const size_t dim = head.centre.size();
    std::vector<float> inverse(dim * dim);
    for (size_t i = 0; i < dim; i++)
      for (size_t j = 0; j < dim; j++) inverse[j * dim + i] = head.inverse[i * dim + j];
    std::vector<uint64_t> per_position;
    for (const float frequency : head.rope.frequencies) per_position.push_back(PerPosition(frequency));
    TideHead& to = heads.emplace_back();
    to.centre = reinterpret_cast<const float*>(place(head.centre));
    to.transform = reinterpret_cast<const float*>(place(head.transform));
    to.inverse = reinterpret_cast<const float*>(place(inverse));
    to.per_position = reinterpret_cast<const uint64_t*>(place(per_position));
    to.widths = reinterpret_cast<const uint8_t*>(place(head.widths));
    to.turned = static_cast<int32_t>(per_position.size());
    to.pairs = head.rope.pairs;
  }
  std::memcpy(all.data(), heads.data(), heads.size() * sizeof(TideHead));
  KVTIDE_RETURN_IF_ERROR(CopyToDevice(memory_.data(), all.data(), all.size()));
  heads_ = reinterpret_cast<const TideHead*>(memory_.data());
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const DeviceProfile>> ProfileStore::Get(const Profile& profile,
                                                                       ProfilePart part) {
  const Key key{profile.hash != 0 ? profile.hash : HashProfile(profile), part};
  const MutexLock lock(mutex_);
  if (const auto found = by_key_.find(key); found != by_key_.end() && found->second->shape == profile.shape) {
    entries_.splice(entries_.begin(), entries_, found->second);
    return entries_.front().profile;
  }
  auto sent = std::make_shared<DeviceProfile>();
  KVTIDE_RETURN_IF_ERROR(sent->Send(profile, part));
  if (const auto found = by_key_.find(key); found != by_key_.end()) entries_.erase(found->second);
  entries_.push_front({key, profile.shape, sent});
  by_key_[key] = entries_.begin();
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
    by_key_.erase(entry->key);
    entry = entries_.erase(entry);
  }
}

}  // namespace kvtide::cuda
