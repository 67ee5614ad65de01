#include "daemon/service/ring_server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/ring/arena.h"
#include "daemon/ring/ring.h"
#include "google/protobuf/arena.h"
#include "kernels/base/check.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

// How long a connection may take to say Hello, and how many may be at it.
constexpr absl::Duration kHelloTime = absl::Seconds(2);
constexpr size_t kMostGuests = 64;
// A sleep that nobody ends: only a lost wake-up could need it.
constexpr absl::Duration kLongestSleep = absl::Milliseconds(500);
constexpr uint64_t kPage = 4096;
// How long a process that maps the pool may take to end once its connection has.
constexpr absl::Duration kLongestDeath = absl::Seconds(10);

// A descriptor of the process at the other end; -1 where the kernel gives none, as of one in a PID namespace
// that is not to be seen from here.
int ProcessOf(int socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.pid <= 0) return -1;
  return static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0));
}

size_t MostPollers() { return std::max<size_t>(1, std::thread::hardware_concurrency() / 2); }

}  // namespace

// A connection that has not said Hello yet.
struct RingServer::Guest {
  int socket = -1;
  absl::Time deadline;
  ring::Hello hello;
  size_t received = 0;
};

class RingServer::Client {
 public:
  // `process`: a pidfd of a client that maps the pool or the host tier (`host_tier`, -1 = it does not),
  // taken; -1 = it cannot be watched, or need not.
  Client(RingServer* server, int socket, ring::Arena arena, std::shared_ptr<Connection> connection,
         bool maps_pool, int host_tier, int process)
      : server_(server),
        socket_(socket),
        process_(process),
        maps_pool_(maps_pool),
        arena_(std::move(arena)),
        requests_(arena_.request_head(), arena_.requests(), arena_.layout().request_bytes),
        answers_(arena_.answer_head(), arena_.answers(), arena_.layout().answer_bytes),
        session_(std::make_unique<RingSession>(server->service_, std::move(connection),
                                               TensorMemory(arena_.tensors(), arena_.layout().tensor_bytes),
                                               static_cast<int64_t>(arena_.layout().answer_bytes) - 4096,
                                               maps_pool, host_tier)) {
    thread_ = std::thread([this] { Run(); });
  }
  ~Client() {
    Close();
    while (!ended()) {
      requests_.Wake();
      absl::SleepFor(absl::Milliseconds(1));
    }
    thread_.join();
    ::close(socket_);
    if (process_ >= 0) ::close(process_);
  }

  int socket() const { return socket_; }
  uint64_t bytes() const { return arena_.layout().total(); }
  bool closing() const { return closing_.load(std::memory_order_relaxed); }
  bool ended() const { return ended_.load(std::memory_order_acquire); }
  // The daemon ends: nobody's work is waited for.
  void Stop() {
    stopping_.store(true);
    Close();
  }
  // The client has gone, or has to go. To be repeated until `ended`: a thread that is about to sleep misses
  // it.
  void Close() {
    closing_.store(true);
    {
      const MutexLock lock(mutex_);
      if (session_ != nullptr) session_->Cancel();
    }
    requests_.Wake();
  }

 private:
  void Run() {
    ring::RingMessage message;
    bool served = true;  // something since it last slept
    while (!closing()) {
      const absl::StatusOr<bool> got = requests_.Read(&message);
      if (!got.ok()) {
        session_->set_end(Annotate(got.status(), "a client's ring"));
        break;
      }
      if (!*got) {
        Rest(served);
        served = false;
        continue;
      }
      served = true;
      if (const absl::Status status = Serve(message); !status.ok()) {
        session_->set_end(status);
        break;
      }
    }
    std::unique_ptr<RingSession> session;
    {
      const MutexLock lock(mutex_);
      session = std::move(session_);
    }
    if (maps_pool_ || session->reads_in_place()) WaitForWork();
    // In this order: who sees the connection end finds the sequences closed.
    session.reset();
    ::shutdown(socket_, SHUT_RDWR);
    ended_.store(true, std::memory_order_release);
  }

  // A client that maps the pool may have work of its own under way that reads and writes blocks, one that
  // loads in place such that reads them. One that says goodbye has none; of a process that has ended, the
  // driver has ended all.
  void WaitForWork() const {
    char last = 0;
    if (process_ < 0 || (::recv(socket_, &last, 1, MSG_DONTWAIT) == 1 && last == ring::kGoodbye)) return;
    const absl::Time end = absl::Now() + kLongestDeath;
    pollfd wait{process_, POLLIN, 0};
    while (!stopping_.load() && absl::Now() < end && ::poll(&wait, 1, 20) == 0) {
    }
  }

  // Looks at the ring for a while, if not too many do, and sleeps. Who sleeps does not count as looking: a
  // client that rests would keep another one's thread from it.
  void Rest(bool served) {
    if (served) {
      if (server_->pollers_.fetch_add(1) < server_->most_pollers_)
        requests_.Wait(server_->options_.limits.poll, absl::ZeroDuration());
      server_->pollers_.fetch_sub(1);
      if (!requests_.empty()) return;
    }
    requests_.Wait(absl::ZeroDuration(), kLongestSleep);
  }

  absl::Status Serve(const ring::RingMessage& message) {
    alignas(16) char block[4096];
    google::protobuf::ArenaOptions options;
    options.initial_block = block;
    options.initial_block_size = sizeof(block);
    google::protobuf::Arena memory(options);
    auto* const answer = google::protobuf::Arena::CreateMessage<v1::SessionResponse>(&memory);
    session_->Serve(message.bytes, message.timeout, answer);
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const to, answers_.Reserve(answer->ByteSizeLong()));
    answer->SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(to));
    answers_.Publish(message.id);
    return absl::OkStatus();
  }

  RingServer* const server_;
  const int socket_, process_;
  const bool maps_pool_;
  ring::Arena arena_;
  ring::RingReader requests_;
  ring::RingWriter answers_;
  Mutex mutex_;
  std::unique_ptr<RingSession> session_;  // gone when the thread ends; changed under the mutex
  std::atomic<bool> closing_{false}, ended_{false}, stopping_{false};
  std::thread thread_;
};

RingServer::RingServer(KvCacheService* service, Options options)
    : service_(service),
      options_(std::move(options)),
      most_pollers_(MostPollers()),
      stop_(::eventfd(0, EFD_CLOEXEC)) {
  KVTIDE_CHECK(stop_ >= 0, "no descriptor is free");
  options_.gauges->shared_memory_limit_bytes = options_.limits.total_bytes;
  watcher_ = std::thread([this] { Watch(); });
}

RingServer::~RingServer() { Stop(); }

void RingServer::Stop() {
  if (!watcher_.joinable()) return;
  const uint64_t one = 1;
  KVTIDE_CHECK(::write(stop_, &one, sizeof(one)) == sizeof(one));
  watcher_.join();
  for (const auto& client : clients_) client->Stop();
  clients_.clear();
  for (const Guest& guest : guests_) ::close(guest.socket);
  guests_.clear();
  ::close(stop_);
}

void RingServer::Watch() {
  for (;;) {
    std::vector<pollfd> waits = {{stop_, POLLIN, 0}};
    for (const int socket : options_.sockets) waits.push_back({socket, POLLIN, 0});
    const size_t first_guest = waits.size();
    for (const Guest& guest : guests_) waits.push_back({guest.socket, POLLIN, 0});
    bool closing = false;
    for (const auto& client : clients_) {
      // Nobody says anything on a connection after the Hello: any event is the end.
      if (client->closing()) {
        client->Close();
        closing = true;
        waits.push_back({-1, 0, 0});
      } else {
        waits.push_back({client->socket(), POLLIN | POLLRDHUP, 0});
      }
    }
    ::poll(waits.data(), waits.size(), closing ? 2 : guests_.empty() ? 1000 : 100);
    if (waits[0].revents != 0) return;
    size_t at = first_guest;
    const absl::Time now = absl::Now();
    for (auto guest = guests_.begin(); guest != guests_.end(); at++) {
      const bool speaks = waits[at].revents != 0;
      if ((speaks && !Hear(&*guest)) || now > guest->deadline) {
        if (guest->socket >= 0) ::close(guest->socket);
        guest = guests_.erase(guest);
      } else {
        ++guest;
      }
    }
    // Those who were let in just now stand behind the others, and were not waited for.
    for (const auto& client : clients_) {
      if (at >= waits.size()) break;
      if (waits[at++].revents != 0) client->Close();
    }
    Sweep();
    for (size_t i = 1; i < first_guest; i++) {
      if (waits[i].revents != 0) Accept(waits[i].fd);
    }
  }
}

void RingServer::Sweep() {
  for (auto client = clients_.begin(); client != clients_.end();) {
    if ((*client)->ended()) {
      bytes_ -= (*client)->bytes();
      client = clients_.erase(client);
    } else {
      ++client;
    }
  }
  options_.gauges->shared_memory_clients = static_cast<int64_t>(clients_.size());
  options_.gauges->shared_memory_bytes = static_cast<int64_t>(bytes_);
}

void RingServer::Accept(int listening) {
  const int socket = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (socket < 0) {
    // No descriptor: the connection stays in the queue; it must not keep this thread busy.
    if (errno == EMFILE || errno == ENFILE) absl::SleepFor(absl::Milliseconds(20));
    return;
  }
  if (guests_.size() >= kMostGuests) {  // the one that has taken longest goes
    ::close(guests_.front().socket);
    guests_.pop_front();
  }
  Guest guest;
  guest.socket = socket;
  guest.deadline = absl::Now() + kHelloTime;
  guests_.push_back(guest);
}

bool RingServer::Hear(Guest* guest) {
  const ssize_t count = ::recv(guest->socket, reinterpret_cast<std::byte*>(&guest->hello) + guest->received,
                               sizeof(guest->hello) - guest->received, MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (count <= 0) return false;
  guest->received += static_cast<size_t>(count);
  if (guest->received < sizeof(guest->hello)) return true;
  if (const absl::Status status = LetIn(guest); !status.ok()) {
    ring::Welcome refusal;
    refusal.generation = options_.generation;
    ring::SetText(status, &refusal);
    ring::Send(guest->socket, std::as_bytes(std::span(&refusal, 1)), {}).IgnoreError();
    options_.gauges->shared_memory_refused++;
    CallReport report;
    const std::string caller = NameOfPeer(guest->socket);
    const absl::StatusOr<IdentityPtr> identity = options_.access.OfSocket(guest->socket);
    if (identity.ok()) report.tenant = (*identity)->tenant;
    report.method = "Session";
    report.way = Way::kSharedMemory;
    report.SetStatus(status);
    report.caller = caller;
    service_->Report(report, nullptr);
  }
  return false;
}

absl::Status RingServer::LetIn(Guest* guest) {
  const SharedMemoryOptions& limits = options_.limits;
  KVTIDE_ASSIGN_OR_RETURN(const IdentityPtr identity, options_.access.OfSocket(guest->socket));
  KVTIDE_RETURN_IF_ERROR(ring::CheckHello(guest->hello, options_.generation));
  KVTIDE_RETURN_IF_ERROR(service_->CheckNotDraining());
  if (clients_.size() >= limits.max_clients) {
    return Refused(Refusal::kLimit, absl::ResourceExhaustedError(absl::StrCat(
                                        "kvtided has ", clients_.size(),
                                        " clients with shared memory, as many as it may; use gRPC")));
  }
  ring::ArenaLayout layout;
  if (guest->hello.tensor_bytes > ring::kMostTensorBytes)
    return absl::InvalidArgumentError("the client asks for an arena beyond 16 TiB");
  layout.tensor_bytes = std::max(kPage, (guest->hello.tensor_bytes + kPage - 1) / kPage * kPage);
  if (layout.total() > static_cast<uint64_t>(limits.client_bytes) ||
      layout.total() + bytes_ > static_cast<uint64_t>(limits.total_bytes)) {
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(absl::StrCat(
                       "an arena of ", layout.total(), " bytes does not fit: one client may have ",
                       limits.client_bytes, " (--shared-memory-client), all of them ", limits.total_bytes,
                       " (--shared-memory), ", bytes_, " are taken; ask for a smaller one, or raise them")));
  }
  ring::PoolSlabs slabs;
  std::vector<int> slab_fds;
  const bool maps_pool = guest->hello.wants_pool != 0;
  int process = -1;
  absl::Cleanup close_process = [&process] {
    if (process >= 0) ::close(process);
  };
  if (maps_pool) {
    KVTIDE_RETURN_IF_ERROR(SharePool(*identity, &slabs, &slab_fds));
    process = ProcessOf(guest->socket);
    if (process < 0)
      return absl::FailedPreconditionError(
          "kvtided cannot see the process that wants to map its pool, so it would not know when that has "
          "ended and "
          "its last kernels with it: let both share a PID namespace (shareProcessNamespace in a pod, --pid "
          "in a "
          "container), or use shared memory");
  }
  ring::HostTier host;
  int host_tier = -1, host_fd = -1;
  if (guest->hello.wants_host != 0) {
    const absl::StatusOr<int> shared = ShareHost(*identity, &host, &host_fd);
    if (shared.ok()) {
      host_tier = *shared;
      // One that cannot be seen is not waited for: what copies of a dead process still read goes nowhere.
      if (process < 0) process = ProcessOf(guest->socket);
    } else {
      ring::SetText(shared.status(), &host);
    }
  }
  KVTIDE_ASSIGN_OR_RETURN(ring::Arena arena, ring::Arena::Make(layout));
  ring::Welcome welcome;
  welcome.generation = options_.generation;
  welcome.layout = ring::LayoutFingerprint();
  welcome.request_bytes = layout.request_bytes;
  welcome.answer_bytes = layout.answer_bytes;
  welcome.tensor_bytes = layout.tensor_bytes;
  const int fd = arena.fd();
  KVTIDE_RETURN_IF_ERROR(ring::Send(guest->socket, std::as_bytes(std::span(&welcome, 1)), {&fd, 1}));
  if (maps_pool)
    KVTIDE_RETURN_IF_ERROR(ring::Send(guest->socket, std::as_bytes(std::span(&slabs, 1)), slab_fds));
  if (guest->hello.wants_host != 0)
    KVTIDE_RETURN_IF_ERROR(ring::Send(guest->socket, std::as_bytes(std::span(&host, 1)),
                                      std::span<const int>(&host_fd, host_tier >= 0 ? 1 : 0)));
  auto connection = std::make_shared<Connection>();
  // Numbers of connections of gRPC are below.
  connection->number = (uint64_t{1} << 63) + (++last_client_ << 32);
  connection->name = NameOfPeer(guest->socket);
  connection->identity = identity;
  connection->client = service_->clients()->Add(maps_pool ? Way::kDirect : Way::kSharedMemory,
                                                connection->name, identity->tenant);
  bytes_ += layout.total();
  clients_.push_back(std::make_unique<Client>(this, std::exchange(guest->socket, -1), std::move(arena),
                                              connection, maps_pool, host_tier, std::exchange(process, -1)));
  return absl::OkStatus();
}

absl::StatusOr<int> RingServer::ShareHost(const Identity& identity, ring::HostTier* tier, int* fd) const {
  if (!options_.host_sharing)
    return absl::FailedPreconditionError("kvtided does not share its tier of host memory (--host-sharing)");
  if (!identity.admin)
    return absl::PermissionDeniedError(
        "the tier of host memory holds what all tenants have cached: only an admin of this kvtided may map "
        "it "
        "(--allow user:NAME=TENANT:admin)");
  const std::vector<TierOptions>& tiers = options_.cache->options().tiers;
  const int host = CountHomes(tiers);
  if (static_cast<size_t>(host) >= tiers.size() || !tiers[static_cast<size_t>(host)].attends())
    return absl::FailedPreconditionError("kvtided has no tier of host memory (--host-memory)");
  KVTIDE_ASSIGN_OR_RETURN(const SlabHandle handle, options_.cache->SlabOf(host)->Share());
  if (handle.kind != SlabHandle::Kind::kFile)
    return absl::FailedPreconditionError("the tier of host memory is none that processes can share");
  tiers[static_cast<size_t>(host)].name.copy(tier->tier, sizeof(tier->tier) - 1);
  tier->bytes = handle.bytes;
  *fd = handle.fd;
  return host;
}

absl::Status RingServer::SharePool(const Identity& identity, ring::PoolSlabs* slabs,
                                   std::vector<int>* fds) const {
  if (!identity.admin)
    return absl::PermissionDeniedError(
        "the memory of the pool holds the blocks of all tenants: only an admin of this kvtided may map it "
        "(--allow user:NAME=TENANT:admin); use shared memory");
  const std::vector<TierOptions>& tiers = options_.cache->options().tiers;
  const size_t homes = std::min<size_t>(static_cast<size_t>(CountHomes(tiers)), ring::kMostSlabs);
  for (size_t t = 0; t < homes; t++) {
    absl::StatusOr<SlabHandle> handle = options_.cache->SlabOf(static_cast<int>(t))->Share();
    if (!handle.ok())
      return Annotate(handle.status(), absl::StrCat("the tier ", tiers[t].name, " on ", tiers[t].Device(),
                                                    " (on CPUs start kvtided with --share-pool)"));
    ring::PoolSlabs::Slab& slab = slabs->slabs[slabs->count++];
    tiers[t].name.copy(slab.tier, sizeof(slab.tier) - 1);
    tiers[t].Device().copy(slab.device, sizeof(slab.device) - 1);
    std::memcpy(slab.owner, handle->device.data(), sizeof(slab.owner));
    slab.kind = static_cast<uint32_t>(handle->kind);
    slab.bytes = handle->bytes;
    std::memcpy(slab.ipc, handle->ipc.data(), sizeof(slab.ipc));
    if (handle->kind == SlabHandle::Kind::kFile) fds->push_back(handle->fd);
  }
  return absl::OkStatus();
}

}  // namespace kvtide::service
