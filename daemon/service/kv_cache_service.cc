#include "daemon/service/kv_cache_service.h"

#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/service/session_verbs.h"

namespace kvtide::service {

KvCacheService::KvCacheService(KvCache* cache, const ServiceOptions& options)
    : options_(options), handlers_(cache, options), workers_(options.threads, options.max_queued_calls) {}

KvCacheService::~KvCacheService() = default;

absl::Status KvCacheService::CheckNotDraining() const {
  if (draining_) return absl::UnavailableError("kvtided is shutting down; try another one, or again later");
  return absl::OkStatus();
}

absl::Status KvCacheService::Begin() {
  ++*options_.calls_under_way;
  return CheckNotDraining();
}

void KvCacheService::End(const char* method, absl::Time start, const absl::Status& status,
                         int64_t request_bytes, int64_t response_bytes) {
  Report(method, start, status, request_bytes, response_bytes);
  --*options_.calls_under_way;
}

void KvCacheService::Report(const char* method, absl::Time start, const absl::Status& status,
                            int64_t request_bytes, int64_t response_bytes) {
  if (!options_.report) return;
  CallReport report;
  report.method = method;
  report.code = status.raw_code();
  report.duration = absl::Now() - start;
  report.request_bytes = request_bytes;
  report.response_bytes = response_bytes;
  options_.report(report);
}

// One unary call; deletes itself when gRPC is done with it.
template <class Request, class Response>
class KvCacheService::UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  using Handler = absl::Status (Handlers::*)(const Request&, Response*, const Cancelled&);

  UnaryCall(KvCacheService* service, const char* method, Where where, Handler handler, const Request* request,
            Response* response)
      : service_(service),
        method_(method),
        start_(absl::Now()),
        handler_(handler),
        request_(request),
        response_(response) {
    if (const absl::Status status = service_->Begin(); !status.ok()) {
      Conclude(status);
    } else if (where == Where::kHere) {
      Handle();
    } else if (!service_->workers_.Submit([this] { Handle(); })) {
      Conclude(absl::ResourceExhaustedError(absl::StrCat("all threads are busy and ",
                                                         service_->options_.max_queued_calls,
                                                         " calls wait already; try again later")));
    }
  }

  void OnCancel() override { cancelled_.Cancel(); }
  void OnDone() override { delete this; }

 private:
  void Handle() {
    if (cancelled_.cancelled()) {
      Conclude(absl::CancelledError("the call was cancelled or its deadline has passed before it began"));
      return;
    }
    Conclude((service_->handlers_.*handler_)(*request_, response_, cancelled_));
  }

  // The last thing that touches `this`: afterwards OnDone may have deleted it.
  void Conclude(const absl::Status& status) {
    service_->End(method_, start_, status, static_cast<int64_t>(request_->ByteSizeLong()),
                  status.ok() ? static_cast<int64_t>(response_->ByteSizeLong()) : 0);
    Finish(ToGrpc(status));
  }

  KvCacheService* const service_;
  const char* const method_;
  const absl::Time start_;
  const Handler handler_;
  const Request* const request_;
  Response* const response_;
  Cancelled cancelled_;
};

#define KVTIDE_UNARY(Method, where)                                                                          \
  grpc::ServerUnaryReactor* KvCacheService::Method(                                                          \
      grpc::CallbackServerContext*, const v1::Method##Request* request, v1::Method##Response* response) {    \
    return new UnaryCall<v1::Method##Request, v1::Method##Response>(this, #Method, where, &Handlers::Method, \
                                                                    request, response);                      \
  }
KVTIDE_UNARY(GetServerInfo, Where::kHere)
KVTIDE_UNARY(RegisterModel, Where::kHere)
KVTIDE_UNARY(CreateSequence, Where::kHere)
KVTIDE_UNARY(ForkSequence, Where::kHere)
KVTIDE_UNARY(CloseSequence, Where::kHere)
KVTIDE_UNARY(TruncateSequence, Where::kWorker)
KVTIDE_UNARY(Append, Where::kWorker)
KVTIDE_UNARY(Attend, Where::kWorker)
KVTIDE_UNARY(AppendAttend, Where::kWorker)
KVTIDE_UNARY(EvictSequences, Where::kWorker)
KVTIDE_UNARY(PrefetchSequences, Where::kWorker)
KVTIDE_UNARY(ListSequences, Where::kWorker)
KVTIDE_UNARY(GetStats, Where::kWorker)
KVTIDE_UNARY(Plan, Where::kWorker)
#undef KVTIDE_UNARY

// One session stream: read, handle, write, and again. At most one operation or handler is under way, so
// nothing here needs a lock; only OnCancel comes from outside.
class KvCacheService::SessionCall final
    : public grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse> {
 public:
  explicit SessionCall(KvCacheService* service) : service_(service) {
    if (const absl::Status status = service_->CheckNotDraining(); !status.ok()) {
      Conclude(status);
      return;
    }
    StartSendInitialMetadata();
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Conclude(cancelled_.cancelled() ? absl::CancelledError("the session was cancelled") : absl::OkStatus());
      return;
    }
    if (!service_->workers_.Submit([this] { Handle(); })) {
      Answer(absl::ResourceExhaustedError("all threads are busy and the queue is full; try again later"));
    }
  }

  void OnWriteDone(bool ok) override {
    if (!ok) {
      Conclude(absl::CancelledError("the session was cancelled"));
      return;
    }
    StartRead(&request_);
  }

  void OnCancel() override { cancelled_.Cancel(); }

  void OnDone() override { delete this; }

 private:
  void Handle() {
    const absl::Time start = absl::Now();
    response_.Clear();
    const char* method = "Session";
    absl::Status status = service_->Begin();
    if (status.ok())
      status = HandleSessionRequest(&service_->handlers_, request_, &response_, cancelled_, &method);
    if (status.ok()) Track();
    service_->End(method, start, status, static_cast<int64_t>(request_.ByteSizeLong()),
                  static_cast<int64_t>(response_.ByteSizeLong()));
    Answer(status);
  }

  void Answer(const absl::Status& status) {
    if (!status.ok()) {
      const grpc::Status wire = ToGrpc(status);
      response_.Clear();
      response_.mutable_error()->set_code(wire.error_code());
      response_.mutable_error()->set_message(wire.error_message());
    }
    response_.set_request_id(request_.request_id());
    StartWrite(&response_);
  }

  void Track() {
    if (response_.has_create_sequence()) owned_.insert(response_.create_sequence().sequence_id());
    if (response_.has_fork_sequence()) owned_.insert(response_.fork_sequence().sequence_id());
    if (request_.has_close_sequence()) owned_.erase(request_.close_sequence().sequence_id());
  }

  // Releases what was created here, then ends the stream: a client that sees the end finds it released.
  void Conclude(const absl::Status& status) {
    for (const SequenceId sequence : owned_) service_->handlers_.Release(sequence);
    owned_.clear();
    service_->Report("Session", start_, status, 0, 0);
    Finish(ToGrpc(status));
  }

  KvCacheService* const service_;
  const absl::Time start_ = absl::Now();
  v1::SessionRequest request_;
  v1::SessionResponse response_;
  absl::flat_hash_set<SequenceId> owned_;
  Cancelled cancelled_;
};

grpc::ServerBidiReactor<v1::SessionRequest, v1::SessionResponse>* KvCacheService::Session(
    grpc::CallbackServerContext*) {
  return new SessionCall(this);
}

}  // namespace kvtide::service
