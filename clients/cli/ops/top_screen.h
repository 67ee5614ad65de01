// What `kvtide top` draws: tiers as bars, and rates between two snapshots. Pure.
#pragma once

#include <string>

#include "clients/cli/ops/status_report.h"
#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

// Lines of one screen, at most `height`, none wider than the terminal. `seconds` lie between the snapshots.
// When the daemon was restarted in between, rates are those of the new one.
// `order`: which sequences fill the rest of the screen; kLargest = most tokens first.
std::string RenderTop(const DaemonSnapshot& before, const DaemonSnapshot& now, double seconds, int height,
                      const Terminal& terminal, SequenceOrder order = SequenceOrder::kLargest);

}  // namespace kvtide::cli
