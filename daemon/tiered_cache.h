// A cache with all that lies under it, as a daemon and an embedded pool have it: backends, tiers on them, the
// disk with what was durable there.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/backends.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/cache/tier/remote_tier.h"
#include "daemon/calibrate/calibrator.h"
#include "daemon/config.h"
#include "daemon/disk/disk_tier.h"
#include "daemon/timed_backend.h"
#include "daemon/trace/trace_recorder.h"

namespace kvtide {

struct TieredCache {
  Backends backends;
  std::unique_ptr<DiskTier> disk;        // null: there is none
  std::unique_ptr<RemoteTier> remote;    // null: there is none
  std::unique_ptr<TraceRecorder> trace;  // null: nothing is recorded
  std::unique_ptr<Calibrator> calibrator;
  std::unique_ptr<KvCache> cache;
  // What whoever runs it wants to know of its start, as lines for a log.
  struct Note {
    enum Level { kInfo, kWarning, kError } level = kInfo;
    std::string text;
  };
  std::vector<Note> notes;

  // Memory beside the tiers for pieces on their way to or from the disk and the remote tier.
  int64_t staging_bytes() const {
    constexpr int64_t kRemote = int64_t{64}
                                << 20;  // a batch of blocks that are written, and values as they come
    return (disk != nullptr ? static_cast<int64_t>(disk->staging_bytes()) : 0) +
           (remote != nullptr ? kRemote : 0);
  }
};

// Takes the memory and the disk that the options name. Errors are those of backends, of memory that is not
// there, of the disk, and of options that do not fit together.
// `timer`, which may be empty, hears of the backends' work, from now on.
absl::StatusOr<std::unique_ptr<TieredCache>> MakeTieredCache(const DaemonOptions& options,
                                                             const WorkTimer& timer = {});

}  // namespace kvtide
