#include "clients/cpp/ring_carrier.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/arena_allocator.h"
#include "clients/cpp/call_trace_impl.h"
#include "daemon/ring/arena.h"
#include "daemon/ring/handshake.h"
#include "daemon/ring/read_window.h"
#include "daemon/ring/ring.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

// How often a caller that sleeps looks whether the daemon still lives.
constexpr absl::Duration kHeartbeat = absl::Milliseconds(20);
// How much longer than its timeout a call may take until the daemon counts as stuck.
constexpr absl::Duration kPatience = absl::Seconds(5);

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

absl::StatusOr<Socket> ConnectTo(const std::string& path) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (path.size() >= sizeof(to.sun_path))
    return absl::InvalidArgumentError(absl::StrCat("the socket path ", path, " is too long"));
  std::memcpy(to.sun_path, path.data(), path.size());
  Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.fd() >= 0 && ::connect(socket.fd(), reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0)
    return socket;
  const int error = errno;
  if (error == ENOENT || error == ECONNREFUSED) {
    return absl::NotFoundError(absl::StrCat(
        "no kvtided offers shared memory at ", path, ": ", std::strerror(error),
        "; is it running, with this address as --listen unix:... and without --shared-memory 0?"));
  }
  if (error == EACCES || error == EPERM)
    return absl::PermissionDeniedError(absl::StrCat("no permission for the socket ", path));
  return absl::UnavailableError(absl::StrCat("cannot connect to ", path, ": ", std::strerror(error)));
}

// The tensors' part of the arena.
class ArenaMemory : public SharedMemory {
 public:
  ArenaMemory(std::byte* base, uint64_t bytes) : base_(base), bytes_(bytes), pieces_(bytes) {}

  std::optional<uint64_t> PlaceOf(const void* data, size_t bytes) const override {
    const uint64_t offset = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(base_);
    if (offset > bytes_ || bytes > bytes_ - offset || offset % kAlignment != 0) return std::nullopt;
    return offset;
  }
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    KVTIDE_ASSIGN_OR_RETURN(const uint64_t offset, pieces_.Allocate(bytes));
    return base_ + offset;
  }
  void Free(std::byte* data) override { pieces_.Free(static_cast<uint64_t>(data - base_)); }

 private:
  static constexpr uint64_t kAlignment = 16;
  std::byte* const base_;
  const uint64_t bytes_;
  ArenaAllocator pieces_;
};

class Ring final : public RingCarrier {
 public:
  // A pool that is mapped, and what holds it; a tier of host memory.
  struct Mapped {
    std::vector<std::unique_ptr<Slab>> slabs;
    std::vector<PoolSlab> pool;
    HostTier host;
  };

  Ring(Socket socket, ring::Arena arena, const RingOptions& options, uint64_t generation, Mapped mapped)
      : options_(options),
        mapped_(std::move(mapped)),
        maps_host_(!mapped_.host.empty()),
        generation_(generation),
        socket_(std::move(socket)),
        arena_(std::move(arena)),
        memory_(arena_.tensors(), arena_.layout().tensor_bytes),
        requests_(arena_.request_head(), arena_.requests(), arena_.layout().request_bytes),
        answers_(arena_.answer_head(), arena_.answers(), arena_.layout().answer_bytes) {}

  ~Ring() override {
    // Whoever works on the pool, or copies from the tier of host memory, has ended before.
    if (!mapped_.pool.empty() || maps_host_)
      (void)::send(socket_.fd(), &ring::kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  uint64_t generation() const override { return generation_; }
  std::span<const PoolSlab> pool() const override { return mapped_.pool; }
  HostTier host_tier() const override {
    const MutexLock lock(host_mutex_);
    return mapped_.host;
  }
  void DropHostTier() override {
    const MutexLock lock(host_mutex_);
    mapped_.host = {};
  }
  bool connected() const override { return !ring::HungUp(socket_.fd()); }
  SharedMemory* memory() override { return &memory_; }

  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) override {
    AddTrace(request);
    const size_t size = request->ByteSizeLong();
    const MutexLock lock(mutex_);
    if (broken_) return Gone();
    auto to = requests_.Reserve(size);
    if (!to.ok()) {
      // A message that is too large is its caller's mistake; nothing else can fill the ring.
      if (to.status().code() != absl::StatusCode::kResourceExhausted) broken_ = true;
      return Annotate(to.status(), "shared memory");
    }
    request->SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(*to));
    requests_.Publish(++last_call_, options_.timeout);
    KVTIDE_RETURN_IF_ERROR(WaitForAnswer());
    if (!response->ParseFromString(answer_.bytes)) {
      broken_ = true;
      return absl::InternalError("kvtided sent an answer that is none");
    }
    if (response->has_error()) return FromProto(response->error());
    if (response->result_case() == v1::SessionResponse::RESULT_NOT_SET)
      return absl::InternalError("kvtided sent an empty answer");
    return absl::OkStatus();
  }

 private:
  static absl::Status Gone() {
    return absl::UnavailableError(
        "the connection to kvtided is lost (it has ended, or was restarted), and the sequences that were "
        "made "
        "on it are closed; connect again");
  }

  absl::Status WaitForAnswer() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    absl::Time end = absl::InfiniteFuture();
    for (bool first = true;; first = false) {
      // Before the answer is looked for: what was written before the end is there.
      const bool ended = !first && ring::HungUp(socket_.fd());
      const absl::StatusOr<bool> got = answers_.Read(&answer_);
      if (!got.ok()) {
        broken_ = true;
        return Annotate(got.status(), "kvtided's answer");
      }
      if (*got && answer_.id == last_call_) return absl::OkStatus();
      if (ended) {
        broken_ = true;
        return Gone();
      }
      if (*got) continue;  // an answer that nobody waits for
      if (first) {
        answers_.Wait(options_.poll, absl::ZeroDuration());
        continue;
      }
      const absl::Time now = absl::Now();
      if (end == absl::InfiniteFuture()) end = now + options_.timeout + kPatience;
      if (now > end) {
        broken_ = true;
        return absl::DeadlineExceededError(absl::StrCat("no answer within ",
                                                        absl::FormatDuration(options_.timeout + kPatience),
                                                        "; the connection is given up"));
      }
      answers_.Wait(absl::ZeroDuration(), kHeartbeat);
    }
  }

  const RingOptions options_;
  mutable Mutex host_mutex_;
  Mapped mapped_;  // `host` under the mutex
  const bool maps_host_;
  const uint64_t generation_;
  const Socket socket_;
  const ring::Arena arena_;
  ArenaMemory memory_;
  Mutex mutex_;  // held while a call is under way
  ring::RingWriter requests_ ABSL_GUARDED_BY(mutex_);
  ring::RingReader answers_ ABSL_GUARDED_BY(mutex_);
  ring::RingMessage answer_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_call_ ABSL_GUARDED_BY(mutex_) = 0;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
};

// Maps what of the pool lies where `device` computes.
absl::StatusOr<Ring::Mapped> MapPool(int socket, absl::Time deadline, DirectDevice* device) {
  ring::PoolSlabs told;
  int fds[ring::kMostSlabs];
  const absl::Status received =
      ring::Receive(socket, std::as_writable_bytes(std::span(&told, 1)), deadline, std::span<int>(fds));
  const absl::Cleanup close = [&] {
    for (const int fd : fds)
      if (fd >= 0) ::close(fd);
  };
  KVTIDE_RETURN_IF_ERROR(received);
  Ring::Mapped mapped;
  absl::Status status = absl::FailedPreconditionError("kvtided shares no memory of its pool");
  size_t files = 0;
  for (uint32_t i = 0; i < std::min(told.count, ring::kMostSlabs); i++) {
    const ring::PoolSlabs::Slab& from = told.slabs[i];
    SlabHandle handle;
    handle.kind = static_cast<SlabHandle::Kind>(from.kind);
    handle.bytes = from.bytes;
    std::memcpy(handle.device.data(), from.owner, handle.device.size() - 1);
    std::memcpy(handle.ipc.data(), from.ipc, handle.ipc.size());
    if (handle.kind == SlabHandle::Kind::kFile && files < ring::kMostSlabs)
      handle.fd = std::exchange(fds[files++], -1);
    absl::StatusOr<std::unique_ptr<Slab>> slab = device->Map(handle);
    if (!slab.ok()) {
      status = slab.status();
      continue;
    }
    const auto text = [](const char* of, size_t most) { return std::string(of, ::strnlen(of, most)); };
    mapped.pool.push_back({text(from.tier, sizeof(from.tier)), text(from.device, sizeof(from.device)),
                           (*slab)->data(), from.bytes});
    mapped.slabs.push_back(*std::move(slab));
  }
  if (mapped.pool.empty()) return status;
  return mapped;
}

// The tier of host memory; nothing where the daemon keeps it to itself, or it cannot be mapped.
absl::StatusOr<HostTier> MapHost(int socket, absl::Time deadline) {
  ring::HostTier told;
  int fd = -1;
  const absl::Status received =
      ring::Receive(socket, std::as_writable_bytes(std::span(&told, 1)), deadline, &fd);
  if (!received.ok() && fd >= 0) ::close(fd);
  KVTIDE_RETURN_IF_ERROR(received);
  if (fd < 0) return HostTier();
  absl::StatusOr<ring::ReadWindow> window = ring::ReadWindow::Map(fd, told.bytes);
  if (!window.ok()) return HostTier();
  auto mapping = std::make_shared<ring::ReadWindow>(*std::move(window));
  return HostTier{mapping->bytes(), mapping};
}

}  // namespace

absl::StatusOr<std::string> SocketPathOf(const std::string& address) {
  constexpr char kUnix[] = "unix:";
  if (!absl::StartsWith(address, kUnix))
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", address, "\": memory is shared with a daemon on a Unix socket; use shm:unix:/path"));
  const std::string path = address.substr(sizeof(kUnix) - 1);
  return absl::StartsWith(path, "//") ? path.substr(2) : path;  // unix:///absolute/path
}

absl::StatusOr<std::unique_ptr<RingCarrier>> RingCarrier::Connect(const std::string& socket_path,
                                                                  const RingOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(Socket socket, ConnectTo(socket_path + ring::kSocketSuffix));
  ring::Hello hello;
  hello.generation = options.generation;
  hello.tensor_bytes = options.arena_bytes;
  if (options.direct != nullptr) {
    hello.wants_pool = 1;
    hello.layout = ring::LayoutFingerprint();
  }
  hello.wants_host = options.host_tier ? 1 : 0;
  KVTIDE_RETURN_IF_ERROR(ring::Send(socket.fd(), std::as_bytes(std::span(&hello, 1)), {}));
  ring::Welcome welcome;
  int fd = -1;
  const absl::Status received = ring::Receive(socket.fd(), std::as_writable_bytes(std::span(&welcome, 1)),
                                              absl::Now() + options.connect_timeout, &fd);
  const absl::Status status = received.ok() ? ring::CheckWelcome(welcome) : received;
  if (!status.ok() || fd < 0) {
    if (fd >= 0) ::close(fd);
    return status.ok() ? absl::InternalError("kvtided sent no arena") : status;
  }
  ring::ArenaLayout layout;
  layout.request_bytes = welcome.request_bytes;
  layout.answer_bytes = welcome.answer_bytes;
  layout.tensor_bytes = welcome.tensor_bytes;
  KVTIDE_ASSIGN_OR_RETURN(ring::Arena arena, ring::Arena::Map(fd, layout));
  Ring::Mapped mapped;
  if (options.direct != nullptr) {
    KVTIDE_ASSIGN_OR_RETURN(mapped,
                            MapPool(socket.fd(), absl::Now() + options.connect_timeout, options.direct));
  }
  if (options.host_tier) {
    KVTIDE_ASSIGN_OR_RETURN(mapped.host, MapHost(socket.fd(), absl::Now() + options.connect_timeout));
  }
  return std::make_unique<Ring>(std::move(socket), std::move(arena), options, welcome.generation,
                                std::move(mapped));
}

}  // namespace kvtide::client
