#include "daemon/cache/move/io_backlog.h"

#include <algorithm>
#include <iterator>

#include "kernels/base/check.h"

namespace kvtide {

void IoBacklog::Take(std::span<const Move> plan) {
  const auto goes_up = [](const Move& move) { return move.to >= 0 && move.to < move.from; };
  const auto last_up = std::find_if(plan.rbegin(), plan.rend(), goes_up).base();
  auto& [wanted, idle] = lists_;
  if (wanted.moves.empty()) wanted.moves.assign(plan.begin(), last_up);
  if (idle.moves.empty()) idle.moves.assign(last_up, plan.end());
}

std::vector<Move> IoBacklog::Next(size_t most) {
  KVTIDE_CHECK(running_ == nullptr && most > 0);
  for (size_t i = 0; i < lists_.size(); i++) {
    List& list = lists_[turn_];
    turn_ = (turn_ + 1) % lists_.size();
    if (list.moves.empty()) continue;
    const auto begin = list.moves.begin() + static_cast<std::ptrdiff_t>(list.next);
    list.next = std::min(list.moves.size(), list.next + most);
    running_ = &list;
    return {begin, list.moves.begin() + static_cast<std::ptrdiff_t>(list.next)};
  }
  return {};
}

void IoBacklog::Done() {
  KVTIDE_CHECK(running_ != nullptr);
  if (running_->next == running_->moves.size()) *running_ = {};
  running_ = nullptr;
}

}  // namespace kvtide
