// Tenants: what each may have at most, and what it has. The counts are guarded by the cache's mutex (part of
// CacheState); limits change with TenantTable::TakeQuotas only.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide {

struct TenantLimits {
  static constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();
  uint64_t sequences = kNone, models = kNone;
  uint64_t pins = kNone;                        // pinned sequences
  uint64_t calls = kNone, connections = kNone;  // at a time; the service's to check
  std::map<std::string, uint64_t> tier_bytes;   // by name of tier, over all its devices
  uint64_t OfTier(const std::string& tier) const {
    const auto found = tier_bytes.find(tier);
    return found == tier_bytes.end() ? kNone : found->second;
  }
  bool operator==(const TenantLimits&) const = default;
};

// The limits of all tenants. A text for each:
// "acme:sequences=100,models=4,pins=10,calls=32,connections=16,device=2GiB, host=16GiB"; what is left out has
// no limit. "*" stands for every tenant that has no text of its own, each for itself.
class TenantQuotas {
 public:
  // `tiers`: their names, which stand beside the four counts. InvalidArgument names the text and what is
  // wrong.
  static absl::StatusOr<TenantQuotas> Parse(std::span<const std::string> texts,
                                            std::span<const std::string> tiers);
  const TenantLimits& Of(const std::string& tenant) const;

 private:
  std::map<std::string, TenantLimits> tenants_;
  TenantLimits others_;
};

// What one tenant has.
struct TenantAccount {
  std::string tenant;
  TenantLimits limits;
  uint64_t sequences = 0, models = 0, pins = 0;
  std::vector<uint64_t> tier_bytes;  // by tier index: extents of its blocks, and of copies on their way
  uint64_t places = 0;               // that these are of

  // ResourceExhausted where one more is too much: says whose quota, how much of it is taken and what frees
  // it.
  absl::Status CheckOneMore(uint64_t TenantAccount::*count, uint64_t limit, const char* what,
                            const char* advice) const;
};

// Of the places that all tenants have together the last sixteenth is for those that have fewer than so many:
// nobody keeps the others out, whatever it opens. Whether one more fits for a tenant that has `own` of the
// `all` there are.
bool LeavesRoomForOthers(uint64_t own, uint64_t all, uint64_t limit);

class TenantTable {
 public:
  TenantTable(const TenantQuotas* quotas, size_t tiers) : quotas_(quotas), tiers_(tiers) {}
  // Kept while it counts anything or somebody has it.
  std::shared_ptr<TenantAccount> Get(const std::string& tenant);
  // The quotas have changed: every account gets its limits from them. Who has more than that keeps it.
  void TakeQuotas();
  // Those that have anything, by name.
  std::vector<const TenantAccount*> All() const;

 private:
  const TenantQuotas* const quotas_;
  const size_t tiers_;
  absl::flat_hash_map<std::string, std::shared_ptr<TenantAccount>> accounts_;
  size_t sweep_at_ = 64;
};

}  // namespace kvtide
