// The result of `kvtide eval` as values and as text: a table, JSON, the rows of planner/plan/quality.csv, and
// a plot of harm against bits. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clients/cli/eval/eval_layers.h"
#include "clients/cli/eval/eval_needle.h"
#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

struct EvalRow {
  std::string pair;
  double perplexity = 0;
  double change_percent = 0;  // of the perplexity, against f16
  double kld_mean = 0;        // nats per prediction
  double kld_p99 = 0;
  double top1_agreement = 0;
  double bits_per_value =
      0;  // of whole sequences as the daemon holds them: codes, scales, padding, window and tail
  bool pareto = false;  // no other pair has fewer bits and less divergence
  std::vector<LayerError> layers;
  std::vector<NeedleScore> needles;  // by depth; empty when not asked for
};

struct EvalReport {
  std::string model, text;
  int64_t parameters = 0;
  int64_t tokens = 0;
  int64_t windows = 0;
  int64_t context = 0;
  int chunk = 0;
  std::string window_policy;  // "default", "none" or "F+L"
  std::string key_centring, key_equalising;
  std::string key_profile;  // the text of the profile by which keys are coded; empty = none
  bool after_rope = false;  // calibrated types code keys after RoPE
  std::string version, date, machine;
  std::string way;  // to the daemon: "shared memory"
  double seconds = 0;
  std::vector<EvalRow> rows;
};

// Sorts by bits, most first, and marks the Pareto front of bits against mean divergence.
void SortAndMark(std::vector<EvalRow>* rows);

std::string RenderTable(const EvalReport& report, const Terminal& terminal);
std::string RenderJson(const EvalReport& report);
std::string RenderCsv(
    const EvalReport& report);  // planner/plan/quality.csv; without f16/f16, which is the yardstick
std::string RenderSvg(const EvalReport& report);

}  // namespace kvtide::cli
