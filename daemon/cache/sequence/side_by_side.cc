#include "daemon/cache/sequence/side_by_side.h"

#include <utility>

namespace kvtide {

SideBySide::~SideBySide() {
  std::vector<std::thread> threads;
  {
    const MutexLock lock(mu_);
    stopping_ = true;
    threads = std::move(threads_);
  }
  wake_.NotifyAll();
  for (std::thread& thread : threads) thread.join();
}

void SideBySide::Run(std::span<const std::function<void()>> parts) {
  if (parts.empty()) return;
  size_t left = parts.size() - 1;
  if (left > 0) {
    {
      const MutexLock lock(mu_);
      for (const std::function<void()>& part : parts.subspan(1)) waiting_.push_back({&part, &left});
      for (; idle_ < waiting_.size(); idle_++) threads_.emplace_back([this] { Work(); });
    }
    wake_.NotifyAll();
  }
  parts.front()();
  const MutexLock lock(mu_);
  while (left > 0) done_.Wait(mu_);
}

size_t SideBySide::threads() const {
  const MutexLock lock(mu_);
  return threads_.size();
}

void SideBySide::Work() {
  for (;;) {
    Part part;
    {
      const MutexLock lock(mu_);
      while (waiting_.empty() && !stopping_) wake_.Wait(mu_);
      if (waiting_.empty()) return;
      part = waiting_.front();
      waiting_.pop_front();
      idle_--;
    }
    (*part.run)();
    {
      const MutexLock lock(mu_);
      idle_++;
      if (--*part.left > 0) continue;
    }
    done_.NotifyAll();
  }
}

}  // namespace kvtide
