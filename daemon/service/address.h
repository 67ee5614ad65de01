// The addresses that kvtided listens on: "unix:/path/to/socket" or "host:port". What stands in the way of one
// is named, with what to do: a port in use, another daemon on the socket, a file in its place, a folder
// without permission. A stale socket of a daemon that died is removed.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::service {

struct Address {
  std::string text;       // as clients write it
  std::string unix_path;  // empty: TCP
  std::string host;       // TCP; "[::1]" without brackets
  int port = 0;           // TCP; 0 = any free one
  bool is_unix() const { return !unix_path.empty(); }
  // False for loopback and Unix sockets.
  bool OpenToNetwork() const;
};

absl::StatusOr<Address> ParseAddress(const std::string& text);

// Holds an address for the life of the daemon: the sockets that listen, and for a Unix socket the lock file
// beside it (PATH.lock), which tells a second daemon that the place is taken. Released on destruction, the
// socket's file is removed.
class AddressClaim {
 public:
  // For a Unix socket: makes its folder (0750), takes the lock, removes a stale socket, makes one for owner
  // and group (0660). For TCP: every address that the host's name has.
  static absl::StatusOr<std::unique_ptr<AddressClaim>> Take(const Address& address);
  // The same, but a Unix socket, which listens already, has no file yet under its name until Show: who waits
  // for the file finds everything behind it ready. (A path without room for ".new" shows at once.)
  static absl::StatusOr<std::unique_ptr<AddressClaim>> Hold(const Address& address);
  absl::Status Show();
  ~AddressClaim();
  AddressClaim(const AddressClaim&) = delete;
  AddressClaim& operator=(const AddressClaim&) = delete;

  // Where the file of a Unix socket is no more, or another one stands in its place, clients cannot come:
  // makes it again, under the same descriptor. True if that was needed; an error where it cannot be done now.
  absl::StatusOr<bool> Mend();

  // Sockets that listen, non-blocking.
  const std::vector<int>& sockets() const { return sockets_; }
  // The address with the port that a port 0 became.
  const std::string& text() const { return text_; }

 private:
  AddressClaim() = default;
  absl::Status ListenOnUnix(const Address& address);
  // Takes the lock, and gives a socket that listens; its file is at hidden_path_ then.
  absl::StatusOr<int> BindUnix(const Address& address);
  absl::Status ListenOnTcp(const Address& address);

  Address address_;
  // Of the Unix socket's file as it was made: its number and time (numbers are used again at once).
  struct File {
    ino_t number = 0;
    int64_t nanos = 0;
    bool operator==(const File&) const = default;
  };
  static File FileAt(const std::string& path);
  File socket_file_;
  std::string text_;
  std::string hidden_path_;  // of the socket's file before it is shown; empty: there is none
  std::string socket_path_;  // the same afterwards
  int lock_ = -1;            // -1 for TCP
  std::vector<int> sockets_;
};

// $XDG_RUNTIME_DIR/kvtide/kvtided.sock, or /run/kvtide/kvtided.sock for root.
std::string DefaultListenAddress();

}  // namespace kvtide::service
