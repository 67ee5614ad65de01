// A progress bar on standard error with the time that is left. On a terminal it redraws one line; elsewhere
// (a log) it prints a line now and then, so that a long run can be followed. Used from one thread.
#pragma once

#include <chrono>
#include <string>

#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

struct ProgressState {
  std::string label;
  std::string unit;  // of done and total, such as "tokens"
  double done = 0;
  double total = 1;
  double elapsed_seconds = 0;
};

// One line: bar, percent, counts, speed, time left; no wider than `width`.
std::string RenderProgress(const ProgressState& state, int width);

class Progress {
 public:
  Progress(std::string label, double total, std::string unit);
  // Ends the line; only Finish draws the state of work that is done.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Update(double done);
  void Add(double more) { Update(state_.done + more); }
  // Work that an earlier run did: it counts as done, but not for the speed.
  void Skip(double done);
  void SetLabel(std::string label) { state_.label = std::move(label); }
  void Finish();

 private:
  using Clock = std::chrono::steady_clock;
  void Draw();

  const Terminal terminal_;
  ProgressState state_;
  double skipped_ = 0;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_{};
  bool finished_ = false;
};

}  // namespace kvtide::cli
