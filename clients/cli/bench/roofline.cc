#include "clients/cli/bench/roofline.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

absl::Status SystemError(const std::string& what) {
  return absl::InternalError(absl::StrCat(what, ": ", std::strerror(errno)));
}

// work(first, count) on parts of `count` things, one in each thread.
void SideBySide(int threads, size_t count, const std::function<void(size_t, size_t)>& work) {
  std::vector<std::thread> others;
  const size_t parts = static_cast<size_t>(std::max(1, threads));
  const auto begin = [&](size_t part) { return count * part / parts; };
  for (size_t part = 1; part < parts; part++)
    others.emplace_back([&, part] { work(begin(part), begin(part + 1) - begin(part)); });
  work(0, begin(1));
  for (std::thread& other : others) other.join();
}

absl::Status SendAll(int fd, const char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t sent = send(fd, data, bytes, MSG_NOSIGNAL);
    if (sent <= 0) return SystemError("cannot send over a Unix socket");
    data += sent;
    bytes -= static_cast<size_t>(sent);
  }
  return absl::OkStatus();
}

// False at the end of the stream.
bool ReceiveAll(int fd, char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = recv(fd, data, bytes, 0);
    if (got <= 0) return false;
    data += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

}  // namespace

MemoryRoofline::MemoryRoofline(size_t bytes, int threads)
    : bytes_(bytes), threads_(threads), source_(bytes / 8, 1), target_(bytes / 8, 2) {}

double MemoryRoofline::Copy(size_t bytes) {
  const auto start = Clock::now();
  std::memcpy(target_.data(), source_.data(), bytes);
  return Since(start);
}

double MemoryRoofline::CopySideBySide() {
  const auto start = Clock::now();
  SideBySide(threads_, source_.size(), [&](size_t first, size_t count) {
    std::memcpy(target_.data() + first, source_.data() + first, 8 * count);
  });
  return Since(start);
}

double MemoryRoofline::Read() {
  const auto start = Clock::now();
  std::atomic<uint64_t> sum{0};
  SideBySide(threads_, source_.size(), [&](size_t first, size_t count) {
    // Four sums: an addition does not wait for the one before.
    uint64_t sums[4] = {};
    const uint64_t* const words = source_.data() + first;
    for (size_t i = 0; i + 4 <= count; i += 4)
      for (size_t j = 0; j < 4; j++) sums[j] += words[i + j];
    sum += sums[0] + sums[1] + sums[2] + sums[3];
  });
  const double seconds = Since(start);
  sum_ += sum;
  return seconds;
}

constexpr size_t kPiece = size_t{1} << 20;
constexpr int kFileThreads = 4;

FileRoofline::FileRoofline(int fd, bool direct, size_t bytes)
    : fd_(fd),
      direct_(direct),
      bytes_(bytes),
      buffer_(static_cast<std::byte*>(std::aligned_alloc(4096, kFileThreads * kPiece))) {
  std::memset(buffer_, 0x5a, kFileThreads * kPiece);
}
FileRoofline::~FileRoofline() {
  std::free(buffer_);
  close(fd_);
}

absl::StatusOr<std::unique_ptr<FileRoofline>> FileRoofline::Make(const std::string& folder, size_t bytes) {
  std::string name = folder + "/kvtide-bench-XXXXXX";
  int fd = mkstemp(name.data());
  if (fd < 0) return SystemError(absl::StrCat("cannot make a file in ", folder));
  const int direct = open(name.c_str(), O_RDWR | O_CLOEXEC | O_DIRECT);
  unlink(name.c_str());
  if (direct >= 0) {
    close(fd);
    fd = direct;
  }
  bytes = (bytes + kPiece - 1) / kPiece * kPiece;
  std::unique_ptr<FileRoofline> file(new FileRoofline(fd, direct >= 0, bytes));
  if (posix_fallocate(fd, 0, static_cast<off_t>(bytes)) != 0)
    return absl::ResourceExhaustedError(absl::StrCat("no room for ", bytes >> 20, " MiB in ", folder));
  // Blocks that were never written are not read from the disk.
  KVTIDE_RETURN_IF_ERROR(file->Write().status());
  return file;
}

absl::StatusOr<double> FileRoofline::Transfer(bool write) {
  std::atomic<int> failed{0}, lane{0};
  if (!write && !direct_) posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
  const auto start = Clock::now();
  SideBySide(kFileThreads, bytes_ / kPiece, [&](size_t first, size_t count) {
    std::byte* const buffer = buffer_ + static_cast<size_t>(lane++) * kPiece;
    for (size_t i = first; i < first + count; i++) {
      const off_t at = static_cast<off_t>(i * kPiece);
      const ssize_t done = write ? pwrite(fd_, buffer, kPiece, at) : pread(fd_, buffer, kPiece, at);
      if (done != static_cast<ssize_t>(kPiece)) failed = errno == 0 ? EIO : errno;
    }
  });
  if (write && fdatasync(fd_) != 0) failed = errno;
  if (failed != 0)
    return absl::InternalError(
        absl::StrCat("a file cannot be ", write ? "written: " : "read: ", std::strerror(failed)));
  return Since(start);
}
absl::StatusOr<double> FileRoofline::Write() { return Transfer(true); }
absl::StatusOr<double> FileRoofline::Read() { return Transfer(false); }

struct TalkRoofline::Shared {
  int ours = -1, theirs = -1;
  alignas(64) std::atomic<uint64_t> asked{0};
  alignas(64) std::atomic<uint64_t> answered{0};
  struct Order {
    uint64_t there = 0, back = 0, words = 0;
  };
  std::vector<char> sent, received;  // of this end

  // The other end: does what each order says until the socket closes.
  void Answer() {
    std::vector<char> data;
    for (Order order; ReceiveAll(theirs, reinterpret_cast<char*>(&order), sizeof(order));) {
      for (uint64_t i = 0; i < order.words; i++) {
        const uint64_t seen = answered.load(std::memory_order_relaxed);
        while (asked.load(std::memory_order_acquire) == seen) {
        }
        answered.store(seen + 1, std::memory_order_release);
      }
      data.resize(std::max<size_t>(data.size(), std::max(order.there, order.back)));
      if (!ReceiveAll(theirs, data.data(), order.there) || !SendAll(theirs, data.data(), order.back).ok())
        return;
    }
  }
};

TalkRoofline::TalkRoofline(std::unique_ptr<Shared> shared) : shared_(std::move(shared)) {
  other_ = std::thread([this] { shared_->Answer(); });
}
TalkRoofline::~TalkRoofline() {
  shutdown(shared_->ours, SHUT_RDWR);
  other_.join();
  close(shared_->ours);
  close(shared_->theirs);
}

absl::StatusOr<std::unique_ptr<TalkRoofline>> TalkRoofline::Make() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0)
    return SystemError("cannot make Unix sockets");
  auto shared = std::make_unique<Shared>();
  shared->ours = fds[0];
  shared->theirs = fds[1];
  return std::unique_ptr<TalkRoofline>(new TalkRoofline(std::move(shared)));
}

absl::StatusOr<double> TalkRoofline::Socket(size_t there, size_t back) {
  Shared& s = *shared_;
  s.sent.resize(std::max(s.sent.size(), there));
  s.received.resize(std::max(s.received.size(), back));
  const Shared::Order order{there, back, 0};
  KVTIDE_RETURN_IF_ERROR(SendAll(s.ours, reinterpret_cast<const char*>(&order), sizeof(order)));
  const auto start = Clock::now();
  KVTIDE_RETURN_IF_ERROR(SendAll(s.ours, s.sent.data(), there));
  if (!ReceiveAll(s.ours, s.received.data(), back)) return SystemError("a Unix socket does not answer");
  return Since(start);
}

double TalkRoofline::Word() {
  constexpr uint64_t kWords = 100;
  Shared& s = *shared_;
  const Shared::Order order{0, 0, kWords};
  if (!SendAll(s.ours, reinterpret_cast<const char*>(&order), sizeof(order)).ok()) return 0;
  double seconds = 0;
  for (uint64_t i = 0; i < kWords; i++) {
    const auto start = Clock::now();
    const uint64_t asked = s.asked.load(std::memory_order_relaxed) + 1;
    s.asked.store(asked, std::memory_order_release);
    while (s.answered.load(std::memory_order_acquire) != asked) {
    }
    // The first one wakes the other end.
    if (i > 0) seconds += Since(start);
  }
  return seconds / (kWords - 1);
}

absl::StatusOr<std::unique_ptr<GpuRoofline>> GpuRoofline::Make(const std::string& device, size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(Backends backends, MakeBackends({device}, 1));
  if (backends.host == nullptr) return absl::InvalidArgumentError(absl::StrCat(device, " is no GPU"));
  std::unique_ptr<GpuRoofline> gpu(new GpuRoofline);
  gpu->bytes_ = bytes;
  gpu->device_ = std::move(backends.devices.front());
  gpu->host_ = std::move(backends.host);
  KVTIDE_ASSIGN_OR_RETURN(gpu->on_device_, gpu->device_->AllocateSlab(2 * bytes));
  KVTIDE_ASSIGN_OR_RETURN(gpu->on_host_, gpu->host_->AllocateSlab(bytes));
  std::memset(gpu->on_host_->data(), 0x5a, bytes);
  return gpu;
}

absl::StatusOr<double> GpuRoofline::Copy(CopyDirection direction) {
  std::byte* const device = on_device_->data();
  CopyPiece piece{device, on_host_->data(), bytes_};
  if (direction == CopyDirection::kToHost) piece = {on_host_->data(), device, bytes_};
  if (direction == CopyDirection::kInside) piece = {device + bytes_, device, bytes_};
  const auto start = Clock::now();
  KVTIDE_ASSIGN_OR_RETURN(const CopyTicket ticket, device_->StartCopy({&piece, 1}, direction));
  for (;;) {
    KVTIDE_ASSIGN_OR_RETURN(const bool done, device_->Poll(ticket));
    if (done) return Since(start);
  }
}

}  // namespace kvtide::cli
