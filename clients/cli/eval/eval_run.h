// The work behind `kvtide eval`: runs a model over windows of a text with its keys and values in a daemon,
// once per pair, and gathers the scores. Pairs run in lockstep with one f16 run per window.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_policy.h"
#include "clients/cli/eval/eval_report.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct EvalOptions {
  std::string model_folder;  // empty = the bundled one
  std::string text_file;     // empty = the bundled one
  std::vector<std::string>
      pairs;  // K/V; empty = all that the daemon knows, the same on both sides and after q8_0
  int windows = 24;
  int context = 0;                        // 0 = 4,096 or what the model can handle
  int chunk = 0;                          // 0 = 64, or 512 when everything is coded at once
  std::string window_policy = "default";  // "default", "none" or "F+L"
  client::KeyCentring key_centring = client::KeyCentring::kDefault;
  client::KeyEqualising key_equalising = client::KeyEqualising::kDefault;
  std::string profile_file;  // of `kvtide calibrate`: keys are centred by it; empty = none
  int needles = 0;
  bool layer_errors = true;
  int threads = 0;
  int64_t memory_bytes = 0;  // of the daemon that is started; 0 = what the run needs, at most 4 GiB
  std::string state_file;    // for resuming; empty = none
  std::string address;       // of a running daemon; empty = start one
  std::string daemon_program;
  bool show_progress = true;
};

// CANCELLED when `stop` becomes true; finished windows are in the state file then.
absl::StatusOr<EvalReport> RunEval(const EvalOptions& options, const std::atomic<bool>& stop);

}  // namespace kvtide::cli
