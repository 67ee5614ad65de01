// An EvictionPolicy orders the recency records that have blocks in one tier from the coldest to the hottest;
// inside a record, blocks go in the order in which they came (recency.h). It decides nothing about room, pins
// or tiers; the tier policy asks it who is next. Not thread-safe; KvCache guards it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"

namespace kvtide {

using RecordSlot = uint32_t;  // of a recency record in the block store; small, dense, used again

// What is known of a record's blocks when it comes to a tier.
enum class Standing : uint8_t {
  kUsed,  // an open sequence has them, or they were found again
  kNew,   // nobody has asked for them since they were cached
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // A record whose first block came into the tier; it is the hottest of its standing.
  virtual void Insert(RecordSlot record, Standing standing) = 0;
  virtual void Touch(RecordSlot record) = 0;
  // Shows records from the coldest on until `visit` says false. `visit` must not change the policy.
  virtual void Peek(absl::FunctionRef<bool(RecordSlot)> visit) const = 0;
  virtual void Remove(RecordSlot record) = 0;
  // It has another standing from now on.
  virtual void Stand(RecordSlot, Standing) {}
  // Blocks of the record came (or went, below 0): the first one after Insert, the last one before Remove.
  virtual void Count(RecordSlot, int64_t /*blocks*/) {}
  // A block of the record leaves the tier for lack of room.
  virtual void Evict(RecordSlot) {}
};

enum class EvictionKind : uint8_t { kLru, kS3Fifo };
// "lru", "s3-fifo".
std::string NameOf(EvictionKind kind);
// InvalidArgument with the known names.
absl::StatusOr<EvictionKind> ParseEvictionKind(const std::string& name);
std::span<const EvictionKind> AllEvictionKinds();

// Least recently used: all calls take constant time.
std::unique_ptr<EvictionPolicy> MakeLruPolicy();

}  // namespace kvtide
