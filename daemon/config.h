// The daemon's configuration: a JSON file (kvtide/v1/kvtided_config.proto is its manual), checked and turned
// into options. Where its values come from: settings.h. Errors name the file and the field.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/remote/remote_options.h"
#include "daemon/service/service_options.h"
#include "kvtide/v1/kvtided_config.pb.h"

namespace kvtide {

struct DaemonOptions {
  std::vector<std::string> devices;  // as ParseDevices gives them
  int64_t device_bytes = 0;          // on each device
  int64_t host_bytes = 0;            // 0 = no host tier
  std::string disk_folder;           // empty = no disk tier
  int64_t disk_bytes = 0;
  std::string disk_io;                  // "auto", "io_uring", "threads"
  std::string disk_key_file;            // empty = the disk tier is not encrypted
  std::optional<RemoteOptions> remote;  // none = no remote tier
  std::string trace_file;               // empty = nothing is recorded
  int64_t trace_bytes = 0;              // that it may have
  std::string metrics_address;          // empty = none
  std::string log_level, log_format;
  absl::Duration slow_call;  // infinite = none are logged
  int compute_threads = 0;
  absl::Duration shutdown_grace;
  bool insecure_tcp = false;
  bool host_checksum = true;  // of blocks in the host tier, compared when they leave it or are loaded
  bool share_pool = false;     // engines of an admin may map the device tier on CPUs, too,
  std::string gpu_sharing;     // and on GPUs by "ipc", "descriptors" or "auto"
  CalibratorOptions calibrate;
  service::ServiceOptions service;
  CacheOptions cache;  // limits; the tiers are filled in with the backends
};

// InvalidArgument with the place and the known fields for anything that is not a KvtidedConfig.
absl::StatusOr<v1::KvtidedConfig> ParseConfig(const std::string& json, const std::string& file_name);
absl::StatusOr<v1::KvtidedConfig> ReadConfigFile(const std::string& path);

// Fields that are set in `over` replace those of `config`, also where they are false, 0 or empty; a list with
// an empty text in it is set, and has one fewer.
void MergeConfig(const v1::KvtidedConfig& over, v1::KvtidedConfig* config);

// "cpu", "cuda:0", "cuda:GPU-..." (a UUID, "cuda:" may be missing), "cuda:all", "auto", or a list of the
// first three: each one in the first form. InvalidArgument for anything else and for a GPU that is there
// twice.
absl::StatusOr<std::vector<std::string>> ParseDevices(const std::string& text);

// Defaults filled in, everything checked.
absl::StatusOr<DaemonOptions> ResolveConfig(const v1::KvtidedConfig& config);

// The configuration with everything said that it leaves to defaults: what ResolveConfig made of it, as a
// configuration.
v1::KvtidedConfig WithDefaults(const v1::KvtidedConfig& config, const DaemonOptions& options);

}  // namespace kvtide
