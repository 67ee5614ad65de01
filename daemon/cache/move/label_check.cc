#include "daemon/cache/move/label_check.h"

#include <algorithm>
#include <map>
#include <vector>

#include "daemon/cache/block/block_label.h"
#include "daemon/cache/move/move_batch.h"

namespace kvtide {

void CheckLabels(CacheLock& lock, std::span<const HeldBlock> blocks) {
  CacheCore& core = lock.core();
  std::vector<PinnedPlace> pins;
  std::vector<IoJob> jobs;
  std::vector<Block*> asked;
  std::map<int, std::vector<size_t>> by_tier;
  for (const HeldBlock& held : blocks) {
    Block* const block = held.get();
    if (block->checked || block->place == nullptr) continue;
    if (core.attends(block->place->tier)) {  // read since
      block->checked = true;
      continue;
    }
    IoJob job;
    job.offset = block->place->offset;
    job.label = LabelOf(*block, *block->place);
    job.label_only = true;
    by_tier[block->place->tier].push_back(jobs.size());
    jobs.push_back(std::move(job));
    asked.push_back(block);
    pins.emplace_back(lock->store, block->place);
  }
  if (jobs.empty()) return;
  {
    const Unlocked unlocked(lock);
    for (const auto& [tier, indices] : by_tier) {
      std::vector<IoJob> of_tier;
      for (const size_t index : indices) of_tier.push_back(jobs[index]);
      core.io(tier).Run(of_tier);
      for (size_t i = 0; i < indices.size(); i++) jobs[indices[i]].status = of_tier[i].status;
    }
  }
  for (size_t i = 0; i < jobs.size(); i++) {
    Block* const block = asked[i];
    if (jobs[i].status.ok()) {
      block->checked = true;
    } else if (absl::IsDataLoss(jobs[i].status) && block->place == pins[i].get() && !block->moving) {
      lock->counters.lost_blocks++;
      lock->store.tier(block->place->tier).lost++;
      lock->store.Drop(block);
    }
  }
}

std::span<const BlockKey> BeforeUnchecked(std::span<const BlockKey> keys, std::span<const HeldBlock> blocks) {
  for (const HeldBlock& block : blocks) {
    const bool found = block->keyed || block->prefix() != nullptr;
    if (!found || block->checked) continue;
    const auto key = std::find(keys.begin(), keys.end(), block->key);
    keys = keys.first(static_cast<size_t>(key - keys.begin()));
  }
  return keys;
}

}  // namespace kvtide
