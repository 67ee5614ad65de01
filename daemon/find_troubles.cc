#include "daemon/find_troubles.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace kvtide {
namespace {

// So long after the last failure it counts as one that is over.
constexpr absl::Duration kFailsNow = absl::Minutes(2);

}  // namespace

void TroubleFinder::Look(const CacheStats& stats, const LostDevices& lost, absl::Time now,
                         service::Troubles* troubles) {
  using service::Trouble;
  std::string tiers;
  for (const TierStats& tier : stats.tiers)
    if (!tier.attends && !tier.io.writable)
      absl::StrAppend(&tiers, tiers.empty() ? "" : "; ", "the tier ", tier.name,
                      " takes no blocks: ", tier.io.problem);
  troubles->Set(Trouble::kDisk, tiers, false, now);
  std::string remote;
  if (stats.remote.has_value() && !stats.remote->problem.empty())
    remote = absl::StrCat(stats.remote->server, " is away: ", stats.remote->problem);
  else if (stats.remote.has_value() && !stats.remote->write_problem.empty())
    remote = absl::StrCat(stats.remote->server, " takes no blocks: ", stats.remote->write_problem);
  troubles->Set(Trouble::kRemote, remote, false, now);
  if (stats.failed_persists > failed_persists_) failed_at_ = now;
  failed_persists_ = stats.failed_persists;
  std::string persist;
  if (now - failed_at_ < kFailsNow) {
    persist = "sequences could not be made durable; kvtide persist says of each whether it can, and why not";
    if (!stats.persist_problem.empty()) absl::StrAppend(&persist, "; the last: ", stats.persist_problem);
  }
  troubles->Set(Trouble::kPersist, persist, false, now);
  troubles->Set(Trouble::kDevice, lost.text, lost.all, now);
}

}  // namespace kvtide
