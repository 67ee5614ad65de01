// The memory that a client and the daemon share: an anonymous file of a size that can never change (so that
// no end can make the other one fault), with a ring for each direction and the tensors behind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "daemon/ring/ring.h"

namespace kvtide::ring {

// Where things lie in an arena, in bytes; multiples of a page.
struct ArenaLayout {
  uint64_t request_bytes = uint64_t{1} << 20;  // the areas of the rings
  uint64_t answer_bytes = uint64_t{4} << 20;
  uint64_t tensor_bytes = 0;

  static constexpr uint64_t kHeads = 8192;  // the two RingHeads
  uint64_t requests() const { return kHeads; }
  uint64_t answers() const { return kHeads + request_bytes; }
  uint64_t tensors() const { return kHeads + request_bytes + answer_bytes; }
  uint64_t total() const { return tensors() + tensor_bytes; }
};
constexpr uint64_t kMostTensorBytes = uint64_t{1} << 44;
// InvalidArgument unless all sizes are multiples of a page and within bounds.
absl::Status CheckLayout(const ArenaLayout& layout);

class Arena {
 public:
  // A new one, all zeros; pages are taken as they are first used.
  static absl::StatusOr<Arena> Make(const ArenaLayout& layout);
  // One that came as a descriptor, which is taken. InvalidArgument if its size is not that of the layout, or
  // may change.
  static absl::StatusOr<Arena> Map(int fd, const ArenaLayout& layout);
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  ~Arena();

  int fd() const { return fd_; }
  const ArenaLayout& layout() const { return layout_; }
  RingHead* request_head() const { return reinterpret_cast<RingHead*>(data_); }
  RingHead* answer_head() const { return reinterpret_cast<RingHead*>(data_ + ArenaLayout::kHeads / 2); }
  std::byte* requests() const { return data_ + layout_.requests(); }
  std::byte* answers() const { return data_ + layout_.answers(); }
  std::byte* tensors() const { return data_ + layout_.tensors(); }

 private:
  Arena(int fd, std::byte* data, const ArenaLayout& layout) : fd_(fd), data_(data), layout_(layout) {}

  int fd_;
  std::byte* data_;
  ArenaLayout layout_;
};
static_assert(sizeof(RingHead) <= ArenaLayout::kHeads / 2);

}  // namespace kvtide::ring
