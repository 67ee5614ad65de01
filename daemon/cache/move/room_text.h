// Why there is no room, for whoever asked for it: which tiers are full, how much of them pins and leases hold
// and whose they are, and what would free it. Other tenants have no names here.
#pragma once

#include <cstddef>
#include <string>

#include "absl/time/time.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

// "no room for N bytes: tier 'device' has ...". `account`: of the tenant that the room was for; null: of
// none.
std::string NoRoomText(const CacheState& state, size_t bytes, const TenantAccount* account, absl::Time now);

// "no room for N bytes within the quota of tenant 'acme': M of M bytes taken in tier 'device'": for all tiers
// where it has a quota.
std::string OverQuotaText(const CacheState& state, size_t bytes, const TenantAccount& account,
                          absl::Time now);

}  // namespace kvtide
