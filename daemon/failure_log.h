// One line in the log for each call that failed (code, message, verb, sequence, request id, trace, caller),
// and for each that was slow, with where its time went. Lines are limited by verb and code, so that a client
// that fails all the time cannot fill a disk: after a burst only one a second, with the number of those that
// were left out. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "daemon/service/service_options.h"
#include "kernels/base/mutex.h"

namespace kvtide {

// Lets a burst through, then so many a second.
class RateLimit {
 public:
  RateLimit(double burst, double per_second) : burst_(burst), per_second_(per_second), left_(burst) {}
  // Whether one may pass now; `suppressed` gets how many did not since the last that did.
  bool Pass(absl::Time now, int64_t* suppressed);

 private:
  const double burst_, per_second_;
  double left_;
  absl::Time last_ = absl::InfinitePast();
  int64_t suppressed_ = 0;
};

// Control characters, quotes and backslashes as \n, \", \x1b: a text of a client stays within its line and
// quotes. Cut after `most` bytes.
std::string Escaped(std::string_view text, size_t most = 1024);

class FailureLog {
 public:
  // `write` gets "error" (the daemon's own fault), "warning" (something is full, lost or going away) or
  // "info" (a mistake or wish of the client), and the line.
  using Write = std::function<void(const char* level, const std::string& line)>;
  // `slow`: calls that took longer are told too, sessions aside.
  explicit FailureLog(Write write, absl::Duration slow = absl::InfiniteDuration())
      : write_(std::move(write)), slow_(slow) {}

  void Add(const service::CallReport& call, absl::Time now);
  // From now on.
  void SetSlow(absl::Duration slow);

 private:
  const Write write_;
  Mutex mutex_;
  absl::Duration slow_ ABSL_GUARDED_BY(mutex_);
  // By verb and code, a bounded number of each.
  std::map<std::pair<std::string, int>, RateLimit> limits_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide
