#include "clients/cpp/channel.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/convert.h"
#include "clients/cpp/credentials.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

// A connected socket to a Unix or TCP address, or -1.
int Dial(const std::string& address) {
  const std::string prefix = "unix:";
  if (address.compare(0, prefix.size(), prefix) == 0) {
    const std::string path = address.substr(prefix.size());
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    if (path.size() >= sizeof(name.sun_path)) return -1;
    std::memcpy(name.sun_path, path.c_str(), path.size() + 1);
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval patience = {1, 0};  // with a daemon that has no time to accept
    if (fd >= 0) ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (fd >= 0 && ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0) return fd;
    if (fd >= 0) ::close(fd);
    return -1;
  }
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) return -1;
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), address.substr(colon + 1).c_str(), &hints, &found) != 0) return -1;
  int fd = -1;
  for (addrinfo* one = found; one != nullptr && fd < 0; one = one->ai_next) {
    fd = ::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval patience = {1, 0};  // of connect too
    if (fd >= 0) ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (fd >= 0 && ::connect(fd, one->ai_addr, one->ai_addrlen) != 0) {
      ::close(fd);
      fd = -1;
    }
  }
  ::freeaddrinfo(found);
  return fd;
}

// What stands at the other end says itself why it does not serve, which gRPC keeps to itself: a daemon with a
// full table says goodbye with a text, and one that wants TLS answers plain HTTP/2 with an alert. OK when it
// says nothing of the kind; `answers`: it speaks HTTP/2 all the same. Asked only after gRPC has failed.
absl::Status AskWhy(const std::string& address, bool* answers) {
  const int fd = Dial(address);
  if (fd < 0) return absl::OkStatus();
  const timeval patience = {1, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  // The preface of HTTP/2 and empty settings.
  const std::string hello("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33);
  std::string said;
  char bytes[512];
  // A refusal comes unasked; only who waits for us first is spoken to.
  ssize_t count = ::recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT);
  if (count < 0 && ::send(fd, hello.data(), hello.size(), MSG_NOSIGNAL) > 0)
    count = ::recv(fd, bytes, sizeof(bytes), 0);
  for (; count > 0 && said.size() < 4096; count = ::recv(fd, bytes, sizeof(bytes), 0)) {
    said.append(bytes, static_cast<size_t>(count));
    if (said.size() > 17) break;  // the first frame and the head of the second
  }
  const bool ended = count == 0 || (count < 0 && errno == ECONNRESET);
  ::close(fd);
  const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(said[i])); };
  // A kvtided without TLS answers the preface at once; one with TLS ends what is no handshake.
  const bool unix = address.compare(0, 5, "unix:") == 0;
  if ((ended && said.empty() && !unix) || (said.size() >= 3 && byte(0) == 0x15 && byte(1) == 3))
    return absl::UnavailableError(
        "it ends connections that speak plain HTTP/2, so it may want TLS; give --tls-ca (KVTIDE_TLS_CA), the "
        "CA of "
        "its certificate");
  for (size_t at = 0; at + 9 <= said.size();) {
    const size_t length = byte(at) << 16 | byte(at + 1) << 8 | byte(at + 2);
    constexpr size_t kGoAway = 7, kHead = 17, kEnhanceYourCalm = 0xb;
    if (byte(at + 3) == kGoAway && length > 8 && at + 9 + length <= said.size()) {
      const std::string text = said.substr(at + kHead, length - 8);
      return byte(at + kHead - 1) == kEnhanceYourCalm ? absl::ResourceExhaustedError(text)
                                                      : absl::UnavailableError(text);
    }
    at += 9 + length;
  }
  constexpr size_t kSettings = 4;
  *answers = said.size() >= 9 && byte(3) == kSettings;
  return absl::OkStatus();
}

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
    return "the socket is there but nobody answers; is kvtided running?";
  }
  return "is kvtided running and listening there (--listen)?";
}

// Why no connection came about; `answers`: somebody speaks HTTP/2 there, so that another try may succeed.
absl::Status Unreachable(const std::string& address, const std::string& within,
                         const std::shared_ptr<grpc::Channel>& channel, const Credentials& credentials,
                         bool* answers) {
  const std::string head = absl::StrCat("no kvtided at ", address, within, ": ");
  const bool tls = !credentials.tls_ca.empty() && address.compare(0, 5, "unix:") != 0;
  if (const absl::Status why = tls ? absl::OkStatus() : AskWhy(address, answers); !why.ok())
    return absl::Status(why.code(), absl::StrCat(head, why.message()));
  if (*answers)
    return absl::UnavailableError(absl::StrCat(
        head, "it answers, but not in time; is the machine overloaded, or are there very many clients?"));
  if (!tls) return absl::UnavailableError(absl::StrCat(head, WhatToCheck(address)));
  // Of a handshake that failed gRPC tells the first call.
  const absl::Status call = AskHealth(channel, absl::Seconds(1));
  return absl::UnavailableError(absl::StrCat(head, call.message(),
                                             "; does it speak TLS (--server-cert), is --tls-ca the CA of its "
                                             "certificate, and does it want one of yours (--tls-cert)?"));
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
  // Before a daemon does (idle_seconds): nobody looks at the connection of a client that makes no calls, so a
  // call could go into one that the daemon has just closed.
  arguments.SetInt(GRPC_ARG_CLIENT_IDLE_TIMEOUT_MS, 10 * 60 * 1000);
  // A proxy of the environment is never meant for this.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  KVTIDE_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ChannelCredentials> credentials,
                          ChannelCredentialsFor(address, options.credentials));
  std::shared_ptr<grpc::Channel> channel = grpc::CreateCustomChannel(address, credentials, arguments);
  const auto deadline = absl::ToChronoTime(absl::Now() + options.connect_timeout);
  bool answers = false;
  if (!options.wait_for_daemon) {
    grpc_connectivity_state state = channel->GetState(true);
    while (state != GRPC_CHANNEL_READY && state != GRPC_CHANNEL_TRANSIENT_FAILURE &&
           channel->WaitForStateChange(state, deadline))
      state = channel->GetState(true);
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE) {
      const absl::Status why = Unreachable(address, "", channel, options.credentials, &answers);
      // A daemon that is there is worth another try: its queue of connections was full, or it was just
      // starting.
      if (!answers) return why;
    }
  }
  if (!channel->WaitForConnected(deadline)) {
    return Unreachable(address, absl::StrCat(" within ", absl::FormatDuration(options.connect_timeout)),
                       channel, options.credentials, &answers);
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
