#include "clients/cli/terminal/interrupt.h"

#include <csignal>

namespace kvtide::cli {
namespace {

std::atomic<bool> stop_asked{false};
static_assert(std::atomic<bool>::is_always_lock_free);

void AskToStop(int) {
  stop_asked = true;
  std::signal(SIGINT, SIG_DFL);
}

}  // namespace

const std::atomic<bool>& StopAtInterrupt() {
  std::signal(SIGINT, AskToStop);
  return stop_asked;
}

}  // namespace kvtide::cli
