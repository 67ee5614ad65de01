#include "daemon/service/open_steps.h"

#include <cstdint>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "kernels/base/status.h"

namespace kvtide::service {

int64_t ToldTable::Update(const Step& step, size_t item, int group) {
  if (serial == step.Serial(item, group)) return end_block();
  std::vector<Entry> now;
  const std::span<const SnapshotRun> runs = step.Runs(item, group);
  now.reserve(static_cast<size_t>(runs.back().end_block() - runs.front().first_block));
  for (const SnapshotRun& run : runs)
    for (std::byte* const data : run.blocks) now.push_back({run.layout, run.tier, data});
  const int64_t first = runs.front().first_block;
  int64_t same = first;
  if (serial != 0 && first >= first_block) {
    while (same < end_block() && same < runs.back().end_block() &&
           blocks[static_cast<size_t>(same - first_block)] == now[static_cast<size_t>(same - first)])
      same++;
  }
  serial = step.Serial(item, group);
  first_block = first;
  blocks = std::move(now);
  return same;
}

absl::StatusOr<OpenSteps::Taken> OpenSteps::TakeFrom(OpenSteps* steps, uint64_t id) {
  if (steps == nullptr)
    return absl::FailedPreconditionError(
        "steps belong to a session, and end with it: use the stream Session (ClientOptions::session) or "
        "shared memory");
  const MutexLock lock(steps->mutex_);
  const auto found = steps->open_.find(id);
  if (found == steps->open_.end())
    return absl::NotFoundError(absl::StrCat("step ", id, " is not open on this session"));
  if (found->second.taken)
    return absl::AbortedError(absl::StrCat("another call works on step ", id, "; one at a time"));
  found->second.taken = true;
  return Taken(steps, id, found->second.step.get());
}

absl::Status OpenSteps::CheckRoom() {
  const MutexLock lock(mutex_);
  if (open_.size() < kMost) return absl::OkStatus();
  return Refused(Refusal::kLimit,
                 absl::ResourceExhaustedError(absl::StrCat(
                     open_.size(), " steps are open on this session, as many as may be; end some")));
}

absl::StatusOr<uint64_t> OpenSteps::Add(std::unique_ptr<Step> step, uint64_t after) {
  KVTIDE_RETURN_IF_ERROR(CheckRoom());
  const MutexLock lock(mutex_);
  Open& open = open_[++last_];
  open.step = std::move(step);
  open.after = after;
  return last_;
}

uint64_t OpenSteps::Previous(uint64_t id) {
  const MutexLock lock(mutex_);
  const auto found = open_.find(id);
  return found != open_.end() && open_.count(found->second.after) > 0 ? found->second.after : 0;
}

void OpenSteps::GiveBack(uint64_t id) {
  const MutexLock lock(mutex_);
  open_.at(id).taken = false;
}

std::unique_ptr<Step> OpenSteps::Remove(uint64_t id) {
  const MutexLock lock(mutex_);
  return std::move(open_.extract(id).mapped().step);
}

void OpenSteps::Forget(SequenceId sequence) {
  const MutexLock lock(mutex_);
  told_.erase(told_.lower_bound({sequence, 0}), told_.upper_bound({sequence, INT32_MAX}));
}

void OpenSteps::ForgetAll() {
  const MutexLock lock(mutex_);
  told_.clear();
}

void OpenSteps::RollBackAll() {
  const MutexLock lock(mutex_);
  while (!open_.empty()) open_.erase(std::prev(open_.end()));  // what follows others goes first
  told_.clear();
}

}  // namespace kvtide::service
