// Which memory of the host is registered with the driver (PinnedRange), for all devices: kernels read
// tensors there, and write results, where callers have them. Thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace kvtide::cuda {

// As of some moment. Ranges do not overlap and are in ascending order.
class PinnedRanges {
 public:
  static std::shared_ptr<const PinnedRanges> Now();
  // `data` is what the driver registered; until Remove.
  static void Add(const std::byte* data, size_t bytes);
  static void Remove(const std::byte* data);

  bool empty() const { return ranges_.empty(); }
  // Whether kernels may read and write [data, data + bytes) by 16 bytes at a time.
  bool Reaches(const void* data, size_t bytes) const;

 private:
  struct Range {
    const std::byte* begin;
    const std::byte* end;
  };
  std::vector<Range> ranges_;
};

}  // namespace kvtide::cuda
