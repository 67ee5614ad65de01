#include "clients/cli/terminal/progress.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvtide::cli {
namespace {

using Seconds = std::chrono::duration<double>;

// Often enough to look alive on a terminal, rarely enough for a log.
constexpr Seconds kTerminalInterval{0.1};
constexpr Seconds kLogInterval{10};

}  // namespace

std::string RenderProgress(const ProgressState& state, int width) {
  const double share = state.total > 0 ? std::clamp(state.done / state.total, 0.0, 1.0) : 1.0;
  std::string numbers = absl::StrFormat("%3.0f %%  %s/%s %s", 100 * share, CountText(state.done),
                                        CountText(state.total), state.unit);
  if (state.elapsed_seconds > 0 && state.done > 0) {
    const double speed = state.done / state.elapsed_seconds;
    absl::StrAppend(&numbers, "  ", CountText(speed), "/s  ",
                    share < 1 ? DurationText((state.total - state.done) / speed) + " left"
                              : DurationText(state.elapsed_seconds));
  }
  const int bar = std::min(30, width - DisplayWidth(state.label) - DisplayWidth(numbers) - 6);
  if (bar < 5) return absl::StrCat(state.label, "  ", numbers);
  const int full = static_cast<int>(share * bar);
  return absl::StrCat(state.label, "  [", std::string(full, '#'), std::string(bar - full, '.'), "] ",
                      numbers);
}

Progress::Progress(std::string label, double total, std::string unit) : terminal_(Terminal::Of(2)) {
  state_.label = std::move(label);
  state_.total = total;
  state_.unit = std::move(unit);
  if (!terminal_.interactive()) drawn_ = start_;
}

Progress::~Progress() {
  // Work that ended early: the line as it was drawn last stays.
  if (!finished_ && terminal_.interactive()) std::fputc('\n', stderr);
}

void Progress::Update(double done) {
  state_.done = done;
  const Seconds since = Clock::now() - drawn_;
  if (since < (terminal_.interactive() ? kTerminalInterval : kLogInterval)) return;
  Draw();
}

void Progress::Skip(double done) {
  skipped_ += done;
  state_.done += done;
}

void Progress::Finish() {
  if (finished_) return;
  finished_ = true;
  Draw();
  if (terminal_.interactive()) std::fputc('\n', stderr);
}

void Progress::Draw() {
  drawn_ = Clock::now();
  ProgressState shown = state_;
  shown.elapsed_seconds = Seconds(drawn_ - start_).count();
  // Skipped work took no time: the speed is that of the rest.
  if (skipped_ > 0 && state_.done > skipped_) shown.elapsed_seconds *= state_.done / (state_.done - skipped_);
  if (skipped_ > 0 && state_.done <= skipped_) shown.elapsed_seconds = 0;
  const std::string line = RenderProgress(shown, terminal_.width() - 1);
  if (terminal_.interactive()) {
    std::fprintf(stderr, "\r\x1b[2K%s", line.c_str());
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace kvtide::cli
