#include "planner/units.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvtide::planner {

std::string FormatBytes(int64_t bytes) {
  const double magnitude = std::fabs(static_cast<double>(bytes));
  if (magnitude >= 1024.0 * kGiB)
    return absl::StrFormat("%.2f TiB", static_cast<double>(bytes) / (1024.0 * kGiB));
  if (magnitude >= 10.0 * kGiB) return absl::StrFormat("%.1f GiB", static_cast<double>(bytes) / kGiB);
  if (magnitude >= 1.0 * kGiB) return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / kGiB);
  if (magnitude >= 1.0 * kMiB) return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / kMiB);
  if (magnitude >= 1.0 * kKiB) return absl::StrFormat("%.1f KiB", static_cast<double>(bytes) / kKiB);
  return absl::StrCat(bytes, " B");
}

std::string FormatMiB(int64_t bytes) { return absl::StrFormat("%.1f", static_cast<double>(bytes) / kMiB); }

std::string FormatTokens(int64_t tokens) {
  if (tokens > 0 && tokens % 1024 == 0) return absl::StrCat(tokens / 1024, "K");
  return absl::StrCat(tokens);
}

}  // namespace kvtide::planner
