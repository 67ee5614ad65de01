// What this machine does by itself, without kvtide: the bounds that `kvtide bench` holds its numbers against.
// Each call does the work once and says how long it took, in seconds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/backends.h"

namespace kvtide::cli {

// Host memory, larger than most caches.
class MemoryRoofline {
 public:
  MemoryRoofline(size_t bytes, int threads);
  size_t bytes() const { return bytes_; }
  double Copy(size_t bytes);  // memcpy of the first ones by one thread
  double CopySideBySide();    // all bytes, memcpy by all threads
  double Read();              // all bytes, looked at by all threads

 private:
  const size_t bytes_;
  const int threads_;
  std::vector<uint64_t> source_, target_;
  uint64_t sum_ = 0;
};

// A file in a folder, in pieces of 1 MiB by four threads side by side, past the page cache where the file
// system allows it. The file goes with the object.
class FileRoofline {
 public:
  static absl::StatusOr<std::unique_ptr<FileRoofline>> Make(const std::string& folder, size_t bytes);
  ~FileRoofline();
  size_t bytes() const { return bytes_; }
  bool direct() const { return direct_; }  // past the page cache
  absl::StatusOr<double> Write();          // on the disk when it returns
  absl::StatusOr<double> Read();

 private:
  FileRoofline(int fd, bool direct, size_t bytes);
  absl::StatusOr<double> Transfer(bool write);
  const int fd_;
  const bool direct_;
  const size_t bytes_;
  std::byte* buffer_ = nullptr;
};

// Another thread at the other end of a Unix socket, and of two words that both ends look at.
class TalkRoofline {
 public:
  static absl::StatusOr<std::unique_ptr<TalkRoofline>> Make();
  ~TalkRoofline();
  // Sends `there` bytes over the socket and waits for `back`.
  absl::StatusOr<double> Socket(size_t there, size_t back);
  // There and back by a word, without sleeping.
  double Word();

 private:
  struct Shared;
  explicit TalkRoofline(std::unique_ptr<Shared> shared);
  const std::unique_ptr<Shared> shared_;
  std::thread other_;
};

// Plain copies between a GPU and pinned host memory, and within the GPU, by the driver.
class GpuRoofline {
 public:
  // `device`: "cuda:0", "cuda:GPU-...".
  static absl::StatusOr<std::unique_ptr<GpuRoofline>> Make(const std::string& device, size_t bytes);
  size_t bytes() const { return bytes_; }
  absl::StatusOr<double> Copy(CopyDirection direction);

 private:
  GpuRoofline() = default;
  size_t bytes_ = 0;
  std::unique_ptr<Backend> device_, host_;
  std::unique_ptr<Slab> on_device_, on_host_;
};

}  // namespace kvtide::cli
