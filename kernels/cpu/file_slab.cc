#include "kernels/cpu/file_slab.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

class FileSlab : public Slab {
 public:
  FileSlab(int fd, std::byte* data, size_t bytes) : fd_(fd), data_(data), bytes_(bytes) {}
  ~FileSlab() override {
    ::munmap(data_, bytes_);
    ::close(fd_);
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }
  absl::StatusOr<SlabHandle> Share() const override {
    SlabHandle handle;
    handle.kind = SlabHandle::Kind::kFile;
    handle.fd = fd_;
    handle.bytes = bytes_;
    std::memcpy(handle.device.data(), "cpu", 4);
    return handle;
  }

 private:
  const int fd_;
  std::byte* const data_;
  const size_t bytes_;
};

absl::StatusOr<std::unique_ptr<Slab>> MapAll(int fd, size_t bytes) {
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    ::close(fd);
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes of shared host memory: ", std::strerror(error)));
  }
  return std::make_unique<FileSlab>(fd, static_cast<std::byte*>(data), bytes);
}

// A file of zeros, with these seals.
absl::StatusOr<int> MakeFile(size_t bytes, int seals) {
  const int fd = ::memfd_create("kvtide pool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) == 0 &&
      (seals == 0 || ::fcntl(fd, F_ADD_SEALS, seals) == 0))
    return fd;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  return absl::ResourceExhaustedError(
      absl::StrCat("no ", bytes, " bytes of shared host memory: ", std::strerror(error)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Slab>> MakeFileSlab(size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(const int fd, MakeFile(bytes, kSeals));
  return MapAll(fd, bytes);
}

absl::StatusOr<std::unique_ptr<Slab>> MakeReadableSlab(size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(const int fd, MakeFile(bytes, 0));
  // The one mapping that writes is there before the seal.
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Slab> slab, MapAll(fd, bytes));
  if (::fcntl(fd, F_ADD_SEALS, kSeals | F_SEAL_FUTURE_WRITE) != 0)
    return absl::FailedPreconditionError(
        absl::StrCat("this kernel cannot keep others from writing to shared memory (Linux 5.1 can): ",
                     std::strerror(errno)));
  return slab;
}

absl::StatusOr<std::unique_ptr<Slab>> MapFileSlab(const SlabHandle& handle) {
  struct stat about {};
  const bool good = handle.kind == SlabHandle::Kind::kFile && handle.bytes > 0 &&
                    ::fstat(handle.fd, &about) == 0 && static_cast<uint64_t>(about.st_size) == handle.bytes &&
                    (::fcntl(handle.fd, F_GET_SEALS) & kSeals) == kSeals;
  if (!good) {
    if (handle.fd >= 0) ::close(handle.fd);
    return absl::InvalidArgumentError("what came as the memory of a pool is none, or its size may change");
  }
  return MapAll(handle.fd, static_cast<size_t>(handle.bytes));
}

}  // namespace kvtide
