#include "daemon/service_manager.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace kvtide {

void NotifyServiceManager(const std::string& state) {
  const char* path = std::getenv("NOTIFY_SOCKET");
  sockaddr_un name{};
  if (path == nullptr || std::strlen(path) < 2 || std::strlen(path) >= sizeof(name.sun_path)) return;
  const int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, path, std::strlen(path));
  if (name.sun_path[0] == '@') name.sun_path[0] = '\0';  // an abstract socket
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
  if (::sendto(fd, state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&name),
               length) < 0) {
    // Nobody listens any more.
  }
  ::close(fd);
}

bool WatchdogWanted() {
  const char* const time = std::getenv("WATCHDOG_USEC");
  const char* const process = std::getenv("WATCHDOG_PID");
  return time != nullptr && std::atoll(time) > 0 && (process == nullptr || std::atoll(process) == ::getpid());
}

}  // namespace kvtide
