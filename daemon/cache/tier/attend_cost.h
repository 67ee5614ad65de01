// Whether blocks that lie in a lower tier which attends are attended there, or are brought home first: by
// what either is predicted to take. Pure functions; where the rates come from: measured_rates.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace kvtide {

enum class AttendLowerTiers : uint8_t {
  kCost,          // what is predicted to take less time
  kInPlace,       // always where they lie
  kPromoteFirst,  // brought home first wherever there is room
};
// "cost", "in-place", "promote-first".
std::string NameOf(AttendLowerTiers rule);
// InvalidArgument with the known names.
absl::StatusOr<AttendLowerTiers> ParseAttendLowerTiers(const std::string& name);

// Bytes of blocks a second.
struct AttendRates {
  double lower = 0, home = 0;  // attended where they lie, and at home
  double up = 0;               // copied home
};

// One sequence's blocks in one lower tier, as one attention sees them.
struct LowerTierView {
  uint64_t bytes = 0;  // of the blocks, all of their layers
  uint64_t room = 0;   // that is free at home and may be filled: nobody makes way
  // So many attentions, this one included, read them before they would be home by themselves.
  double reads = 1;
  double passes = 1;  // over the bytes, of one attention (PassesOf)
};

// True where copying the blocks and then attending at home takes less time than attending them where they
// lie; never where home has no room for all of them.
bool PromoteFirst(const LowerTierView& view, const AttendRates& rates, AttendLowerTiers rule);

// An attention reads blocks once for so many queries.
constexpr int64_t kQueriesOfPass = 16;
constexpr double PassesOf(int64_t queries) {
  return static_cast<double>((queries + kQueriesOfPass - 1) / kQueriesOfPass);
}

// How often a sequence that has attended in so many steps without a pause will go on to: as often again, but
// not more than kMostReads, after which the mover has brought its blocks home beside the attentions.
constexpr int64_t kMostReads = 8;
constexpr double ReadsOf(int64_t recent_steps) {
  return static_cast<double>(recent_steps < 1 ? 1 : recent_steps > kMostReads ? kMostReads : recent_steps);
}

}  // namespace kvtide
