// The work behind `kvtide eval --captured`: what pairs of cache types do to the keys, the values and the
// attention of each layer of a captured file. Needs neither the model nor a daemon; says nothing about
// predictions.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_layers.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct CapturedOptions {
  std::string file;
  std::vector<std::string> pairs;  // K/V; empty = every type on both sides and after q8_0
  std::string window_policy = "default";
  client::KeyCentring key_centring = client::KeyCentring::kDefault;
  client::KeyEqualising key_equalising = client::KeyEqualising::kDefault;
  int threads = 0;
  std::string state_file;  // for resuming; empty = none
  bool show_progress = true;
};

struct CapturedRow {
  std::string pair;
  double bits_per_value = 0;  // of a sequence of that length: codes, scales, padding, window and tail
  bool pareto = false;        // no other pair has fewer bits and less error of the attention output
  LayerError mean;            // over layers
  std::vector<LayerError> layers;
};

struct CapturedReport {
  std::string file, model, text;
  int64_t tokens = 0, queries = 0;
  std::string window_policy, key_centring, key_equalising;
  std::string version, date, machine;
  double seconds = 0;
  std::vector<CapturedRow> rows;  // most bits first
};

// CANCELLED when `stop` becomes true; finished layers are in the state file then.
absl::StatusOr<CapturedReport> RunEvalCaptured(const CapturedOptions& options, const std::atomic<bool>& stop);

void SortAndMark(std::vector<CapturedRow>* rows);
std::string RenderTable(const CapturedReport& report, const Terminal& terminal);
std::string RenderJson(const CapturedReport& report);
std::string RenderCsv(
    const CapturedReport& report);  // a line for the mean ("all") and for each layer of each pair
std::string RenderSvg(const CapturedReport& report);

}  // namespace kvtide::cli
