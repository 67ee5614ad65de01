// A tier that daemons share: blocks lie there under names that are made of what they hold, and every daemon
// that knows the name finds them. The cache places nothing there and nothing depends on it: what is there is
// a copy, the store drops it when it likes, and a store that is away, slow, full or wrong is a miss. So it
// holds no place of a block, and no call that attends, appends or moves ever waits for it.
//
// Names are unique in a space, which is a text that says what the bytes depend on (tenant, model, pairs,
// codec versions, ...); stores have to tell spaces apart by a hash that nobody can make collide. Calls may
// come from several threads at once, and never under the cache's mutex.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "daemon/cache/tier/block_id.h"
#include "daemon/cache/tier/io_tier.h"
#include "kernels/base/cancellation.h"

namespace kvtide {

struct RemoteName {
  enum class Kind : uint8_t { kBlock, kProfile };
  Kind kind = Kind::kBlock;
  BlockKey key;   // of a profile: its hash, and 0
  int group = 0;  // layer group
};

// One value on its way. Its label says whose bytes they are: a write sets its checksum, a read compares all
// of it but write id, sequence and profile (checksum 0 and, of profiles, size 0: any), and returns what it
// found.
struct RemoteJob {
  RemoteName name;
  BlockLabel label;
  // As in IoJob: called in order, never for two pieces at a time.
  std::function<absl::Status(size_t at, std::span<std::byte> piece)> copy;
  // A read: NotFound where nothing lies, DataLoss where something else or damaged bytes do. ResourceExhausted
  // when the store is full; Unavailable or DeadlineExceeded when it does not answer, or is not asked for a
  // while.
  absl::Status status = absl::UnavailableError("not tried");
};

// How long a call may take.
struct RemoteLimit {
  absl::Duration time = absl::Seconds(1);
  const Cancellation* cancellation = nullptr;
};

// How long operations took: how many took at most so long, and those beyond.
struct RemoteTimes {
  static constexpr std::array<double, 8> kSeconds = {.0002, .0005, .001, .005, .02, .1, .5, 2};
  std::array<uint64_t, kSeconds.size() + 1> counts{};
  double seconds = 0;
  void Add(absl::Duration time);
};

struct RemoteStats {
  std::string server;                  // "redis://10.0.0.5:6379"
  std::string problem, write_problem;  // why it is not asked, not written to; empty: it is
  uint64_t read_blocks = 0, read_bytes = 0, written_blocks = 0, written_bytes = 0;
  uint64_t damaged_blocks = 0;  // labels or checksums that were not those expected, missing pieces
  uint64_t timeouts = 0, errors = 0, connects = 0;
  // As the store says; 0 and empty: it does not.
  uint64_t memory_limit_bytes = 0, memory_used_bytes = 0;
  std::string memory_policy;
  RemoteTimes find, read, write;
  // Filled in by the cache: blocks that lookups wanted and found there, or not; that were there when they
  // were to be written; that were left out for want of room or time; that wait.
  uint64_t hit_blocks = 0, miss_blocks = 0, present_blocks = 0, left_out_blocks = 0, queued_blocks = 0;
};

// What is written there of the blocks that others could find.
enum class RemoteWrites : uint8_t {
  kNone,
  kOnDemote,  // cached ones that no open sequence has, before the last tier here has no room for them
  kAll,       // as soon as they are found here
};

class RemoteTier {
 public:
  virtual ~RemoteTier() = default;
  virtual std::string name() const = 0;
  // What lies under these names now, in one round trip; nothing, also where the store does not answer.
  virtual std::vector<std::optional<BlockLabel>> Find(const std::string& space,
                                                      std::span<const RemoteName> names,
                                                      const RemoteLimit& limit) = 0;
  // All jobs of equal direction together; returns when none runs any more, however some have ended. What was
  // read or written lies there for its whole time again.
  virtual void Read(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) = 0;
  virtual void Write(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) = 0;
  // Nothing of the space is found any more when this returns OK.
  virtual absl::Status Erase(const std::string& space, const RemoteLimit& limit) = 0;
  // False while it is not asked, or takes nothing, after an error: a while later it is tried again.
  virtual bool Writable() const = 0;
  virtual RemoteStats Stats() const = 0;
};

inline void RemoteTimes::Add(absl::Duration time) {
  const double took = absl::ToDoubleSeconds(time);
  size_t bucket = 0;
  while (bucket < kSeconds.size() && took > kSeconds[bucket]) bucket++;
  counts[bucket]++;
  seconds += took;
}

}  // namespace kvtide
