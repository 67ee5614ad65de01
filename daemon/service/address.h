// The addresses that kvtided listens on: "unix:/path/to/socket" or "host:port". What gRPC only reports as a
// failure is found out before it is asked, so that the message can say what to do: a port in use, another
// daemon on the socket, a file in its place, a folder without permission. A stale socket of a daemon that
// died is removed.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace kvtide::service {

struct Address {
  std::string text;       // as gRPC takes it
  std::string unix_path;  // empty: TCP
  std::string host;       // TCP; "[::1]" without brackets
  int port = 0;           // TCP; 0 = any free one
  bool is_unix() const { return !unix_path.empty(); }
  // False for loopback and Unix sockets.
  bool OpenToNetwork() const;
};

absl::StatusOr<Address> ParseAddress(const std::string& text);

// Holds an address for the life of the daemon: for a Unix socket the lock file beside it (PATH.lock), which
// tells a second daemon that the place is taken. Released on destruction, the socket is removed.
class AddressClaim {
 public:
  // For a Unix socket: makes its folder (0750), takes the lock, removes a stale socket. For TCP: tries to
  // bind.
  static absl::StatusOr<std::unique_ptr<AddressClaim>> Take(const Address& address);
  ~AddressClaim();
  AddressClaim(const AddressClaim&) = delete;
  AddressClaim& operator=(const AddressClaim&) = delete;

 private:
  AddressClaim(std::string socket_path, int lock) : socket_path_(std::move(socket_path)), lock_(lock) {}
  const std::string socket_path_;  // empty for TCP
  const int lock_;                 // -1 for TCP
};

// $XDG_RUNTIME_DIR/kvtide/kvtided.sock, or /run/kvtide/kvtided.sock for root.
std::string DefaultListenAddress();

}  // namespace kvtide::service
