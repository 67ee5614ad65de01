#include "daemon/cache/attend_plans.h"

#include <utility>

namespace kvtide {

template <class Fits>
std::unique_ptr<CachedAttendPlan> AttendPlans::TakeWhere(Fits fits) {
  const MutexLock lock(mu_);
  for (size_t i = plans_.size(); i-- > 0;) {
    if (!fits(plans_[i]->key)) continue;
    std::unique_ptr<CachedAttendPlan> plan = std::move(plans_[i]);
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
  std::unique_ptr<CachedAttendPlan> oldest;  // goes without the mutex
  const MutexLock lock(mu_);
  plans_.push_back(std::move(plan));
  if (plans_.size() <= most_) return;
  oldest = std::move(plans_.front());
  plans_.erase(plans_.begin());
}

size_t AttendPlans::size() const {
  const MutexLock lock(mu_);
  return plans_.size();
}

}  // namespace kvtide
