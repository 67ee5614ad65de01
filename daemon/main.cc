// kvtided: the daemon. Reads its configuration, takes the memory of the tiers, serves until it is told to
// stop.
#include <signal.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "daemon/backends.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/config.h"
#include "daemon/failure_log.h"
#include "daemon/log.h"
#include "daemon/metrics/metrics.h"
#include "daemon/service/address.h"
#include "daemon/service/server.h"
#include "daemon/service_manager.h"
#include "daemon/tiered_cache.h"
#include "daemon/version.h"
#include "google/protobuf/util/json_util.h"
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

struct Flags {
  std::string config_file;
  v1::KvtidedConfig config;
  bool print_config = false;
  bool version = false;
};

// One flag for one field of the config; `name` in the environment is KVTIDE_NAME.
template <class Set>
void AddFlag(CLI::App* app, const std::string& flag, const std::string& env, Set set,
             const std::string& help) {
  app->add_option_function<std::string>(flag, set, help)->envname(env);
}

void AddFlags(CLI::App* app, Flags* flags) {
  v1::KvtidedConfig* config = &flags->config;
  app->add_option("--config", flags->config_file,
                  "JSON file; kvtide/v1/kvtided_config.proto lists its fields")
      ->envname("KVTIDE_CONFIG");
  app->add_option_function<std::vector<std::string>>(
         "--listen",
         [config](const std::vector<std::string>& all) {
           config->mutable_listen()->Assign(all.begin(), all.end());
         },
         "address: unix:/path/to/socket or host:port; may be given several times")
      ->allow_extra_args(false)
      ->envname("KVTIDE_LISTEN");
  AddFlag(
      app, "--device", "KVTIDE_DEVICE", [config](const std::string& v) { config->set_device(v); },
      "cpu, cuda:0, several as in cuda:0,cuda:1, cuda:all, or auto (default: the first GPU, else cpu)");
  AddFlag(
      app, "--device-memory", "KVTIDE_DEVICE_MEMORY",
      [config](const std::string& v) { config->set_device_memory(v); },
      "size of the device tier on each device, such as 16GiB (default 1GiB)");
  AddFlag(
      app, "--host-memory", "KVTIDE_HOST_MEMORY",
      [config](const std::string& v) { config->set_host_memory(v); },
      "size of the host tier, 0 for none (default 2GiB)");
  AddFlag(
      app, "--disk", "KVTIDE_DISK", [config](const std::string& v) { config->set_disk(v); },
      "disk tier: a folder of its own and its size, such as /var/lib/kvtide:100GiB (default: none)");
  AddFlag(
      app, "--disk-io", "KVTIDE_DISK_IO", [config](const std::string& v) { config->set_disk_io(v); },
      "io_uring, threads, or auto (default: io_uring where it is allowed)");
  AddFlag(
      app, "--persist", "KVTIDE_PERSIST", [config](const std::string& v) { config->set_persist(v); },
      "when sequences become durable by themselves: none (default), on-park or all");
  AddFlag(
      app, "--default-pair", "KVTIDE_DEFAULT_PAIR",
      [config](const std::string& v) { config->set_default_pair(v); },
      "K and V type of sequences that name none (default q8_0/turbo4)");
  AddFlag(
      app, "--metrics-address", "KVTIDE_METRICS_ADDRESS",
      [config](const std::string& v) { config->set_metrics_address(v); },
      "where /metrics is served, or off (default 127.0.0.1:9464)");
  AddFlag(
      app, "--log-level", "KVTIDE_LOG_LEVEL", [config](const std::string& v) { config->set_log_level(v); },
      "trace, debug, info, warning or error (default info)");
  AddFlag(
      app, "--log-format", "KVTIDE_LOG_FORMAT", [config](const std::string& v) { config->set_log_format(v); },
      "text (default; words and key=value) or json, an object a line");
  app->add_option_function<int>(
         "--slow-call-ms", [config](int v) { config->set_slow_call_ms(v); },
         "log calls that take longer, and where the time went; 0 = the default (1000), -1 = none")
      ->envname("KVTIDE_SLOW_CALL_MS");
  app->add_option_function<int>(
         "--compute-threads", [config](int v) { config->set_compute_threads(v); },
         "threads that attend on the CPU; 0 = the default (one per core)")
      ->envname("KVTIDE_COMPUTE_THREADS");
  app->add_option_function<int64_t>(
         "--max-message-bytes", [config](int64_t v) { config->set_max_message_bytes(v); },
         "largest message, either way (default 64 MiB)")
      ->envname("KVTIDE_MAX_MESSAGE_BYTES");
  app->add_option_function<int64_t>(
         "--max-attend-work", [config](int64_t v) { config->set_max_attend_work(v); },
         "most work of one attention: queries x visible tokens x query heads of all its items (default 2^38)")
      ->envname("KVTIDE_MAX_ATTEND_WORK");
  app->add_option_function<int>(
         "--max-connections", [config](int v) { config->set_max_connections(v); },
         "connections at a time; 0 = the default (1024, or what the limit of open files has room for)")
      ->envname("KVTIDE_MAX_CONNECTIONS");
  app->add_option_function<int>(
         "--idle-seconds", [config](int v) { config->set_idle_seconds(v); },
         "close connections without calls after so long; 0 = the default (1800)")
      ->envname("KVTIDE_IDLE_SECONDS");
  AddFlag(
      app, "--call-memory", "KVTIDE_CALL_MEMORY",
      [config](const std::string& v) { config->set_call_memory(v); },
      "memory for requests and answers of calls under way (default and least: six largest messages)");
  AddFlag(
      app, "--shared-memory", "KVTIDE_SHARED_MEMORY",
      [config](const std::string& v) { config->set_shared_memory(v); },
      "memory shared with clients of this host, all together (default 512MiB); 0 closes that way");
  AddFlag(
      app, "--shared-memory-client", "KVTIDE_SHARED_MEMORY_CLIENT",
      [config](const std::string& v) { config->set_shared_memory_client(v); },
      "most of it for one client (default 256MiB)");
  app->add_option_function<std::vector<std::string>>(
         "--allow",
         [config](const std::vector<std::string>& all) {
           config->mutable_allow()->Assign(all.begin(), all.end());
         },
         "who may use kvtided beside its own user and root, and as which tenant: uid:1001, group (its own), "
         "group:kvtide=acme, "
         "uid:1002=ops:admin, anyone, tcp=acme; may be given several times")
      ->allow_extra_args(false)
      ->envname("KVTIDE_ALLOW");
  app->add_option_function<std::vector<std::string>>(
         "--quota",
         [config](const std::vector<std::string>& all) {
           config->mutable_quota()->Assign(all.begin(), all.end());
         },
         "hard limits of a tenant, or of every other one (*): "
         "acme:sequences=100,models=4,calls=32,connections=16,"
         "device=2GiB,host=16GiB; may be given several times")
      ->allow_extra_args(false)
      ->envname("KVTIDE_QUOTA");
  AddFlag(
      app, "--server-cert", "KVTIDE_SERVER_CERT",
      [config](const std::string& v) { config->set_server_cert(v); },
      "TLS on TCP addresses: PEM file with kvtided's certificate chain");
  AddFlag(
      app, "--server-key", "KVTIDE_SERVER_KEY", [config](const std::string& v) { config->set_server_key(v); },
      "PEM file with its key");
  AddFlag(
      app, "--client-ca", "KVTIDE_CLIENT_CA", [config](const std::string& v) { config->set_client_ca(v); },
      "mTLS: PEM file with the CA of clients' certificates, whose common name is the tenant");
  AddFlag(
      app, "--tokens", "KVTIDE_TOKENS", [config](const std::string& v) { config->set_tokens(v); },
      "file with the SHA-256 of bearer tokens: sha256:HEX TENANT[:admin] [until=TIME]; read again at SIGHUP");
  app->add_flag_function(
         "--allow-insecure-tcp", [config](int64_t) { config->set_allow_insecure_tcp(true); },
         "listen beyond loopback without TLS, or without asking who calls")
      ->envname("KVTIDE_ALLOW_INSECURE_TCP");
  app->add_option_function<int>(
         "--shutdown-seconds", [config](int v) { config->set_shutdown_seconds(v); },
         "how long calls under way may go on after SIGTERM; 0 = the default (10)")
      ->envname("KVTIDE_SHUTDOWN_SECONDS");
  app->add_flag("--print-config", flags->print_config, "print the configuration as JSON and stop");
  app->add_flag("--version", flags->version, "print the version and stop");
  app->footer(
      "Examples:\n"
      "  kvtided                                                   a Unix socket, 1 GiB of device memory\n"
      "  kvtided --device cpu --device-memory 256MiB --listen unix:/tmp/kv/kvtided.sock\n"
      "  kvtided --config /etc/kvtide/kvtided.json                 as `kvtide plan --output kvtided-config` "
      "writes it\n"
      "  kvtided --listen unix:/run/kvtide/kvtided.sock --listen 127.0.0.1:7600\n"
      "Stop it with SIGTERM or Ctrl-C: it finishes the calls under way.");
}

absl::StatusOr<v1::KvtidedConfig> GatherConfig(const Flags& flags) {
  v1::KvtidedConfig config;
  if (!flags.config_file.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(config, ReadConfigFile(flags.config_file));
  }
  MergeConfig(flags.config, &config);
  return config;
}

// Everything that lives while the daemon serves, in the order in which it is made.
class Daemon {
 public:
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(DaemonOptions options) {
    std::unique_ptr<Daemon> daemon(new Daemon(std::move(options)));
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

  // What may change without a restart is read again; what cannot be read stays as it was.
  void Reload() {
    if (options_.service.tokens == nullptr) return;
    if (const absl::Status status = options_.service.tokens->Reload(); status.ok()) {
      spdlog::info("reloaded tokens={}", options_.service.tokens->size());
    } else {
      spdlog::error("tokens stay as they were: {}", std::string(status.message()));
    }
  }

  // False: a call has not come back, so that nothing can be taken apart.
  bool Stop() {
    if (!server_->Shutdown(options_.shutdown_grace, kShutdownPatience)) return false;
    cache_->PersistChanged();
    const CacheStats stats = cache_->Stats();
    spdlog::info("stopped sequences={} appended_tokens={} moves={}", stats.sequences, stats.appended_tokens,
                 stats.moves);
    metrics_->Stop();
    tiers_.reset();
    return true;
  }

 private:
  explicit Daemon(DaemonOptions options)
      : options_(std::move(options)),
        calls_([](const char* level,
                  const std::string& line) { spdlog::log(spdlog::level::from_str(level), "{}", line); },
               options_.slow_call) {}

  absl::Status StartCache() {
    KVTIDE_ASSIGN_OR_RETURN(tiers_, MakeTieredCache(options_));
    cache_ = tiers_->cache.get();
    options_.service.staging_bytes = tiers_->staging_bytes();
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
    metrics.service = [this] { return ServiceStats(options_.service); };
    metrics_ = std::make_unique<metrics::Metrics>(std::move(metrics));
    options_.service.report = [this](const service::CallReport& call) {
      metrics_->RecordCall(call.method, call.code, call.duration, call.request_bytes, call.response_bytes);
      calls_.Add(call, absl::Now());
    };
    if (options_.metrics_address.empty()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(metrics_address_, metrics_->Start(options_.metrics_address));
    return absl::OkStatus();
  }

  static metrics::ServiceStats ServiceStats(const service::ServiceOptions& options) {
    const service::ServiceGauges& gauges = *options.gauges;
    metrics::ServiceStats stats;
    stats.calls_under_way = gauges.calls_under_way;
    stats.queued_calls = gauges.queued_calls;
    stats.queued_bulk_calls = gauges.queued_bulk_calls;
    stats.connections = gauges.connections;
    stats.connections_limit = gauges.connections_limit;
    stats.connections_accepted = gauges.connections_accepted;
    stats.connections_refused = gauges.connections_refused;
    stats.call_memory_bytes = gauges.call_memory_bytes;
    stats.call_memory_limit = options.call_memory_bytes;
    stats.memory_overhead_limit = service::MemoryOverheadBytes(options);
    stats.shared_memory_clients = gauges.shared_memory_clients;
    stats.shared_memory_refused = gauges.shared_memory_refused;
    stats.shared_memory_bytes = gauges.shared_memory_bytes;
    stats.shared_memory_limit = gauges.shared_memory_limit_bytes;
    return stats;
  }

  absl::Status StartServer() {
    for (const std::string& text : options_.service.listen) {
      KVTIDE_ASSIGN_OR_RETURN(const service::Address address, service::ParseAddress(text));
      if (address.OpenToNetwork() && options_.insecure_tcp) {
        spdlog::warn("address={} is open to the network, by --allow-insecure-tcp", address.text);
      }
    }
    options_.service.refused = [gauges = options_.service.gauges](int64_t refused) {
      spdlog::warn(
          "connections refused={} open={} max_connections={} close idle clients, or raise --max-connections",
          refused, gauges->connections.load(), gauges->connections_limit.load());
    };
    // The service manager restarts who does not say so in time (WatchdogSec).
    if (WatchdogWanted()) options_.service.alive = [] { NotifyServiceManager("WATCHDOG=1"); };
    options_.service.mended = [](const std::string& address, const absl::Status& status) {
      if (status.ok()) {
        spdlog::warn("address={} the socket's file was gone; it is there again", address);
      } else {
        spdlog::error("address={} the socket's file is gone: {}", address, std::string(status.message()));
      }
    };
    KVTIDE_ASSIGN_OR_RETURN(server_, service::Server::Start(cache_, options_.service));
    const int64_t connections = options_.service.gauges->connections_limit;
    if (connections < static_cast<int64_t>(options_.service.max_connections)) {
      spdlog::warn(
          "max_connections={} the limit of open files has room for no more; raise LimitNOFILE (ulimit -n)",
          connections);
    }
    return absl::OkStatus();
  }

  DaemonOptions options_;
  FailureLog calls_;
  std::unique_ptr<TieredCache> tiers_;
  KvCache* cache_ = nullptr;  // of tiers_
  std::unique_ptr<metrics::Metrics> metrics_;
  std::string metrics_address_;  // as bound; empty = not served
  std::unique_ptr<service::Server> server_;
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

int Main(int argc, char** argv) {
  EndProcessWhenOutOfMemory();
  // Abseil as distributions build it looks for deadlocks: every mutex of gRPC is entered into one graph,
  // under one lock.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  CLI::App app("kvtided keeps the KV cache of inference servers in compressed pools on GPU and host memory.",
               "kvtided");
  Flags flags;
  AddFlags(&app, &flags);
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
  const auto config = GatherConfig(flags);
  if (!config.ok()) return Fail(config.status(), kExitBadInput);
  auto options = ResolveConfig(*config);
  if (!options.ok()) return Fail(options.status(), kExitBadInput);
  if (flags.print_config) {
    google::protobuf::util::JsonPrintOptions print;
    print.add_whitespace = true;
    print.preserve_proto_field_names = true;
    std::string json;
    if (!google::protobuf::util::MessageToJsonString(*config, &json, print).ok()) return kExitBadInput;
    std::printf("%s", json.c_str());
    return 0;
  }
  SetUpLogging(options->log_level, options->log_format == "json");
  const sigset_t stop_signals = BlockStopSignals();
  auto daemon = Daemon::Start(std::move(options).value());
  if (!daemon.ok()) return Fail(daemon.status(), kExitCannotStart);
  std::printf("%s\n", (*daemon)->ReadyLine().c_str());
  std::fflush(stdout);
  NotifyServiceManager("READY=1");

  int received = 0;
  while (sigwait(&stop_signals, &received) == 0 && received == SIGHUP) {
    NotifyServiceManager("RELOADING=1");
    (*daemon)->Reload();
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
