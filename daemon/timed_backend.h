// A backend around another one that says how long its work takes, for metrics: rows written, blocks coded,
// queries attended, rows read back, copies between tiers (from their start until somebody has seen that they
// are done).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "kernels/backend.h"

namespace kvtide {

enum class Work : uint8_t { kAppend, kSeal, kAttend, kRead, kCopy };
constexpr const char* kWorkNames[] = {"append", "seal", "attend", "read", "copy"};

// Called from any thread, also while others do; quick. Work that fails counts too.
using WorkTimer = std::function<void(Work work, absl::Duration time)>;

std::unique_ptr<Backend> MakeTimedBackend(std::unique_ptr<Backend> inner, WorkTimer timer);

}  // namespace kvtide
