// A queue of messages in memory that two processes share: one writes, the other reads, and neither trusts the
// other. A message is an entry in a small ring, which says where its bytes lie in an area beside the ring.
// The writer's and the reader's side keep all that they rely on in memory of their own; what the other end
// can change is loaded once, checked, and copied before it is looked at. Nothing that the other end writes
// makes this end touch a byte outside of ring and area.
//
// A reader that has nothing to do looks at the ring for a while, then also lets others have the processor,
// and then sleeps (a futex on `written`); a writer wakes it only then, so that a message to a reader that is
// awake needs no system call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace kvtide::ring {

constexpr uint32_t kEntries = 64;

// What lies in shared memory; zeros are an empty ring. Counts run on and wrap at 2^32.
struct RingHead {
  struct Entry {
    uint64_t id = 0;                 // of the call
    int64_t timeout_ns = 0;          // of the call, from when it is read; 0 = none
    uint32_t offset = 0, bytes = 0;  // in the area
    uint64_t unused = 0;
  };
  alignas(64) std::atomic<uint32_t> written{0};   // messages; changed by the writer
  alignas(64) std::atomic<uint32_t> read{0};      // messages; changed by the reader
  alignas(64) std::atomic<uint32_t> sleeping{0};  // 1: the reader wants to be woken
  alignas(64) Entry entries[kEntries];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(RingHead) == 3 * 64 + kEntries * 32);

// Not thread-safe.
class RingWriter {
 public:
  // Borrows both. `area_bytes` is below 4 GiB.
  RingWriter(RingHead* head, std::byte* area, size_t area_bytes)
      : head_(head), area_(area), area_bytes_(area_bytes) {}

  // Room for a message of so many bytes, to be filled before Publish. ResourceExhausted if there is none now,
  // or at all; Internal if the reader's count makes no sense.
  absl::StatusOr<std::byte*> Reserve(size_t bytes);
  // The reserved message becomes readable; wakes the reader if it sleeps.
  void Publish(uint64_t id, absl::Duration timeout = absl::InfiniteDuration());

  size_t area_bytes() const { return area_bytes_; }

 private:
  RingHead* const head_;
  std::byte* const area_;
  const size_t area_bytes_;
  uint32_t written_ = 0;
  size_t next_ = 0;  // first free byte of the area
  size_t reserved_offset_ = 0, reserved_bytes_ = 0;
};

struct RingMessage {
  uint64_t id = 0;
  absl::Duration timeout = absl::InfiniteDuration();
  std::string bytes;  // a copy
};

// Not thread-safe, but for Wake.
class RingReader {
 public:
  RingReader(RingHead* head, const std::byte* area, size_t area_bytes)
      : head_(head), area_(area), area_bytes_(area_bytes) {}

  // True: `message` holds the next one. Internal, once and for all, if what the writer wrote makes no sense.
  absl::StatusOr<bool> Read(RingMessage* message);
  // Returns when there may be something to read, when `sleep` has passed, or without a reason: looks for
  // `poll`, then sleeps.
  void Wait(absl::Duration poll, absl::Duration sleep);
  bool empty() const { return head_->written.load(std::memory_order_acquire) == read_; }
  // Ends a sleep of the reader, from any thread of this process.
  void Wake();

 private:
  RingHead* const head_;
  const std::byte* const area_;
  const size_t area_bytes_;
  uint32_t read_ = 0;
};

}  // namespace kvtide::ring
