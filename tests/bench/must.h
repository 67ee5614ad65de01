// The value of a call that a benchmark cannot go on without; else the program ends with what was wrong.
#pragma once

#include <errno.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::bench {

template <class T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, value.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(value);
}
inline void Must(const absl::Status& status) { Must(status.ok() ? absl::StatusOr<int>(0) : status); }

}  // namespace kvtide::bench
