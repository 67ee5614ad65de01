#include "daemon/config.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "daemon/service/address.h"
#include "daemon/service/convert.h"
#include "daemon/version.h"
#include "google/protobuf/util/json_util.h"
#include "kernels/base/status.h"
#include "planner/model/device.h"
#include "planner/near_names.h"
#include "planner/units.h"

namespace kvtide {
namespace {

constexpr int64_t kDefaultDeviceBytes = int64_t{1} << 30, kDefaultHostBytes = int64_t{2} << 30;
constexpr int64_t kLeastTierBytes = int64_t{1} << 20;
constexpr int64_t kLeastArenaBytes = int64_t{8} << 20;
constexpr char kDefaultPair[] = "q8_0/turbo4";
constexpr int64_t kTraceBytes = int64_t{256} << 20, kLeastTraceFile = int64_t{64} << 10;
// gRPC counts messages in int.
constexpr int64_t kLeastMessageBytes = 4096, kMostMessageBytes = (int64_t{1} << 31) - 1;

std::vector<std::string> FieldsOf(const google::protobuf::Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); i++) names.push_back(message.field(i)->name());
  return names;
}

std::string KnownFields() { return absl::StrJoin(FieldsOf(*v1::KvtidedConfig::descriptor()), ", "); }

// What protobuf says of JSON: a reason, and below it perhaps a line of the text and a mark under the place.
std::string OneLine(const std::string& message) {
  const std::vector<std::string> lines = absl::StrSplit(message, '\n');
  const size_t mark = lines.back().find('^');
  if (lines.size() < 3 || mark == std::string::npos || mark > lines[lines.size() - 2].size())
    return absl::StrJoin(lines, " ");
  constexpr size_t kShown = 40;
  const std::string& text = lines[lines.size() - 2];
  const std::string place = text.substr(mark, kShown);
  return absl::StrCat(lines.front(), place.empty() ? " at the end of '" : " at '",
                      place.empty() ? text : place, "'");
}

// What protobuf's parser lets pass in silence: a key that is there twice (the last one wins), and
// "deviceMemory" for "device_memory" (two spellings of one key). Unknown keys get the nearest known one
// besides.
class KeyCheck : public nlohmann::json_sax<nlohmann::json> {
 public:
  const absl::Status& status() const { return status_; }

  bool key(std::string& name) override {
    Object& object = objects_.back();
    if (!object.seen.insert(name).second)
      return Fail(absl::StrCat("the key \"", name, "\" is there twice; leave one of them"));
    object.next = nullptr;
    if (object.message == nullptr) return true;
    const google::protobuf::FieldDescriptor* const field = object.message->FindFieldByName(name);
    if (field == nullptr) {
      const std::vector<std::string> near = planner::NearNames(name, FieldsOf(*object.message), 1);
      return Fail(absl::StrCat("there is no field \"", name, "\"",
                               near.empty() ? "" : absl::StrCat("; did you mean \"", near.front(), "\"?")));
    }
    object.next = field->message_type();
    return true;
  }
  bool start_object(size_t) override {
    objects_.push_back(
        {objects_.empty() ? v1::KvtidedConfig::descriptor() : objects_.back().next, nullptr, {}});
    return true;
  }
  bool end_object() override {
    objects_.pop_back();
    return true;
  }
  bool start_array(size_t) override { return !objects_.empty(); }
  bool end_array() override { return true; }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  // Protobuf says so better.
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  struct Object {
    const google::protobuf::Descriptor* message = nullptr;  // null: its keys are free
    const google::protobuf::Descriptor* next = nullptr;     // of the value of the last key
    std::set<std::string> seen;
  };
  bool Fail(std::string text) {
    status_ = absl::InvalidArgumentError(std::move(text));
    return false;
  }

  std::vector<Object> objects_;
  absl::Status status_;
};

// OK too for what is no JSON.
absl::Status CheckKeys(const std::string& json) {
  KeyCheck check;
  nlohmann::json::sax_parse(json, &check);
  return check.status();
}

// A size from its text, or from its number of bytes, or the default.
absl::StatusOr<int64_t> ResolveBytes(const char* field, const std::string& text, int64_t bytes,
                                     int64_t fallback) {
  if (text.empty()) {
    if (bytes < 0) return absl::InvalidArgumentError(absl::StrCat(field, " is negative"));
    return bytes > 0 ? bytes : fallback;
  }
  if (text == "0") return 0;
  auto parsed = planner::ParseBytes(text);
  if (!parsed.ok()) return Annotate(parsed.status(), field);
  return *parsed;
}

template <class T>
absl::Status CheckRange(const char* field, T value, T least, T most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is ", value, "; allowed are ", least, " to ", most, ", or 0 for the default"));
}

int Processors() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

// Beyond loopback nobody listens along, and callers say who they are.
absl::Status CheckNetwork(const service::ServiceOptions& service) {
  for (const std::string& text : service.listen) {
    KVTIDE_ASSIGN_OR_RETURN(const service::Address address, service::ParseAddress(text));
    if (!address.OpenToNetwork()) continue;
    if (!service.tls.enabled())
      return absl::InvalidArgumentError(
          absl::StrCat("listen: ", text,
                       " is open to the network without TLS; give --server-cert and --server-key, stay on "
                       "127.0.0.1, or say --allow-insecure-tcp where the network itself is private"));
    if (service.tls.client_ca.empty() && service.tokens == nullptr)
      return absl::InvalidArgumentError(
          absl::StrCat("listen: ", text,
                       " is open to the network, and callers need not say who they are; give --client-ca or "
                       "--tokens, or say --allow-insecure-tcp"));
  }
  return absl::OkStatus();
}

absl::Status ResolveService(const v1::KvtidedConfig& config, service::ServiceOptions* service) {
  service->version = kVersion;
  service->listen.assign(config.listen().begin(), config.listen().end());
  if (service->listen.empty()) service->listen.push_back(service::DefaultListenAddress());
  for (const std::string& address : service->listen) {
    KVTIDE_RETURN_IF_ERROR(Annotate(service::ParseAddress(address).status(), "listen"));
  }
  KVTIDE_ASSIGN_OR_RETURN(service->access,
                          service::Access::Parse({config.allow().begin(), config.allow().end()}));
  service->tls = {config.server_cert(), config.server_key(), config.client_ca()};
  KVTIDE_RETURN_IF_ERROR(service::CheckTls(service->tls));
  if (!config.tokens().empty()) {
    KVTIDE_ASSIGN_OR_RETURN(service->tokens, service::Tokens::Load(config.tokens()));
  }
  if (!config.allow_insecure_tcp()) KVTIDE_RETURN_IF_ERROR(CheckNetwork(*service));
  auto pair = ParseCachePair(config.default_pair().empty() ? kDefaultPair : config.default_pair());
  if (!pair.ok()) return Annotate(pair.status(), "default_pair");
  service->defaults.pair = *pair;
  if (config.has_exact_window()) {
    KVTIDE_ASSIGN_OR_RETURN(service->defaults.exact_window, service::FromProto(config.exact_window()));
  }
  if (config.max_message_bytes() != 0) {
    KVTIDE_RETURN_IF_ERROR(
        CheckRange("max_message_bytes", config.max_message_bytes(), kLeastMessageBytes, kMostMessageBytes));
    service->max_message_bytes = config.max_message_bytes();
  }
  KVTIDE_RETURN_IF_ERROR(CheckRange("service_threads", config.service_threads(), 0, 1024));
  service->threads = config.service_threads() > 0 ? config.service_threads() : std::max(2, Processors());
  KVTIDE_RETURN_IF_ERROR(CheckRange("max_queued_calls", config.max_queued_calls(), 0, 1 << 20));
  if (config.max_queued_calls() > 0)
    service->max_queued_calls = static_cast<size_t>(config.max_queued_calls());
  KVTIDE_RETURN_IF_ERROR(CheckRange("bulk_threads", config.bulk_threads(), 0, 1024));
  if (config.bulk_threads() > 0) service->bulk_threads = config.bulk_threads();
  KVTIDE_RETURN_IF_ERROR(CheckRange("max_connections", config.max_connections(), 0, 1 << 20));
  if (config.max_connections() > 0) service->max_connections = static_cast<size_t>(config.max_connections());
  KVTIDE_RETURN_IF_ERROR(CheckRange("idle_seconds", config.idle_seconds(), 0, 1 << 20));
  if (config.idle_seconds() > 0) service->idle = absl::Seconds(config.idle_seconds());
  KVTIDE_RETURN_IF_ERROR(
      CheckRange("max_calls_per_connection", config.max_calls_per_connection(), 0, 1 << 16));
  if (config.max_calls_per_connection() > 0)
    service->max_calls_per_connection = config.max_calls_per_connection();
  const int64_t least = service::LeastCallMemory(service->max_message_bytes);
  KVTIDE_ASSIGN_OR_RETURN(service->call_memory_bytes,
                          ResolveBytes("call_memory", config.call_memory(), 0, least));
  if (service->call_memory_bytes < least) {
    return absl::InvalidArgumentError(absl::StrCat("call_memory is ", service->call_memory_bytes,
                                                   " bytes; with messages of ", service->max_message_bytes,
                                                   " bytes (max_message_bytes) it is at least ", least));
  }
  return absl::OkStatus();
}

// "/var/lib/kvtide:100GiB"; the size is behind the last colon.
absl::Status ResolveDisk(const v1::KvtidedConfig& config, DaemonOptions* options) {
  const std::string& text = config.disk();
  options->disk_io = config.disk_io().empty() ? "auto" : config.disk_io();
  if (options->disk_io != "auto" && options->disk_io != "io_uring" && options->disk_io != "threads")
    return absl::InvalidArgumentError(
        absl::StrCat("disk_io \"", options->disk_io, "\" is unknown; use auto, io_uring or threads"));
  if (!text.empty() && text != "off") {
    const size_t colon = text.rfind(':');
    if (colon == std::string::npos || colon == 0)
      return absl::InvalidArgumentError(
          absl::StrCat("disk \"", text, "\": give a folder and a size, such as /var/lib/kvtide:100GiB"));
    options->disk_folder = text.substr(0, colon);
    KVTIDE_ASSIGN_OR_RETURN(options->disk_bytes, ResolveBytes("disk", text.substr(colon + 1), 0, 0));
    if (options->disk_bytes < kLeastTierBytes)
      return absl::InvalidArgumentError(
          absl::StrCat("disk is ", options->disk_bytes, " bytes, at least 1MiB"));
  }
  options->disk_key_file = config.disk_key_file();
  if (!options->disk_key_file.empty() && options->disk_folder.empty())
    return absl::InvalidArgumentError("disk_key_file needs a disk tier: --disk /var/lib/kvtide:100GiB");
  const std::string persist = config.persist().empty() ? "none" : config.persist();
  if (persist == "on-park") {
    options->service.defaults.persistence = Persistence::kOnPark;
  } else if (persist == "all") {
    options->service.defaults.persistence = Persistence::kAll;
  } else if (persist != "none") {
    return absl::InvalidArgumentError(
        absl::StrCat("persist \"", persist, "\" is unknown; use none, on-park or all"));
  }
  if (persist != "none" && options->disk_folder.empty())
    return absl::InvalidArgumentError(
        absl::StrCat("persist ", persist, " needs a disk tier: --disk /var/lib/kvtide:100GiB"));
  return absl::OkStatus();
}

// The remote tier; its fields are looked at without one, too.
absl::Status ResolveRemote(const v1::KvtidedConfig& config, DaemonOptions* options) {
  RemoteOptions remote;
  const bool wanted = !config.remote().empty() && config.remote() != "off";
  if (wanted) {
    KVTIDE_ASSIGN_OR_RETURN(remote.address, ParseRemoteAddress(config.remote()));
  }
  if (!config.remote_prefix().empty()) remote.prefix = config.remote_prefix();
  remote.auth_file = config.remote_auth_file();
  remote.ca_file = config.remote_ca();
  if (!config.remote_write().empty()) {
    KVTIDE_ASSIGN_OR_RETURN(remote.writes, ParseRemoteWrites(config.remote_write()));
  }
  KVTIDE_RETURN_IF_ERROR(CheckRange("remote_ttl_seconds", config.remote_ttl_seconds(), -1, 1 << 30));
  if (config.remote_ttl_seconds() != 0)
    remote.ttl = config.remote_ttl_seconds() < 0 ? absl::InfiniteDuration()
                                                 : absl::Seconds(config.remote_ttl_seconds());
  KVTIDE_RETURN_IF_ERROR(CheckRange("remote_timeout_ms", config.remote_timeout_ms(), 0, 60000));
  if (config.remote_timeout_ms() > 0) remote.timeout = absl::Milliseconds(config.remote_timeout_ms());
  KVTIDE_RETURN_IF_ERROR(CheckRange("remote_read_ms", config.remote_read_ms(), 0, 600000));
  if (config.remote_read_ms() > 0) remote.read_time = absl::Milliseconds(config.remote_read_ms());
  if (!wanted) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(CheckRemoteOptions(remote));
  options->remote = remote;
  options->service.waits_for_lookups = true;
  return absl::OkStatus();
}

// "FILE" or "FILE:SIZE".
absl::Status ResolveTrace(const v1::KvtidedConfig& config, DaemonOptions* options) {
  const std::string& text = config.record_trace();
  if (text.empty() || text == "off") return absl::OkStatus();
  options->trace_file = text;
  options->trace_bytes = kTraceBytes;
  if (const size_t colon = text.rfind(':'); colon != std::string::npos) {
    options->trace_file = text.substr(0, colon);
    KVTIDE_ASSIGN_OR_RETURN(options->trace_bytes, ResolveBytes("record_trace", text.substr(colon + 1), 0, 0));
  }
  if (options->trace_file.empty() || options->trace_file.back() == '/')
    return absl::InvalidArgumentError(absl::StrCat(
        "record_trace \"", text, "\": give a file, and its size if you like: /var/tmp/kvtide.trace:1GiB"));
  if (options->trace_bytes < kLeastTraceFile)
    return absl::InvalidArgumentError(
        absl::StrCat("record_trace may have ", options->trace_bytes, " bytes, at least 64KiB"));
  return absl::OkStatus();
}

absl::Status ResolveSharedMemory(const v1::KvtidedConfig& config, service::SharedMemoryOptions* shared) {
  KVTIDE_ASSIGN_OR_RETURN(shared->total_bytes,
                          ResolveBytes("shared_memory", config.shared_memory(), 0, shared->total_bytes));
  // One client may have all of a total that is small.
  KVTIDE_ASSIGN_OR_RETURN(shared->client_bytes,
                          ResolveBytes("shared_memory_client", config.shared_memory_client(), 0,
                                       std::min(shared->client_bytes, shared->total_bytes)));
  if (shared->client_bytes > shared->total_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("shared_memory_client is ", shared->client_bytes,
                                                   " bytes, more than shared_memory, ", shared->total_bytes));
  }
  if (shared->total_bytes != 0 && shared->client_bytes < kLeastArenaBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("shared_memory: a client may have ", shared->client_bytes,
                     " bytes, the least is 8MiB; \"0\" closes the shared-memory way"));
  }
  KVTIDE_RETURN_IF_ERROR(
      CheckRange("max_shared_memory_clients", config.max_shared_memory_clients(), 0, 4096));
  if (config.max_shared_memory_clients() > 0)
    shared->max_clients = static_cast<size_t>(config.max_shared_memory_clients());
  return absl::OkStatus();
}

absl::Status ResolveWatermarks(const v1::KvtidedConfig& config, TierLimits* limits) {
  if (config.high_watermark() != 0) limits->high_watermark = config.high_watermark();
  if (config.low_watermark() != 0) limits->low_watermark = config.low_watermark();
  if (limits->low_watermark > 0 && limits->low_watermark <= limits->high_watermark &&
      limits->high_watermark <= 1)
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "low_watermark is ", limits->low_watermark, " and high_watermark ", limits->high_watermark,
      "; both are fractions of a tier above 0 and at most 1, the low one no higher than the other"));
}

absl::Status ResolveCalibrate(const v1::KvtidedConfig& config, CalibratorOptions* calibrate) {
  using Models = CalibratorOptions::Models;
  const std::string& models = config.calibrate();
  if (models == "all") {
    calibrate->models = Models::kAll;
  } else if (models == "never" || models == "off") {
    calibrate->models = Models::kNever;
  } else if (!models.empty() && models != "asked") {
    return absl::InvalidArgumentError(
        absl::StrCat("calibrate is \"", models, "\"; allowed are \"asked\", \"all\" and \"never\""));
  }
  KVTIDE_ASSIGN_OR_RETURN(calibrate->memory_bytes, ResolveBytes("calibrate_memory", config.calibrate_memory(),
                                                                0, calibrate->memory_bytes));
  return absl::OkStatus();
}

absl::Status ResolveLimits(const v1::KvtidedConfig& config, CacheOptions* cache) {
  KVTIDE_RETURN_IF_ERROR(ResolveWatermarks(config, &cache->limits));
  KVTIDE_RETURN_IF_ERROR(CheckRange<int64_t>("max_sequences", config.max_sequences(), 0, int64_t{1} << 32));
  KVTIDE_RETURN_IF_ERROR(CheckRange<int64_t>("max_models", config.max_models(), 0, 1 << 16));
  KVTIDE_RETURN_IF_ERROR(CheckRange<int64_t>("max_tokens", config.max_tokens(), 0, int64_t{1} << 40));
  KVTIDE_RETURN_IF_ERROR(
      CheckRange<int64_t>("max_attend_work", config.max_attend_work(), 0, int64_t{1} << 62));
  if (config.max_attend_work() > 0) cache->max_attend_work = config.max_attend_work();
  KVTIDE_RETURN_IF_ERROR(
      CheckRange<int64_t>("max_prefix_blocks", config.max_prefix_blocks(), -1, int64_t{1} << 31));
  if (config.max_prefix_blocks() != 0)
    cache->max_prefix_blocks = static_cast<size_t>(std::max<int64_t>(0, config.max_prefix_blocks()));
  if (config.max_sequences() > 0) cache->max_sequences = static_cast<size_t>(config.max_sequences());
  if (config.max_models() > 0) cache->max_models = static_cast<size_t>(config.max_models());
  if (config.max_tokens() > 0) cache->max_tokens_per_sequence = config.max_tokens();
  return absl::OkStatus();
}

// As ParseBytes reads it, to the byte: "16GiB", "1500000".
std::string ExactBytes(int64_t bytes) {
  constexpr const char* kUnits[] = {"", "KiB", "MiB", "GiB"};
  int unit = 0;
  for (; unit < 3 && bytes != 0 && bytes % 1024 == 0; unit++) bytes /= 1024;
  return absl::StrCat(bytes, kUnits[unit]);
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ParseDevices(const std::string& text) {
  constexpr size_t kMost = 32;
  std::vector<std::string> devices;
  const std::vector<std::string> parts = absl::StrSplit(text, ',');
  for (const std::string& part : parts) {
    std::string device(absl::StripAsciiWhitespace(part));
    if (absl::StartsWith(device, "GPU-")) device.insert(0, "cuda:");
    const bool gpu = absl::StartsWith(device, "cuda:") && device.size() > 5;
    const bool alone = device == "auto" || device == "cuda:all";
    if (!(device == "cpu" || gpu || alone) || (alone && parts.size() > 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("device \"", text,
                       "\" is unknown; use cpu, cuda:0, a list such as cuda:0,cuda:1, cuda:all or auto"));
    }
    if (gpu && std::find(devices.begin(), devices.end(), device) != devices.end())
      return absl::InvalidArgumentError(absl::StrCat("device \"", text, "\": ", device, " is named twice"));
    devices.push_back(std::move(device));
  }
  if (devices.size() > kMost)
    return absl::InvalidArgumentError(absl::StrCat("device: ", devices.size(), " devices, at most ", kMost));
  return devices;
}

absl::StatusOr<v1::KvtidedConfig> ParseConfig(const std::string& json, const std::string& file_name) {
  if (const absl::Status keys = CheckKeys(json); !keys.ok())
    return absl::InvalidArgumentError(
        absl::StrCat("config file ", file_name, ": ", keys.message(), "\nknown fields: ", KnownFields()));
  v1::KvtidedConfig config;
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = false;
  const auto status = google::protobuf::util::JsonStringToMessage(json, &config, options);
  if (!status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("config file ", file_name, ": ",
                                                   OneLine(std::string(status.message())),
                                                   "\nknown fields: ", KnownFields()));
  }
  return config;
}

absl::StatusOr<v1::KvtidedConfig> ReadConfigFile(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    return absl::NotFoundError(absl::StrCat("the config file ", path, " is a folder"));
  errno = 0;
  std::ifstream file(path);
  if (!file)
    return absl::NotFoundError(
        absl::StrCat("cannot read the config file ", path, ": ", std::strerror(errno)));
  std::stringstream text;
  if (!(text << file.rdbuf()))
    return absl::InvalidArgumentError(
        absl::StrCat("the config file ", path, " is empty; {} is the least it can hold"));
  return ParseConfig(text.str(), path);
}

void MergeConfig(const v1::KvtidedConfig& over, v1::KvtidedConfig* config) {
  // Two ways to say one thing.
  if (over.has_device_memory()) config->clear_device_tier_bytes();
  if (over.has_host_memory()) config->clear_host_tier_bytes();
  if (over.listen_size() > 0) config->clear_listen();
  if (over.allow_size() > 0) config->clear_allow();
  if (over.quota_size() > 0) config->clear_quota();
  if (over.has_exact_window()) config->clear_exact_window();
  config->MergeFrom(over);
  // An empty text takes away what is below, and is none itself.
  for (auto* const list : {config->mutable_listen(), config->mutable_allow(), config->mutable_quota()})
    list->erase(std::remove(list->begin(), list->end(), ""), list->end());
}

absl::StatusOr<DaemonOptions> ResolveConfig(const v1::KvtidedConfig& config) {
  DaemonOptions options;
  KVTIDE_ASSIGN_OR_RETURN(options.devices, ParseDevices(config.device().empty() ? "auto" : config.device()));
  KVTIDE_ASSIGN_OR_RETURN(
      options.device_bytes,
      ResolveBytes("device_memory", config.device_memory(), config.device_tier_bytes(), kDefaultDeviceBytes));
  KVTIDE_ASSIGN_OR_RETURN(options.host_bytes, ResolveBytes("host_memory", config.host_memory(),
                                                           config.host_tier_bytes(), kDefaultHostBytes));
  if (options.device_bytes < kLeastTierBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("device_memory is ", options.device_bytes, " bytes, at least 1MiB"));
  }
  if (options.host_bytes != 0 && options.host_bytes < kLeastTierBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("host_memory is ", options.host_bytes, " bytes, at least 1MiB, or 0 for no host tier"));
  }
  options.metrics_address = config.metrics_address().empty() ? "127.0.0.1:9464" : config.metrics_address();
  if (options.metrics_address == "off") options.metrics_address.clear();
  options.log_level = config.log_level().empty() ? "info" : config.log_level();
  const std::vector<std::string> kLevels = {"trace", "debug", "info", "warning", "error"};
  if (std::find(kLevels.begin(), kLevels.end(), options.log_level) == kLevels.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("log_level \"", options.log_level, "\" is unknown; use ", absl::StrJoin(kLevels, ", ")));
  }
  options.log_format = config.log_format().empty() ? "text" : config.log_format();
  if (options.log_format != "text" && options.log_format != "json")
    return absl::InvalidArgumentError(
        absl::StrCat("log_format \"", options.log_format, "\" is unknown; use text or json"));
  KVTIDE_RETURN_IF_ERROR(CheckRange("slow_call_ms", config.slow_call_ms(), -1, 1 << 30));
  options.slow_call = config.slow_call_ms() < 0
                          ? absl::InfiniteDuration()
                          : absl::Milliseconds(config.slow_call_ms() > 0 ? config.slow_call_ms() : 1000);
  KVTIDE_RETURN_IF_ERROR(CheckRange("compute_threads", config.compute_threads(), 0, 1024));
  options.compute_threads = config.compute_threads();
  KVTIDE_RETURN_IF_ERROR(CheckRange("shutdown_seconds", config.shutdown_seconds(), 0, 3600));
  options.insecure_tcp = config.allow_insecure_tcp();
  options.share_pool = config.share_pool();
  options.service.shared_memory.host_sharing = config.host_sharing();
  options.host_checksum = !config.has_host_checksum() || config.host_checksum();
  options.gpu_sharing = config.gpu_sharing().empty() ? "ipc" : config.gpu_sharing();
  if (options.gpu_sharing != "ipc" && options.gpu_sharing != "descriptors" && options.gpu_sharing != "auto")
    return absl::InvalidArgumentError(
        absl::StrCat("gpu_sharing \"", options.gpu_sharing, "\" is unknown; use ipc, descriptors or auto"));
  options.shutdown_grace = absl::Seconds(config.shutdown_seconds() > 0 ? config.shutdown_seconds() : 10);
  KVTIDE_RETURN_IF_ERROR(ResolveService(config, &options.service));
  KVTIDE_RETURN_IF_ERROR(ResolveSharedMemory(config, &options.service.shared_memory));
  KVTIDE_RETURN_IF_ERROR(ResolveLimits(config, &options.cache));
  KVTIDE_RETURN_IF_ERROR(ResolveCalibrate(config, &options.calibrate));
  KVTIDE_RETURN_IF_ERROR(ResolveDisk(config, &options));
  KVTIDE_RETURN_IF_ERROR(ResolveRemote(config, &options));
  KVTIDE_RETURN_IF_ERROR(ResolveTrace(config, &options));
  if (!config.eviction().empty()) {
    KVTIDE_ASSIGN_OR_RETURN(options.cache.eviction, ParseEvictionKind(config.eviction()));
  }
  if (!config.attend_lower_tiers().empty()) {
    KVTIDE_ASSIGN_OR_RETURN(options.cache.attend_lower_tiers,
                            ParseAttendLowerTiers(config.attend_lower_tiers()));
  }
  std::vector<std::string> tiers = {"device"};
  if (options.host_bytes > 0) tiers.push_back("host");
  if (options.disk_bytes > 0) tiers.push_back("disk");
  KVTIDE_ASSIGN_OR_RETURN(
      options.cache.quotas,
      TenantQuotas::Parse(std::vector<std::string>(config.quota().begin(), config.quota().end()), tiers));
  options.service.quotas->Set(options.cache.quotas);
  return options;
}

v1::KvtidedConfig WithDefaults(const v1::KvtidedConfig& config, const DaemonOptions& options) {
  v1::KvtidedConfig full = config;
  const service::ServiceOptions& service = options.service;
  full.mutable_listen()->Assign(service.listen.begin(), service.listen.end());
  full.set_device(absl::StrJoin(options.devices, ","));
  full.set_device_memory(ExactBytes(options.device_bytes));
  full.clear_device_tier_bytes();
  full.set_host_memory(ExactBytes(options.host_bytes));
  full.clear_host_tier_bytes();
  full.set_disk(options.disk_folder.empty()
                    ? "off"
                    : absl::StrCat(options.disk_folder, ":", ExactBytes(options.disk_bytes)));
  full.set_disk_io(options.disk_io);
  const RemoteOptions remote = options.remote.value_or(RemoteOptions());
  full.set_remote(options.remote.has_value() ? remote.address.Text() : "off");
  if (config.remote_prefix().empty()) full.set_remote_prefix(remote.prefix);
  if (config.remote_write().empty()) full.set_remote_write("all");
  if (config.remote_ttl_seconds() == 0)
    full.set_remote_ttl_seconds(static_cast<int32_t>(absl::ToInt64Seconds(RemoteOptions().ttl)));
  if (config.remote_timeout_ms() == 0)
    full.set_remote_timeout_ms(static_cast<int32_t>(absl::ToInt64Milliseconds(RemoteOptions().timeout)));
  if (config.remote_read_ms() == 0)
    full.set_remote_read_ms(static_cast<int32_t>(absl::ToInt64Milliseconds(RemoteOptions().read_time)));
  full.set_record_trace(options.trace_file.empty()
                            ? "off"
                            : absl::StrCat(options.trace_file, ":", ExactBytes(options.trace_bytes)));
  full.set_eviction(NameOf(options.cache.eviction));
  full.set_attend_lower_tiers(NameOf(options.cache.attend_lower_tiers));
  if (config.persist().empty()) full.set_persist("none");
  full.set_default_pair(PairName(service.defaults.pair));
  full.mutable_exact_window()->set_first_blocks(service.defaults.exact_window.first_blocks);
  full.mutable_exact_window()->set_last_blocks(service.defaults.exact_window.last_blocks);
  full.set_metrics_address(options.metrics_address.empty() ? "off" : options.metrics_address);
  full.set_log_level(options.log_level);
  full.set_log_format(options.log_format);
  full.set_slow_call_ms(options.slow_call == absl::InfiniteDuration()
                            ? -1
                            : static_cast<int32_t>(absl::ToInt64Milliseconds(options.slow_call)));
  full.set_max_connections(static_cast<int32_t>(service.max_connections));
  full.set_max_calls_per_connection(service.max_calls_per_connection);
  full.set_idle_seconds(static_cast<int32_t>(absl::ToInt64Seconds(service.idle)));
  full.set_max_queued_calls(static_cast<int32_t>(service.max_queued_calls));
  full.set_max_message_bytes(service.max_message_bytes);
  full.set_call_memory(ExactBytes(service.call_memory_bytes));
  full.set_shared_memory(ExactBytes(service.shared_memory.total_bytes));
  full.set_shared_memory_client(ExactBytes(service.shared_memory.client_bytes));
  full.set_max_shared_memory_clients(static_cast<int32_t>(service.shared_memory.max_clients));
  full.set_share_pool(options.share_pool);
  full.set_gpu_sharing(options.gpu_sharing);
  full.set_host_sharing(service.shared_memory.host_sharing);
  full.set_host_checksum(options.host_checksum);
  full.set_max_sequences(static_cast<int64_t>(options.cache.max_sequences));
  full.set_max_models(static_cast<int64_t>(options.cache.max_models));
  full.set_max_tokens(options.cache.max_tokens_per_sequence);
  full.set_max_attend_work(options.cache.max_attend_work);
  full.set_high_watermark(options.cache.limits.high_watermark);
  full.set_low_watermark(options.cache.limits.low_watermark);
  full.set_max_prefix_blocks(
      options.cache.max_prefix_blocks > 0 ? static_cast<int64_t>(options.cache.max_prefix_blocks) : -1);
  using Models = CalibratorOptions::Models;
  full.set_calibrate(options.calibrate.models == Models::kAll     ? "all"
                     : options.calibrate.models == Models::kNever ? "never"
                                                                  : "asked");
  full.set_calibrate_memory(ExactBytes(options.calibrate.memory_bytes));
  full.set_service_threads(service.threads);
  full.set_bulk_threads(service.bulk_threads);
  full.set_compute_threads(options.compute_threads > 0 ? options.compute_threads : Processors());
  full.set_shutdown_seconds(static_cast<int32_t>(absl::ToInt64Seconds(options.shutdown_grace)));
  return full;
}

}  // namespace kvtide
