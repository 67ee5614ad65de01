// Hands out pieces of an arena: first fit by address, neighbours that are free become one. Pieces begin at
// multiples of 64. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"

namespace kvtide::client {

class ArenaAllocator {
 public:
  explicit ArenaAllocator(uint64_t bytes);

  // The offset of a piece. ResourceExhausted with the numbers.
  absl::StatusOr<uint64_t> Allocate(uint64_t bytes);
  // Of a piece that Allocate gave.
  void Free(uint64_t offset);
  uint64_t free_bytes() const;

 private:
  const uint64_t bytes_;
  mutable Mutex mutex_;
  std::map<uint64_t, uint64_t> free_ ABSL_GUARDED_BY(mutex_);  // offset -> bytes
  std::map<uint64_t, uint64_t> taken_ ABSL_GUARDED_BY(mutex_);
  uint64_t free_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvtide::client
