// Accepts the connections of the daemon and hands their descriptors over to gRPC. gRPC's own listener never
// accepts again once the descriptor table was full, knows no limit of connections, and does not tell the ends
// of Unix sockets apart; this one does all three. Connections beyond the limit are told so on HTTP/2 (GOAWAY)
// and closed. Where many come in a short time, each waits for 2 ms before it is handed over, and one whose
// other end has closed by then costs gRPC nothing: floods that come and go, scans and probes of ports.
#pragma once

#include <poll.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/service/connections.h"

namespace kvtide::service {

// Why a connection is not served: there are as many as may be, of all or of its tenant; no file descriptor is
// left; it speaks plain HTTP/2 where TLS is asked for; it has said nothing for too long.
enum class ConnectionRefusal { kLimit, kQuota, kDescriptors, kPlaintext, kSilent };
constexpr size_t kConnectionRefusals = 5;
constexpr std::array<const char*, kConnectionRefusals> kConnectionRefusalNames = {
    "limit", "quota", "descriptors", "plaintext", "silent"};
// By reason, since the start.
using RefusedConnections = std::array<uint64_t, kConnectionRefusals>;

class Listener {
 public:
  struct Options {
    std::vector<int> sockets;  // that listen, non-blocking; borrowed
    size_t max_connections = 0;
    // Takes the descriptor of a connection that is in `connections`.
    std::function<void(int fd, bool tcp)> serve;
    // TCP is TLS: a connection is handed over when its first byte has come, and counts as refused where that
    // begins no handshake (gRPC ends it with an alert), or where none comes for 10 s.
    bool tls = false;
    // Why a connection that was just added is one too many, or empty; may be empty itself.
    std::function<std::string(const Connection& connection)> refusal;
    // About once a second; with the connections that were not served.
    std::function<void(const RefusedConnections& refused)> tick;
    std::function<std::chrono::steady_clock::time_point()> now = std::chrono::steady_clock::now;
  };
  // Borrows `connections`.
  Listener(Connections* connections, Options options);
  // Accepts no more; connections that were handed over stay.
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

 private:
  void Run();
  // False: nobody waits any more.
  bool AcceptOne(int listening);
  // No connection more may come: those that are served and those that wait are as many as may be.
  bool Full();
  // Refuses a connection or hands it over.
  void Admit(int fd);
  // Those that have waited, and the oldest beyond kMostWaiting; closes those that have gone.
  void AdmitWaiting(std::chrono::steady_clock::time_point now);
  // Of those that have said nothing yet, which `waits` has from `first` on: hands over who speaks.
  void HearSilent(const std::vector<pollfd>& waits, size_t first, std::chrono::steady_clock::time_point now);
  // Milliseconds until something is to be done although nobody comes.
  int Patience(std::chrono::steady_clock::time_point now) const;
  // Whether connections come so rarely that the next one need not wait.
  bool Calm(std::chrono::steady_clock::time_point now);
  // Takes a connection with the descriptor that is kept for it, and closes it; false: there was none.
  bool RefuseWithSpare(int listening);
  // Tells why. The descriptor stays open for a while where there is one to spare: a client that is still
  // sending when it is closed sees a broken pipe instead of the reason.
  void Refuse(int fd, ConnectionRefusal why, const char* reason, bool linger);
  void Count(ConnectionRefusal why) { refused_[static_cast<size_t>(why)]++; }
  void CloseRefused(size_t left);

  Connections* const connections_;
  const Options options_;
  RefusedConnections refused_{};
  std::deque<std::pair<int, std::chrono::steady_clock::time_point>> lingering_;  // refused, and since when
  std::deque<std::pair<int, std::chrono::steady_clock::time_point>> waiting_;    // accepted, and until when
  std::deque<std::pair<int, std::chrono::steady_clock::time_point>> silent_;     // of TLS, and until when
  double calm_ = 0;  // how many may still come at once without a wait, at calm_at_
  std::chrono::steady_clock::time_point calm_at_{};
  int spare_ = -1;  // a descriptor to be able to refuse when the table is full
  int stop_ = -1;   // an eventfd
  std::thread thread_;
};

}  // namespace kvtide::service
