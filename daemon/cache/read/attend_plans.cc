#include "daemon/cache/read/attend_plans.h"

#include <utility>

namespace kvtide {

size_t CachedAttendPlan::DeviceBytes() const {
  size_t bytes = 0;
  for (const TierPart& part : parts)
    if (part.plan != nullptr) bytes += part.plan->device_bytes();
  return bytes;
}

template <class Fits>
std::unique_ptr<CachedAttendPlan> AttendPlans::TakeWhere(Fits fits) {
  const MutexLock lock(mu_);
  for (size_t i = plans_.size(); i-- > 0;) {
    if (!fits(plans_[i].plan->key)) continue;
    std::unique_ptr<CachedAttendPlan> plan = std::move(plans_[i].plan);
    bytes_ -= plans_[i].bytes;
    plans_.erase(plans_.begin() + static_cast<std::ptrdiff_t>(i));
    return plan;
  }
  return nullptr;
}

std::unique_ptr<CachedAttendPlan> AttendPlans::Take(const AttendPlanKey& key) {
  return TakeWhere(
      [&](const AttendPlanKey& mine) { return mine.content == key.content && mine.shape == key.shape; });
}

std::unique_ptr<CachedAttendPlan> AttendPlans::TakeShape(const AttendPlanKey& key) {
  return TakeWhere([&](const AttendPlanKey& mine) { return mine.shape == key.shape; });
}

void AttendPlans::Put(std::unique_ptr<CachedAttendPlan> plan) {
  const size_t bytes = plan->DeviceBytes();
  std::vector<Kept> forgotten;  // go without the mutex
  const MutexLock lock(mu_);
  plans_.push_back({std::move(plan), bytes});
  bytes_ += bytes;
  size_t first = 0;
  for (; plans_.size() - first > most_ || bytes_ > most_bytes_; first++) {
    bytes_ -= plans_[first].bytes;
    forgotten.push_back(std::move(plans_[first]));
  }
  plans_.erase(plans_.begin(), plans_.begin() + static_cast<std::ptrdiff_t>(first));
}

size_t AttendPlans::size() const {
  const MutexLock lock(mu_);
  return plans_.size();
}

size_t AttendPlans::bytes() const {
  const MutexLock lock(mu_);
  return bytes_;
}

}  // namespace kvtide
