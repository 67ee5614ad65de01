// How many GPUs a mix of conversations needs, and what a host tier is worth: a simulation over the planner's
// bytes and step times. Sessions arrive (Poisson, fixed seed), grow turn by turn, rest between turns, are
// moved to the host tier or dropped when the device fills (least recently used first), and are recomputed
// when they come back to nothing. The prefill of a group and its PCIe link serve one turn after another, and
// prefill takes its time from decoding. Deterministic for a seed; no clock, no threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/plan/plan.h"

namespace kvtide::planner {

// One kind of conversation.
struct SessionClass {
  std::string name;
  int64_t context_tokens = 0;   // at its end
  int64_t output_tokens = 256;  // per turn
  int turns = 1;
  double think_s = 30;    // between turns
  double rate_per_s = 0;  // new sessions per second, whole fleet
};

// CSV with columns context_tokens, rate_per_s and optionally name, output_tokens, turns, think_s.
absl::StatusOr<std::vector<SessionClass>> ParseMixCsv(const std::string& csv, const std::string& file_name);

enum class HostTierMode {
  kExclusive,  // kvtided: blocks move down, the host holds what the device does not
  kInclusive,  // write-through: the host holds copies
};

struct FleetRequest {
  PlanRequest plan;  // one group: device.count cards; contexts and concurrency are ignored
  TypePair pair;
  std::vector<SessionClass> mix;
  std::vector<int64_t>
      host_bytes;  // per GPU, one simulation each; empty: 0, 1/4, 1/2, 1, 2, 4 times the device tier
  HostTierMode mode = HostTierMode::kExclusive;
  double prefill_tokens_per_s = 5000;  // per card, shared by all of its turns; a guess unless measured
  // 95th percentile of waiting that is still acceptable: for room, and for the prefill of others. A turn's
  // own prefill is work, not waiting.
  double max_wait_s = 2;
  double duration_s = 3600;  // simulated; the first quarter is not counted
  uint64_t seed = 1;
  int max_gpus = 256;  // cards
};

struct FleetPoint {
  int64_t host_bytes = 0;
  int groups =
      0;  // fewest tensor-parallel groups (cards, when a group is one card) that hold max_wait_s; 0 = none
  int gpus = 0;  // their cards
  // Of returning turns, on FleetResult::compared_gpus GPUs: found on the device, on the host, gone.
  double device_hit = 0;
  double host_hit = 0;
  double miss = 0;
  double recomputed_tokens_per_s = 0;  // whole fleet
  double wait_p95_s = 0;
  double busy = 0;  // share of time with at least one active turn, mean over GPUs
  // Share of the device tier that turns at work hold, mean over time and GPUs: near 1, turns wait for room.
  double held = 0;
  double prefill_load = 0;  // share of the prefill capacity that is used; 1 = the queue only grows
  int64_t turns = 0;
};

struct FleetResult {
  int64_t device_tier_bytes = 0;  // cache per card
  int cards_per_group = 1;
  int compared_gpus =
      0;  // cards of the fleet on which the points are compared: the largest that any of them needs
  std::vector<FleetPoint> points;
  int best = -1;  // index into points: fewest GPUs, then the smallest host tier; -1 = max_gpus do not suffice
  std::vector<std::string> warnings;
};

absl::StatusOr<FleetResult> SimulateFleet(const FleetRequest& request);

std::string RenderFleetTable(const FleetRequest& request, const FleetResult& result);
std::string RenderFleetJson(const FleetRequest& request, const FleetResult& result);

}  // namespace kvtide::planner
