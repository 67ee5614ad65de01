// What is asked of cached blocks, told to whoever records it (CacheOptions::trace): stores and lookups of the
// block store, prefixes that are looked up, begun with and sealed. A recording shows how another policy, or
// other tiers, would have done (daemon/trace).
#pragma once

#include <cstdint>
#include <span>

#include "absl/time/time.h"
#include "daemon/cache/tier/block_id.h"

namespace kvtide {

enum class TraceVerb : uint8_t {
  kStore = 1,   // StoreBlocks
  kLookup = 2,  // LookupBlocks and LookupPrefix; peeks are not told
  kLoad = 3,    // LoadBlocks
  kSeal = 4,    // full blocks of known tokens that can be found by them from now on
  kBegin = 5,   // a sequence begins with a prefix
};

struct TraceEvent {
  absl::Time time;
  TraceVerb verb = TraceVerb::kLookup;
  uint64_t name_space = 0;         // in which the keys are unique
  uint32_t block_tokens = 0;       // of one block
  uint64_t block_bytes = 0;        // of one block, all its layer groups together
  uint64_t there = 0;              // a lookup: so many of the keys, from the first one on, were there
  std::span<const BlockKey> keys;  // in the order of their tokens
};

class TraceSink {
 public:
  virtual ~TraceSink() = default;
  // Called with the cache's mutex: takes what it needs of the event and returns at once.
  virtual void Record(const TraceEvent& event) = 0;
};

}  // namespace kvtide
