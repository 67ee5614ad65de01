#include "daemon/service/listener.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/base/check.h"

namespace kvtide::service {
namespace {

constexpr int kTickMilliseconds = 1000;
constexpr std::chrono::milliseconds kBreath{50};
// How long and how many refused connections stay open.
constexpr std::chrono::milliseconds kLinger{1000};
constexpr size_t kMostLingering = 8;
// How long a connection of TLS may take to begin its handshake; gRPC gives it as long to end that.
constexpr std::chrono::seconds kSilence{10};
constexpr char kHandshake = 0x16;  // the first byte of TLS
// How many may come at once, and a second, before they wait; for how long, and how many do at a time.
constexpr double kCalmAtOnce = 64, kCalmPerSecond = 100;
constexpr std::chrono::milliseconds kWait{2};
constexpr size_t kMostWaiting = 256;

int OpenSpare() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

// An empty SETTINGS frame, and GOAWAY with ENHANCE_YOUR_CALM and a text: what HTTP/2 has for a refusal.
std::string Goodbye(const std::string& text) {
  std::string frames("\0\0\0\4\0\0\0\0\0", 9);
  const size_t size = 8 + text.size();
  frames += {'\0', static_cast<char>(size >> 8), static_cast<char>(size), '\7'};
  frames += std::string(
      "\0\0\0\0\0"
      "\0\0\0\0"
      "\0\0\0\x0b",
      13);
  return frames + text;
}

}  // namespace

Listener::Listener(Connections* connections, Options options)
    : connections_(connections),
      options_(std::move(options)),
      spare_(OpenSpare()),
      stop_(::eventfd(0, EFD_CLOEXEC)) {
  KVTIDE_CHECK(stop_ >= 0, "no descriptor is free");
  thread_ = std::thread([this] { Run(); });
}

Listener::~Listener() {
  const uint64_t one = 1;
  KVTIDE_CHECK(::write(stop_, &one, sizeof(one)) == sizeof(one));
  thread_.join();
  CloseRefused(0);
  for (const auto& [fd, until] : waiting_) ::close(fd);
  for (const auto& [fd, until] : silent_) ::close(fd);
  ::close(stop_);
  if (spare_ >= 0) ::close(spare_);
}

void Listener::Run() {
  std::vector<pollfd> waits = {{stop_, POLLIN, 0}};
  for (const int fd : options_.sockets) waits.push_back({fd, POLLIN, 0});
  const size_t first_silent = waits.size();
  auto next_tick = options_.now();
  for (;;) {
    waits.resize(first_silent);
    for (const auto& [fd, until] : silent_) waits.push_back({fd, POLLIN | POLLRDHUP, 0});
    ::poll(waits.data(), waits.size(), Patience(options_.now()));
    if (waits[0].revents != 0) return;
    HearSilent(waits, first_silent, options_.now());
    AdmitWaiting(options_.now());
    if (const auto now = options_.now(); now >= next_tick) {
      connections_->Sweep();
      while (!lingering_.empty() && now - lingering_.front().second >= kLinger)
        CloseRefused(lingering_.size() - 1);
      options_.tick(refused_);
      next_tick = now + std::chrono::milliseconds(kTickMilliseconds);
    }
    for (size_t i = 1; i < first_silent; i++) {
      while (waits[i].revents != 0 && AcceptOne(waits[i].fd)) {
      }
    }
  }
}

bool Listener::AcceptOne(int listening) {
  const int fd = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    if (error == EMFILE || error == ENFILE) return RefuseWithSpare(listening);
    if (error == EINTR || error == ECONNABORTED) return true;
    if (error != EAGAIN) std::this_thread::sleep_for(kBreath);  // out of memory, say: try again
    return false;
  }
  const auto now = options_.now();
  if (Calm(now) || Full()) {
    Admit(fd);
  } else {
    waiting_.emplace_back(fd, now + kWait);
    AdmitWaiting(now);
  }
  return true;
}

bool Listener::Calm(std::chrono::steady_clock::time_point now) {
  calm_ += kCalmPerSecond * std::chrono::duration<double>(now - calm_at_).count();
  calm_ = std::min(calm_, kCalmAtOnce);
  calm_at_ = now;
  if (calm_ < 1) return false;
  calm_ -= 1;
  return true;
}

int Listener::Patience(std::chrono::steady_clock::time_point now) const {
  if (waiting_.empty()) return kTickMilliseconds;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(waiting_.front().second - now).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, kTickMilliseconds));
}

void Listener::AdmitWaiting(std::chrono::steady_clock::time_point now) {
  while (!waiting_.empty() && (waiting_.front().second <= now || waiting_.size() > kMostWaiting)) {
    const int fd = waiting_.front().first;
    waiting_.pop_front();
    pollfd end{fd, POLLRDHUP, 0};
    if (::poll(&end, 1, 0) > 0) {
      ::close(fd);
    } else {
      Admit(fd);
    }
  }
}

void Listener::HearSilent(const std::vector<pollfd>& waits, size_t first,
                          std::chrono::steady_clock::time_point now) {
  std::deque<std::pair<int, std::chrono::steady_clock::time_point>> left;
  for (size_t i = 0; i < silent_.size(); i++) {
    const auto& [fd, until] = silent_[i];
    char byte = 0;
    const ssize_t size = first + i < waits.size() && waits[first + i].revents != 0
                             ? ::recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
                             : -1;
    if (size > 0) {
      if (byte != kHandshake) Count(ConnectionRefusal::kPlaintext);
      options_.serve(fd, true);
    } else if (size < 0 && (errno == EAGAIN || errno == EINTR || waits[first + i].revents == 0) &&
               now < until) {
      left.push_back(silent_[i]);
    } else {
      if (now >= until) Count(ConnectionRefusal::kSilent);
      connections_->Forget(fd);
      ::close(fd);
    }
  }
  silent_ = std::move(left);
}

// Those that wait have a descriptor each, as the others.
bool Listener::Full() {
  const auto most = [this](size_t connections) {
    return connections + waiting_.size() >= options_.max_connections;
  };
  return most(connections_->size()) && most(connections_->Sweep());
}

void Listener::Admit(int fd) {
  if (Full()) {
    Refuse(fd, ConnectionRefusal::kLimit,
           "kvtided has as many connections as it may (max_connections, or the limit of open files)", true);
    return;
  }
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // not for Unix sockets, which say so
  const std::shared_ptr<Connection> connection = connections_->Add(fd);
  if (const std::string reason = options_.refusal ? options_.refusal(*connection) : ""; !reason.empty()) {
    connections_->Forget(fd);
    Refuse(fd, ConnectionRefusal::kQuota, reason.c_str(), true);
    return;
  }
  if (connection->tcp && options_.tls) {
    silent_.emplace_back(fd, options_.now() + kSilence);
    return;
  }
  options_.serve(fd, connection->tcp);
}

bool Listener::RefuseWithSpare(int listening) {
  if (spare_ >= 0) ::close(spare_);
  const int fd = ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd >= 0) Refuse(fd, ConnectionRefusal::kDescriptors, "kvtided has no file descriptor left", false);
  spare_ = OpenSpare();
  // Others were faster: until they give one back there is nothing to do but to wait.
  if (spare_ < 0) std::this_thread::sleep_for(kBreath);
  return fd >= 0;
}

void Listener::CloseRefused(size_t left) {
  for (; lingering_.size() > left; lingering_.pop_front()) ::close(lingering_.front().first);
}

void Listener::Refuse(int fd, ConnectionRefusal why, const char* reason, bool linger) {
  Count(why);
  const std::string text = Goodbye(std::string(reason) + "; close some, or connect later");
  if (::send(fd, text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    // It has gone already.
  }
  if (!linger) {
    ::close(fd);
    return;
  }
  ::shutdown(fd, SHUT_WR);
  CloseRefused(kMostLingering - 1);
  lingering_.emplace_back(fd, options_.now());
}

}  // namespace kvtide::service
