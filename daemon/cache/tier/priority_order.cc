#include "daemon/cache/tier/priority_order.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace kvtide {

RecordSlot PriorityOrder::Names::Take(RecordSlot record) {
  if (free.empty()) {
    records.push_back(record);
    return static_cast<RecordSlot>(records.size() - 1);
  }
  const RecordSlot name = free.back();
  free.pop_back();
  records[name] = record;
  return name;
}

PriorityOrder::PriorityOrder(std::function<std::unique_ptr<EvictionPolicy>()> make,
                             std::function<bool(RecordSlot)> may_go)
    : make_(std::move(make)), may_go_(std::move(may_go)), all_(make_()) {}

void PriorityOrder::Insert(RecordSlot record, Standing standing, Tenant tenant, Priority priority) {
  if (record >= entries_.size()) entries_.resize(record + size_t{1});
  Entry& entry = entries_[record];
  entry = {};
  entry.tenant = tenant;
  entry.priority = priority;
  entry.standing = standing;
  entry.turn = turns_.Take(record);
  all_->Insert(entry.turn, standing);
  TenantRecords& records = tenants_[tenant];
  records.records++;
  if (records.levels != nullptr) {
    EnterLevel(record, records.levels.get());
  } else if (priority != Priority::kNormal) {
    MakeLevels(tenant, &records, record);
  }
}

void PriorityOrder::MakeLevels(Tenant tenant, TenantRecords* records, RecordSlot only) {
  records->levels = std::make_unique<Levels>();
  leveled_++;
  for (auto& policy : records->levels->policies) policy = make_();
  if (records->records == 1) return EnterLevel(only, records->levels.get());
  // The coldest first, so that they stand as they stood.
  all_->Peek([&](RecordSlot turn) {
    const RecordSlot record = turns_.records[turn];
    if (entries_[record].tenant == tenant) EnterLevel(record, records->levels.get());
    return true;
  });
}

void PriorityOrder::EnterLevel(RecordSlot record, Levels* levels) {
  Entry& entry = entries_[record];
  entry.name = levels->names.Take(record);
  entry.leveled = true;
  EvictionPolicy& policy = *levels->policies[static_cast<size_t>(entry.priority)];
  policy.Insert(entry.name, entry.standing);
  policy.Count(entry.name, entry.blocks);
}

void PriorityOrder::Touch(RecordSlot record) {
  const Entry& entry = entries_[record];
  all_->Touch(entry.turn);
  if (entry.leveled) LevelOf(entry).Touch(entry.name);
}

void PriorityOrder::Stand(RecordSlot record, Standing standing) {
  Entry& entry = entries_[record];
  entry.standing = standing;
  all_->Stand(entry.turn, standing);
  if (entry.leveled) LevelOf(entry).Stand(entry.name, standing);
}

void PriorityOrder::Count(RecordSlot record, int64_t blocks) {
  Entry& entry = entries_[record];
  entry.blocks += blocks;
  if (entry.blocks > 0) entry.evicted = false;
  blocks_[static_cast<size_t>(entry.priority)] += static_cast<uint64_t>(blocks);
  all_->Count(entry.turn, blocks);
  if (entry.leveled) LevelOf(entry).Count(entry.name, blocks);
}

void PriorityOrder::Evict(RecordSlot record) {
  Entry& entry = entries_[record];
  entry.evicted = true;
  all_->Evict(entry.turn);
  if (entry.leveled) LevelOf(entry).Evict(entry.name);
}

void PriorityOrder::Remove(RecordSlot record) {
  const Entry& entry = entries_[record];
  KVTIDE_CHECK(entry.blocks == 0, "record ", record, " leaves with ", entry.blocks, " blocks");
  const auto tenant = tenants_.find(entry.tenant);
  if (entry.leveled) {
    LevelOf(entry).Remove(entry.name);
    tenant->second.levels->names.Give(entry.name);
    if (entry.evicted) ExchangeTurn(record);
  }
  all_->Remove(entry.turn);
  turns_.Give(entry.turn);
  if (--tenant->second.records > 0) return;
  if (tenant->second.levels != nullptr) leveled_--;
  tenants_.erase(tenant);
}

void PriorityOrder::ExchangeTurn(RecordSlot record) {
  constexpr int kMost = 256;  // turns that are looked at: before the tenant's there are those that may not go
  Entry& gone = entries_[record];
  Entry* other = nullptr;
  int looked_at = 0;
  all_->Peek([&](RecordSlot turn) {
    const RecordSlot its = turns_.records[turn];
    Entry& entry = entries_[its];
    if (entry.tenant == gone.tenant && (&entry == &gone || may_go_ == nullptr || may_go_(its)))
      other = &entry;
    return other == nullptr && ++looked_at < kMost;
  });
  if (other == nullptr || other == &gone) return;
  all_->Count(other->turn, -other->blocks);
  all_->Count(gone.turn, other->blocks);
  std::swap(turns_.records[gone.turn], turns_.records[other->turn]);
  std::swap(gone.turn, other->turn);
}

void PriorityOrder::SetPriority(RecordSlot record, Priority priority) {
  Entry& entry = entries_[record];
  if (entry.priority == priority) return;
  blocks_[static_cast<size_t>(entry.priority)] -= static_cast<uint64_t>(entry.blocks);
  blocks_[static_cast<size_t>(priority)] += static_cast<uint64_t>(entry.blocks);
  TenantRecords& records = tenants_.at(entry.tenant);
  if (records.levels == nullptr) {
    entry.priority = priority;
    return MakeLevels(entry.tenant, &records, record);
  }
  EvictionPolicy& former = LevelOf(entry);
  former.Count(entry.name, -entry.blocks);
  former.Remove(entry.name);
  records.levels->names.Give(entry.name);
  entry.priority = priority;
  EnterLevel(record, records.levels.get());
}

void PriorityOrder::Peek(Usable usable, absl::FunctionRef<bool(RecordSlot)> visit) const {
  if (leveled_ == 0)
    return all_->Peek([&](RecordSlot turn) {
      const RecordSlot record = turns_.records[turn];
      return !usable(record) || visit(record);
    });
  // What a tenant gives next, some of it at a time: as a rule little is asked for.
  struct Giving {
    std::vector<RecordSlot> records;  // usable ones
    size_t next = 0;
  };
  absl::flat_hash_map<Tenant, Giving> tenants;
  const auto fill = [&](const Levels& levels, Giving* giving) {
    constexpr size_t kFirst = 16;
    const size_t most = std::max(kFirst, 2 * giving->records.size());
    giving->records.clear();
    for (const auto& policy : levels.policies) {
      if (giving->records.size() == most) return;
      policy->Peek([&](RecordSlot name) {
        const RecordSlot record = levels.names.records[name];
        if (usable(record)) giving->records.push_back(record);
        return giving->records.size() < most;
      });
    }
  };
  all_->Peek([&](RecordSlot turn) {
    const RecordSlot record = turns_.records[turn];
    if (!usable(record)) return true;
    const Entry& entry = entries_[record];
    if (!entry.leveled) return visit(record);
    Giving& giving = tenants[entry.tenant];
    if (giving.next == giving.records.size()) fill(*tenants_.at(entry.tenant).levels, &giving);
    KVTIDE_CHECK(giving.next < giving.records.size());
    return visit(giving.records[giving.next++]);
  });
}

}  // namespace kvtide
