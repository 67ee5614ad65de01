#include "daemon/cache/tier/attend_cost.h"

#include "absl/strings/str_cat.h"

namespace kvtide {

std::string NameOf(AttendLowerTiers rule) {
  switch (rule) {
    case AttendLowerTiers::kCost:
      return "cost";
    case AttendLowerTiers::kInPlace:
      return "in-place";
    case AttendLowerTiers::kPromoteFirst:
      break;
  }
  return "promote-first";
}

absl::StatusOr<AttendLowerTiers> ParseAttendLowerTiers(const std::string& name) {
  for (const AttendLowerTiers rule :
       {AttendLowerTiers::kCost, AttendLowerTiers::kInPlace, AttendLowerTiers::kPromoteFirst})
    if (NameOf(rule) == name) return rule;
  return absl::InvalidArgumentError(
      absl::StrCat("attend_lower_tiers \"", name, "\" is unknown; use cost, in-place or promote-first"));
}

bool PromoteFirst(const LowerTierView& view, const AttendRates& rates, AttendLowerTiers rule) {
  if (rule == AttendLowerTiers::kInPlace || view.bytes == 0 || view.bytes > view.room) return false;
  if (rule == AttendLowerTiers::kPromoteFirst) return true;
  const auto bytes = static_cast<double>(view.bytes);
  const double read = view.reads * view.passes * bytes;
  return bytes / rates.up + read / rates.home < read / rates.lower;
}

}  // namespace kvtide
