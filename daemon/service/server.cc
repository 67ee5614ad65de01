#include "daemon/service/server.h"

#include <algorithm>
#include <chrono>
#include <future>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_posix.h"
#include "kernels/base/status.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"

namespace kvtide::service {
namespace {

constexpr absl::Duration kTimeToSend = absl::Milliseconds(300);
constexpr uint64_t kTicksBetweenLooks = 5;

// Several hand the sockets to each other, which takes a single client twice as long: they do where there are
// many (RpcLoop).
int ThreadsForSockets() {
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 8, 3, 4);
}

// The service as reflection shows it. All its methods are served by name, by KvCacheService.
template <class Base, template <class> class... Marks>
struct Marked;
template <class Base>
struct Marked<Base> {
  using Type = Base;
};
template <class Base, template <class> class Mark, template <class> class... Rest>
struct Marked<Base, Mark, Rest...> {
  using Type = Mark<typename Marked<Base, Rest...>::Type>;
};
using Api = v1::KvCacheService;
using Description = Marked<
    Api::Service, Api::WithGenericMethod_GetServerInfo, Api::WithGenericMethod_RegisterModel,
    Api::WithGenericMethod_UnregisterModel, Api::WithGenericMethod_CreateSequence,
    Api::WithGenericMethod_LookupPrefix, Api::WithGenericMethod_ForkSequence,
    Api::WithGenericMethod_TruncateSequence, Api::WithGenericMethod_CloseSequence,
    Api::WithGenericMethod_Append, Api::WithGenericMethod_Attend, Api::WithGenericMethod_AppendAttend,
    Api::WithGenericMethod_ReadTokens, Api::WithGenericMethod_EvictSequences,
    Api::WithGenericMethod_PrefetchSequences, Api::WithGenericMethod_ListSequences,
    Api::WithGenericMethod_PersistSequences, Api::WithGenericMethod_GetStats, Api::WithGenericMethod_Plan,
    Api::WithGenericMethod_OpenNamespace, Api::WithGenericMethod_StoreBlocks,
    Api::WithGenericMethod_LookupBlocks, Api::WithGenericMethod_LoadBlocks,
    Api::WithGenericMethod_ReleaseLease, Api::WithGenericMethod_DeleteNamespace,
    Api::WithGenericMethod_PersistNamespace, Api::WithGenericMethod_ListNamespaces,
    Api::WithGenericMethod_BeginStep, Api::WithGenericMethod_EndStep, Api::WithGenericMethod_GetStepProfile,
    Api::WithGenericMethod_PinStep, Api::WithGenericMethod_PinSequences, Api::WithGenericMethod_SetPriority,
    Api::WithGenericMethod_GetConfig, Api::WithGenericMethod_ReloadConfig,
    Api::WithGenericMethod_StartCalibration, Api::WithGenericMethod_StopCalibration,
    Api::WithGenericMethod_ListCalibrations, Api::WithGenericMethod_ExportProfile,
    Api::WithGenericMethod_InstallProfile, Api::WithGenericMethod_Session>::Type;

void SetLimits(const ServiceOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  builder->SetMaxSendMessageSize(static_cast<int>(options.max_message_bytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_calls_per_connection);
  // gRPC inflates a whole message before it looks at its size: 1.5 MB become 1.5 GB. Tensors hardly shrink
  // anyway.
  builder->SetDefaultCompressionAlgorithm(GRPC_COMPRESS_NONE);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder->AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  // Windows that do not grow: a stream that is not being read holds 64 KiB at most.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  // Who connects and says nothing, or never ends its TLS handshake, is let go.
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS,
                              static_cast<int>(absl::ToInt64Milliseconds(options.idle)));
  // A client whose host died is found within 40 s, and its session released.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  // Beyond it gRPC reads slower, then ends streams whose messages are still arriving.
  grpc::ResourceQuota quota("kvtided");
  quota.Resize(static_cast<size_t>(ReceiveMemoryBytes(options)));
  builder->SetResourceQuota(quota);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(KvCache* cache, const ServiceOptions& asked,
                                                      ServerWatch watch) {
  if (asked.listen.empty()) return absl::InvalidArgumentError("there is no address to listen on");
  ServiceOptions options = asked;
  options.troubles = watch.troubles;
  options.call_memory_bytes = std::max(options.call_memory_bytes, LeastCallMemory(options.max_message_bytes));
  std::unique_ptr<Server> server(new Server(options.access, options.clients, std::move(watch)));
  KVTIDE_RETURN_IF_ERROR(CheckTls(options.tls));
  std::vector<int> sockets, ring_sockets;
  for (const std::string& text : options.listen) {
    KVTIDE_ASSIGN_OR_RETURN(const Address address, ParseAddress(text));
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<AddressClaim> claim, AddressClaim::Hold(address));
    sockets.insert(sockets.end(), claim->sockets().begin(), claim->sockets().end());
    server->addresses_.push_back(claim->text());
    server->claims_.push_back(std::move(claim));
    if (!address.is_unix() || options.shared_memory.total_bytes == 0) continue;
    auto ring_address = ParseAddress(address.text + ring::kSocketSuffix);
    if (!ring_address.ok()) {
      return Annotate(ring_address.status(),
                      "the socket of the shared-memory way (--shared-memory 0 closes it)");
    }
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<AddressClaim> ring_claim, AddressClaim::Hold(*ring_address));
    ring_sockets.insert(ring_sockets.end(), ring_claim->sockets().begin(), ring_claim->sockets().end());
    server->claims_.push_back(std::move(ring_claim));
  }
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  server->service_ = std::make_unique<KvCacheService>(cache, &server->connections_, options);
  server->health_ = std::make_unique<Health>();
  server->description_ = std::make_unique<Description>();
  grpc::ServerBuilder builder;
  SetLimits(options, &builder);
  builder.RegisterService(server->description_.get());
  if (options.tls.enabled()) {
    KVTIDE_ASSIGN_OR_RETURN(server->tls_, TlsFiles::Open(options.tls));
    server->secure_ = builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        MakeServerCredentials(server->tls_->copies()));
  }
  server->loop_ = std::make_unique<RpcLoop>(
      &builder, [to = server->service_.get(), health = server->health_.get()](Rpc* rpc) {
        if (!health->Begin(rpc)) to->Begin(rpc);
      });
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr) return absl::UnavailableError("the gRPC server did not start");
  server->loop_->Start(ThreadsForSockets(),
                       [connections = &server->connections_] { return connections->size(); });
  // What lives as long as the daemon is open by now.
  const DescriptorUse use = LookAtDescriptors();
  const ClientCounts wanted{options.max_connections,
                            ring_sockets.empty() ? 0 : options.shared_memory.max_clients};
  KVTIDE_ASSIGN_OR_RETURN(const ClientCounts room, ShareDescriptors(use, wanted));
  server->shortage_ = DescriptorShortage(use, wanted, room);
  options.gauges->connections_limit = static_cast<int64_t>(room.connections);
  Listener::Options listener;
  listener.sockets = std::move(sockets);
  listener.max_connections = room.connections;
  listener.tls = server->secure_ != nullptr;
  listener.serve = [to = server->server_.get(), secure = server->secure_.get()](int fd, bool tcp) {
    if (!tcp || secure == nullptr) {
      grpc::AddInsecureChannelFromFd(to, fd);
      return;
    }
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
    connection.fd = fd;
    secure->HandleNewConnection(&connection);
  };
  listener.refusal = [connections = &server->connections_, quotas = options.quotas](const Connection& one) {
    if (!one.identity.ok()) return std::string();
    const std::string& tenant = (*one.identity)->tenant;
    const uint64_t limit = quotas->ConnectionsOf(tenant);
    return limit == TenantLimits::kNone || connections->CountOf(tenant) <= limit
               ? std::string()
               : absl::StrCat("tenant '", tenant, "' has as many connections as its quota allows, ", limit);
  };
  listener.tick = [self = server.get(), options](const RefusedConnections& refused) {
    self->Tick(options, refused);
  };
  server->listener_ = std::make_unique<Listener>(&server->connections_, std::move(listener));
  if (!ring_sockets.empty()) {
    RingServer::Options rings;
    rings.sockets = std::move(ring_sockets);
    std::random_device random;
    rings.generation = uint64_t{random()} << 32 | random() | 1;
    rings.limits = options.shared_memory;
    rings.limits.max_clients = room.ring_clients;
    rings.access = options.access;
    rings.cache = cache;
    rings.host_sharing = options.shared_memory.host_sharing;
    rings.gauges = options.gauges;
    server->rings_ = std::make_unique<RingServer>(server->service_.get(), std::move(rings));
  }
  // The files of Unix sockets appear when all is there, the one for shared memory before the one beside which
  // it lies: who waits for the latter may use either.
  for (auto claim = server->claims_.rbegin(); claim != server->claims_.rend(); ++claim)
    KVTIDE_RETURN_IF_ERROR((*claim)->Show());
  return server;
}

Server::~Server() { Shutdown(absl::ZeroDuration(), absl::InfiniteDuration()); }

void Server::Tick(const ServiceOptions& options, const RefusedConnections& refused) {
  service_->Tick();
  Troubles& troubles = *watch_.troubles;
  std::string gone;
  for (const auto& claim : claims_) {
    const absl::StatusOr<bool> mended = claim->Mend();
    if (mended.ok() && *mended && options.mended) options.mended(claim->text(), mended.status());
    if (!mended.ok())
      absl::StrAppend(&gone, gone.empty() ? "" : "; ", "the file of ", claim->text(),
                      " is gone: ", std::string(mended.status().message()));
  }
  troubles.Set(Trouble::kSocket, gone);
  if (ticks_++ % kTicksBetweenLooks == 0) {
    if (tls_ != nullptr) CheckCertificate(options);
    if (watch_.look) watch_.look();
  }
  const bool serves = !troubles.EndService();
  if (serves != serves_ && service_->CheckNotDraining().ok()) health_->SetServing(serves);
  serves_ = serves;
  if (options.alive && serves) options.alive();
  ServiceGauges& gauges = *options.gauges;
  gauges.connections = static_cast<int64_t>(connections_.size());
  gauges.connections_accepted = static_cast<int64_t>(connections_.accepted());
  bool more = false;
  for (size_t i = 0; i < refused.size(); i++) {
    const auto count = static_cast<int64_t>(refused[i]);
    more |= gauges.connections_refused[i].exchange(count) != count;
  }
  if (more && options.refused) options.refused(refused);
}

void Server::CheckCertificate(const ServiceOptions& options) {
  const absl::Status status = tls_->Refresh();
  if (watch_.certificate_ends) watch_.certificate_ends(tls_->expires());
  watch_.troubles->Set(
      Trouble::kCertificate,
      status.ok() ? ExpiryWarning(options.tls.certificate, tls_->expires(), absl::Now())
                  : absl::StrCat(std::string(status.message()), "; the certificate from before is used"));
}

bool Server::Shutdown(absl::Duration grace, absl::Duration patience) {
  if (server_ == nullptr) return true;
  health_->SetServing(false);
  service_->Drain();
  const absl::Time deadline = absl::Now() + grace;
  while (service_->calls_under_way() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(2));
  listener_.reset();
  // The answers are on their way out; idle sessions would wait for ever. What is left then is cancelled. gRPC
  // waits for the last call without end, so a thread of its own does.
  std::promise<void> ended;
  std::future<void> end = ended.get_future();
  std::thread ending([this, wait = std::min(grace, kTimeToSend), promise = std::move(ended)]() mutable {
    if (rings_ != nullptr) rings_->Stop();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + wait));
    server_->Wait();
    loop_->WaitForCalls();
    promise.set_value();
  });
  const bool in_time =
      patience == absl::InfiniteDuration() ||
      end.wait_for(absl::ToChronoNanoseconds(kTimeToSend + patience)) == std::future_status::ready;
  claims_.clear();
  if (!in_time) {
    ending.detach();
    rings_.release();
    server_.release();
    loop_.release();
    service_.release();
    health_.release();
    description_.release();
    return false;
  }
  ending.join();
  rings_.reset();
  loop_.reset();  // what gRPC has left in its queue looks at the server
  server_.reset();
  service_.reset();
  return true;
}

}  // namespace kvtide::service
