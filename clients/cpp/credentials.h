// What Credentials (client.h) mean to gRPC: the channel's credentials, and the token that goes with every
// call.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cpp/client.h"
#include "grpcpp/client_context.h"
#include "grpcpp/security/credentials.h"
#include "kernels/base/mutex.h"

namespace kvtide::client {

// Empty fields are those of the environment: KVTIDE_TLS_CA, KVTIDE_TLS_CERT, KVTIDE_TLS_KEY,
// KVTIDE_TOKEN_FILE.
Credentials WithEnvironment(Credentials credentials);

// TLS for TCP addresses where `credentials` ask for it; Unix sockets never have it. The files are looked at
// again every few seconds. InvalidArgument names what is missing.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ChannelCredentialsFor(
    const std::string& address, const Credentials& credentials);

// A token in a file: what is in it, without spaces and line ends. Looked at again at most once a second, so
// that a token can be renewed under a running client. Thread-safe.
class TokenFile {
 public:
  // Null for an empty path. InvalidArgument for a file that cannot be read or holds no token.
  static absl::StatusOr<std::shared_ptr<TokenFile>> Open(const std::string& path);
  // Adds the token to a call that has not begun.
  void AddTo(grpc::ClientContext* context);

 private:
  explicit TokenFile(std::string path) : path_(std::move(path)) {}
  absl::Status Read() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  Mutex mutex_;
  std::string header_ ABSL_GUARDED_BY(mutex_);
  absl::Time read_at_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace kvtide::client
