// KVTIDE_CHECK stops the process when an invariant of the program is broken: it names the condition, the
// place and a message. It is for bugs, never for bad input (bad input is an absl::Status), and it stays on in
// every build.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"

namespace kvtide::internal {
[[noreturn]] inline void CheckFailed(const char* condition, const char* file, int line,
                                     const std::string& message) {
  std::fprintf(stderr, "kvtide: check failed: %s at %s:%d %s\n", condition, file, line, message.c_str());
  std::abort();
}
}  // namespace kvtide::internal

// KVTIDE_CHECK(condition) or KVTIDE_CHECK(condition, "any", values): the values are joined by absl::StrCat.
#define KVTIDE_CHECK(condition, ...) \
  (static_cast<bool>(condition)      \
       ? static_cast<void>(0)        \
       : ::kvtide::internal::CheckFailed(#condition, __FILE__, __LINE__, absl::StrCat(__VA_ARGS__)))
