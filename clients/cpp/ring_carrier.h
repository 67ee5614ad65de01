// The shared-memory way: messages through a ring, tensors in an arena, both in memory that kvtided of this
// host gives (daemon/ring). Calls go one after the other; a second caller waits. A daemon that dies, or does
// not answer long after the deadline, ends the connection: every later call is Unavailable.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cpp/carrier.h"
#include "kernels/direct_device.h"

namespace kvtide::client {

struct RingOptions {
  absl::Duration timeout = absl::Seconds(60);  // of every call
  absl::Duration connect_timeout = absl::Seconds(5);
  uint64_t arena_bytes = uint64_t{64} << 20;  // for tensors
  // How long a caller looks for its answer before it sleeps.
  absl::Duration poll = absl::Microseconds(50);
  // Of the daemon that it has to be; 0 = any.
  uint64_t generation = 0;
  // Maps the pool where this computes; borrowed. Null: the pool is not mapped. FailedPrecondition if it lies
  // elsewhere, or blocks look otherwise; PermissionDenied if the daemon does not allow it.
  DirectDevice* direct = nullptr;
  // Maps the tier of host memory, for reading, where the daemon allows it.
  bool host_tier = false;
};

// Of "unix:/path" and "unix:///path". InvalidArgument for addresses of other kinds.
absl::StatusOr<std::string> SocketPathOf(const std::string& address);

class RingCarrier : public Carrier {
 public:
  // `socket_path` is that of the daemon's own socket. NotFound if it has no shared-memory socket beside it;
  // PermissionDenied, FailedPrecondition or ResourceExhausted as the daemon says.
  static absl::StatusOr<std::unique_ptr<RingCarrier>> Connect(const std::string& socket_path,
                                                              const RingOptions& options);
  // Of the daemon's pool.
  virtual uint64_t generation() const = 0;
};

}  // namespace kvtide::client
