// Macros that pass an absl::Status up, and Annotate, with which each layer adds one phrase of its own.
#pragma once

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace kvtide {

// The status with `phrase: ` in front of its message; an OK status is returned as it is.
inline absl::Status Annotate(const absl::Status& status, const std::string& phrase) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(phrase, ": ", status.message()));
}

}  // namespace kvtide

#define KVTIDE_CONCAT_INNER(a, b) a##b
#define KVTIDE_CONCAT(a, b) KVTIDE_CONCAT_INNER(a, b)

#define KVTIDE_RETURN_IF_ERROR(expression)           \
  do {                                               \
    absl::Status kvtide_status_ = (expression);      \
    if (!kvtide_status_.ok()) return kvtide_status_; \
  } while (false)

// KVTIDE_ASSIGN_OR_RETURN(auto x, F()): F returns absl::StatusOr.
#define KVTIDE_ASSIGN_OR_RETURN(lhs, expression) \
  KVTIDE_ASSIGN_OR_RETURN_IMPL(KVTIDE_CONCAT(kvtide_result_, __LINE__), lhs, expression)
#define KVTIDE_ASSIGN_OR_RETURN_IMPL(result, lhs, expression) \
  auto result = (expression);                                 \
  if (!result.ok()) return result.status();                   \
  lhs = std::move(result).value()
