// The ways of gRPC: a call for each message, or one session stream for all.
#include <utility>

#include "absl/time/clock.h"
#include "clients/cpp/call_trace_impl.h"
#include "clients/cpp/channel.h"
#include "clients/cpp/client_impl.h"
#include "clients/cpp/convert.h"
#include "clients/cpp/credentials.h"
#include "clients/cpp/session.h"
#include "kernels/base/status.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"
#include "proto/call_trace.h"

namespace kvtide::client {
namespace {

using Stub = v1::KvCacheService::Stub;

class UnaryCalls : public Carrier {
 public:
  UnaryCalls(std::shared_ptr<Stub> stub, absl::Duration timeout, std::shared_ptr<TokenFile> token)
      : stub_(std::move(stub)), timeout_(timeout), token_(std::move(token)) {}

  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) override {
    using Case = v1::SessionRequest::CallCase;
#define KVTIDE_VERB(Method, field) \
  case Case::k##Method:            \
    return Unary(&Stub::Method, request->field(), response->mutable_##field());
    switch (request->call_case()) {
      KVTIDE_VERB(GetServerInfo, get_server_info)
      KVTIDE_VERB(RegisterModel, register_model)
      KVTIDE_VERB(UnregisterModel, unregister_model)
      KVTIDE_VERB(CreateSequence, create_sequence)
      KVTIDE_VERB(LookupPrefix, lookup_prefix)
      KVTIDE_VERB(ForkSequence, fork_sequence)
      KVTIDE_VERB(TruncateSequence, truncate_sequence)
      KVTIDE_VERB(CloseSequence, close_sequence)
      KVTIDE_VERB(Append, append)
      KVTIDE_VERB(Attend, attend)
      KVTIDE_VERB(AppendAttend, append_attend)
      KVTIDE_VERB(ReadTokens, read_tokens)
      KVTIDE_VERB(EvictSequences, evict_sequences)
      KVTIDE_VERB(PrefetchSequences, prefetch_sequences)
      KVTIDE_VERB(PersistSequences, persist_sequences)
      KVTIDE_VERB(ListSequences, list_sequences)
      KVTIDE_VERB(GetStats, get_stats)
      KVTIDE_VERB(PinSequences, pin_sequences)
      KVTIDE_VERB(SetPriority, set_priority)
      KVTIDE_VERB(GetConfig, get_config)
      KVTIDE_VERB(ReloadConfig, reload_config)
      KVTIDE_VERB(Plan, plan)
      KVTIDE_VERB(OpenNamespace, open_namespace)
      KVTIDE_VERB(StoreBlocks, store_blocks)
      KVTIDE_VERB(LookupBlocks, lookup_blocks)
      KVTIDE_VERB(LoadBlocks, load_blocks)
      KVTIDE_VERB(ReleaseLease, release_lease)
      KVTIDE_VERB(DeleteNamespace, delete_namespace)
      KVTIDE_VERB(PersistNamespace, persist_namespace)
      KVTIDE_VERB(ListNamespaces, list_namespaces)
      KVTIDE_VERB(BeginStep, begin_step)
      KVTIDE_VERB(EndStep, end_step)
      KVTIDE_VERB(GetStepProfile, get_step_profile)
      KVTIDE_VERB(PinStep, pin_step)
      KVTIDE_VERB(StartCalibration, start_calibration)
      KVTIDE_VERB(StopCalibration, stop_calibration)
      KVTIDE_VERB(ListCalibrations, list_calibrations)
      KVTIDE_VERB(ExportProfile, export_profile)
      KVTIDE_VERB(InstallProfile, install_profile)
      case Case::CALL_NOT_SET:
        break;
    }
#undef KVTIDE_VERB
    return absl::InternalError("a message without a call");
  }

 private:
  template <class Request, class Response>
  absl::Status Unary(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                     const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout_));
    if (token_ != nullptr) token_->AddTo(&context);
    AddTrace(&context);
    const absl::Status status = FromGrpc((stub_.get()->*method)(&context, request, response));
    if (status.ok()) return status;
    const auto& trailing = context.GetServerTrailingMetadata();
    const auto id = trailing.find(kRequestIdKey);
    return id == trailing.end() ? status : WithRequestId(status, {id->second.data(), id->second.size()});
  }

  const std::shared_ptr<Stub> stub_;
  const absl::Duration timeout_;
  const std::shared_ptr<TokenFile> token_;  // null = none
};

// A session and the stub that its stream hangs on.
class SessionCarrier : public Carrier {
 public:
  SessionCarrier(std::shared_ptr<Stub> stub, std::unique_ptr<Session> session)
      : stub_(std::move(stub)), session_(std::move(session)) {}
  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) override {
    return session_->Call(request, response);
  }

 private:
  const std::shared_ptr<Stub> stub_;
  const std::unique_ptr<Session> session_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Client::Impl>> ConnectGrpc(const std::string& address,
                                                          const ClientOptions& asked) {
  ClientOptions options = asked;
  options.credentials = WithEnvironment(options.credentials);
  KVTIDE_ASSIGN_OR_RETURN(std::shared_ptr<TokenFile> token, TokenFile::Open(options.credentials.token_file));
  auto impl = std::make_unique<Client::Impl>();
  impl->address = address;
  KVTIDE_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, OpenChannel(address, options));
  std::shared_ptr<Stub> stub = v1::KvCacheService::NewStub(channel);
  if (options.session) {
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Session> session,
                            Session::Start(stub.get(), options.timeout, token.get()));
    impl->carrier = std::make_unique<SessionCarrier>(std::move(stub), std::move(session));
  } else {
    impl->carrier = std::make_unique<UnaryCalls>(std::move(stub), options.timeout, std::move(token));
  }
  impl->check_health = [channel, timeout = options.timeout] { return AskHealth(channel, timeout); };
  return impl;
}

}  // namespace kvtide::client
