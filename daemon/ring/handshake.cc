#include "daemon/ring/handshake.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/catalogue.h"

namespace kvtide::ring {

uint64_t LayoutFingerprint() {
  static const uint64_t fingerprint = [] {
    std::string text = absl::StrCat(kBlockTokens);
    std::vector<CacheType> types = AllCacheTypes();
    for (const CacheType type : CalibratedTypes()) types.push_back(type);
    for (const CacheType type : types) {
      const CacheTypeInfo& info = Info(type);
      absl::StrAppend(&text, ";", info.name, " ", info.version);
      for (const int dim : {64, 128, 256})
        absl::StrAppend(&text, " ", BlockLayout({2, 2, dim, dim}, {type, type}).block_bytes());
    }
    return XXH3_64bits(text.data(), text.size());
  }();
  return fingerprint;
}

absl::Status CheckHello(const Hello& hello, uint64_t generation) {
  if (std::memcmp(hello.magic, kMagic, sizeof(kMagic)) != 0)
    return absl::InvalidArgumentError("this socket speaks kvtide's shared-memory protocol only");
  if (hello.version != kProtocolVersion) {
    return absl::FailedPreconditionError(absl::StrCat("the client speaks version ", hello.version,
                                                      " of the shared-memory protocol, this kvtided ",
                                                      kProtocolVersion, "; use equal versions, or gRPC"));
  }
  if (hello.generation != 0 && hello.generation != generation) {
    return absl::FailedPreconditionError(
        "the kvtided that the client knew has ended, and its sequences with it; connect anew");
  }
  if (hello.layout != 0 && hello.layout != LayoutFingerprint()) {
    return absl::FailedPreconditionError(
        "blocks of this kvtided look otherwise than the client reads them; use equal versions");
  }
  return absl::OkStatus();
}

absl::Status CheckWelcome(const Welcome& welcome) {
  if (std::memcmp(welcome.magic, kMagic, sizeof(kMagic)) != 0)
    return absl::FailedPreconditionError("what answers there is no kvtided");
  const std::string text(welcome.text, ::strnlen(welcome.text, sizeof(welcome.text)));
  if (welcome.code != 0) return absl::Status(static_cast<absl::StatusCode>(welcome.code), text);
  if (welcome.version != kProtocolVersion) {
    return absl::FailedPreconditionError(absl::StrCat("kvtided speaks version ", welcome.version,
                                                      " of the shared-memory protocol, this client ",
                                                      kProtocolVersion, "; use equal versions, or gRPC"));
  }
  return absl::OkStatus();
}

void SetText(const absl::Status& status, Welcome* welcome) {
  welcome->code = status.raw_code();
  status.message().copy(welcome->text, sizeof(welcome->text) - 1);
}

void SetText(const absl::Status& status, HostTier* tier) {
  status.message().copy(tier->text, sizeof(tier->text) - 1);
}

absl::Status Send(int socket, std::span<const std::byte> bytes, std::span<const int> fds) {
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostSlabs * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* const head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(head), fds.data(), fds.size_bytes());
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  // The buffer of a fresh socket holds far more.
  if (sent == static_cast<ssize_t>(bytes.size())) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the other end of the socket has gone: ",
                                             sent < 0 ? std::strerror(errno) : "sent in part"));
}

absl::Status Receive(int socket, std::span<std::byte> bytes, absl::Time deadline, std::span<int> fds) {
  std::fill(fds.begin(), fds.end(), -1);
  size_t came = 0;
  size_t received = 0;
  while (received < bytes.size()) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration())
      return absl::DeadlineExceededError("the other end of the socket says nothing");
    pollfd wait{socket, POLLIN, 0};
    ::poll(&wait, 1, static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(left) + 1, 60'000)));
    iovec data{bytes.data() + received, bytes.size() - received};
    alignas(cmsghdr) char control[CMSG_SPACE(kMostSlabs * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t count = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (count <= 0) return absl::UnavailableError("the other end of the socket has closed it");
    received += static_cast<size_t>(count);
    for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
      if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
      const size_t count_of_fds = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count_of_fds; i++) {
        int one = -1;
        std::memcpy(&one, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
        if (came < fds.size()) {
          fds[came++] = one;
        } else {
          ::close(one);
        }
      }
    }
  }
  return absl::OkStatus();
}

bool HungUp(int socket) {
  pollfd wait{socket, POLLRDHUP, 0};
  return ::poll(&wait, 1, 0) > 0 && (wait.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

}  // namespace kvtide::ring
