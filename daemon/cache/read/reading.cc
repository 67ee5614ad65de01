#include "daemon/cache/read/reading.h"

#include <algorithm>

namespace kvtide {

Reading::Reading(CacheState& state, size_t tables) : state_(state) {
  state_.attends_running++;
  entries_.reserve(tables);
}

Reading::~Reading() {
  for (const Entry& entry : entries_) {
    entry.sequence->readers--;
    entry.recency.ForEach([&](const RecencyPtr& record) { state_.store.EndRead(record); });
  }
  entries_.clear();
  state_.counters.attended_blocks += attended_blocks;
  state_.counters.attended_blocks_below_tier0 += attended_blocks_below_tier0;
  const auto add = [](const std::vector<uint64_t>& from, std::vector<uint64_t>* to) {
    to->resize(std::max(to->size(), from.size()));
    for (size_t t = 0; t < from.size(); t++) (*to)[t] += from[t];
  };
  add(attended_bytes, &state_.counters.attended_bytes);
  add(attended_in_place, &state_.counters.attended_in_place);
  add(promoted_first, &state_.counters.promoted_first);
  state_.attends_running--;
  state_.changed.NotifyAll();
}

absl::StatusOr<const TableSnapshot*> Reading::Add(const SequencePtr& sequence, int group,
                                                  const void* writer) {
  if (sequence->closed) return absl::AbortedError("the sequence was closed");
  if (sequence->options.seal_at_once && sequence->writer != nullptr && sequence->writer != writer)
    return absl::AbortedError(
        "the sequence codes at once (evaluation mode) and is being written; one call at a time");
  Entry& entry = entries_.emplace_back();
  entry.sequence = sequence;
  entry.snapshot = sequence->groups[static_cast<size_t>(group)].blocks->Snapshot();
  entry.recency = sequence->recency;
  sequence->readers++;
  entry.recency.ForEach([&](const RecencyPtr& record) { state_.store.BeginRead(record); });
  return entry.snapshot.get();
}

}  // namespace kvtide
