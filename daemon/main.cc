// kvtided: the daemon. Reads its configuration, takes the memory of the tiers, serves until it is told to
// stop.
#include <signal.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "daemon/backends.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/command_line.h"
#include "daemon/config.h"
#include "daemon/disk/folder_key.h"
#include "daemon/failure_log.h"
#include "daemon/find_troubles.h"
#include "daemon/log.h"
#include "daemon/lost_devices.h"
#include "daemon/memory_use.h"
#include "daemon/metrics/gpu_collector.h"
#include "daemon/metrics/metrics.h"
#include "daemon/running_config.h"
#include "daemon/service/address.h"
#include "daemon/service/descriptors.h"
#include "daemon/service/server.h"
#include "daemon/service_manager.h"
#include "daemon/settings.h"
#include "daemon/tiered_cache.h"
#include "daemon/version.h"
#include "google/protobuf/util/json_util.h"
#include "kernels/base/mutex.h"
#include "kernels/base/out_of_memory.h"
#include "kernels/base/status.h"
#include "planner/near_names.h"
#include "planner/units.h"

#ifdef KVTIDE_JEMALLOC
// Returns memory of large messages to the kernel in the background.
extern "C" {
extern const char* malloc_conf;
const char* malloc_conf = "background_thread:true,dirty_decay_ms:5000,muzzy_decay_ms:5000";
}
#endif

namespace kvtide {
namespace {

constexpr int kExitBadInput = 2, kExitCannotStart = 1, kExitCallsLeft = 3;
// How long calls that a shutdown has cancelled may take to notice.
constexpr absl::Duration kShutdownPatience = absl::Seconds(5);

// Everything that lives while the daemon serves, in the order in which it is made.
class Daemon {
 public:
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(ConfigLayers layers, DaemonOptions options) {
    std::unique_ptr<Daemon> daemon(new Daemon(std::move(layers), std::move(options)));
    KVTIDE_RETURN_IF_ERROR(daemon->StartCache());
    KVTIDE_RETURN_IF_ERROR(daemon->StartMetrics());
    KVTIDE_RETURN_IF_ERROR(daemon->StartServer());
    return daemon;
  }

  std::string ReadyLine() const {
    std::string line = absl::StrCat("kvtided ", kVersion, " ready:");
    for (const std::string& address : server_->addresses()) absl::StrAppend(&line, " ", address);
    if (!metrics_address_.empty()) absl::StrAppend(&line, ", metrics http://", metrics_address_, "/metrics");
    for (const TierStats& tier : cache_->Stats().tiers) {
      absl::StrAppend(&line, ", ", tier.name, " tier ",
                      planner::FormatBytes(static_cast<int64_t>(tier.capacity_bytes)), " on ", tier.device);
    }
    return line;
  }

  // What may change without a restart is read again; what cannot be read stays as it was. From any thread.
  absl::StatusOr<v1::ReloadConfigResponse> Reload() {
    const MutexLock lock(reload_mutex_);
    if (options_.service.tokens != nullptr) {
      if (const absl::Status status = options_.service.tokens->Reload(); !status.ok()) {
        spdlog::error("tokens stay as they were: {}", std::string(status.message()));
        troubles_->Set(service::Trouble::kTokens,
                       absl::StrCat("the tokens from before are used: ", std::string(status.message())));
        return status;
      }
      troubles_->Set(service::Trouble::kTokens, "");
      spdlog::info("reloaded tokens={}", options_.service.tokens->size());
    }
    const auto changes = config_.Reload([this](const DaemonOptions& now) -> absl::Status {
      KVTIDE_RETURN_IF_ERROR(cache_->SetLimits(LiveLimitsOf(now.cache)));
      options_.service.quotas->Set(now.cache.quotas);
      calls_.SetSlow(now.slow_call);
      SetLogLevel(now.log_level);
      return absl::OkStatus();
    });
    if (!changes.ok()) {
      spdlog::error("the configuration stays as it was: {}",
                    Escaped(std::string(changes.status().message())));
      // What a file may say is a long list; the first line says what is wrong with it.
      const std::string wrong(changes.status().message());
      troubles_->Set(service::Trouble::kConfig,
                     absl::StrCat("the settings from before are used: ", wrong.substr(0, wrong.find('\n'))));
      return changes.status();
    }
    troubles_->Set(service::Trouble::kConfig, "");
    spdlog::info("reloaded changed=\"{}\" needs_restart=\"{}\"", absl::StrJoin(changes->changed(), " "),
                 absl::StrJoin(changes->needs_restart(), " "));
    return changes;
  }

  // False: a call has not come back, so that nothing can be taken apart.
  bool Stop() {
    if (!server_->Shutdown(options_.shutdown_grace, kShutdownPatience)) return false;
    cache_->PersistChanged();
    const CacheStats stats = cache_->Stats();
    spdlog::info("stopped sequences={} appended_tokens={} moves={}", stats.sequences, stats.appended_tokens,
                 stats.moves);
    metrics_->Stop();
    if (tiers_->trace != nullptr) {
      tiers_->trace->Flush();
      const TraceRecorderStats trace = tiers_->trace->Stats();
      spdlog::info("recorded events={} left_out={} bytes={} full={}{}", trace.events, trace.left_out,
                   trace.bytes, trace.full,
                   trace.problem.empty() ? "" : absl::StrCat(" problem=\"", trace.problem, "\""));
    }
    tiers_.reset();
    return true;
  }

 private:
  Daemon(ConfigLayers layers, DaemonOptions options)
      : options_(std::move(options)),
        config_(std::move(layers), options_),
        calls_([](const char* level,
                  const std::string& line) { spdlog::log(spdlog::level::from_str(level), "{}", line); },
               options_.slow_call),
        troubles_(std::make_shared<service::Troubles>([](const char* level, const std::string& line) {
          spdlog::log(spdlog::level::from_str(level), "{}", line);
        })) {}

  absl::Status StartCache() {
    KVTIDE_ASSIGN_OR_RETURN(tiers_, MakeTieredCache(options_, [this](Work work, absl::Duration time) {
                              // There are none yet while durable sequences come back.
                              if (metrics::Metrics* const metrics = listening_metrics_)
                                metrics->RecordWork(static_cast<size_t>(work), time);
                            }));
    cache_ = tiers_->cache.get();
    options_.service.staging_bytes = tiers_->staging_bytes();
    options_.service.calibrator = tiers_->calibrator.get();
    for (const TieredCache::Note& note : tiers_->notes)
      spdlog::log(note.level == TieredCache::Note::kError     ? spdlog::level::err
                  : note.level == TieredCache::Note::kWarning ? spdlog::level::warn
                                                              : spdlog::level::info,
                  "{}", note.text);
    return absl::OkStatus();
  }

  absl::Status StartMetrics() {
    metrics::MetricsOptions metrics;
    metrics.version = kVersion;
    metrics.cuda = KnownBackends() != "cpu";
    metrics.stats = [cache = cache_] { return cache->Stats(); };
    metrics.works.assign(std::begin(kWorkNames), std::end(kWorkNames));
    options_.service.memory = [this] {
      return MeasureMemory(*cache_, service::MemoryOverheadBytes(options_.service),
                           gpus_.BytesOfThisProcess());
    };
    metrics.service = [this] { return ServiceStats(options_.service); };
    metrics_ = std::make_unique<metrics::Metrics>(std::move(metrics));
    listening_metrics_ = metrics_.get();
    options_.service.report = [this](const service::CallReport& call) {
      metrics_->RecordCall({call.method, call.code, call.duration, call.received, call.waited,
                            call.request_bytes, call.response_bytes, call.tenant, call.refusal});
      calls_.Add(call, absl::Now());
    };
    options_.service.looked_up = [this](std::string_view tenant, const char* unit, std::string_view tier,
                                        uint64_t count) {
      metrics_->RecordLookup(tenant, unit, tier, count);
    };
    if (options_.metrics_address.empty()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(metrics_address_, metrics_->Start(options_.metrics_address));
    return absl::OkStatus();
  }

  metrics::ServiceStats ServiceStats(const service::ServiceOptions& options) const {
    const service::ServiceGauges& gauges = *options.gauges;
    metrics::ServiceStats stats;
    stats.calls_under_way = gauges.calls_under_way;
    stats.queued_calls = gauges.queued_calls;
    stats.queued_bulk_calls = gauges.queued_bulk_calls;
    stats.connections = gauges.connections;
    stats.connections_limit = gauges.connections_limit;
    stats.connections_accepted = gauges.connections_accepted;
    for (size_t i = 0; i < service::kConnectionRefusals; i++)
      stats.connections_refused.emplace_back(service::kConnectionRefusalNames[i],
                                             gauges.connections_refused[i].load());
    stats.call_memory_bytes = gauges.call_memory_bytes;
    stats.call_memory_limit = options.call_memory_bytes;
    stats.memory_overhead_limit = service::MemoryOverheadBytes(options);
    stats.shared_memory_clients = gauges.shared_memory_clients;
    stats.shared_memory_refused = gauges.shared_memory_refused;
    stats.shared_memory_bytes = gauges.shared_memory_bytes;
    stats.shared_memory_limit = gauges.shared_memory_limit_bytes;
    stats.certificate_expires = certificate_ends_;
    const uint32_t troubles = troubles_->Bits();
    for (size_t i = 0; i < std::size(service::kTroubleNames); i++)
      stats.troubles.emplace_back(service::kTroubleNames[i], (troubles >> i & 1) != 0);
    for (const service::MemoryUse& use : options.memory())
      stats.memory.push_back({use.part, use.predicted_bytes, use.actual_bytes});
    const CalibratorStats calibrations = options.calibrator->Stats();
    stats.calibrations = {calibrations.gathering,
                          calibrations.making,
                          calibrations.ready,
                          calibrations.refused,
                          calibrations.memory_bytes,
                          absl::ToDoubleSeconds(calibrations.observed),
                          absl::ToDoubleSeconds(calibrations.spent),
                          absl::ToDoubleSeconds(calibrations.making_time)};
    const auto ways = options.clients->Ways();
    for (size_t i = 0; i < ways.size(); i++)
      stats.ways.push_back({service::kWayNames[i], ways[i].connected, ways[i].traffic.calls,
                            ways[i].traffic.steps, ways[i].traffic.received_bytes,
                            ways[i].traffic.sent_bytes});
    return stats;
  }

  absl::Status StartServer() {
    for (const std::string& text : options_.service.listen) {
      KVTIDE_ASSIGN_OR_RETURN(const service::Address address, service::ParseAddress(text));
      if (address.OpenToNetwork() && options_.insecure_tcp) {
        spdlog::warn("address={} is open to the network, by --allow-insecure-tcp", address.text);
      }
    }
    options_.service.refused = [gauges =
                                    options_.service.gauges](const service::RefusedConnections& refused) {
      uint64_t all = 0;
      std::string reasons;
      for (size_t i = 0; i < refused.size(); i++) {
        all += refused[i];
        if (refused[i] > 0)
          absl::StrAppend(&reasons, reasons.empty() ? "" : " ", service::kConnectionRefusalNames[i], "=",
                          refused[i]);
      }
      spdlog::warn("connections refused={} open={} max_connections={} reasons=\"{}\"", all,
                   gauges->connections.load(), gauges->connections_limit.load(), reasons);
    };
    options_.service.pin = [this](std::byte* tensors, size_t bytes) {
      auto pinned = tiers_->backends.Pin(tensors, bytes);
      if (pinned.ok()) return *std::move(pinned);
      spdlog::warn("a client's shared memory is not pinned, its attention is slower: {}",
                   std::string(pinned.status().message()));
      return std::shared_ptr<void>();
    };
    // The service manager restarts who does not say so in time (WatchdogSec).
    if (WatchdogWanted()) options_.service.alive = [] { NotifyServiceManager("WATCHDOG=1"); };
    options_.service.config = [this] { return config_.Describe(); };
    options_.service.reload = [this] { return Reload(); };
    service::ServerWatch watch;
    watch.troubles = troubles_;
    watch.look = [this] {
      finder_.Look(cache_->Stats(), FindLostDevices(tiers_->backends), absl::Now(), troubles_.get());
    };
    watch.certificate_ends = [this](absl::Time end) { certificate_ends_ = absl::ToUnixSeconds(end); };
    options_.service.mended = [](const std::string& address, const absl::Status&) {
      spdlog::warn("address={} the socket's file was gone; it is there again", address);
    };
    KVTIDE_ASSIGN_OR_RETURN(server_, service::Server::Start(cache_, options_.service, std::move(watch)));
    if (!server_->shortage().empty()) spdlog::warn("{}", server_->shortage());
    return absl::OkStatus();
  }

  DaemonOptions options_;
  RunningConfig config_;
  FailureLog calls_;
  const std::shared_ptr<service::Troubles> troubles_;
  std::atomic<int64_t> certificate_ends_{0};  // Unix time; 0 = there is none
  TroubleFinder finder_;                      // of the listener's thread
  const metrics::GpuCollector gpus_;          // of which this process holds some
  std::atomic<metrics::Metrics*> listening_metrics_{nullptr};
  std::unique_ptr<TieredCache> tiers_;
  KvCache* cache_ = nullptr;  // of tiers_
  std::unique_ptr<metrics::Metrics> metrics_;
  std::string metrics_address_;  // as bound; empty = not served
  std::unique_ptr<service::Server> server_;
  Mutex reload_mutex_;  // one reload at a time
};

// Signals that stop the daemon, and SIGHUP, are taken by Main alone; every thread that starts later inherits
// this.
sigset_t BlockStopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return signals;
}

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "kvtided: %s\n", std::string(status.message()).c_str());
  return code;
}

// kvtided --rekey-disk FILE: the folder opens with that key from now on.
absl::Status RekeyDisk(const DaemonOptions& options, const std::string& new_key_file) {
  if (options.disk_key_file.empty())
    return absl::InvalidArgumentError(
        "--rekey-disk needs the folder (--disk) and the key that it has now (--disk-key-file)");
  absl::StatusOr<SecretKey> from = ReadKeyFile(options.disk_key_file);
  if (!from.ok()) return Annotate(from.status(), "disk_key_file");
  absl::StatusOr<SecretKey> to = ReadKeyFile(new_key_file);
  if (!to.ok()) return Annotate(to.status(), "--rekey-disk");
  return ChangeOperatorsKey(SystemFiles(), options.disk_folder, *from, *to);
}

int Main(int argc, char** argv) {
  EndProcessWhenOutOfMemory();
  service::RaiseDescriptorLimit();
  // Abseil as distributions build it looks for deadlocks: every mutex of gRPC is entered into one graph,
  // under one lock.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  CLI::App app(kDaemonDescription, "kvtided");
  CommandLine flags;
  AddCommandLine(&app, &flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError&) {
    std::vector<std::string> known;
    for (const CLI::Option* option : app.get_options())
      for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
    return Fail(absl::InvalidArgumentError(planner::UnknownArguments(app.remaining(), known) +
                                           "\nRun with --help for more information."),
                kExitBadInput);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitBadInput;
  }
  if (flags.version) {
    std::printf("kvtided %s (backends: %s)\n", kVersion, KnownBackends().c_str());
    return 0;
  }
  const auto layers = GatherConfig(flags.config_file, flags.config);
  if (!layers.ok()) return Fail(layers.status(), kExitBadInput);
  const v1::KvtidedConfig config = layers->Merged();
  auto options = ResolveConfig(config);
  if (!options.ok()) return Fail(options.status(), kExitBadInput);
  if (flags.print_config) {
    google::protobuf::util::JsonPrintOptions print;
    print.add_whitespace = true;
    print.preserve_proto_field_names = true;
    std::string json;
    if (!google::protobuf::util::MessageToJsonString(config, &json, print).ok()) return kExitBadInput;
    std::printf("%s", json.c_str());
    return 0;
  }
  if (!flags.rekey_disk.empty()) {
    const absl::Status changed = RekeyDisk(*options, flags.rekey_disk);
    if (!changed.ok())
      return Fail(changed, absl::IsInvalidArgument(changed) ? kExitBadInput : kExitCannotStart);
    std::printf("the key of %s is that in %s now\n", options->disk_folder.c_str(), flags.rekey_disk.c_str());
    return 0;
  }
  SetUpLogging(options->log_level, options->log_format == "json");
  // Not refused, as in a file: an environment has more readers than this one.
  for (const std::string& unknown : UnknownVariables(::environ)) spdlog::warn("{}", Escaped(unknown));
  const sigset_t stop_signals = BlockStopSignals();
  auto daemon = Daemon::Start(*layers, std::move(options).value());
  if (!daemon.ok()) return Fail(daemon.status(), kExitCannotStart);
  std::printf("%s\n", (*daemon)->ReadyLine().c_str());
  std::fflush(stdout);
  NotifyServiceManager("READY=1");

  int received = 0;
  while (sigwait(&stop_signals, &received) == 0 && received == SIGHUP) {
    NotifyServiceManager("RELOADING=1");
    (*daemon)->Reload().IgnoreError();  // the log says it
    NotifyServiceManager("READY=1");
  }
  NotifyServiceManager("STOPPING=1");
  spdlog::info("stopping signal={}", received == SIGTERM ? "SIGTERM" : "SIGINT");
  // A second signal ends the process at once.
  pthread_sigmask(SIG_UNBLOCK, &stop_signals, nullptr);
  if ((*daemon)->Stop()) return 0;
  spdlog::error("calls have not come back {} after they were cancelled; ending without them",
                absl::FormatDuration(kShutdownPatience));
  spdlog::shutdown();
  std::_Exit(kExitCallsLeft);
}

}  // namespace
}  // namespace kvtide

int main(int argc, char** argv) { return kvtide::Main(argc, argv); }
