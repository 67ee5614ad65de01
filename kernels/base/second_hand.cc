#include "kernels/base/second_hand.h"

namespace kvtide {

SecondHand::SecondHand(std::chrono::microseconds hot) : hot_(hot), thread_([this] { Work(); }) {}

SecondHand::~SecondHand() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.NotifyAll();
  thread_.join();
}

void SecondHand::Run(Loop& loop) {
  for (size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.body(i);
}

void SecondHand::Share(size_t count, absl::FunctionRef<void(size_t)> body) {
  if (count < 2 || busy_.exchange(true, std::memory_order_acquire)) {
    for (size_t i = 0; i < count; i++) body(i);
    return;
  }
  Loop loop{count, body};
  loop_ = &loop;
  offer_ = Offer::kOpen;
  if (asleep_) {
    { const MutexLock lock(mutex_); }  // it is either before its look at offer_ or waits
    wake_.NotifyAll();
  }
  Run(loop);
  // Nobody has come, or the thread ends with its last item.
  Offer open = Offer::kOpen;
  if (!offer_.compare_exchange_strong(open, Offer::kNone))
    while (offer_ != Offer::kNone) std::this_thread::yield();
  busy_.store(false, std::memory_order_release);
}

void SecondHand::Work() {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();
  while (!stopping_) {
    Offer open = Offer::kOpen;
    if (offer_.load(std::memory_order_relaxed) == Offer::kOpen &&
        offer_.compare_exchange_strong(open, Offer::kTaken)) {
      Run(*loop_);
      offer_ = Offer::kNone;
      last = Clock::now();
    } else if (Clock::now() - last < hot_) {
      std::this_thread::yield();
    } else {
      const MutexLock lock(mutex_);
      asleep_ = true;
      while (!stopping_ && offer_ != Offer::kOpen) wake_.Wait(mutex_);
      asleep_ = false;
      last = Clock::now();
    }
  }
}

}  // namespace kvtide
