#include "clients/cpp/pool.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clients/cpp/client_impl.h"
#include "clients/cpp/embedded_carrier.h"
#include "clients/cpp/ring_carrier.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

constexpr char kUnix[] = "unix:";

std::string PathOf(const std::string& unix_address) {
  std::string path = unix_address.substr(sizeof(kUnix) - 1);
  return absl::StartsWith(path, "//") ? path.substr(2) : path;  // unix:///absolute/path
}

// Whether a process has the Unix socket of the address open; true for addresses of other kinds. gRPC waits
// for one to come, which is no use for "auto".
bool MayAnswer(const std::string& address) {
  if (!absl::StartsWith(address, kUnix)) return true;
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  const std::string path = PathOf(address);
  if (path.size() >= sizeof(to.sun_path)) return false;
  std::memcpy(to.sun_path, path.data(), path.size());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool answers = ::connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0;
  ::close(fd);
  return answers;
}

}  // namespace

const char* WayName(Way way) {
  switch (way) {
    case Way::kEmbedded:
      return "embedded";
    case Way::kSharedMemory:
      return "shared memory";
    case Way::kGrpc:
      return "gRPC";
  }
  return "unknown";
}

TensorBuffer::TensorBuffer(TensorBuffer&& other) noexcept
    : memory_(other.memory_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}
TensorBuffer& TensorBuffer::operator=(TensorBuffer&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}
TensorBuffer::~TensorBuffer() {
  if (data_ != nullptr) memory_->Free(data_);
}

Pool::Pool(std::unique_ptr<Impl> impl, Way way, std::string why)
    : Client(std::move(impl)),
      way_(way),
      why_(std::move(why)),
      own_memory_(impl_->carrier->memory() == nullptr ? MakeProcessMemory() : nullptr) {}
Pool::~Pool() = default;

absl::StatusOr<TensorBuffer> Pool::Allocate(size_t bytes) {
  SharedMemory* const memory = own_memory_ != nullptr ? own_memory_.get() : impl_->carrier->memory();
  KVTIDE_ASSIGN_OR_RETURN(std::byte* const data, memory->Allocate(bytes));
  return TensorBuffer(memory, data, bytes);
}

namespace {

absl::StatusOr<std::unique_ptr<Carrier>> ConnectRing(const std::string& address, const PoolOptions& options) {
  if (!absl::StartsWith(address, kUnix)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", address, "\": memory is shared with a daemon on a Unix socket; use shm:unix:/path"));
  }
  if (options.arena_bytes < 1) return absl::InvalidArgumentError("arena_bytes is less than 1");
  RingOptions ring;
  ring.timeout = options.client.timeout;
  ring.connect_timeout = options.client.connect_timeout;
  ring.arena_bytes = static_cast<uint64_t>(options.arena_bytes);
  ring.poll = options.poll;
  return RingCarrier::Connect(PathOf(address), ring);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> Pool::Connect(const std::string& asked, const PoolOptions& options) {
  constexpr char kShared[] = "shm:", kBest[] = "auto:";
  const bool shared = absl::StartsWith(asked, kShared);
  const bool best = asked == "auto" || absl::StartsWith(asked, kBest);
  std::string address = asked, why = "asked for";
  if (shared) address = asked.substr(sizeof(kShared) - 1);
  if (best && asked != "auto") address = asked.substr(sizeof(kBest) - 1);
  if (address == "auto") {
    address = DefaultAddress();
    // Who names a daemon wants that one.
    const char* const named = std::getenv("KVTIDE_ADDRESS");
    if (named != nullptr && *named != '\0') {
      why = absl::StrCat("$KVTIDE_ADDRESS is ", address);
    } else if (!best || MayAnswer(address)) {
      why = absl::StrCat("kvtided answers at ", address);
    } else {
      why = absl::StrCat("no kvtided answers at ", address);
      address = "embedded";
    }
  } else if (best) {
    why = "the best way";
  }
  auto impl = std::make_unique<Impl>();
  impl->address = address;
  if (address == "embedded") {
    KVTIDE_ASSIGN_OR_RETURN(impl->carrier, MakeEmbeddedCarrier(options.embedded_config));
    return std::unique_ptr<Pool>(new Pool(std::move(impl), Way::kEmbedded, why));
  }
  if (shared || (best && absl::StartsWith(address, kUnix))) {
    absl::StatusOr<std::unique_ptr<Carrier>> ring = ConnectRing(address, options);
    if (ring.ok()) {
      impl->carrier = *std::move(ring);
      return std::unique_ptr<Pool>(new Pool(std::move(impl), Way::kSharedMemory, why));
    }
    if (shared) return ring.status();
    absl::StrAppend(&why, "; no shared memory: ", ring.status().message());
  }
  auto grpc = ConnectGrpc(address, options.client);
  if (!grpc.ok()) return best ? Annotate(grpc.status(), "auto") : grpc.status();
  return std::unique_ptr<Pool>(new Pool(*std::move(grpc), Way::kGrpc, why));
}

}  // namespace kvtide::client
