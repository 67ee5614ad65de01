// absl::Status to Python exceptions: kvtide.errors has one class for each code.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::python {

// Thrown by bindings, turned into the exception of its code by the module's translator.
class StatusException : public std::exception {
 public:
  explicit StatusException(absl::Status status)
      : status_(std::move(status)), message_(std::string(status_.message())) {}
  const absl::Status& status() const { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  absl::Status status_;
  std::string message_;
};

inline void Raise(const absl::Status& status) {
  if (!status.ok()) throw StatusException(status);
}
template <class T>
T Raise(absl::StatusOr<T> value) {
  Raise(value.status());
  return std::move(value).value();
}

}  // namespace kvtide::python
