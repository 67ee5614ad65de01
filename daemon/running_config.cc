#include "daemon/running_config.h"

#include <utility>

#include "kernels/base/status.h"

namespace kvtide {

RunningConfig::RunningConfig(ConfigLayers layers, const DaemonOptions& options)
    : layers_(std::move(layers)), values_(EffectiveValues(layers_, options)) {}

v1::GetConfigResponse RunningConfig::Describe() const {
  const MutexLock lock(mutex_);
  v1::GetConfigResponse response;
  response.set_file(layers_.file_name);
  for (const EffectiveValue& value : values_) {
    v1::ConfigValue* const out = response.add_values();
    out->set_name(value.setting->field);
    out->set_value(value.value);
    out->set_source(NameOf(value.source));
    out->set_live(value.setting->live);
  }
  return response;
}

absl::StatusOr<v1::ReloadConfigResponse> RunningConfig::Reload(
    const std::function<absl::Status(const DaemonOptions& now)>& apply, const Environment& environment) {
  const MutexLock lock(mutex_);
  KVTIDE_ASSIGN_OR_RETURN(ConfigLayers layers, GatherConfig(layers_.file_name, layers_.flags, environment));
  KVTIDE_ASSIGN_OR_RETURN(const DaemonOptions options, ResolveConfig(layers.Merged()));
  const std::vector<EffectiveValue> values = EffectiveValues(layers, options);
  KVTIDE_RETURN_IF_ERROR(apply(options));
  v1::ReloadConfigResponse changes;
  for (size_t i = 0; i < values.size(); i++) {
    const EffectiveValue& value = values[i];
    if (value.value != values_[i].value)
      *(value.setting->live ? changes.add_changed() : changes.add_needs_restart()) = value.setting->field;
    if (value.setting->live) values_[i] = value;
  }
  layers_.file = std::move(layers.file);
  return changes;
}

}  // namespace kvtide
