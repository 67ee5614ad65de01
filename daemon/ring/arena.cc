#include "daemon/ring/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::ring {
namespace {

constexpr uint64_t kPage = 4096;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

absl::Status Failed(const char* what, uint64_t bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat("no shared memory of ", bytes, " bytes: ", what, ": ", std::strerror(errno)));
}

absl::StatusOr<std::byte*> MapFile(int fd, uint64_t bytes) {
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return Failed("mmap", bytes);
  return static_cast<std::byte*>(data);
}

}  // namespace

absl::Status CheckLayout(const ArenaLayout& layout) {
  constexpr uint64_t kMostMessageBytes = uint64_t{1} << 30;
  const auto good = [](uint64_t bytes, uint64_t most) {
    return bytes >= kPage && bytes <= most && bytes % kPage == 0;
  };
  if (good(layout.request_bytes, kMostMessageBytes) && good(layout.answer_bytes, kMostMessageBytes) &&
      good(layout.tensor_bytes, kMostTensorBytes)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "an arena with ", layout.request_bytes, " + ", layout.answer_bytes, " bytes for messages and ",
      layout.tensor_bytes, " for tensors; each has to be whole pages"));
}

absl::StatusOr<Arena> Arena::Make(const ArenaLayout& layout) {
  KVTIDE_RETURN_IF_ERROR(CheckLayout(layout));
  const int fd = ::memfd_create("kvtide-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Failed("memfd_create", layout.total());
  if (::ftruncate(fd, static_cast<off_t>(layout.total())) != 0 || ::fcntl(fd, F_ADD_SEALS, kSeals) != 0) {
    const absl::Status status = Failed("ftruncate and seals", layout.total());
    ::close(fd);
    return status;
  }
  return Map(fd, layout);
}

absl::StatusOr<Arena> Arena::Map(int fd, const ArenaLayout& layout) {
  absl::Status status = CheckLayout(layout);
  struct stat info {};
  if (status.ok() && (::fstat(fd, &info) != 0 || static_cast<uint64_t>(info.st_size) != layout.total() ||
                      (::fcntl(fd, F_GET_SEALS) & kSeals) != kSeals)) {
    status =
        absl::InvalidArgumentError(absl::StrCat("the arena's file has ", info.st_size, " bytes instead of ",
                                                layout.total(), ", or its size is not sealed"));
  }
  absl::StatusOr<std::byte*> data = status.ok() ? MapFile(fd, layout.total()) : status;
  if (!data.ok()) {
    ::close(fd);
    return data.status();
  }
  return Arena(fd, *data, layout);
}

Arena::Arena(Arena&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), data_(std::exchange(other.data_, nullptr)), layout_(other.layout_) {}

Arena::~Arena() {
  if (data_ != nullptr) ::munmap(data_, layout_.total());
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace kvtide::ring
