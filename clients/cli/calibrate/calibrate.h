// `kvtide calibrate`: runs a model over a text and keeps the mean of its keys (clients/engine/key_profile.h).
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <string>

#include "absl/status/statusor.h"
#include "clients/engine/key_profile.h"

namespace kvtide::cli {

struct CalibrateOptions {
  std::string model;  // folder or GGUF file; empty = the bundled one
  std::string text_file;
  int tokens = 16384;  // of the text, at most
  int context = 0;     // tokens of a window; 0 = 2048, or what the model can handle
  int threads = 0;
  bool show_progress = true;
};

// Means over all tokens but the first block of each window: sequences keep it exact, and its first token has
// keys unlike all others. CANCELLED when `stop` becomes true.
absl::StatusOr<engine::KeyProfile> Calibrate(const CalibrateOptions& options, const std::atomic<bool>& stop);

void AddCalibrateCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
