#include "daemon/service/server.h"

#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

constexpr int kMaxStreamsPerConnection = 1024;
// Messages that gRPC may hold at once, in largest messages: beyond it it reads no more from its sockets.
constexpr int64_t kMessagesInMemory = 16;
constexpr absl::Duration kTimeToSend = absl::Milliseconds(300);

void SetLimits(const ServiceOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  builder->SetMaxSendMessageSize(static_cast<int>(options.max_message_bytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  // Two daemons would share a port silently.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A client whose host died is found within 40 s, and its session released.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  grpc::ResourceQuota quota("kvtided");
  quota.Resize(static_cast<size_t>(
      std::max<int64_t>(int64_t{256} << 20, kMessagesInMemory * options.max_message_bytes)));
  builder->SetResourceQuota(quota);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(KvCache* cache, const ServiceOptions& options) {
  if (options.listen.empty()) return absl::InvalidArgumentError("there is no address to listen on");
  std::unique_ptr<Server> server(new Server);
  std::vector<Address> addresses;
  for (const std::string& text : options.listen) {
    KVTIDE_ASSIGN_OR_RETURN(Address address, ParseAddress(text));
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<AddressClaim> claim, AddressClaim::Take(address));
    server->claims_.push_back(std::move(claim));
    addresses.push_back(std::move(address));
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  server->service_ = std::make_unique<KvCacheService>(cache, options);
  grpc::ServerBuilder builder;
  SetLimits(options, &builder);
  std::vector<int> ports(addresses.size(), 0);
  for (size_t i = 0; i < addresses.size(); i++) {
    builder.AddListeningPort(addresses[i].text, grpc::InsecureServerCredentials(), &ports[i]);
  }
  builder.RegisterService(server->service_.get());
  {
    // gRPC makes its socket file with what the mask leaves: owner and group may connect.
    const mode_t before = ::umask(0117);
    const absl::Cleanup restore = [before] { ::umask(before); };
    server->server_ = builder.BuildAndStart();
  }
  for (size_t i = 0; i < addresses.size(); i++) {
    if (server->server_ == nullptr || ports[i] == 0) {
      if (server->server_ == nullptr && ports[i] != 0) continue;
      return absl::UnavailableError(
          absl::StrCat("cannot listen on ", addresses[i].text, "; choose another --listen"));
    }
    const bool any_port = !addresses[i].is_unix() && addresses[i].port == 0;
    server->addresses_.push_back(
        any_port ? absl::StrCat(addresses[i].text.substr(0, addresses[i].text.rfind(':') + 1), ports[i])
                 : addresses[i].text);
  }
  if (server->server_ == nullptr) return absl::UnavailableError("the gRPC server did not start");
  return server;
}

Server::~Server() { Shutdown(absl::ZeroDuration()); }

void Server::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  if (auto* health = server_->GetHealthCheckService(); health != nullptr) health->SetServingStatus(false);
  service_->Drain();
  const absl::Time deadline = absl::Now() + grace;
  while (service_->calls_under_way() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(2));
  // The answers are on their way out; idle sessions would wait for ever.
  server_->Shutdown(absl::ToChronoTime(absl::Now() + std::min(grace, kTimeToSend)));
  server_->Wait();
  server_.reset();
  service_.reset();
  claims_.clear();
}

}  // namespace kvtide::service
