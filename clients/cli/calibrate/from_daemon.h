// `kvtide calibrate --from-daemon`: profiles of keys from the traffic of a running kvtided
// (kvtide/v1/calibration.proto): begin, follow, write, install.
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cpp/calibration.h"
#include "clients/engine/key_profile.h"

namespace kvtide::cli {

struct TrafficOptions {
  DaemonFlags daemon;
  std::string model;  // as it is registered; empty = all, which can only be shown
  bool start = false, wait = false, install = false, stop = false;
  std::string rope_of;          // folder or GGUF file of the model; empty = RoPE as registered
  std::string profile_file;     // to install instead of the calibration's
  std::string out_file;         // empty = not written
  std::string output = "text";  // or "json"
  bool show_progress = true;
  client::CalibrationOptions calibration;
};

// The profile of a daemon's model as a file has it. InvalidArgument for models whose layers differ in shape.
absl::StatusOr<engine::KeyProfile> ProfileOf(const client::ExportedProfile& exported);

std::string RenderCalibrations(const std::vector<client::Calibration>& calibrations);
std::string RenderCalibrationsJson(const std::vector<client::Calibration>& calibrations);

// `from_daemon`: the option was given.
CLI::Option* AddTrafficOptions(CLI::App* calibrate, TrafficOptions* options, bool* from_daemon);

// Does what is asked for, in this order: start, wait, write, install, stop. Returns what is to be printed.
// FailedPrecondition if a profile was refused; Cancelled when `stop` becomes true: the daemon goes on.
absl::StatusOr<std::string> CalibrateFromDaemon(const TrafficOptions& options, const std::atomic<bool>& stop);

}  // namespace kvtide::cli
