// Bearer tokens: whoever sends one speaks for its tenant. The file has the SHA-256 of each token, never the
// token itself, so that who reads it cannot call:
//
//   # a line for each token; `printf %s "$TOKEN" | sha256sum` gives the digits
//   sha256:HEX TENANT[:admin] [until=2027-01-31T00:00:00Z]
//
// Reloaded as a whole or not at all. Thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "daemon/service/access.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class Tokens {
 public:
  // InvalidArgument names the file, the line and what is wrong with it; NotFound a file that cannot be read.
  static absl::StatusOr<std::shared_ptr<Tokens>> Load(const std::string& path);
  // Reads the file again; on an error the tokens stay as they were.
  absl::Status Reload();

  // Whose token it is. Unauthenticated for one that is unknown or has expired. Takes the same time for every
  // token that is unknown.
  absl::StatusOr<IdentityPtr> Identify(absl::string_view token, absl::Time now) const;
  size_t size() const;

 private:
  struct Entry {
    std::array<uint8_t, 32> hash{};
    IdentityPtr identity;
    absl::Time until = absl::InfiniteFuture();
  };
  explicit Tokens(std::string path) : path_(std::move(path)) {}
  static absl::StatusOr<Entry> ParseLine(absl::string_view line);

  const std::string path_;
  mutable Mutex mutex_;
  std::shared_ptr<const std::vector<Entry>> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
