#include "daemon/service/kv_cache_service.h"

#include <algorithm>
#include <random>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/service/ring_session.h"
#include "kernels/base/status.h"
#include "proto/call_trace.h"

namespace kvtide::service {
namespace {

// A call costs about so much beside its messages.
constexpr int64_t kCallBytes = 2048;
// An answer that its client does not take for so long is given up, and a request that takes so long to come.
constexpr absl::Duration kPatience = absl::Seconds(30);
constexpr int64_t kBaseBytes = int64_t{160} << 20;

// What a client says in the metadata; empty where it says nothing.
std::string_view SaidIn(const grpc::ServerContext& context, const char* key) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(key);
  return found == metadata.end() ? std::string_view()
                                 : std::string_view(found->second.data(), found->second.size());
}

absl::Time ToTime(std::chrono::system_clock::time_point deadline) {
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

absl::Status Gone() {
  return absl::CancelledError("the call was cancelled or its deadline has passed before it began");
}

}  // namespace

int64_t LeastCallMemory(int64_t max_message_bytes) {
  return std::max<int64_t>(int64_t{64} << 20, 6 * max_message_bytes + (int64_t{2} << 20));
}

int64_t ReceiveMemoryBytes(const ServiceOptions& options) {
  return std::max<int64_t>(int64_t{64} << 20, 4 * options.max_message_bytes);
}

int64_t MemoryOverheadBytes(const ServiceOptions& options) {
  return kBaseBytes + ReceiveMemoryBytes(options) + options.call_memory_bytes + options.staging_bytes +
         options.shared_memory.total_bytes +
         (options.calibrator != nullptr ? options.calibrator->memory_limit() : 0);
}

KvCacheService::KvCacheService(KvCache* cache, const Connections* connections, const ServiceOptions& options)
    : options_(options),
      connections_(connections),
      handlers_(cache, options),
      memory_(options.call_memory_bytes, options.call_memory_bytes / 2),
      last_request_(std::random_device()() * uint64_t{0x9e3779b97f4a7c15}),
      prompt_(options.threads, options.max_queued_calls),
      bulk_(options.bulk_threads, options.max_queued_calls) {}

KvCacheService::~KvCacheService() = default;

absl::Status KvCacheService::CheckNotDraining() const {
  return draining_ ? ShuttingDown() : absl::OkStatus();
}

absl::StatusOr<IdentityPtr> KvCacheService::Identify(const grpc::ServerContext& context,
                                                     const Connection& connection) const {
  if (options_.tokens != nullptr) {
    const auto& metadata = context.client_metadata();
    if (const auto sent = metadata.find("authorization"); sent != metadata.end()) {
      absl::string_view token(sent->second.data(), sent->second.size());
      if (!absl::ConsumePrefix(&token, "Bearer ") && !absl::ConsumePrefix(&token, "bearer "))
        return absl::UnauthenticatedError("the metadata \"authorization\" is \"Bearer TOKEN\"");
      return options_.tokens->Identify(token, absl::Now());
    }
  }
  if (!connection.tcp || !connection.identity.ok()) return connection.identity;
  if (!options_.tls.client_ca.empty())
    return options_.access.OfCertificate(NamesOfCertificate(*context.auth_context()));
  if (options_.tokens != nullptr)
    return absl::UnauthenticatedError(
        "calls over TCP need a token: the metadata \"authorization: Bearer TOKEN\" (clients of kvtide take "
        "it "
        "from --token-file, KVTIDE_TOKEN_FILE)");
  return connection.identity;
}

absl::StatusOr<bool> KvCacheService::BeginCall(const std::string& tenant) {
  const uint64_t limit = options_.quotas->CallsOf(tenant);
  if (limit == TenantLimits::kNone) return false;
  const MutexLock lock(tenants_mutex_);
  uint64_t& calls = calls_of_[tenant];
  if (calls >= limit)
    return Refused(Refusal::kQuota,
                   absl::ResourceExhaustedError(absl::StrCat("tenant '", tenant, "' has ", calls,
                                                             " calls under way, and its quota is ", limit,
                                                             "; wait for answers before sending more")));
  calls++;
  return true;
}

void KvCacheService::EndCall(const std::string& tenant) {
  const MutexLock lock(tenants_mutex_);
  const auto found = calls_of_.find(tenant);
  if (--found->second == 0) calls_of_.erase(found);
}

bool KvCacheService::IsBulk(const Verb* verb) const {
  // What is not known yet may be anything.
  return verb == nullptr || verb->lane == Lane::kBulk ||
         (verb->lane == Lane::kLookup && options_.waits_for_lookups);
}

void KvCacheService::Submit(const Verb* verb, Caller caller, WorkerPool::Work* work) {
  (IsBulk(verb) ? bulk_ : prompt_).Submit(caller, work);
}

void KvCacheService::Report(const CallReport& report, Client* client) const {
  options_.counts->Add(report);
  options_.clients->Count(report, client);
  if (options_.report) options_.report(report);
}

std::string KvCacheService::NewRequestId() {
  // Odd steps visit all numbers; neighbours look unlike each other.
  const uint64_t number = last_request_.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  return absl::StrCat(absl::Hex(number, absl::kZeroPad16));
}

// What calls have in common: who calls, how long, with how much memory. Deletes itself when gRPC is done with
// it.
class KvCacheService::AnyCall : public Rpc::Reactions, public WorkerPool::Work {
 public:
  AnyCall(KvCacheService* service, Rpc* rpc)
      : service_(service),
        rpc_(rpc),
        connection_(service->connections_->Find(rpc->context()->peer())),
        hold_(&service->memory_, &connection_->memory) {
    grpc::GenericServerContext* const context = rpc->context();
    const std::string_view asked = SaidIn(*context, kRequestIdKey);
    request_id_ = IsRequestId(asked) ? std::string(asked) : service->NewRequestId();
    context->AddTrailingMetadata(kRequestIdKey, request_id_);
    trace_ = TraceIdOf(SaidIn(*context, kTraceparentKey));
    call_.context.caller = connection_->name;
    identity_ = service->Identify(*context, *connection_);
    if (identity_.ok()) call_.context.identity = identity_->get();
    call_.context.request_id = std::hash<std::string>()(request_id_);
    call_.context.deadline = ToTime(context->deadline());
    call_.context.cancellation = &cancellation_;
    call_.memory = &hold_;
    const MutexLock lock(service_->mutex_);
    service_->calls_.insert(this);
  }

  void OnCancel() override { cancellation_.Cancel(); }
  void OnDone() override {
    {
      const MutexLock lock(service_->mutex_);
      service_->calls_.erase(this);
    }
    delete this;
  }

  // From any thread while the call is in `calls_`.
  void GiveUpIfStale(absl::Time now) {
    if (now - absl::FromUnixNanos(waiting_since_.load(std::memory_order_relaxed)) > kPatience) {
      stale_.store(true, std::memory_order_relaxed);
      rpc_->context()->TryCancel();
    }
  }
  void CancelIfBulk() {
    if (bulk_.load(std::memory_order_relaxed)) cancellation_.Cancel();
  }

 protected:
  virtual ~AnyCall() = default;

  // Takes the memory of a request that has arrived: as it is, and as it will be read.
  absl::Status TakeRequest() {
    request_bytes_ = static_cast<int64_t>(request_.Length());
    received_ = taken_ = absl::Now();
    return hold_.Add(2 * request_bytes_ + kCallBytes);
  }
  // Whether the caller is somebody, before anything of the call is read.
  absl::Status MayCall() const {
    KVTIDE_RETURN_IF_ERROR(service_->CheckNotDraining());
    return identity_.status();
  }
  // Counts the call for its tenant, until End.
  absl::Status CountForTenant() {
    KVTIDE_ASSIGN_OR_RETURN(const bool counted, service_->BeginCall(call_.context.tenant()));
    if (counted) counted_for_ = *identity_;
    return absl::OkStatus();
  }
  // For reports: empty where the caller is nobody.
  std::string_view Tenant() const {
    return identity_.ok() ? std::string_view((*identity_)->tenant) : std::string_view();
  }
  Caller CallerOf() const { return {std::hash<std::string>()(call_.context.tenant()), connection_->number}; }
  // Whether the call may begin.
  absl::Status MayBegin() {
    taken_ = absl::Now();
    if (cancellation_.cancelled()) return Gone();
    return service_->CheckNotDraining();
  }
  void Place(const Verb* verb) { bulk_.store(service_->IsBulk(verb), std::memory_order_relaxed); }

  void Begin() {
    start_ = received_ = taken_ = absl::Now();
    service_->options_.gauges->calls_under_way++;
    connection_->calls_under_way++;
  }
  void End(const char* method, const absl::Status& status, SequenceId sequence, std::string_view request_id,
           std::string_view trace) {
    CallReport report;
    report.method = method;
    report.SetStatus(status);
    // gRPC cancels a call at its deadline: nobody has given it up.
    if (report.code == static_cast<int>(absl::StatusCode::kCancelled)) {
      if (stale()) {
        report.refusal = Refusal::kSlowClient;
      } else if (absl::Now() >= call_.context.deadline) {
        report.refusal = Refusal::kDeadline;
      }
    }
    report.duration = absl::Now() - start_;
    report.request_bytes = request_bytes_;
    report.response_bytes = status.ok() ? static_cast<int64_t>(answer_.Length()) : 0;
    report.received = received_ - start_;
    report.waited = taken_ - received_;
    report.locked = locked_;
    report.request_id = request_id;
    report.caller = connection_->name;
    report.tenant = Tenant();
    report.trace = trace;
    report.sequence = sequence;
    if (counted_for_ != nullptr) service_->EndCall(std::exchange(counted_for_, nullptr)->tenant);
    service_->Report(report, connection_->client.get());
    connection_->calls_under_way--;
    service_->options_.gauges->calls_under_way--;
  }

  // Serves the call at once, on the thread that has read it, if that takes no longer than handing it over: a
  // small attention that is its connection's only call. Who has several under way takes turns with them, and
  // so do all while many calls are under way, since sockets wait for this thread that have something to say.
  // False: nothing has happened.
  template <class Serve>
  bool ServeHere(const Verb* verb, Serve serve) {
    constexpr int64_t kSmallRequest = 64 << 10, kManyCalls = 128;
    if (verb == nullptr || !verb->may_be_brief || request_bytes_ > kSmallRequest ||
        connection_->calls_under_way > 1 || service_->options_.gauges->calls_under_way > kManyCalls ||
        !MayBegin().ok())
      return false;
    const int64_t held = hold_.bytes();
    bool declined = false;
    grpc::ByteBuffer request = request_;  // shares its bytes
    call_.declined = &declined;
    serve(&request);
    call_.declined = nullptr;
    if (!declined) return true;
    answer_.Clear();
    hold_.Drop(hold_.bytes() - (held - request_bytes_));  // what was kept for answers
    return false;
  }

  // It was given up because its client neither sent nor took anything for kPatience.
  bool stale() const { return stale_.load(std::memory_order_relaxed); }

  // To be called before an answer is written or a request is awaited that has begun, and when that is done.
  void WaitForClient(bool begins) {
    waiting_since_.store(begins ? absl::ToUnixNanos(absl::Now()) : absl::ToUnixNanos(absl::InfiniteFuture()),
                         std::memory_order_relaxed);
  }

  KvCacheService* const service_;
  Rpc* const rpc_;
  const std::shared_ptr<Connection> connection_;
  MemoryBudget::Hold hold_;
  absl::StatusOr<IdentityPtr> identity_;
  IdentityPtr counted_for_;  // null: not counted
  Cancellation cancellation_;
  Call call_;
  std::string request_id_, trace_;
  grpc::ByteBuffer request_, answer_;
  int64_t request_bytes_ = 0;
  absl::Duration locked_;
  absl::Time start_ = absl::Now(), received_ = start_, taken_ = start_;

 private:
  std::atomic<int64_t> waiting_since_{absl::ToUnixNanos(absl::InfiniteFuture())};
  std::atomic<bool> bulk_{false}, stale_{false};
};

class KvCacheService::UnaryCall final : public AnyCall, public ReadTurns::Reader {
 public:
  UnaryCall(KvCacheService* service, Rpc* rpc, const Verb* verb) : AnyCall(service, rpc), verb_(verb) {}

  void Start() {
    Begin();
    absl::Status status = MayCall();
    if (status.ok()) status = CountForTenant();
    if (!status.ok()) {
      Conclude(status);
      return;
    }
    Place(verb_);
    connection_->turns.Enter(*this);
  }
  void Read() override {
    WaitForClient(true);
    rpc_->Read(&request_);
  }

  void OnReadDone(bool ok) override {
    WaitForClient(false);
    const absl::Status taken = ok ? TakeRequest() : absl::OkStatus();  // before the next one comes
    connection_->turns.Leave();
    if (!ok) {
      // Why, is known when gRPC is done with the call: one that it has ended hears nothing of this.
      unread_ = true;
      rpc_->Finish(ToGrpc(NoRequest()));
      return;
    }
    if (!taken.ok()) {
      request_.Clear();
      Conclude(taken);
      return;
    }
    absl::Status status;
    if (ServeHere(verb_, [&](grpc::ByteBuffer* request) { status = Serve(request); })) {
      request_.Clear();
      Conclude(status);
      return;
    }
    service_->Submit(verb_, CallerOf(), this);
  }

  void Run() override {
    absl::Status status = MayBegin();
    if (status.ok()) status = Serve(&request_);
    Conclude(status);
  }
  void Refuse(const absl::Status& why) override { Conclude(why); }
  void OnWriteDone(bool) override {}
  void OnDone() override {
    if (unread_) End(verb_->method, WhyUnread(), 0, request_id_, trace_);
    AnyCall::OnDone();
  }

 private:
  static absl::Status NoRequest() { return absl::InvalidArgumentError("the call came without a request"); }
  absl::Status WhyUnread() const {
    if (!cancellation_.cancelled()) return NoRequest();
    if (stale()) return absl::CancelledError("the request has stopped coming");
    if (absl::Now() >= call_.context.deadline) return Gone();
    if (service_->connections_->HasEnded(*connection_))
      return absl::CancelledError("the connection has ended before the request was there");
    return Refused(
        Refusal::kNotReceived,
        absl::CancelledError(absl::StrCat(
            "the request is larger than max_message_bytes = ", service_->options_.max_message_bytes,
            " or compressed, or was taken back before it was there")));
  }

  absl::Status Serve(grpc::ByteBuffer* request) {
    const LockedTime locked(&locked_);
    return verb_->serve(&service_->handlers_, request, call_, &answer_, &sequence_);
  }

  // The last thing that touches `this`: afterwards OnDone may have deleted it.
  void Conclude(const absl::Status& status) {
    End(verb_->method, status, sequence_, request_id_, trace_);
    if (!status.ok()) {
      rpc_->Finish(ToGrpc(status));
      return;
    }
    WaitForClient(true);
    rpc_->WriteAndFinish(answer_);
  }

  const Verb* const verb_;
  SequenceId sequence_ = 0;
  bool unread_ = false;  // there is no request: told when the call is done
};

// One session stream: read, handle, write, and again. At most one operation or handler is under way, so
// nothing here needs a lock; only OnCancel comes from outside.
class KvCacheService::SessionCall final : public AnyCall {
 public:
  SessionCall(KvCacheService* service, Rpc* rpc) : AnyCall(service, rpc) {}

  void Start() {
    if (const absl::Status status = MayCall(); !status.ok()) {
      Conclude(status);
      return;
    }
    rpc_->SendInitialMetadata();
    rpc_->Read(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Conclude(cancellation_.cancelled() ? absl::CancelledError("the session was cancelled")
                                         : absl::OkStatus());
      return;
    }
    number_++;
    Begin();
    head_ = ReadSessionHead(request_);
    // A token may have expired or been taken back since the session began.
    if (service_->options_.tokens != nullptr) {
      identity_ = service_->Identify(*rpc_->context(), *connection_);
      if (!identity_.ok()) {
        Fail(identity_.status());
        return;
      }
      call_.context.identity = identity_->get();
    }
    Place(head_.verb);
    absl::Status taken = CountForTenant();
    if (taken.ok()) taken = TakeRequest();
    if (!taken.ok()) {
      Fail(taken);
    } else if (SequenceId sequence = 0; ServeHere(
                   head_.verb, [&](grpc::ByteBuffer* request) { served_ = Serve(request, &sequence); })) {
      Write(served_, sequence);
    } else {
      service_->Submit(head_.verb, CallerOf(), this);
    }
  }

  void Run() override {
    if (const absl::Status status = MayBegin(); !status.ok()) {
      Fail(status);
      return;
    }
    SequenceId sequence = 0;
    const absl::Status status = Serve(&request_, &sequence);
    Write(status, sequence);
  }
  void Refuse(const absl::Status& why) override { Fail(why); }

  void OnWriteDone(bool ok) override {
    WaitForClient(false);
    answer_.Clear();
    hold_.Drop(hold_.bytes());
    if (!ok) {
      Conclude(absl::CancelledError("the session was cancelled"));
      return;
    }
    rpc_->Read(&request_);
  }

 private:
  absl::Status Serve(grpc::ByteBuffer* request, SequenceId* sequence) {
    const LockedTime locked(&locked_);
    return ServeSessionRequest(&service_->handlers_, head_.verb, request, call_, &answer_, sequence, &owned_);
  }

  void Fail(const absl::Status& status) {
    locked_ = absl::ZeroDuration();
    Write(status, 0);
  }

  void Write(const absl::Status& status, SequenceId sequence) {
    const std::string name =
        IsRequestId(head_.x_request_id) ? head_.x_request_id : absl::StrCat(request_id_, "/", number_);
    const std::string_view trace = TraceIdOf(head_.traceparent);
    if (!status.ok()) AnswerSessionError(head_.request_id, status, name, &answer_);
    End(head_.verb == nullptr ? "Session" : head_.verb->method, status, sequence, name,
        trace.empty() ? trace_ : trace);
    request_.Clear();
    WaitForClient(true);
    rpc_->Write(answer_);
  }

  // Releases what was created here, then ends the stream: a client that sees the end finds it released.
  void Conclude(const absl::Status& status) {
    owned_.Release(&service_->handlers_);
    CallReport report;
    report.method = "Session";
    report.SetStatus(status);
    report.duration = absl::Now() - opened_;
    report.request_id = request_id_;
    report.caller = connection_->name;
    report.tenant = Tenant();
    report.trace = trace_;
    service_->Report(report, connection_->client.get());
    rpc_->Finish(ToGrpc(status));
  }

  const absl::Time opened_ = absl::Now();
  SessionHead head_;     // of the request under way
  uint64_t number_ = 0;  // of requests
  absl::Status served_;  // the last one that was served here
  SessionOwned owned_;
};

// A method that this version does not have.
class KvCacheService::RefusedCall final : public Rpc::Reactions {
 public:
  RefusedCall(KvCacheService* service, Rpc* rpc) {
    const std::shared_ptr<Connection> connection = service->connections_->Find(rpc->context()->peer());
    const absl::Status status =
        absl::UnimplementedError(absl::StrCat("this kvtided has no method ", rpc->context()->method()));
    CallReport report;
    report.method = "other";
    report.SetStatus(status);
    report.caller = connection->name;
    service->Report(report, connection->client.get());
    rpc->Bind(this);
    rpc->Finish(ToGrpc(status));
  }
  void OnReadDone(bool) override {}
  void OnWriteDone(bool) override {}
  void OnCancel() override {}
  void OnDone() override { delete this; }
};

void KvCacheService::Begin(Rpc* rpc) {
  const std::string& method = rpc->context()->method();
  if (const Verb* const verb = FindVerb(method); verb != nullptr) {
    auto* const call = new UnaryCall(this, rpc, verb);
    rpc->Bind(call);
    call->Start();
  } else if (method == "/kvtide.v1.KvCacheService/Session") {
    auto* const call = new SessionCall(this, rpc);
    rpc->Bind(call);
    call->Start();
  } else {
    new RefusedCall(this, rpc);
  }
}

void KvCacheService::Drain() {
  draining_ = true;
  {
    const MutexLock lock(mutex_);
    for (AnyCall* call : calls_) call->CancelIfBulk();
    for (RingSession* session : rings_) session->CancelIfBulk();
  }
  prompt_.Close();
  bulk_.Close();
}

void KvCacheService::Tick() {
  const absl::Time now = absl::Now();
  {
    const MutexLock lock(mutex_);
    for (AnyCall* call : calls_) call->GiveUpIfStale(now);
  }
  ServiceGauges& gauges = *options_.gauges;
  gauges.queued_calls = static_cast<int64_t>(prompt_.queued());
  gauges.queued_bulk_calls = static_cast<int64_t>(bulk_.queued());
  gauges.call_memory_bytes = memory_.held();
}

}  // namespace kvtide::service
