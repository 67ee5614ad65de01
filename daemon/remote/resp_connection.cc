#include "daemon/remote/resp_connection.h"

#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

using Limits = RespConnection::Limits;

absl::Status Closed(const std::string& why) { return absl::UnavailableError(why); }

std::string TlsError() {
  const unsigned long code = ERR_get_error();
  if (code == 0) return "the connection was closed";
  char text[256];
  ERR_error_string_n(code, text, sizeof text);
  ERR_clear_error();
  return text;
}

// A socket that is on its way to be connected. Names are asked for by the system's resolver, in its own time.
absl::StatusOr<int> StartConnect(const sockaddr* address, socklen_t bytes, int family) {
  const int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return Closed(std::strerror(errno));
  if (family != AF_UNIX) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  if (connect(fd, address, bytes) == 0 || errno == EINPROGRESS) return fd;
  const absl::Status failed = Closed(std::strerror(errno));
  close(fd);
  return failed;
}

absl::Status FinishConnect(int fd, const Limits& limits) {
  while (true) {
    if (IsCancelled(limits.cancellation)) return absl::CancelledError("the call was cancelled");
    const absl::Duration left = limits.deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return absl::DeadlineExceededError("no connection in time");
    pollfd poll_fd{fd, POLLOUT, 0};
    const int ready = poll(
        &poll_fd, 1, static_cast<int>(absl::ToInt64Milliseconds(std::min(left, absl::Milliseconds(50)))) + 1);
    if (ready < 0 && errno != EINTR) return Closed(std::strerror(errno));
    if (ready <= 0) continue;
    int error = 0;
    socklen_t bytes = sizeof error;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes);
    return error == 0 ? absl::OkStatus() : Closed(std::strerror(error));
  }
}

absl::StatusOr<int> ConnectTo(const sockaddr* address, socklen_t bytes, int family, const Limits& limits) {
  KVTIDE_ASSIGN_OR_RETURN(const int fd, StartConnect(address, bytes, family));
  const absl::Status status = FinishConnect(fd, limits);
  if (status.ok()) return fd;
  close(fd);
  return status;
}

absl::StatusOr<int> OpenSocket(const RemoteAddress& address, const Limits& limits) {
  if (address.host.empty()) {
    sockaddr_un path{};
    path.sun_family = AF_UNIX;
    std::copy(address.path.begin(), address.path.end(), path.sun_path);
    return ConnectTo(reinterpret_cast<const sockaddr*>(&path), sizeof path, AF_UNIX, limits);
  }
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
  if (error != 0) return Closed(absl::StrCat("no address of ", address.host, ": ", gai_strerror(error)));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> all(found, &freeaddrinfo);
  absl::StatusOr<int> fd = Closed("no address");
  for (const addrinfo* at = found; at != nullptr && !fd.ok(); at = at->ai_next)
    fd = ConnectTo(at->ai_addr, at->ai_addrlen, at->ai_family, limits);
  return fd;
}

void AddWord(std::string_view word, std::string* out) {
  absl::StrAppend(out, "$", word.size(), "\r\n");
  out->append(word);
  out->append("\r\n");
}

// What goes out: texts, and borrowed values between them.
struct Outgoing {
  std::vector<std::string> texts;
  std::vector<std::string_view> parts;
};
Outgoing Format(const std::vector<RespCommand>& commands) {
  Outgoing out;
  out.texts.reserve(2 * commands.size() + 1);
  std::string text;
  const auto end_text = [&] {
    if (text.empty()) return;
    out.texts.push_back(std::exchange(text, {}));
    out.parts.push_back(out.texts.back());
  };
  for (const RespCommand& command : commands) {
    absl::StrAppend(&text, "*", command.words.size() + (command.value.empty() ? 0 : 1), "\r\n");
    for (size_t i = 0; i <= command.words.size(); i++) {
      if (!command.value.empty() && i == command.value_at) {
        size_t bytes = 0;
        for (const std::string_view part : command.value) bytes += part.size();
        absl::StrAppend(&text, "$", bytes, "\r\n");
        end_text();
        for (const std::string_view part : command.value)
          if (!part.empty()) out.parts.push_back(part);
        text = "\r\n";
      }
      if (i < command.words.size()) AddWord(command.words[i], &text);
    }
  }
  end_text();
  return out;
}

}  // namespace

struct RespConnection::Tls {
  SSL_CTX* context = nullptr;
  SSL* ssl = nullptr;
  ~Tls() {
    SSL_free(ssl);
    SSL_CTX_free(context);
  }
};

RespConnection::RespConnection(int fd) : fd_(fd), reader_(redisReaderCreate()) {
  KVTIDE_CHECK(reader_ != nullptr);
}

RespConnection::~RespConnection() {
  redisReaderFree(reader_);
  tls_.reset();
  close(fd_);
}

absl::StatusOr<std::unique_ptr<RespConnection>> RespConnection::Connect(const RemoteAddress& address,
                                                                        const std::string& ca_file,
                                                                        const Limits& limits) {
  KVTIDE_ASSIGN_OR_RETURN(const int fd, OpenSocket(address, limits));
  std::unique_ptr<RespConnection> connection(new RespConnection(fd));
  if (address.tls) KVTIDE_RETURN_IF_ERROR(connection->StartTls(address, ca_file, limits));
  return connection;
}

absl::Status RespConnection::StartTls(const RemoteAddress& address, const std::string& ca_file,
                                      const Limits& limits) {
  auto tls = std::make_unique<Tls>();
  ERR_clear_error();
  tls->context = SSL_CTX_new(TLS_client_method());
  if (tls->context == nullptr) return absl::InternalError(TlsError());
  SSL_CTX_set_min_proto_version(tls->context, TLS1_2_VERSION);
  SSL_CTX_set_verify(tls->context, SSL_VERIFY_PEER, nullptr);
  SSL_CTX_set_mode(tls->context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  const int loaded = ca_file.empty() ? SSL_CTX_set_default_verify_paths(tls->context)
                                     : SSL_CTX_load_verify_locations(tls->context, ca_file.c_str(), nullptr);
  if (loaded != 1)
    return absl::PermissionDeniedError(absl::StrCat("cannot read the CA ", ca_file, ": ", TlsError()));
  tls->ssl = SSL_new(tls->context);
  if (tls->ssl == nullptr || SSL_set_fd(tls->ssl, fd_) != 1) return absl::InternalError(TlsError());
  SSL_set_tlsext_host_name(tls->ssl, address.host.c_str());
  X509_VERIFY_PARAM* const verify = SSL_get0_param(tls->ssl);
  if (X509_VERIFY_PARAM_set1_ip_asc(verify, address.host.c_str()) != 1)
    X509_VERIFY_PARAM_set1_host(verify, address.host.c_str(), 0);
  ERR_clear_error();
  const absl::Time since = absl::Now();
  while (true) {
    const int done = SSL_connect(tls->ssl);
    if (done == 1) break;
    const int error = SSL_get_error(tls->ssl, done);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
      KVTIDE_RETURN_IF_ERROR(Wait(error == SSL_ERROR_WANT_WRITE, limits, since));
      continue;
    }
    const long verified = SSL_get_verify_result(tls->ssl);
    if (verified != X509_V_OK)
      return absl::PermissionDeniedError(
          absl::StrCat("its certificate is not trusted: ", X509_verify_cert_error_string(verified)));
    return Closed(absl::StrCat("TLS: ", TlsError()));
  }
  tls_ = std::move(tls);
  return absl::OkStatus();
}

RespConnection::Io RespConnection::Send(std::string_view bytes, size_t* sent) {
  if (tls_ != nullptr) {
    ERR_clear_error();
    const int done =
        SSL_write(tls_->ssl, bytes.data(), static_cast<int>(std::min<size_t>(bytes.size(), 1 << 20)));
    if (done > 0) {
      *sent = static_cast<size_t>(done);
      return Io::kDone;
    }
    const int error = SSL_get_error(tls_->ssl, done);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? Io::kAgain : Io::kClosed;
  }
  const ssize_t done = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  if (done > 0) {
    *sent = static_cast<size_t>(done);
    return Io::kDone;
  }
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? Io::kAgain : Io::kClosed;
}

RespConnection::Io RespConnection::Receive(char* buffer, size_t bytes, size_t* got) {
  if (tls_ != nullptr) {
    ERR_clear_error();
    const int done = SSL_read(tls_->ssl, buffer, static_cast<int>(bytes));
    if (done > 0) {
      *got = static_cast<size_t>(done);
      return Io::kDone;
    }
    const int error = SSL_get_error(tls_->ssl, done);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? Io::kAgain : Io::kClosed;
  }
  const ssize_t done = recv(fd_, buffer, bytes, 0);
  if (done > 0) {
    *got = static_cast<size_t>(done);
    return Io::kDone;
  }
  if (done == 0) return Io::kClosed;
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? Io::kAgain : Io::kClosed;
}

absl::Status RespConnection::Wait(bool write, const Limits& limits, absl::Time since) const {
  const absl::Time now = absl::Now();
  if (IsCancelled(limits.cancellation)) return absl::CancelledError("the call was cancelled");
  if (now >= limits.deadline) return absl::DeadlineExceededError("the server did not answer in time");
  if (now - since >= limits.silence)
    return absl::DeadlineExceededError(
        absl::StrCat("the server was silent for ", absl::FormatDuration(limits.silence)));
  // Looks at the cancellation now and then.
  const absl::Duration wait =
      std::min({limits.deadline - now, limits.silence - (now - since), absl::Milliseconds(50)});
  pollfd poll_fd{fd_, static_cast<short>(POLLIN | (write ? POLLOUT : 0)), 0};
  poll(&poll_fd, 1, static_cast<int>(absl::ToInt64Milliseconds(wait)) + 1);
  return absl::OkStatus();
}

absl::Status RespConnection::Run(const std::vector<RespCommand>& commands, const Limits& limits,
                                 const OnReply& on_reply) {
  answered_ = false;
  const Outgoing out = Format(commands);
  size_t part = 0, at = 0, replies = 0;
  std::vector<char> buffer(size_t{256} << 10);
  absl::Time last = absl::Now();
  while (replies < commands.size()) {
    bool moved = false;
    if (part < out.parts.size()) {
      size_t sent = 0;
      const Io io = Send(out.parts[part].substr(at), &sent);
      if (io == Io::kClosed) return Closed("the server has closed the connection");
      if (io == Io::kDone) {
        moved = true;
        at += sent;
        if (at == out.parts[part].size()) {
          part++;
          at = 0;
        }
      }
    }
    size_t got = 0;
    const Io io = Receive(buffer.data(), buffer.size(), &got);
    if (io == Io::kClosed) return Closed("the server has closed the connection");
    if (io == Io::kDone) {
      moved = answered_ = true;
      if (redisReaderFeed(reader_, buffer.data(), got) != REDIS_OK)
        return absl::InternalError(absl::StrCat("the server does not speak RESP: ", reader_->errstr));
      while (true) {
        void* raw = nullptr;
        if (redisReaderGetReply(reader_, &raw) != REDIS_OK)
          return absl::InternalError(absl::StrCat("the server does not speak RESP: ", reader_->errstr));
        if (raw == nullptr) break;
        const std::unique_ptr<void, decltype(&freeReplyObject)> reply(raw, &freeReplyObject);
        if (replies >= commands.size()) return absl::InternalError("the server answers what nobody asked");
        on_reply(replies++, *static_cast<const redisReply*>(raw));
      }
    }
    if (moved) {
      last = absl::Now();
      if (last >= limits.deadline && replies < commands.size())
        return absl::DeadlineExceededError("the server did not answer in time");
      if (IsCancelled(limits.cancellation)) return absl::CancelledError("the call was cancelled");
      continue;
    }
    KVTIDE_RETURN_IF_ERROR(Wait(part < out.parts.size(), limits, last));
  }
  return absl::OkStatus();
}

}  // namespace kvtide
