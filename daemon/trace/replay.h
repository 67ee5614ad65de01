// Plays what cached blocks were asked (trace_file.h) against a cache with other tiers or another eviction
// policy: the daemon's own cache (daemon/cache), over tiers without memory. A lookup is a prompt: what is
// there is loaded, what is not is computed and stored; stores and seals of a recording add what they name.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/tier/eviction_policy.h"
#include "daemon/trace/trace_file.h"

namespace kvtide {

// Everything of a recording. DataLoss and errors of TraceReader; a file that ends inside a record gives what
// is before, and `cut_off`. `progress` gets the events that were read; false ends with Cancelled.
struct Recording {
  std::vector<RecordedEvent> events;
  uint64_t missing = 0;  // events that were left out when it was recorded
  bool cut_off = false;
};
absl::StatusOr<Recording> ReadRecording(const std::string& path,
                                        const std::function<bool(uint64_t)>& progress);

struct ReplayOptions {
  EvictionKind eviction = EvictionKind::kLru;
  uint64_t host_bytes = 0;
  uint64_t disk_bytes = 0;  // 0: none
  // Gets the events that were played; false ends with Cancelled. Empty: nobody.
  std::function<bool(uint64_t)> progress;
};

struct ReplayResult {
  uint64_t lookups = 0;
  uint64_t asked_blocks = 0, hit_blocks = 0;  // of lookups
  uint64_t asked_tokens = 0, hit_tokens = 0;
  uint64_t host_hit_blocks = 0, disk_hit_blocks = 0;  // where they were found
  uint64_t stored_blocks = 0, stored_bytes = 0;
  uint64_t refused_blocks = 0;  // larger than the tiers
  uint64_t dropped_blocks = 0;
  uint64_t down_bytes = 0, up_bytes = 0;  // from host to disk and back
  double TokenHitRatio() const { return Ratio(hit_tokens, asked_tokens); }
  double BlockHitRatio() const { return Ratio(hit_blocks, asked_blocks); }

 private:
  static double Ratio(uint64_t part, uint64_t whole) {
    return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
  }
};

// Events are in the order of time. InvalidArgument: tiers that are too small for one block, sizes that no
// block has. The same events and options give the same result.
absl::StatusOr<ReplayResult> Replay(std::span<const RecordedEvent> events, const ReplayOptions& options);

// Bytes of all blocks that the events name, each once: a tier of this size drops nothing.
uint64_t DistinctBytes(std::span<const RecordedEvent> events);

}  // namespace kvtide
