// Whose blocks make way first. Among the blocks of one tenant, in every tier, those of a lower priority go
// before those of a higher one, and are brought up after them. Between tenants priorities say nothing: whose
// turn it is to make way the eviction policy decides as if there were none (priority_order.h).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace kvtide {

enum class Priority : uint8_t { kLow, kNormal, kHigh };
constexpr size_t kPriorities = 3;
constexpr std::array<Priority, kPriorities> kAllPriorities = {Priority::kLow, Priority::kNormal,
                                                              Priority::kHigh};

// "low", "normal", "high".
std::string NameOf(Priority priority);
// InvalidArgument with the known names.
absl::StatusOr<Priority> ParsePriority(const std::string& name);

// Puts each tenant's items into its own places, its higher priorities first, equals as they stood.
template <class T, class TenantOf, class PriorityOf>
void HigherFirst(std::span<T> items, TenantOf tenant_of, PriorityOf priority_of) {
  if (items.empty()) return;
  const Priority first = priority_of(items.front());
  if (std::all_of(items.begin(), items.end(), [&](const T& item) { return priority_of(item) == first; }))
    return;
  absl::flat_hash_map<decltype(tenant_of(items.front())), std::vector<size_t>> places;
  for (size_t i = 0; i < items.size(); i++) places[tenant_of(items[i])].push_back(i);
  std::vector<T> ordered(items.begin(), items.end());
  for (const auto& [tenant, own] : places) {
    std::vector<size_t> from = own;
    std::stable_sort(from.begin(), from.end(),
                     [&](size_t a, size_t b) { return priority_of(items[a]) > priority_of(items[b]); });
    for (size_t i = 0; i < own.size(); i++) ordered[own[i]] = items[from[i]];
  }
  std::move(ordered.begin(), ordered.end(), items.begin());
}

}  // namespace kvtide
