// `kvtide calibrate`: runs a model over a text and keeps the mean of its keys and the transforms of
// calibrated K types (clients/engine/key_profile.h).
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/engine/key_calibration.h"
#include "clients/engine/key_profile.h"

namespace kvtide::cli {

struct CalibrateOptions {
  std::string model;  // folder or GGUF file; empty = the bundled one
  std::string text_file;
  int tokens = 16384;  // of the text, at most
  // Tokens of a window; 0 = 2048, or what the model can handle. Transforms after RoPE hold for positions up
  // to there.
  int context = 0;
  engine::KeysAt keys = engine::KeysAt::kBeforeRope;
  // Bits per value of a calibrated type, its gains included, as TYPE=BITS: fewer than its pages hold, to measure
  // lower rates.
  std::vector<std::string> bits;
  int threads = 0;
  bool means_only = false;  // no transforms
  bool show_progress = true;
};

// Over all tokens but the first block of each window: sequences keep it exact, and its first token has keys
// unlike all others. For transforms the last tokens, an eighth and at most 1024, are held back: `errors` says
// how the types compare with turbo on them. INVALID_ARGUMENT if one is not better. CANCELLED when `stop`
// becomes true.
absl::StatusOr<engine::KeyProfile> Calibrate(const CalibrateOptions& options, const std::atomic<bool>& stop,
                                             std::vector<engine::KeyTypeError>* errors);

void AddCalibrateCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
