#include "daemon/tiered_cache.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "daemon/host_memory.h"
#include "kernels/base/status.h"
#ifdef KVTIDE_HAVE_REDIS
#include "daemon/remote/redis_tier.h"
#endif

namespace kvtide {
namespace {

using Note = TieredCache::Note;

constexpr absl::Duration kLetGo = absl::Seconds(5);

absl::StatusOr<IoKind> ChooseIo(const std::string& wanted, std::vector<Note>* notes) {
  if (wanted == "threads") return IoKind::kThreads;
  const absl::Status uring = CheckUring();
  if (uring.ok()) return IoKind::kUring;
  if (wanted == "io_uring")
    return Annotate(uring, "disk_io io_uring is not allowed here (threads works everywhere)");
  notes->push_back(
      {Note::kWarning, absl::StrCat("disk_io=threads io_uring is not allowed here: ", uring.message())});
  return IoKind::kThreads;
}

absl::Status OpenDisk(const DaemonOptions& options, TieredCache* made) {
  DiskTierOptions disk;
  disk.folder = options.disk_folder;
  disk.capacity_bytes = static_cast<size_t>(options.disk_bytes);
  KVTIDE_ASSIGN_OR_RETURN(disk.io, ChooseIo(options.disk_io, &made->notes));
  if (!options.disk_key_file.empty()) {
    absl::StatusOr<SecretKey> key = ReadKeyFile(options.disk_key_file);
    if (!key.ok()) return Annotate(key.status(), "disk_key_file");
    disk.key = std::make_shared<SecretKey>(*std::move(key));
  }
  KVTIDE_ASSIGN_OR_RETURN(made->disk, DiskTier::Open(disk));
  if (!made->disk->rebuild_reason().empty())
    made->notes.push_back(
        {Note::kError, absl::StrCat("index of the disk tier built anew: ", made->disk->rebuild_reason())});
  made->notes.push_back(
      {Note::kInfo, absl::StrCat("disk folder=", disk.folder, " bytes=", disk.capacity_bytes,
                                 " io=", disk.io == IoKind::kUring ? "io_uring" : "threads",
                                 " encrypted=", disk.key != nullptr ? "yes" : "no")});
  return absl::OkStatus();
}

absl::Status OpenRemote(const RemoteOptions& options, TieredCache* made) {
#ifdef KVTIDE_HAVE_REDIS
  RedisTierOptions redis;
  redis.remote = options;
  KVTIDE_ASSIGN_OR_RETURN(made->remote, RedisTier::Open(redis));
  const RemoteStats stats = made->remote->Stats();
  made->notes.push_back({Note::kInfo, absl::StrCat("remote server=", stats.server, " prefix=", options.prefix,
                                                   " writes=", NameOf(options.writes))});
  if (!stats.problem.empty())
    made->notes.push_back({Note::kWarning, absl::StrCat("remote server=", stats.server,
                                                        " is away, and is tried again: ", stats.problem)});
  return absl::OkStatus();
#else
  (void)made;
  return absl::UnimplementedError(absl::StrCat(
      "remote ", options.address.Text(),
      ": this kvtided was built without Redis; build it with -DKVTIDE_REDIS=ON (libhiredis-dev)"));
#endif
}

}  // namespace

absl::StatusOr<std::unique_ptr<TieredCache>> MakeTieredCache(const DaemonOptions& options,
                                                             const WorkTimer& timer) {
  auto made = std::make_unique<TieredCache>();
  KVTIDE_ASSIGN_OR_RETURN(made->backends, MakeBackends(options.devices, options.compute_threads,
                                                       {options.share_pool, options.gpu_sharing,
                                                        options.service.shared_memory.host_sharing}));
  if (!made->backends.note.empty())
    made->notes.push_back({Note::kWarning, absl::StrCat("device=cpu ", made->backends.note)});
  if (timer != nullptr) {
    for (auto& device : made->backends.devices) device = MakeTimedBackend(std::move(device), timer);
    if (made->backends.host != nullptr)
      made->backends.host = MakeTimedBackend(std::move(made->backends.host), timer);
  }
  // Pages of the tiers are taken as they are first used; by then it is too late to say no.
  const int64_t wanted = options.host_bytes + made->backends.cpu_devices * options.device_bytes;
  absl::Status room = CheckHostMemory(wanted, ReadHostMemory());
  // Engines that had mapped the host tier of a kvtided before let go of it when they see that it has ended.
  const bool shared = options.service.shared_memory.host_sharing;
  for (const absl::Time end = absl::Now() + kLetGo; shared && !room.ok() && absl::Now() < end;) {
    absl::SleepFor(absl::Milliseconds(100));
    room = CheckHostMemory(wanted, ReadHostMemory());
  }
  KVTIDE_RETURN_IF_ERROR(room);
  CacheOptions cache = options.cache;
  for (const auto& device : made->backends.devices)
    cache.tiers.push_back(
        {"device", device.get(), static_cast<size_t>(options.device_bytes), false, device->name()});
  if (options.host_bytes > 0)
    cache.tiers.push_back({"host", made->backends.Host(), static_cast<size_t>(options.host_bytes),
                           options.host_checksum, "cpu"});
  if (!options.disk_folder.empty()) {
    KVTIDE_RETURN_IF_ERROR(OpenDisk(options, made.get()));
    DiskTier* const disk = made->disk.get();
    cache.tiers.push_back({"disk", nullptr, disk->capacity_bytes(), true, "disk", disk, disk});
  }
  if (options.remote.has_value()) {
    KVTIDE_RETURN_IF_ERROR(OpenRemote(*options.remote, made.get()));
    cache.remote = made->remote.get();
    cache.remote_read = options.remote->read_time;
    cache.remote_writes = options.remote->writes;
  }
  if (!options.trace_file.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(
        made->trace,
        TraceRecorder::Open(options.trace_file, static_cast<uint64_t>(options.trace_bytes), absl::Now()));
    cache.trace = made->trace.get();
    made->notes.push_back(
        {Note::kInfo, absl::StrCat("recording file=", options.trace_file, " bytes=", options.trace_bytes)});
  }
  made->calibrator = std::make_unique<Calibrator>(options.calibrate);
  cache.traffic = made->calibrator.get();
  KVTIDE_ASSIGN_OR_RETURN(made->cache, KvCache::Create(cache));
  const RestoreReport& restored = made->cache->restored();
  if (restored.sequences > 0)
    made->notes.push_back(
        {Note::kInfo, absl::StrCat("restored sequences=", restored.sequences, " tokens=", restored.tokens,
                                   " blocks=", restored.blocks, " bytes=", restored.bytes)});
  if (restored.prefix_blocks > 0)
    made->notes.push_back({Note::kInfo, absl::StrCat("restored prefix_blocks=", restored.prefix_blocks)});
  for (const std::string& lost : restored.lost)
    made->notes.push_back({Note::kError, absl::StrCat("not restored: ", lost)});
  return made;
}

}  // namespace kvtide
