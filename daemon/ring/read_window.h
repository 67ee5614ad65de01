// Memory of another process that this one may only read: a sealed file that came as a descriptor, mapped for
// as long as the object lives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"

namespace kvtide::ring {

class ReadWindow {
 public:
  // The descriptor is taken, and closed. InvalidArgument if the file's size is not `bytes`, or may change.
  static absl::StatusOr<ReadWindow> Map(int fd, uint64_t bytes);
  ReadWindow() = default;  // of nothing
  ReadWindow(ReadWindow&& other) noexcept;
  ReadWindow& operator=(ReadWindow&& other) noexcept;
  ~ReadWindow();

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace kvtide::ring
