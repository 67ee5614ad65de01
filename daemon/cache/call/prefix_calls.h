// What is asked and answered about prefixes (prefix_reuse.h does it).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/name_space.h"
#include "daemon/cache/call/sequence_options.h"
#include "daemon/cache/call/token_chain.h"

namespace kvtide {

struct PrefixCall {
  ModelId model = 0;
  SequenceOptions
      options;  // of the sequence that is to begin with it: other pairs, windows or salts share nothing
  std::span<const TokenId> token_ids;
  absl::Duration lease;                  // how long; not above 0: none
  bool peek = false;                     // does not count as a use
  const CallContext* context = nullptr;  // null = this process, for as long as it takes
};

struct PrefixReport {
  struct Run {
    int tier = 0;  // the lowest one that a group's block lies in
    int64_t tokens = 0;
  };
  int64_t tokens = 0;      // from the first one on, in full blocks
  std::vector<Run> tiers;  // neighbours in one tier
  LeaseId lease = 0;       // 0: none
};

}  // namespace kvtide
