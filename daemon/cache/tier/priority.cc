#include "daemon/cache/tier/priority.h"

#include "absl/strings/str_cat.h"

namespace kvtide {

std::string NameOf(Priority priority) {
  static constexpr const char* kNames[kPriorities] = {"low", "normal", "high"};
  return kNames[static_cast<size_t>(priority)];
}

absl::StatusOr<Priority> ParsePriority(const std::string& name) {
  for (const Priority priority : kAllPriorities)
    if (NameOf(priority) == name) return priority;
  return absl::InvalidArgumentError(
      absl::StrCat("priority \"", name, "\" is unknown; use low, normal or high"));
}

}  // namespace kvtide
