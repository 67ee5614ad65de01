// Ctrl-C asks long work to end after the piece at hand; a second one kills.
#pragma once

#include <atomic>

namespace kvtide::cli {

// True once SIGINT has come, which from this call on asks instead of kills, the first time.
const std::atomic<bool>& StopAtInterrupt();

}  // namespace kvtide::cli
