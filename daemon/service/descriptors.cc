#include "daemon/service/descriptors.h"

#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace kvtide::service {
namespace {

constexpr size_t kFewestConnections = 4;

}  // namespace

DescriptorUse LookAtDescriptors() {
  DescriptorUse use;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) use.limit = limit.rlim_cur;
  std::error_code error;
  const std::filesystem::directory_iterator entries("/proc/self/fd", error);
  // Without /proc: what a daemon with a GPU has.
  use.open = error ? 64 : static_cast<size_t>(std::distance(begin(entries), end(entries)));
  return use;
}

uint64_t DescriptorsFor(const DescriptorUse& use, const ClientCounts& wanted) {
  return use.open + kDescriptorsForLater + wanted.connections +
         kDescriptorsOfRingClient * wanted.ring_clients;
}

absl::StatusOr<ClientCounts> ShareDescriptors(const DescriptorUse& use, const ClientCounts& wanted) {
  const size_t taken = use.open + kDescriptorsForLater;
  const size_t room = use.limit > taken ? static_cast<size_t>(use.limit - taken) : 0;
  ClientCounts counts = wanted;
  const size_t ring_room =
      std::max(room / 4, room - std::min(room, wanted.connections)) / kDescriptorsOfRingClient;
  counts.ring_clients = std::min(wanted.ring_clients, ring_room);
  counts.connections = std::min(wanted.connections, room - kDescriptorsOfRingClient * counts.ring_clients);
  if (counts.connections < std::min(wanted.connections, kFewestConnections)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the limit of open files is ", use.limit, ", of which ", use.open, " are open already and ",
        kDescriptorsForLater,
        " are kept for later: no room for clients. Raise it (LimitNOFILE of a unit, ulimit -n); ",
        DescriptorsFor(use, wanted), " are enough for ", wanted.connections, " connections and ",
        wanted.ring_clients, " clients that share memory"));
  }
  return counts;
}

std::string DescriptorShortage(const DescriptorUse& use, const ClientCounts& wanted,
                               const ClientCounts& room) {
  if (room == wanted) return "";
  return absl::StrCat("max_connections=", room.connections, " max_shared_memory_clients=", room.ring_clients,
                      " the limit of open files, ", use.limit,
                      ", has room for no more; raise LimitNOFILE (ulimit -n), ", DescriptorsFor(use, wanted),
                      " are enough");
}

void RaiseDescriptorLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace kvtide::service
