// Recency records for blocks that go together from now on, whatever their priorities: one for each, made when
// a block needs it, so that every block keeps its own.
#pragma once

#include <array>

#include "absl/time/time.h"
#include "daemon/cache/block/block_store.h"

namespace kvtide {

class PriorityRecords {
 public:
  PriorityRecords(BlockStore& store, absl::Time now) : store_(store), now_(now) {}
  // With one that is there already.
  PriorityRecords(BlockStore& store, absl::Time now, const RecencyPtr& record) : PriorityRecords(store, now) {
    records_[static_cast<size_t>(store.PriorityOf(record))] = record;
  }

  const RecencyPtr& Of(Priority priority) {
    RecencyPtr& record = records_[static_cast<size_t>(priority)];
    if (record == nullptr) record = store_.NewRecency(now_, Standing::kUsed, priority);
    return record;
  }
  const RecencyPtr& Of(const Block& block) { return Of(store_.PriorityOf(block)); }
  bool Has(const Block& block) const {
    for (const RecencyPtr& record : records_)
      if (record != nullptr && store_.GoesBy(block, record)) return true;
    return false;
  }
  void Touch(absl::Time now) const {
    for (const RecencyPtr& record : records_)
      if (record != nullptr) store_.Touch(record, now);
  }

 private:
  BlockStore& store_;
  const absl::Time now_;
  std::array<RecencyPtr, kPriorities> records_;
};

}  // namespace kvtide
