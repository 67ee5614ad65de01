#include "daemon/metrics/endpoint.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <list>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/metrics/http_request.h"
#include "kernels/base/check.h"

namespace kvtide::metrics {
namespace {

// Connections that are taken before those that have been are looked at: whoever asks at once is answered
// before others, however many, can take its place.
constexpr int kAcceptedTogether = 16;

// Of a thread with turns of the usual 3 ms a whole one may have to end before this one's begins; among
// threads that have their due, the one whose turn would end first runs. No privilege is needed, kernels
// without it ignore it.
void AskForShortTurns() {
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  constexpr uint64_t kTurnNs = 100'000;  // the shortest
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0 ||
      attributes.policy != SCHED_OTHER)
    return;
  attributes.runtime = kTurnNs;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

std::string Answer(const char* status, const std::string& body, bool gzip, bool keeps_alive, bool head_only) {
  return absl::StrCat("HTTP/1.1 ", status, "\r\nContent-Type: text/plain; charset=utf-8\r\n",
                      gzip ? "Content-Encoding: gzip\r\n" : "", keeps_alive ? "" : "Connection: close\r\n",
                      "Content-Length: ", body.size(), "\r\n\r\n", head_only ? "" : body);
}

}  // namespace

std::string Gzip(const std::string& text) {
  z_stream stream{};
  constexpr int kGzip = 16, kMemory = 8;
  KVTIDE_CHECK(
      deflateInit2(&stream, Z_BEST_SPEED, Z_DEFLATED, MAX_WBITS + kGzip, kMemory, Z_DEFAULT_STRATEGY) == Z_OK,
      "no memory to compress metrics");
  std::string packed(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  const int ended = deflate(&stream, Z_FINISH);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  KVTIDE_CHECK(ended == Z_STREAM_END, "metrics were not compressed");
  return packed;
}

class Endpoint::Server {
 public:
  Server(int socket, std::function<std::string()> text, const Limits& limits)
      : socket_(socket), text_(std::move(text)), limits_(limits), stop_(::eventfd(0, EFD_CLOEXEC)) {
    KVTIDE_CHECK(stop_ >= 0, "no descriptor is free");
    thread_ = std::thread([this] { Run(); });
  }
  ~Server() {
    const uint64_t one = 1;
    KVTIDE_CHECK(::write(stop_, &one, sizeof(one)) == sizeof(one));
    thread_.join();
    for (const Connection& connection : connections_) ::close(connection.fd);
    ::close(stop_);
    ::close(socket_);
  }

  int port() const {
    sockaddr_storage address{};
    socklen_t size = sizeof(address);
    KVTIDE_CHECK(::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                               : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
  }

 private:
  struct Connection {
    int fd = -1;
    std::string received, answer;
    size_t sent = 0;           // of the answer
    bool ends = false;         // with the answer
    bool asks = false;         // more has come behind the last request: its turn comes, after those of others
    absl::Time served, until;  // since when it has waited, and how long it may go on
  };
  using Place = std::list<Connection>::iterator;

  void Run() {
    AskForShortTurns();
    for (;;) {
      std::vector<pollfd> waits = {{stop_, POLLIN, 0}, {socket_, POLLIN, 0}};
      absl::Time first = absl::InfiniteFuture();
      for (const Connection& connection : connections_) {
        const bool writes = !connection.answer.empty();
        waits.push_back({connection.fd, static_cast<short>(writes ? POLLOUT : POLLIN), 0});
        first = std::min(first, connection.asks ? absl::InfinitePast() : connection.until);
      }
      const absl::Duration left = std::clamp(first - absl::Now(), absl::ZeroDuration(), absl::Seconds(60));
      ::poll(waits.data(), waits.size(), static_cast<int>(absl::ToInt64Milliseconds(left)) + 1);
      if (waits[0].revents != 0) return;
      size_t at = 2;
      const absl::Time now = absl::Now();
      for (Place connection = connections_.begin(); connection != connections_.end();) {
        const bool ready = waits[at++].revents != 0 || connection->asks;
        const Place one = connection++;
        if (ready ? !Move(*one) : now >= one->until) Close(one);
      }
      if (waits[1].revents != 0) Accept();
    }
  }

  void Accept() {
    for (int i = 0; i < kAcceptedTogether; i++) {
      const int fd = ::accept4(socket_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) {
        // Without a free descriptor the next one waits for a while, and so does this thread, which would ask
        // again at once.
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
          absl::SleepFor(absl::Milliseconds(50));
        return;
      }
      if (connections_.size() >= limits_.connections)
        Close(std::min_element(connections_.begin(), connections_.end(),
                               [](const Connection& a, const Connection& b) { return a.served < b.served; }));
      const int one = 1;
      ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
      Connection& made = connections_.emplace_back();
      made.fd = fd;
      made.served = absl::Now();
      made.until = made.served + limits_.patience;
      if (!Move(made)) Close(std::prev(connections_.end()));  // what it asks has often come with it
    }
  }

  void Close(Place connection) {
    ::close(connection->fd);
    connections_.erase(connection);
  }

  // Reads, answers and writes what can be without waiting; false: the connection has ended.
  bool Move(Connection& connection) {
    if (!connection.answer.empty()) return Write(connection);
    if (std::exchange(connection.asks, false)) return Serve(connection);
    char buffer[4096];
    const ssize_t count = ::recv(connection.fd, buffer, sizeof(buffer), 0);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) return false;
    if (count < 0) return true;
    if (connection.received.empty()) connection.until = absl::Now() + limits_.patience;
    connection.received.append(buffer, static_cast<size_t>(count));
    return Serve(connection);
  }

  // The request that has come, if one has.
  bool Serve(Connection& connection) {
    const absl::StatusOr<std::optional<HttpRequest>> request = TakeHttpRequest(&connection.received);
    if (request.ok() && !request->has_value()) return true;
    connection.ends = !request.ok() || !(*request)->keeps_alive;
    connection.answer = request.ok() ? AnswerTo(**request) : Refusal(request.status());
    connection.sent = 0;
    connection.until = absl::Now() + limits_.patience;
    return Write(connection);
  }
  std::string AnswerTo(const HttpRequest& request) const {
    const bool head = request.method == "HEAD", alive = request.keeps_alive;
    if (!head && request.method != "GET")
      return Answer("405 Method Not Allowed", "GET and HEAD are answered\n", false, alive, false);
    if (request.path != "/metrics")
      return Answer("404 Not Found", "there is /metrics alone\n", false, alive, head);
    const std::string text = text_();
    return Answer("200 OK", request.takes_gzip ? Gzip(text) : text, request.takes_gzip, alive, head);
  }
  static std::string Refusal(const absl::Status& why) {
    const bool large = absl::IsResourceExhausted(why);
    return Answer(large ? "431 Request Header Fields Too Large" : "400 Bad Request",
                  absl::StrCat(why.message(), "\n"), false, false, false);
  }

  bool Write(Connection& connection) {
    while (connection.sent < connection.answer.size()) {
      const ssize_t count = ::send(connection.fd, connection.answer.data() + connection.sent,
                                   connection.answer.size() - connection.sent, MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno == EAGAIN;
      connection.sent += static_cast<size_t>(count);
    }
    if (connection.ends) {
      // What it has sent besides would reset the connection before the answer is read.
      ::shutdown(connection.fd, SHUT_WR);
      char rest[4096];
      while (::recv(connection.fd, rest, sizeof(rest), 0) > 0) {
      }
      return false;
    }
    connection.answer.clear();
    connection.served = absl::Now();
    connection.until = connection.served + limits_.rest;
    connection.asks = !connection.received.empty();
    if (connection.asks) connection.until = connection.served + limits_.patience;
    return true;
  }

  const int socket_;
  const std::function<std::string()> text_;
  const Limits limits_;
  const int stop_;  // an eventfd
  std::list<Connection> connections_;
  std::thread thread_;
};

Endpoint::Endpoint(std::unique_ptr<Server> server) : server_(std::move(server)) {}
Endpoint::~Endpoint() = default;

absl::StatusOr<std::unique_ptr<Endpoint>> Endpoint::Start(const EndpointAddress& address,
                                                          std::function<std::string()> text, Limits limits) {
  const absl::StatusOr<int> socket = Listen(address);
  if (!socket.ok()) return socket.status();
  return std::unique_ptr<Endpoint>(new Endpoint(std::make_unique<Server>(*socket, std::move(text), limits)));
}

int Endpoint::port() const { return server_->port(); }

}  // namespace kvtide::metrics
