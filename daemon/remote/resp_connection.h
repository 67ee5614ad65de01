// A connection to a Redis or Valkey server: commands go out and replies come back pipelined, within a
// deadline that holds for all of them. hiredis reads the protocol; the sockets are ours, for a deadline that
// a slow sender cannot stretch, and for TLS with any hiredis. Used by one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/remote/remote_options.h"
#include "kernels/base/cancellation.h"

struct redisReply;
struct redisReader;

namespace kvtide {

// A command: its words, and perhaps bytes that follow the word before `value_at` (they may be two parts,
// which are one word).
struct RespCommand {
  std::vector<std::string> words;
  // Borrowed parts of one more word, which comes after so many words; empty: none.
  size_t value_at = 0;
  std::vector<std::string_view> value;
};

class RespConnection {
 public:
  struct Limits {
    absl::Time deadline;     // by absl::Now()
    absl::Duration silence;  // no byte either way for so long: gone
    const Cancellation* cancellation = nullptr;
  };
  // Unavailable or DeadlineExceeded; PermissionDenied where TLS does not trust the server.
  static absl::StatusOr<std::unique_ptr<RespConnection>> Connect(const RemoteAddress& address,
                                                                 const std::string& ca_file,
                                                                 const Limits& limits);
  ~RespConnection();
  RespConnection(const RespConnection&) = delete;
  RespConnection& operator=(const RespConnection&) = delete;

  // Sends all and hands each reply, in the order of the commands, to `reply`; errors of the server are
  // replies. After an error of its own (Unavailable: closed; DeadlineExceeded: silence or the deadline;
  // Cancelled; Internal: no RESP) the connection is of no use any more.
  using OnReply = std::function<void(size_t command, const redisReply& reply)>;
  absl::Status Run(const std::vector<RespCommand>& commands, const Limits& limits, const OnReply& reply);
  // Whether the last Run got a byte.
  bool answered() const { return answered_; }

 private:
  struct Tls;
  enum class Io { kDone, kAgain, kClosed };

  explicit RespConnection(int fd);
  absl::Status StartTls(const RemoteAddress& address, const std::string& ca_file, const Limits& limits);
  Io Send(std::string_view bytes, size_t* sent);
  Io Receive(char* buffer, size_t bytes, size_t* got);
  // Until the socket is ready, or a limit is reached. `since`: of the last byte.
  absl::Status Wait(bool write, const Limits& limits, absl::Time since) const;

  const int fd_;
  std::unique_ptr<Tls> tls_;
  redisReader* const reader_;
  bool answered_ = false;
};

}  // namespace kvtide
