// The order in which the records of one tier make way: that of an eviction policy, and within each tenant by
// priority first. The policy says whose turn it is, as if nobody had priorities; the tenant whose turn it is
// gives what it can spare best: of its lowest priority what is coldest. So a tenant orders its own blocks and
// takes nothing from others by it, whatever it calls its priorities.
//
// A turn is a record's place in the policy. When a record is gone that went in another's turn, that turn is
// over, and the other record has the turn of the one that is gone: tenants give as much as without
// priorities.
//
// A tenant all of whose records are normal costs nothing but its entries; one that has used another priority
// has a policy of its own for each. Not thread-safe; KvCache guards it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "daemon/cache/tier/eviction_policy.h"
#include "daemon/cache/tier/priority.h"

namespace kvtide {

class PriorityOrder {
 public:
  using Tenant = const void*;  // names one; never read
  using Usable = absl::FunctionRef<bool(RecordSlot)>;
  // `make` makes an empty policy. `may_go`: false while a record's blocks may not leave at all, whose turn
  // does not count for others of its tenant then.
  explicit PriorityOrder(std::function<std::unique_ptr<EvictionPolicy>()> make,
                         std::function<bool(RecordSlot)> may_go = nullptr);

  // As EvictionPolicy has them.
  void Insert(RecordSlot record, Standing standing, Tenant tenant, Priority priority);
  void Touch(RecordSlot record);
  void Peek(absl::FunctionRef<bool(RecordSlot)> visit) const {
    Peek([](RecordSlot) { return true; }, visit);
  }
  // Without those that are not usable: a tenant has as many turns as it has usable records.
  void Peek(Usable usable, absl::FunctionRef<bool(RecordSlot)> visit) const;
  void Remove(RecordSlot record);
  void Stand(RecordSlot record, Standing standing);
  void Count(RecordSlot record, int64_t blocks);
  void Evict(RecordSlot record);

  // It is the hottest of its new priority.
  void SetPriority(RecordSlot record, Priority priority);
  Tenant TenantOf(RecordSlot record) const { return entries_[record].tenant; }
  Priority PriorityOf(RecordSlot record) const { return entries_[record].priority; }
  // Of all tenants.
  uint64_t blocks(Priority priority) const { return blocks_[static_cast<size_t>(priority)]; }

 private:
  // What a policy calls the records that it has, by numbers that are dense.
  struct Names {
    std::vector<RecordSlot> records;  // by name
    std::vector<RecordSlot> free;
    RecordSlot Take(RecordSlot record);
    void Give(RecordSlot name) { free.push_back(name); }
  };
  // The records of a tenant by priority.
  struct Levels {
    std::array<std::unique_ptr<EvictionPolicy>, kPriorities> policies;
    Names names;  // in any of them
  };
  struct TenantRecords {
    uint64_t records = 0;
    std::unique_ptr<Levels> levels;  // null: all are normal, and always were
  };
  struct Entry {
    Tenant tenant = nullptr;
    int64_t blocks = 0;
    RecordSlot turn = 0;  // its name in the policy of all
    RecordSlot name = 0;  // and in its tenant's levels, if that has some
    Priority priority = Priority::kNormal;
    Standing standing = Standing::kUsed;
    bool leveled = false;
    bool evicted = false;  // its last block is leaving for lack of room
  };

  EvictionPolicy& LevelOf(const Entry& entry) const {
    return *tenants_.at(entry.tenant).levels->policies[static_cast<size_t>(entry.priority)];
  }
  // Gives a tenant levels, with the records that it has; `only` where it has one.
  void MakeLevels(Tenant tenant, TenantRecords* records, RecordSlot only);
  void EnterLevel(RecordSlot record, Levels* levels);
  // The record, which is gone, gives its turn to the one of its tenant whose turn it was.
  void ExchangeTurn(RecordSlot record);

  const std::function<std::unique_ptr<EvictionPolicy>()> make_;
  const std::function<bool(RecordSlot)> may_go_;  // null: always
  const std::unique_ptr<EvictionPolicy> all_;     // of turns
  Names turns_;
  std::vector<Entry> entries_;                          // by record
  absl::flat_hash_map<Tenant, TenantRecords> tenants_;  // that have records here
  size_t leveled_ = 0;                                  // tenants that have levels
  std::array<uint64_t, kPriorities> blocks_{};
};

}  // namespace kvtide
