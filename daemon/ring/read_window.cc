#include "daemon/ring/read_window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace kvtide::ring {

absl::StatusOr<ReadWindow> ReadWindow::Map(int fd, uint64_t bytes) {
  const absl::Cleanup close = [fd] {
    if (fd >= 0) ::close(fd);
  };
  constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  struct stat about {};
  if (bytes == 0 || ::fstat(fd, &about) != 0 || static_cast<uint64_t>(about.st_size) != bytes ||
      (::fcntl(fd, F_GET_SEALS) & kSeals) != kSeals)
    return absl::InvalidArgumentError("what came as a tier of host memory is none, or its size may change");
  void* const data = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED)
    return absl::ResourceExhaustedError(
        absl::StrCat("no room to map ", bytes, " bytes of a tier of host memory: ", std::strerror(errno)));
  ReadWindow window;
  window.bytes_ = {static_cast<const std::byte*>(data), bytes};
  return window;
}

ReadWindow::ReadWindow(ReadWindow&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
ReadWindow& ReadWindow::operator=(ReadWindow&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}
ReadWindow::~ReadWindow() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace kvtide::ring
