#include "daemon/trace/replay.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/trace/weightless_tiers.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kProgressEvery = 64;
constexpr absl::Duration kLease = absl::Seconds(60);
constexpr size_t kMostNamespaces = 4096;

bool IsLookup(const RecordedEvent& event) { return event.Is(TraceVerb::kLookup); }
bool IsStore(const RecordedEvent& event) { return event.Is(TraceVerb::kStore) || event.Is(TraceVerb::kSeal); }

// The cache and the names that it knows the events' keys by.
class Player {
 public:
  static absl::StatusOr<std::unique_ptr<Player>> Make(std::span<const RecordedEvent> events,
                                                      const ReplayOptions& options) {
    uint64_t largest = 0, most = 0;
    for (const RecordedEvent& event : events) {
      if (event.keys.empty()) continue;
      largest = std::max(largest, event.block_bytes);
      most = std::max(most, SaturatingMul(event.block_bytes, event.keys.size()));
    }
    if (largest > options.host_bytes)
      return absl::InvalidArgumentError(absl::StrCat("the host tier of ", options.host_bytes,
                                                     " bytes is smaller than one block, which has ", largest,
                                                     "; give it more"));
    auto player = std::make_unique<Player>(options);
    KVTIDE_ASSIGN_OR_RETURN(player->payload_, AddressRange::Take(static_cast<size_t>(most)));
    KVTIDE_RETURN_IF_ERROR(player->Start());
    return player;
  }

  explicit Player(const ReplayOptions& options)
      : options_(options), disk_(static_cast<size_t>(options.disk_bytes)) {}

  absl::Status Play(const RecordedEvent& event) {
    now_ = std::max(now_, absl::UnixEpoch() + absl::Nanoseconds(event.nanos));
    cache_->RunMovesOnce();
    if (event.keys.empty() || (!IsLookup(event) && !IsStore(event))) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const NamespaceId space, Namespace(event));
    std::vector<std::string_view> keys;
    keys.reserve(event.keys.size());
    for (const uint64_t& key : event.keys) keys.emplace_back(reinterpret_cast<const char*>(&key), sizeof key);
    if (!IsLookup(event)) return Store(event, space, keys);
    KVTIDE_ASSIGN_OR_RETURN(const uint64_t hits, Lookup(event, space, keys));
    return Store(event, space, std::span(keys).subspan(static_cast<size_t>(hits)));
  }

  ReplayResult Result() const {
    ReplayResult result = result_;
    const CacheStats stats = cache_->Stats();
    result.dropped_blocks = stats.dropped_blocks;
    const IoTierStats disk = disk_.Stats();
    result.down_bytes = disk.written_bytes;
    result.up_bytes = disk.read_bytes;
    return result;
  }

 private:
  absl::Status Start() {
    CacheOptions cache;
    cache.tiers.push_back({"host", &host_, static_cast<size_t>(options_.host_bytes), false});
    if (options_.disk_bytes > 0)
      cache.tiers.push_back({"disk", nullptr, disk_.capacity_bytes(), true, "disk", &disk_});
    cache.eviction = options_.eviction;
    cache.max_namespaces = kMostNamespaces;
    cache.max_keyed_blocks = ~uint32_t{0};
    cache.max_copy_threads = 1;
    cache.background_moves = false;
    cache.room_wait = cache.io_wait = absl::ZeroDuration();
    cache.clock = [this] { return now_; };
    cache.id_seed = 1;
    KVTIDE_ASSIGN_OR_RETURN(cache_, KvCache::Create(cache));
    return absl::OkStatus();
  }

  absl::StatusOr<NamespaceId> Namespace(const RecordedEvent& event) {
    const auto name = std::make_tuple(event.name_space, event.block_bytes, event.block_tokens);
    if (const auto found = spaces_.find(name); found != spaces_.end()) return found->second;
    NamespaceSpec spec;
    spec.model = absl::StrCat(absl::Hex(event.name_space));
    spec.block_tokens = static_cast<int>(std::min<uint32_t>(event.block_tokens, 1 << 30));
    spec.opaque = OpaqueContent{event.block_bytes, "replay"};
    KVTIDE_ASSIGN_OR_RETURN(const NamespaceInfo info, cache_->OpenNamespace(spec, Persistence::kNone));
    spaces_[name] = info.id;
    return info.id;
  }

  // Loads what is there; returns how many blocks that are.
  absl::StatusOr<uint64_t> Lookup(const RecordedEvent& event, NamespaceId space,
                                  std::span<const std::string_view> keys) {
    LookupCall lookup;
    lookup.name_space = space;
    lookup.keys = keys;
    lookup.lease = kLease;
    KVTIDE_ASSIGN_OR_RETURN(const LookupReport report, cache_->LookupBlocks(lookup));
    result_.lookups++;
    result_.asked_blocks += keys.size();
    result_.hit_blocks += report.hits;
    result_.asked_tokens += keys.size() * event.block_tokens;
    result_.hit_tokens += report.hits * event.block_tokens;
    for (const LookupReport::Hits& hits : report.tiers)
      (hits.tier == 0 ? result_.host_hit_blocks : result_.disk_hit_blocks) += hits.blocks;
    if (report.hits == 0) return uint64_t{0};
    LoadCall load;
    load.lease = report.lease;
    load.blocks = report.hits;
    load.form = BlockPayload::kBytes;
    load.payload = {payload_->data(), static_cast<size_t>(report.hits * event.block_bytes)};
    load.allow_lost = true;
    const absl::StatusOr<LoadReport> loaded = cache_->LoadBlocks(load);
    cache_->ReleaseLease(report.lease);
    KVTIDE_RETURN_IF_ERROR(loaded.status());
    return report.hits;
  }

  absl::Status Store(const RecordedEvent& event, NamespaceId space, std::span<const std::string_view> keys) {
    if (keys.empty()) return absl::OkStatus();
    StoreCall store;
    store.name_space = space;
    store.keys = keys;
    store.form = BlockPayload::kBytes;
    store.payload = {payload_->data(), static_cast<size_t>(keys.size() * event.block_bytes)};
    const absl::StatusOr<StoreReport> report = cache_->StoreBlocks(store);
    if (absl::IsResourceExhausted(report.status())) {
      result_.refused_blocks += keys.size();
      return absl::OkStatus();
    }
    KVTIDE_RETURN_IF_ERROR(report.status());
    result_.stored_blocks += report->stored;
    result_.stored_bytes += report->stored * event.block_bytes;
    result_.refused_blocks += report->left_out;
    return absl::OkStatus();
  }

  const ReplayOptions options_;
  WeightlessMemory host_;
  WeightlessDisk disk_;
  absl::Time now_ = absl::UnixEpoch();
  std::unique_ptr<AddressRange> payload_;
  std::map<std::tuple<uint64_t, uint64_t, uint32_t>, NamespaceId> spaces_;
  ReplayResult result_;
  std::unique_ptr<KvCache> cache_;
};

}  // namespace

absl::StatusOr<Recording> ReadRecording(const std::string& path,
                                        const std::function<bool(uint64_t)>& progress) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<TraceReader> reader, TraceReader::Open(path));
  Recording recording;
  RecordedEvent event;
  while (true) {
    KVTIDE_ASSIGN_OR_RETURN(const bool more, reader->Next(&event));
    if (!more) break;
    if (event.verb == kTraceGap) {
      recording.missing += event.count;
      continue;
    }
    recording.events.push_back(std::move(event));
    if (progress && recording.events.size() % kProgressEvery == 0 && !progress(recording.events.size()))
      return absl::CancelledError("interrupted");
  }
  recording.cut_off = reader->cut_off();
  return recording;
}

absl::StatusOr<ReplayResult> Replay(std::span<const RecordedEvent> events, const ReplayOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<Player> player, Player::Make(events, options));
  uint64_t played = 0;
  for (const RecordedEvent& event : events) {
    KVTIDE_RETURN_IF_ERROR(Annotate(player->Play(event), absl::StrCat("event ", played)));
    if (++played % kProgressEvery == 0 && options.progress && !options.progress(played))
      return absl::CancelledError("interrupted");
  }
  return player->Result();
}

uint64_t DistinctBytes(std::span<const RecordedEvent> events) {
  absl::flat_hash_set<std::pair<uint64_t, uint64_t>> seen;
  uint64_t bytes = 0;
  for (const RecordedEvent& event : events) {
    if (!IsLookup(event) && !IsStore(event)) continue;
    for (const uint64_t key : event.keys)
      if (seen.emplace(event.name_space, key).second) bytes += event.block_bytes;
  }
  return bytes;
}

}  // namespace kvtide
