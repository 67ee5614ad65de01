#include "daemon/service/connections.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace kvtide::service {
namespace {

// The number of the socket behind a descriptor; 0 when there is none.
ino_t SocketOf(int fd) {
  struct stat info {};
  return ::fstat(fd, &info) == 0 && S_ISSOCK(info.st_mode) ? info.st_ino : 0;
}

bool IsTcp(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  return ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 && address.ss_family != AF_UNIX;
}

// "ipv4:127.0.0.1:53412" or "ipv6:%5B::1%5D:53412" as NameOfPeer writes it; empty for other peers.
std::string AddressOfPeer(absl::string_view peer) {
  if (!absl::ConsumePrefix(&peer, "ipv4:") && !absl::ConsumePrefix(&peer, "ipv6:")) return "";
  return absl::StrReplaceAll(peer, {{"%5B", "["}, {"%5D", "]"}});
}

}  // namespace

std::string NameOfPeer(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return "unknown";
  if (address.ss_family == AF_UNIX) {
    ucred peer{};
    socklen_t peer_size = sizeof(peer);
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_size) != 0) return "unix";
    return absl::StrCat("unix:uid=", peer.uid, ",pid=", peer.pid);
  }
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "unknown";
  }
  return address.ss_family == AF_INET6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

std::shared_ptr<Connection> Connections::Add(int fd) {
  auto connection = std::make_shared<Connection>();
  connection->fd = fd;
  connection->name = NameOfPeer(fd);
  connection->identity = access_.OfSocket(fd);
  connection->tcp = IsTcp(fd);
  if (clients_ != nullptr)
    connection->client =
        clients_->Add(Way::kGrpc, connection->name,
                      connection->identity.ok() ? (*connection->identity)->tenant : std::string());
  const ino_t socket = SocketOf(fd);
  const MutexLock lock(mutex_);
  connection->number = ++last_;
  Erase(fd);
  open_[fd] = {connection, socket};
  if (connection->identity.ok()) of_tenants_[(*connection->identity)->tenant]++;
  if (connection->tcp) tcp_[connection->name] = fd;
  size_ = open_.size();
  return connection;
}

std::shared_ptr<Connection> Connections::Find(const std::string& peer) const {
  absl::string_view number(peer);
  int fd = -1;
  const bool by_number = absl::ConsumePrefix(&number, "fd:") && absl::SimpleAtoi(number, &fd);
  const std::string address = by_number ? "" : AddressOfPeer(peer);
  if (by_number || !address.empty()) {
    const MutexLock lock(mutex_);
    if (!by_number) {
      const auto named = tcp_.find(address);
      fd = named == tcp_.end() ? -1 : named->second;
    }
    if (const auto found = open_.find(fd); found != open_.end()) return found->second.connection;
  }
  return gone_;
}

void Connections::Erase(int fd) {
  const auto entry = open_.find(fd);
  if (entry == open_.end()) return;
  const Connection& connection = *entry->second.connection;
  const auto named = tcp_.find(connection.name);
  if (named != tcp_.end() && named->second == fd) tcp_.erase(named);
  if (connection.identity.ok()) {
    const auto of = of_tenants_.find((*connection.identity)->tenant);
    if (--of->second == 0) of_tenants_.erase(of);
  }
  open_.erase(entry);
}

void Connections::Forget(int fd) {
  const MutexLock lock(mutex_);
  Erase(fd);
  size_ = open_.size();
}

bool Connections::HasEnded(const Connection& connection) const {
  const MutexLock lock(mutex_);
  const auto found = open_.find(connection.fd);
  if (found == open_.end() || found->second.connection.get() != &connection) return true;
  pollfd wait{connection.fd, POLLRDHUP, 0};
  return ::poll(&wait, 1, 0) > 0 || SocketOf(connection.fd) != found->second.socket;
}

size_t Connections::CountOf(const std::string& tenant) const {
  const MutexLock lock(mutex_);
  const auto found = of_tenants_.find(tenant);
  return found == of_tenants_.end() ? 0 : found->second;
}

size_t Connections::Sweep() {
  const MutexLock lock(mutex_);
  std::vector<int> gone;
  for (const auto& [fd, entry] : open_)
    if (SocketOf(fd) != entry.socket) gone.push_back(fd);
  for (const int fd : gone) Erase(fd);
  size_ = open_.size();
  return open_.size();
}

uint64_t Connections::accepted() const {
  const MutexLock lock(mutex_);
  return last_;
}

}  // namespace kvtide::service
