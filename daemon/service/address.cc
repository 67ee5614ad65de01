#include "daemon/service/address.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

constexpr char kUnixPrefix[] = "unix:";
// What a socket's file ends with until it is shown.
constexpr char kHidden[] = ".new";
constexpr int kWaitingConnections = 128;  // that the kernel keeps for the daemon to accept

std::string ErrorText(int error) { return std::system_category().message(error); }

// True if somebody accepts connections on the socket.
absl::StatusOr<bool> SomebodyListens(const std::string& path) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::InternalError(absl::StrCat("no socket: ", ErrorText(errno)));
  const absl::Cleanup close_fd = [fd] { ::close(fd); };
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, path.c_str(), path.size() + 1);
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0;
}

// Makes the folder of the socket, and says what is wrong with it.
absl::Status PrepareFolder(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!std::filesystem::exists(folder, error)) {
    // One folder is made, and only in one that is there: more of them would hide a mistyped path.
    const std::filesystem::path parent = folder.parent_path();
    if (!std::filesystem::is_directory(parent, error)) {
      return absl::NotFoundError(absl::StrCat("there is no folder ", parent.string(), " for the socket ",
                                              path, "; make it, or correct --listen"));
    }
    if (::mkdir(folder.c_str(), 0750) != 0 && errno != EEXIST) {
      return absl::PermissionDeniedError(absl::StrCat("cannot make the folder ", folder.string(), ": ",
                                                      ErrorText(errno),
                                                      "; make it, or choose another --listen"));
    }
  }
  // In a folder of another user, that user could put a socket of his own in place of ours.
  struct stat info {};
  if (::stat(folder.c_str(), &info) == 0 && info.st_uid != 0 && info.st_uid != ::geteuid()) {
    return absl::PermissionDeniedError(absl::StrCat("the folder ", folder.string(),
                                                    " belongs to another user (uid ", info.st_uid,
                                                    "); choose another --listen"));
  }
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    return absl::PermissionDeniedError(absl::StrCat("cannot write to the folder ", folder.string(), ": ",
                                                    ErrorText(errno), "; choose another --listen"));
  }
  return absl::OkStatus();
}

absl::Status RemoveStaleSocket(const std::string& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) {
    return absl::AlreadyExistsError(
        absl::StrCat(path, " exists and is not a socket; move it away, or choose another --listen"));
  }
  KVTIDE_ASSIGN_OR_RETURN(const bool taken, SomebodyListens(path));
  if (taken) {
    return absl::AlreadyExistsError(absl::StrCat("address in use: another program listens on ", path,
                                                 "; stop it, or choose another --listen"));
  }
  if (::unlink(path.c_str()) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot remove the stale socket ", path, ": ", ErrorText(errno)));
  }
  return absl::OkStatus();
}

absl::Status CannotListen(const Address& address, int error) {
  if (error == EADDRINUSE) {
    return absl::AlreadyExistsError(absl::StrCat("address in use: another program listens on ", address.text,
                                                 " (see `ss -ltnp`); stop it, or choose another --listen"));
  }
  return absl::PermissionDeniedError(
      absl::StrCat("cannot listen on ", address.text, ": ", ErrorText(error), "; choose another --listen"));
}

bool IsSameFile(int fd, int other) {
  struct stat a {
  }, b{};
  return other >= 0 && ::fstat(fd, &a) == 0 && ::fstat(other, &b) == 0 && a.st_ino == b.st_ino &&
         a.st_dev == b.st_dev;
}

// Port of a socket that is bound.
int PortOf(int fd) {
  sockaddr_storage name{};
  socklen_t size = sizeof(name);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size);
  return ntohs(name.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&name)->sin6_port
                                          : reinterpret_cast<sockaddr_in*>(&name)->sin_port);
}

}  // namespace

AddressClaim::File AddressClaim::FileAt(const std::string& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode)) return {};
  return {info.st_ino, int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

bool Address::OpenToNetwork() const {
  return !is_unix() && host != "localhost" && host != "::1" && host.compare(0, 4, "127.") != 0;
}

absl::StatusOr<Address> ParseAddress(const std::string& text) {
  Address address;
  address.text = text;
  const size_t prefix = sizeof(kUnixPrefix) - 1;
  if (text.compare(0, prefix, kUnixPrefix) == 0) {
    std::string path = text.substr(prefix);
    if (path.compare(0, 2, "//") == 0) path = path.substr(2);  // unix:///absolute/path
    if (path.empty()) return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": the path is missing"));
    std::error_code error;
    path = std::filesystem::absolute(path, error).lexically_normal().string();
    if (path.size() >= sizeof(sockaddr_un::sun_path)) {
      return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": a socket path holds at most ",
                                                     sizeof(sockaddr_un::sun_path) - 1,
                                                     " bytes, this one has ", path.size()));
    }
    address.unix_path = path;
    address.text = absl::StrCat(kUnixPrefix, path);
    return address;
  }
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(absl::string_view(text).substr(colon + 1), &address.port) || address.port < 0 ||
      address.port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", text, "\" is no address; use unix:/path/to/socket or host:port, such as 127.0.0.1:7600"));
  }
  address.host = text.substr(0, colon);
  if (address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  }
  return address;
}

absl::StatusOr<std::unique_ptr<AddressClaim>> AddressClaim::Take(const Address& address) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<AddressClaim> claim, Hold(address));
  KVTIDE_RETURN_IF_ERROR(claim->Show());
  return claim;
}

absl::StatusOr<std::unique_ptr<AddressClaim>> AddressClaim::Hold(const Address& address) {
  std::unique_ptr<AddressClaim> claim(new AddressClaim);
  claim->text_ = address.text;
  claim->address_ = address;
  KVTIDE_RETURN_IF_ERROR(address.is_unix() ? claim->ListenOnUnix(address) : claim->ListenOnTcp(address));
  return claim;
}

absl::StatusOr<int> AddressClaim::BindUnix(const Address& address) {
  KVTIDE_RETURN_IF_ERROR(PrepareFolder(address.unix_path));
  const std::string lock_path = address.unix_path + ".lock";
  const int lock = ::open(lock_path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (lock < 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot open the lock file ", lock_path, ": ", ErrorText(errno)));
  }
  absl::Cleanup close_lock = [lock] { ::close(lock); };
  // The lock that is held already may be of a file that is no more; of the same file it is refused.
  if (!IsSameFile(lock, lock_)) {
    if (::flock(lock, LOCK_EX | LOCK_NB) != 0) {
      return absl::AlreadyExistsError(absl::StrCat("address in use: another kvtided listens on ",
                                                   address.unix_path,
                                                   "; stop it, or choose another --listen"));
    }
    std::move(close_lock).Cancel();
    if (lock_ >= 0) ::close(lock_);
    lock_ = lock;
  }
  KVTIDE_RETURN_IF_ERROR(RemoveStaleSocket(address.unix_path));
  std::string path = address.unix_path + kHidden;
  if (path.size() >= sizeof(sockaddr_un::sun_path)) path = address.unix_path;
  KVTIDE_RETURN_IF_ERROR(RemoveStaleSocket(path));
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return CannotListen(address, errno);
  absl::Cleanup close_socket = [fd] { ::close(fd); };
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, path.c_str(), path.size() + 1);
  // The file is made with what the mask leaves: owner and group may connect.
  const mode_t before = ::umask(0117);
  const int bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name));
  const int error = errno;
  ::umask(before);
  if (bound != 0) return CannotListen(address, error);
  hidden_path_ = path;
  if (::listen(fd, kWaitingConnections) != 0) return CannotListen(address, errno);
  std::move(close_socket).Cancel();
  return fd;
}

absl::Status AddressClaim::Show() {
  if (hidden_path_.empty()) return absl::OkStatus();
  if (::rename(hidden_path_.c_str(), address_.unix_path.c_str()) != 0) return CannotListen(address_, errno);
  hidden_path_.clear();
  socket_path_ = address_.unix_path;
  socket_file_ = FileAt(socket_path_);
  return absl::OkStatus();
}

absl::Status AddressClaim::ListenOnUnix(const Address& address) {
  KVTIDE_ASSIGN_OR_RETURN(const int fd, BindUnix(address));
  sockets_.push_back(fd);
  return absl::OkStatus();
}

absl::StatusOr<bool> AddressClaim::Mend() {
  if (socket_path_.empty() || FileAt(socket_path_) == socket_file_) return false;
  KVTIDE_ASSIGN_OR_RETURN(const int fd, BindUnix(address_));
  // Whoever waits on the old descriptor waits on the new socket from now on.
  const int moved = ::dup3(fd, sockets_.front(), O_CLOEXEC);
  ::close(fd);
  if (moved < 0) return absl::InternalError(absl::StrCat("dup3: ", ErrorText(errno)));
  KVTIDE_RETURN_IF_ERROR(Show());
  return true;
}

absl::Status AddressClaim::ListenOnTcp(const Address& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error =
          ::getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
      error != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--listen ", address.text, ": ", ::gai_strerror(error)));
  }
  const absl::Cleanup free_found = [found] { ::freeaddrinfo(found); };
  int port = address.port, failed = 0;
  for (addrinfo* one = found; one != nullptr; one = one->ai_next) {
    if (port != 0 && one->ai_family == AF_INET6)
      reinterpret_cast<sockaddr_in6*>(one->ai_addr)->sin6_port = htons(static_cast<uint16_t>(port));
    if (port != 0 && one->ai_family == AF_INET)
      reinterpret_cast<sockaddr_in*>(one->ai_addr)->sin_port = htons(static_cast<uint16_t>(port));
    const int fd = ::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const int on = 1;
    if (fd >= 0) ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (fd < 0 || ::bind(fd, one->ai_addr, one->ai_addrlen) != 0 || ::listen(fd, kWaitingConnections) != 0) {
      failed = errno;
      if (fd >= 0) ::close(fd);
      if (failed == EADDRINUSE) break;
      continue;  // a host name may have an address that this machine has not, such as ::1
    }
    sockets_.push_back(fd);
    port = PortOf(fd);
  }
  if (sockets_.empty() || failed == EADDRINUSE) return CannotListen(address, failed);
  text_ = absl::StrCat(address.text.substr(0, address.text.rfind(':') + 1), port);
  return absl::OkStatus();
}

AddressClaim::~AddressClaim() {
  for (const int fd : sockets_) ::close(fd);
  if (!hidden_path_.empty()) ::unlink(hidden_path_.c_str());
  // Not what somebody else has put there.
  if (!socket_path_.empty() && FileAt(socket_path_) == socket_file_) ::unlink(socket_path_.c_str());
  // The lock file stays: removing it would let two daemons lock two files of one name.
  if (lock_ >= 0) ::close(lock_);
}

std::string DefaultListenAddress() {
  if (::geteuid() == 0) return "unix:/run/kvtide/kvtided.sock";
  if (const char* folder = std::getenv("XDG_RUNTIME_DIR"); folder != nullptr && *folder != '\0') {
    return absl::StrCat("unix:", folder, "/kvtide/kvtided.sock");
  }
  return absl::StrCat("unix:/tmp/kvtide-", ::geteuid(), "/kvtided.sock");
}

}  // namespace kvtide::service
