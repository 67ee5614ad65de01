#include "daemon/metrics/endpoint_address.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvtide::metrics {
namespace {

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressList Resolve(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* list = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list) != 0) list = nullptr;
  return {list, &freeaddrinfo};
}

absl::Status BadAddress(const std::string& text, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat("metrics address \"", text, "\": ", why,
                                                 "; use host:port such as 127.0.0.1:9464, or off"));
}

}  // namespace

std::string EndpointAddress::Text() const {
  return host.find(':') == std::string::npos ? absl::StrCat(host, ":", port)
                                             : absl::StrCat("[", host, "]:", port);
}

absl::StatusOr<EndpointAddress> ParseEndpointAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return BadAddress(text, "there is no port");
  std::string host = text.substr(0, colon);
  const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (brackets) host = host.substr(1, host.size() - 2);
  if (host.empty()) return BadAddress(text, "there is no host; for all interfaces name 0.0.0.0");
  if (!brackets && host.find(':') != std::string::npos)
    return BadAddress(text, "write an IPv6 host in brackets");
  EndpointAddress address;
  if (!absl::SimpleAtoi(text.substr(colon + 1), &address.port) || address.port < 0 || address.port > 65535) {
    return BadAddress(text, "the port is not a number from 0 to 65535");
  }
  const AddressList list = Resolve(host, address.port);
  char numeric[NI_MAXHOST];
  if (list == nullptr || getnameinfo(list->ai_addr, list->ai_addrlen, numeric, sizeof(numeric), nullptr, 0,
                                     NI_NUMERICHOST) != 0) {
    return BadAddress(text, absl::StrCat("no host named ", host));
  }
  address.host = numeric;
  return address;
}

absl::StatusOr<int> Listen(const EndpointAddress& address) {
  const AddressList list = Resolve(address.host, address.port);
  if (list == nullptr) return BadAddress(address.Text(), "not an address");
  const int fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return BadAddress(address.Text(), std::strerror(errno));
  const int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  int error = 0;
  if (bind(fd, list->ai_addr, list->ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0) error = errno;
  if (error == 0) return fd;
  close(fd);
  if (error == EADDRINUSE) {
    return absl::UnavailableError(absl::StrCat("metrics address ", address.Text(),
                                               " is in use by another program; choose another port with "
                                               "--metrics-address (port 0 = any free one), or off"));
  }
  if (error == EACCES) {
    return absl::PermissionDeniedError(
        absl::StrCat("metrics address ", address.Text(), ": no permission; ports below 1024 belong to root"));
  }
  return BadAddress(address.Text(), std::strerror(error));
}

}  // namespace kvtide::metrics
