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
#include "daemon/backends.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

constexpr char kUnix[] = "unix:";

// Whether a process has the Unix socket of the address open; true for addresses of other kinds. gRPC waits
// for one to come, which is no use for "auto".
bool MayAnswer(const std::string& address) {
  const absl::StatusOr<std::string> found = SocketPathOf(address);
  if (!found.ok()) return true;
  const std::string& path = *found;
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
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
    case Way::kDirect:
      return "direct";
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

HostTier Pool::host_tier() const { return impl_->carrier->host_tier(); }
void Pool::DropHostTier() { impl_->carrier->DropHostTier(); }
bool Pool::connected() const { return impl_->carrier->connected(); }

absl::StatusOr<TensorBuffer> Pool::Allocate(size_t bytes) {
  SharedMemory* const memory = own_memory_ != nullptr ? own_memory_.get() : impl_->carrier->memory();
  KVTIDE_ASSIGN_OR_RETURN(std::byte* const data, memory->Allocate(bytes));
  return TensorBuffer(memory, data, bytes);
}

namespace {

absl::StatusOr<std::unique_ptr<Carrier>> ConnectRing(const std::string& address, const PoolOptions& options,
                                                     DirectDevice* direct) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string path, SocketPathOf(address));
  if (options.arena_bytes < 1) return absl::InvalidArgumentError("arena_bytes is less than 1");
  RingOptions ring;
  ring.timeout = options.client.timeout;
  ring.connect_timeout = options.client.connect_timeout;
  ring.arena_bytes = static_cast<uint64_t>(options.arena_bytes);
  ring.poll = options.poll;
  ring.direct = direct;
  ring.host_tier = options.host_tier;
  return RingCarrier::Connect(path, ring);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Pool>> Pool::Connect(const std::string& asked, const PoolOptions& options) {
  constexpr char kShared[] = "shm:", kBest[] = "auto:", kDirect[] = "direct:";
  const bool shared = absl::StartsWith(asked, kShared);
  const bool direct = absl::StartsWith(asked, kDirect);
  const bool best = asked == "auto" || absl::StartsWith(asked, kBest);
  std::string address = asked, why = "asked for";
  if (shared) address = asked.substr(sizeof(kShared) - 1);
  if (direct) address = asked.substr(sizeof(kDirect) - 1);
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
    if (!options.direct_device.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(impl->direct, MakeDirectDevice(options.direct_device, options.direct_threads));
    }
    KVTIDE_ASSIGN_OR_RETURN(impl->carrier, MakeEmbeddedCarrier(options.embedded_config));
    return std::unique_ptr<Pool>(new Pool(std::move(impl), Way::kEmbedded, why));
  }
  if (direct || (best && absl::StartsWith(address, kUnix) && !options.direct_device.empty())) {
    absl::StatusOr<std::unique_ptr<DirectDevice>> device =
        MakeDirectDevice(options.direct_device, options.direct_threads);
    absl::StatusOr<std::unique_ptr<Carrier>> ring =
        device.ok() ? ConnectRing(address, options, device->get()) : device.status();
    if (ring.ok()) {
      impl->direct = *std::move(device);
      impl->carrier = *std::move(ring);
      return std::unique_ptr<Pool>(new Pool(std::move(impl), Way::kDirect, why));
    }
    if (direct) return ring.status();
    absl::StrAppend(&why, "; not direct: ", ring.status().message());
  }
  if (shared || (best && absl::StartsWith(address, kUnix))) {
    absl::StatusOr<std::unique_ptr<Carrier>> ring = ConnectRing(address, options, nullptr);
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
