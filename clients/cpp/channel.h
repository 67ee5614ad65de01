// How the client reaches the daemon: the channel with its limits, the default address, and a question to the
// standard gRPC health service (two bytes, so that no generated code for it is needed).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cpp/client.h"
#include "grpcpp/channel.h"

namespace kvtide::client {

// A connected channel, or Unavailable with what to check. ResourceExhausted where a daemon answers that it
// has as many connections as it may, InvalidArgument for credentials that make no sense.
// `options.credentials` are complete (WithEnvironment).
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& address,
                                                           const ClientOptions& options);

// OK when the daemon serves, Unavailable with the reason when it does not (starting, shutting down).
absl::Status AskHealth(const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout);

}  // namespace kvtide::client
