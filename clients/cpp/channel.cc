#include "clients/cpp/channel.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/convert.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"

namespace kvtide::client {
namespace {

std::string WhatToCheck(const std::string& address) {
  const std::string prefix = "unix:";
  if (address.compare(0, prefix.size(), prefix) == 0) {
    const std::string path = address.substr(prefix.size());
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0)
      return absl::StrCat("there is no socket ", path, "; is kvtided running?");
    if (!S_ISSOCK(info.st_mode)) return absl::StrCat(path, " is not a socket");
    if (::access(path.c_str(), R_OK | W_OK) != 0) {
      return absl::StrCat("no permission for ", path, "; ask to join the socket's group");
    }
    return "the socket is there but nobody answers; is kvtided running? If it is, it may have all the "
           "connections that it may (--max-connections), which its log says";
  }
  return "is kvtided running and listening there (--listen)?";
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& address,
                                                           const ClientOptions& options) {
  if (address.empty()) return absl::InvalidArgumentError("the address is empty; use unix:/path or host:port");
  if (options.max_message_bytes < 1024 || options.max_message_bytes > (int64_t{1} << 31) - 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_message_bytes is ", options.max_message_bytes, "; allowed are 1 KiB to 2 GiB"));
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  arguments.SetMaxSendMessageSize(static_cast<int>(options.max_message_bytes));
  // One connection for each client: gRPC would share one between all clients of a process, and bulk tensors
  // of one would wait for those of the other.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // A proxy of the environment is never meant for this.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  const auto deadline = absl::ToChronoTime(absl::Now() + options.connect_timeout);
  if (!options.wait_for_daemon) {
    grpc_connectivity_state state = channel->GetState(true);
    while (state != GRPC_CHANNEL_READY && state != GRPC_CHANNEL_TRANSIENT_FAILURE &&
           channel->WaitForStateChange(state, deadline))
      state = channel->GetState(true);
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE)
      return absl::UnavailableError(absl::StrCat("no kvtided at ", address, ": ", WhatToCheck(address)));
  }
  if (!channel->WaitForConnected(deadline)) {
    return absl::UnavailableError(absl::StrCat("no kvtided at ", address, " within ",
                                               absl::FormatDuration(options.connect_timeout), ": ",
                                               WhatToCheck(address)));
  }
  return channel;
}

absl::Status AskHealth(const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout) {
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  // The empty request asks for the whole server.
  grpc::ByteBuffer request(nullptr, 0), response;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  if (!status.ok()) return FromGrpc(status);
  std::vector<grpc::Slice> slices;
  if (!response.Dump(&slices).ok()) return absl::InternalError("unreadable answer of the health service");
  std::string bytes;
  for (const grpc::Slice& slice : slices)
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  // Field 1, a varint: 1 = SERVING.
  if (bytes == std::string("\x08\x01", 2)) return absl::OkStatus();
  return absl::UnavailableError("the daemon does not serve at the moment (starting or shutting down)");
}

std::string DefaultAddress() {
  if (const char* address = std::getenv("KVTIDE_ADDRESS"); address != nullptr && *address != '\0')
    return address;
  if (::geteuid() == 0) return "unix:/run/kvtide/kvtided.sock";
  if (const char* folder = std::getenv("XDG_RUNTIME_DIR"); folder != nullptr && *folder != '\0') {
    return absl::StrCat("unix:", folder, "/kvtide/kvtided.sock");
  }
  return absl::StrCat("unix:/tmp/kvtide-", ::geteuid(), "/kvtided.sock");
}

}  // namespace kvtide::client
