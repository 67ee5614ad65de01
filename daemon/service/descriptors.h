// How many clients the table of file descriptors has room for. Every connection takes a descriptor, a client
// that shares memory three (its socket, its arena, its process); backends, disk tiers and gRPC have theirs
// before (a CUDA device some forty), and a few are needed later: files under /proc, the metrics endpoint,
// tokens and configuration that are read again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace kvtide::service {

inline constexpr size_t kDescriptorsOfRingClient = 3, kDescriptorsForLater = 24;

// Clients of the two ways.
struct ClientCounts {
  size_t connections = 0, ring_clients = 0;
  friend bool operator==(const ClientCounts&, const ClientCounts&) = default;
};

struct DescriptorUse {
  uint64_t limit = 0;  // RLIMIT_NOFILE
  size_t open = 0;     // descriptors of this process
};
// As it is now.
DescriptorUse LookAtDescriptors();

// What `use` leaves room for, at most what is wanted: where it is little, those that share memory get a
// quarter of it. FailedPrecondition if there is no room for four connections (or as many as are wanted),
// with the limit that would do.
absl::StatusOr<ClientCounts> ShareDescriptors(const DescriptorUse& use, const ClientCounts& wanted);
// For the log, which of those that are wanted have no room and the limit that would do; empty if all have.
std::string DescriptorShortage(const DescriptorUse& use, const ClientCounts& wanted,
                               const ClientCounts& room);
// The limit with which all that are wanted have room.
uint64_t DescriptorsFor(const DescriptorUse& use, const ClientCounts& wanted);

// Raises the limit to what the process may have (the soft limit to the hard one). Programs that use select()
// cannot bear that; kvtided does not.
void RaiseDescriptorLimit();

}  // namespace kvtide::service
