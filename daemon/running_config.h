// The configuration that a daemon runs with, and reading it again: what follows at once and what waits for a
// restart. Thread-safe.
#pragma once

#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "daemon/settings.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide {

class RunningConfig {
 public:
  // `options`: what ResolveConfig made of the layers.
  RunningConfig(ConfigLayers layers, const DaemonOptions& options);

  v1::GetConfigResponse Describe() const;

  // Reads the file again; the environment and the flags of a process do not change. `apply` takes the
  // settings that are live out of the new options; where it fails, or the file is not good, nothing has
  // changed.
  absl::StatusOr<v1::ReloadConfigResponse> Reload(
      const std::function<absl::Status(const DaemonOptions& now)>& apply,
      const Environment& environment = ProcessEnvironment);

 private:
  mutable Mutex mutex_;
  ConfigLayers layers_ ABSL_GUARDED_BY(mutex_);
  std::vector<EffectiveValue> values_ ABSL_GUARDED_BY(mutex_);  // that the daemon runs with
};

}  // namespace kvtide
