// The settings of kvtided, each once: a field of its configuration (kvtide/v1/kvtided_config.proto), which is
// also a flag and a variable of the environment. Flags, `kvtide config`, the manual page and the completions
// are made of this table.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/config.h"
#include "kvtide/v1/kvtided_config.pb.h"

namespace kvtide {

struct Setting {
  const char* field;                // "device_memory"
  const char* help;                 // what it is, its form and its default, in one sentence
  bool live = false;                // follows a reload (SIGHUP, `kvtide config reload`) without a restart
  std::string Flag() const;         // "--device-memory"
  std::string Environment() const;  // "KVTIDE_DEVICE_MEMORY"
  // Several values: a list in the file, a flag that is given several times, words in the environment.
  bool repeated() const;
  bool is_switch() const;  // a flag without a value
};

// In the order in which they are shown. All fields of KvtidedConfig but those that only a file can have.
std::span<const Setting> AllSettings();
// Null if there is none.
const Setting* FindSetting(const std::string& field);

// Sets a field from text; repeated ones get one value more. InvalidArgument without the setting's name.
absl::Status SetFromText(const Setting& setting, const std::string& text, v1::KvtidedConfig* config);
// As shown and as SetFromText reads it; lists as words. Empty: not set.
std::string TextOf(const Setting& setting, const v1::KvtidedConfig& config);
bool IsSet(const Setting& setting, const v1::KvtidedConfig& config);

// What a variable of the environment holds; null: it is not there.
using Environment = std::function<const char*(const char* name)>;
const char* ProcessEnvironment(const char* name);

// Where a value comes from; later ones win.
enum class Source { kDefault, kFile, kEnvironment, kFlag };
// "default", "file", "environment", "flag".
const char* NameOf(Source source);

// The configuration by source, and all of it together.
struct ConfigLayers {
  std::string file_name;  // empty = none
  v1::KvtidedConfig file, environment, flags;
  v1::KvtidedConfig Merged() const;
  Source SourceOf(const Setting& setting) const;
};

// Reads the file (`file_name` empty: that of KVTIDE_CONFIG, if there is one) and the environment.
// InvalidArgument and NotFound name the file or the variable, the field and, of unknown ones, the nearest.
absl::StatusOr<ConfigLayers> GatherConfig(std::string file_name, v1::KvtidedConfig flags,
                                          const Environment& environment = ProcessEnvironment);

// One value that a daemon runs with.
struct EffectiveValue {
  const Setting* setting;
  std::string value;  // with the default filled in
  Source source;
};
// What kvtided would run with. Fails as ResolveConfig does.
absl::StatusOr<std::vector<EffectiveValue>> EffectiveValues(const ConfigLayers& layers);
// The same where the options are there already.
std::vector<EffectiveValue> EffectiveValues(const ConfigLayers& layers, const DaemonOptions& options);

// Variables KVTIDE_* of the environment (as `environ`, NAME=VALUE) that look like a setting and are none: a
// line each, with the nearest one. Those of other programs of kvtide are known, and those that Kubernetes
// makes of a Service.
std::vector<std::string> UnknownVariables(const char* const* environ);

}  // namespace kvtide
