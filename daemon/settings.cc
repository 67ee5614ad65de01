#include "daemon/settings.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "google/protobuf/reflection.h"
#include "kernels/base/status.h"
#include "planner/near_names.h"

namespace kvtide {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Reflection;

constexpr Setting kSettings[] = {
    {"listen", "address: unix:/path/to/socket or host:port; may be given several times"},
    {"device",
     "cpu, cuda:0, several as in cuda:0,cuda:1, cuda:all, or auto (default: the first GPU, else cpu)"},
    {"device_memory", "size of the device tier on each device, such as 16GiB (default 1GiB)"},
    {"host_memory", "size of the host tier, 0 for none (default 2GiB)"},
    {"disk", "disk tier: a folder of its own and its size, such as /var/lib/kvtide:100GiB (default: none)"},
    {"disk_io", "io_uring, threads, or auto (default: io_uring where it is allowed)"},
    {"disk_key_file",
     "encrypts the disk tier: file with 32 bytes, raw, hexadecimal or base64, that nobody else may read "
     "(default: not encrypted)"},
    {"remote",
     "Redis or Valkey server through which daemons share blocks: HOST:PORT, rediss://HOST:PORT (TLS), "
     "unix:/path/to/socket (default: none)"},
    {"remote_prefix", "what names of values there begin with; others share nothing (default kvtide)"},
    {"remote_auth_file", "file with PASSWORD, or with USER PASSWORD of an ACL user (default: none is sent)"},
    {"remote_ca", "PEM file with the CA of its certificate (default: those of the system)"},
    {"remote_write",
     "what is written there: all (default) blocks that others can find, on-demote, those that would be "
     "dropped here next, or none"},
    {"remote_ttl_seconds",
     "how long values lie there after their last use; 0 = the default (86400), -1 = no limit"},
    {"remote_timeout_ms", "how long it may be silent before it counts as away; 0 = the default (250)"},
    {"remote_read_ms", "how long one lookup may fetch blocks from there; 0 = the default (1000)"},
    {"record_trace",
     "records what is asked of cached blocks, for kvtide fleet replay: FILE or FILE:SIZE, where it ends "
     "(default size 256MiB; default: none)"},
    {"eviction",
     "which cached blocks go first: lru (default), used least recently, or s3-fifo, never asked for again"},
    {"attend_lower_tiers",
     "attention over blocks in the host tier: cost (default), there or after they were brought to the "
     "device, "
     "whichever is predicted to be faster; in-place; or promote-first, wherever the device has room"},
    {"persist", "when sequences become durable by themselves: none (default), on-park or all"},
    {"default_pair", "K and V type of sequences that name none (default q8_0/turbo4)"},
    {"exact_window",
     "blocks of 64 tokens that sequences which name none keep in f16: at their beginning and at their end, "
     "or none "
     "(default 1,2)"},
    {"metrics_address", "where /metrics is served, or off (default 127.0.0.1:9464)"},
    {"log_level", "trace, debug, info, warning or error (default info)", true},
    {"log_format", "text (default; words and key=value) or json, an object a line"},
    {"slow_call_ms", "log calls that take longer, and where the time went; 0 = the default (1000), -1 = none",
     true},
    {"allow",
     "who may use kvtided beside its own user and root, and as which tenant: uid:1001, group (its own), "
     "group:kvtide=acme, uid:1002=ops:admin, anyone, tcp=acme; may be given several times"},
    {"quota",
     "hard limits of a tenant, or of every other one (*): acme:sequences=100,models=4,pins=10,calls=32,"
     "connections=16,device=2GiB,host=16GiB; may be given several times",
     true},
    {"server_cert", "TLS on TCP addresses: PEM file with kvtided's certificate chain"},
    {"server_key", "PEM file with its key"},
    {"client_ca", "mTLS: PEM file with the CA of clients' certificates, whose common name is the tenant"},
    {"tokens",
     "file with the SHA-256 of bearer tokens: sha256:HEX TENANT[:admin] [until=TIME]; read again at SIGHUP"},
    {"allow_insecure_tcp", "listen beyond loopback without TLS, or without asking who calls"},
    {"max_connections",
     "connections at a time; 0 = the default (1024, or what the limit of open files has room for)"},
    {"max_calls_per_connection", "calls of one connection at a time; 0 = the default (256)"},
    {"idle_seconds", "close connections without calls after so long; 0 = the default (1800)"},
    {"max_queued_calls", "calls that may wait for a thread; 0 = the default (1024)"},
    {"max_message_bytes", "largest message, either way (default 64 MiB)"},
    {"call_memory",
     "memory for requests and answers of calls under way (default and least: six largest messages)"},
    {"shared_memory",
     "memory shared with clients of this host, all together (default 512MiB); 0 closes that way"},
    {"shared_memory_client", "most of it for one client (default 256MiB)"},
    {"max_shared_memory_clients", "clients that share memory, a thread each; 0 = the default (64)"},
    {"share_pool",
     "engines of an admin may map the device tier on CPUs (the direct way), as they may on GPUs"},
    {"gpu_sharing",
     "how they map that of GPUs: ipc (CUDA IPC, the default), descriptors (of files: needs no common IPC "
     "namespace), or auto"},
    {"host_sharing",
     "engines of an admin may map the host tier read-only and load blocks from where they lie; they can read "
     "what all tenants have cached there"},
    {"host_checksum",
     "blocks in the host tier have checksums, compared when they leave it or are loaded, in place the first "
     "time (default true; disk and remote tier always have them)"},
    {"max_sequences", "sequences at a time; 0 = the default (16384)", true},
    {"max_models", "models at a time; 0 = the default (64)", true},
    {"max_tokens", "tokens of one sequence; 0 = the default (4194304)"},
    {"high_watermark", "a tier that is fuller moves idle blocks down (default 0.9 of it)", true},
    {"low_watermark", "until it is no fuller than this (default 0.8)", true},
    {"max_attend_work",
     "most work of one attention: queries x visible tokens x query heads of all its items (default 2^38)"},
    {"max_prefix_blocks",
     "blocks that are found by token ids, for prefixes; 0 = the default (1048576), -1 = none"},
    {"calibrate",
     "models whose keys are calibrated from traffic: asked (the default: by StartCalibration), all or never"},
    {"calibrate_memory", "memory for the sums of calibrations, all together (default 64MiB)"},
    {"service_threads", "threads that serve calls; 0 = the default (one per core, at least 2)"},
    {"bulk_threads", "threads for calls that may take long, beside those; 0 = the default (2)"},
    {"compute_threads", "threads that attend on the CPU; 0 = the default (one per core)"},
    {"shutdown_seconds", "how long calls under way may go on after SIGTERM; 0 = the default (10)"},
};

const FieldDescriptor& FieldOf(const Setting& setting) {
  return *v1::KvtidedConfig::descriptor()->FindFieldByName(setting.field);
}

// "1,2": blocks at the beginning and at the end; "none".
absl::Status SetWindow(const std::string& text, v1::ExactWindow* window) {
  const std::vector<std::string> parts = absl::StrSplit(text == "none" ? "0,0" : text, ',');
  int32_t first = 0, last = 0;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &first) || !absl::SimpleAtoi(parts[1], &last))
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is neither none nor two numbers of blocks as in 1,2"));
  window->set_first_blocks(first);
  window->set_last_blocks(last);
  return absl::OkStatus();
}

absl::Status NoNumber(const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a whole number"));
}

// `device_memory` may be written as a number of bytes in the file.
bool HasBytes(const Setting& setting, const v1::KvtidedConfig& config) {
  return (!std::strcmp(setting.field, "device_memory") && config.device_tier_bytes() != 0) ||
         (!std::strcmp(setting.field, "host_memory") && config.host_tier_bytes() != 0);
}

// Variables that other programs of kvtide read.
constexpr const char* kOthers[] = {
    "KVTIDE_ADDRESS",     "KVTIDE_CONFIG",       "KVTIDE_CUDA",        "KVTIDE_CUDA_PAGED",
    "KVTIDE_DATA_DIR",    "KVTIDE_PAIR",         "KVTIDE_PROFILE",     "KVTIDE_TLS_CA",
    "KVTIDE_TLS_CERT",    "KVTIDE_TLS_KEY",      "KVTIDE_TOKEN_FILE",  "KVTIDE_PREFILL",
    "KVTIDE_SIDE_MEMORY", "KVTIDE_EXACT_WINDOW", "KVTIDE_TEST_DEVICE", "KVTIDE_TEST_PROGRAMS",
};

// What Kubernetes puts into every container for a Service that is called kvtide or kvtide-SOMETHING:
// KVTIDE_SERVICE_HOST=..., KVTIDE_PORT_7600_TCP_ADDR=..., KVTIDE_PORT=tcp://...
bool IsOfKubernetes(absl::string_view entry) {
  const absl::string_view name = entry.substr(0, entry.find('='));
  const size_t port = name.find("_PORT");
  return absl::EndsWith(name, "_SERVICE_HOST") || absl::StrContains(name, "_SERVICE_PORT") ||
         (port != absl::string_view::npos &&
          (absl::StrContains(entry, "://") ||
           (port + 6 < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[port + 6])))));
}

}  // namespace

std::string Setting::Flag() const { return absl::StrCat("--", absl::StrReplaceAll(field, {{"_", "-"}})); }
std::string Setting::Environment() const { return absl::StrCat("KVTIDE_", absl::AsciiStrToUpper(field)); }
bool Setting::repeated() const { return FieldOf(*this).is_repeated(); }
bool Setting::is_switch() const { return FieldOf(*this).cpp_type() == FieldDescriptor::CPPTYPE_BOOL; }

std::span<const Setting> AllSettings() { return kSettings; }

const Setting* FindSetting(const std::string& field) {
  const auto found = std::find_if(std::begin(kSettings), std::end(kSettings),
                                  [&](const Setting& setting) { return field == setting.field; });
  return found == std::end(kSettings) ? nullptr : found;
}

absl::Status SetFromText(const Setting& setting, const std::string& text, v1::KvtidedConfig* config) {
  const FieldDescriptor& field = FieldOf(setting);
  const Reflection& set = *config->GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      if (field.is_repeated()) {
        set.AddString(config, &field, text);
      } else {
        set.SetString(config, &field, text);
      }
      return absl::OkStatus();
    case FieldDescriptor::CPPTYPE_INT32: {
      int32_t number = 0;
      if (!absl::SimpleAtoi(text, &number)) return NoNumber(text);
      set.SetInt32(config, &field, number);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_INT64: {
      int64_t number = 0;
      if (!absl::SimpleAtoi(text, &number)) return NoNumber(text);
      set.SetInt64(config, &field, number);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      double number = 0;
      if (!absl::SimpleAtod(text, &number))
        return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number"));
      set.SetDouble(config, &field, number);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_BOOL: {
      bool on = false;
      if (!absl::SimpleAtob(text, &on))
        return absl::InvalidArgumentError(absl::StrCat("'", text, "' is neither true nor false"));
      set.SetBool(config, &field, on);
      return absl::OkStatus();
    }
    default:  // the only message
      return SetWindow(text, config->mutable_exact_window());
  }
}

std::string TextOf(const Setting& setting, const v1::KvtidedConfig& config) {
  const FieldDescriptor& field = FieldOf(setting);
  const Reflection& get = *config.GetReflection();
  if (field.is_repeated()) {
    const auto values = get.GetRepeatedFieldRef<std::string>(config, &field);
    return absl::StrJoin(values, " ");
  }
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      return get.GetString(config, &field);
    case FieldDescriptor::CPPTYPE_INT32:
      return absl::StrCat(get.GetInt32(config, &field));
    case FieldDescriptor::CPPTYPE_INT64:
      return absl::StrCat(get.GetInt64(config, &field));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return absl::StrCat(get.GetDouble(config, &field));
    case FieldDescriptor::CPPTYPE_BOOL:
      return get.GetBool(config, &field) ? "true" : "false";
    default:
      return config.has_exact_window() ? absl::StrCat(config.exact_window().first_blocks(), ",",
                                                      config.exact_window().last_blocks())
                                       : "";
  }
}

bool IsSet(const Setting& setting, const v1::KvtidedConfig& config) {
  const FieldDescriptor& field = FieldOf(setting);
  const Reflection& get = *config.GetReflection();
  if (HasBytes(setting, config)) return true;
  return field.is_repeated() ? get.FieldSize(config, &field) > 0 : get.HasField(config, &field);
}

const char* ProcessEnvironment(const char* name) { return std::getenv(name); }

const char* NameOf(Source source) {
  constexpr const char* kNames[] = {"default", "file", "environment", "flag"};
  return kNames[static_cast<int>(source)];
}

v1::KvtidedConfig ConfigLayers::Merged() const {
  v1::KvtidedConfig all = file;
  MergeConfig(environment, &all);
  MergeConfig(flags, &all);
  return all;
}

Source ConfigLayers::SourceOf(const Setting& setting) const {
  if (IsSet(setting, flags)) return Source::kFlag;
  if (IsSet(setting, environment)) return Source::kEnvironment;
  return IsSet(setting, file) ? Source::kFile : Source::kDefault;
}

absl::StatusOr<ConfigLayers> GatherConfig(std::string file_name, v1::KvtidedConfig flags,
                                          const Environment& environment) {
  ConfigLayers layers;
  layers.flags = std::move(flags);
  if (const char* const named = environment("KVTIDE_CONFIG"); file_name.empty() && named != nullptr)
    file_name = named;
  layers.file_name = file_name;
  if (!file_name.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(layers.file, ReadConfigFile(file_name));
  }
  for (const Setting& setting : kSettings) {
    const char* const value = environment(setting.Environment().c_str());
    if (value == nullptr || *value == '\0') continue;
    std::vector<std::string> texts = {value};
    if (setting.repeated()) texts = absl::StrSplit(value, absl::ByAnyChar(" \t\n"), absl::SkipEmpty());
    for (const std::string& text : texts)
      KVTIDE_RETURN_IF_ERROR(
          Annotate(SetFromText(setting, text, &layers.environment), setting.Environment()));
  }
  return layers;
}

absl::StatusOr<std::vector<EffectiveValue>> EffectiveValues(const ConfigLayers& layers) {
  KVTIDE_ASSIGN_OR_RETURN(const DaemonOptions options, ResolveConfig(layers.Merged()));
  return EffectiveValues(layers, options);
}

std::vector<EffectiveValue> EffectiveValues(const ConfigLayers& layers, const DaemonOptions& options) {
  const v1::KvtidedConfig merged = layers.Merged();
  const v1::KvtidedConfig filled = WithDefaults(merged, options);
  std::vector<EffectiveValue> values;
  for (const Setting& setting : kSettings)
    values.push_back({&setting, TextOf(setting, filled), layers.SourceOf(setting)});
  return values;
}

std::vector<std::string> UnknownVariables(const char* const* environ) {
  std::vector<std::string> known, lines;
  for (const Setting& setting : kSettings) known.push_back(setting.Environment());
  for (; *environ != nullptr; environ++) {
    const absl::string_view entry = *environ;
    const std::string name(entry.substr(0, entry.find('=')));
    if (!absl::StartsWith(name, "KVTIDE_")) continue;
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    if (std::find(std::begin(kOthers), std::end(kOthers), name) != std::end(kOthers)) continue;
    if (IsOfKubernetes(entry) || absl::StartsWith(name, "KVTIDE_TEST_")) continue;
    const std::vector<std::string> near = planner::NearNames(name, known, 1);
    lines.push_back(absl::StrCat("no setting reads ", name,
                                 near.empty() ? "" : absl::StrCat("; did you mean ", near.front(), "?")));
  }
  return lines;
}

}  // namespace kvtide
