// How a client gets its arena: it connects to the Unix socket PATH.ring beside the daemon's socket PATH,
// sends a Hello and gets a Welcome, with the arena's descriptor (SCM_RIGHTS) when it is let in. Both are
// structs of a fixed size, of processes on one machine. The connection stays open for as long as the client
// lives: its end is how either side learns that the other has gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace kvtide::ring {

// Raised with every change of Hello, Welcome, RingHead, ArenaLayout or what messages mean.
constexpr uint32_t kProtocolVersion = 5;
constexpr char kMagic[8] = {'K', 'V', 'T', 'R', 'I', 'N', 'G', '\0'};
constexpr char kSocketSuffix[] = ".ring";

struct Hello {
  char magic[8] = {'K', 'V', 'T', 'R', 'I', 'N', 'G', '\0'};
  uint32_t version = kProtocolVersion;
  uint32_t wants_pool = 0;  // 1: PoolSlabs follow the Welcome
  // Of the daemon that the client was connected to before; 0 = any. Another one has none of its sequences.
  uint64_t generation = 0;
  // LayoutFingerprint() of clients that want to read blocks themselves; 0 = does not matter.
  uint64_t layout = 0;
  uint64_t tensor_bytes = 0;  // wanted in the arena
  uint32_t wants_host = 0;    // 1: a HostTier follows the Welcome, and the PoolSlabs if any
  uint32_t unused = 0;
};

struct Welcome {
  char magic[8] = {'K', 'V', 'T', 'R', 'I', 'N', 'G', '\0'};
  uint32_t version = kProtocolVersion;
  int32_t code = 0;  // an absl::StatusCode; not 0: refused, and `text` says why
  uint64_t generation = 0, layout = 0;
  uint64_t request_bytes = 0, answer_bytes = 0, tensor_bytes = 0;  // of the arena
  char text[512] = {};
};

// The memory of the first tier, for a client that maps it; the descriptors of files among the slabs come with
// it, in their order (SCM_RIGHTS).
constexpr uint32_t kMostSlabs = 16;
struct PoolSlabs {
  struct Slab {
    char tier[32] = {};    // as TierInfo names it,
    char device[64] = {};  // and its device
    char owner[48] = {};   // SlabHandle::device
    uint32_t kind = 0;     // SlabHandle::Kind
    uint32_t unused = 0;
    uint64_t bytes = 0;
    std::byte ipc[64] = {};
  };
  uint32_t count = 0;
  uint32_t unused = 0;
  Slab slabs[kMostSlabs];
};
// The tier of host memory, for a client that reads the blocks that it loads where they lie; with `bytes`
// comes a descriptor that can be mapped for reading alone (SCM_RIGHTS). To be refused is no error: the client
// loads through its arena.
struct HostTier {
  char tier[32] = {};  // as TierInfo names it
  uint64_t bytes = 0;  // 0: it is not shared, and `text` says why
  char text[256] = {};
};
// What a client that maps the pool or the tier of host memory says before it closes the connection, when no
// work of its own is under way any more. From one that closes without it, the daemon waits until its process
// has ended.
constexpr char kGoodbye = 'B';

// Of what blocks look like in this build: names, versions and layouts of all cache types.
uint64_t LayoutFingerprint();

// What a daemon answers to a Hello from its pool `generation`: OK, or why it is refused.
absl::Status CheckHello(const Hello& hello, uint64_t generation);
// The client's side: why a Welcome is none, or the daemon's refusal.
absl::Status CheckWelcome(const Welcome& welcome);
void SetText(const absl::Status& status, Welcome* welcome);
void SetText(const absl::Status& status, HostTier* tier);

// Sends all bytes, with descriptors beside the first of them; to be used on fresh sockets only.
absl::Status Send(int socket, std::span<const std::byte> bytes, std::span<const int> fds);
// Receives exactly so many bytes by the deadline, and at most fds.size() descriptors (-1 = none came), which
// are the caller's.
absl::Status Receive(int socket, std::span<std::byte> bytes, absl::Time deadline, std::span<int> fds);
inline absl::Status Receive(int socket, std::span<std::byte> bytes, absl::Time deadline, int* fd) {
  return Receive(socket, bytes, deadline, {fd, 1});
}
// Whether the other end has closed or died; does not wait.
bool HungUp(int socket);

}  // namespace kvtide::ring
