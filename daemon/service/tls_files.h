// The files of TLS as gRPC reads them: copies in memory, which change only to what CheckTls finds good. gRPC
// takes whatever is there, and then ends every handshake. One thread at a time.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/service/tls.h"

namespace kvtide::service {

class TlsFiles {
 public:
  // Errors as CheckTls's; Internal where the system has no memory files.
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(const TlsOptions& options);
  ~TlsFiles();

  // Where the copies are.
  const TlsOptions& copies() const { return copies_; }
  // Looks whether the files have changed. InvalidArgument: to something that is not used; what was used goes
  // on.
  absl::Status Refresh();
  // When the server's certificate that is used ends.
  absl::Time expires() const { return expires_; }

 private:
  struct File {
    std::string path, bytes;
    int copy = -1;  // a descriptor
  };
  explicit TlsFiles(TlsOptions options) : options_(std::move(options)) {}

  const TlsOptions options_;
  TlsOptions copies_;
  std::vector<File> files_;  // certificate, key, and the CA if there is one
  absl::Time expires_ = absl::InfiniteFuture();
};

// In words from two weeks before it ends; empty until then.
std::string ExpiryWarning(const std::string& path, absl::Time expires, absl::Time now);

}  // namespace kvtide::service
