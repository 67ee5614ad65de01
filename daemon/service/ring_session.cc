#include "daemon/service/ring_session.h"

#include <string_view>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/cache/call/refusal.h"
#include "google/protobuf/arena.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status.h"
#include "proto/call_trace.h"

namespace kvtide::service {

// A message that waits for its turn in the threads of its lane.
class RingSession::Turn final : public WorkerPool::Work {
 public:
  explicit Turn(std::function<absl::Status()> serve) : serve_(std::move(serve)) {}

  void Run() override { End(serve_()); }
  void Refuse(const absl::Status& why) override { End(why); }

  absl::Status Wait() {
    const MutexLock lock(mutex_);
    while (!ended_) ended_changed_.Wait(mutex_);
    return status_;
  }

 private:
  void End(const absl::Status& status) {
    // Notified under the mutex: afterwards this may be gone.
    const MutexLock lock(mutex_);
    status_ = status;
    ended_ = true;
    ended_changed_.NotifyAll();
  }

  const std::function<absl::Status()> serve_;
  Mutex mutex_;
  CondVar ended_changed_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

RingSession::RingSession(KvCacheService* service, std::shared_ptr<Connection> connection,
                         const TensorMemory& tensors, int64_t max_answer_bytes, bool maps_pool, int host_tier)
    : service_(service),
      connection_(std::move(connection)),
      tensors_(tensors),
      max_answer_bytes_(max_answer_bytes),
      maps_pool_(maps_pool),
      opened_(absl::Now()),
      places_(host_tier) {
  const MutexLock lock(service_->mutex_);
  service_->rings_.insert(this);
}

RingSession::~RingSession() {
  {
    const MutexLock lock(service_->mutex_);
    service_->rings_.erase(this);
  }
  owned_.Release(&service_->handlers_);
  service_->handlers_.EndPlaces(&places_);
  CallReport report;
  report.method = "Session";
  report.way = way();
  report.SetStatus(end_);
  report.duration = absl::Now() - opened_;
  report.caller = connection_->name;
  const std::string name = Name();
  report.request_id = name;
  report.tenant = (*connection_->identity)->tenant;
  service_->Report(report, connection_->client.get());
}

std::string RingSession::Name() const { return absl::StrCat("ring/", connection_->number & 0xffffffff); }

// With the first attention: clients that never attend need no memory of the host for it, and wait for
// nothing.
void RingSession::PinTensors(const v1::SessionRequest& request) {
  if (asked_to_pin_ || (!request.has_attend() && !request.has_append_attend())) return;
  asked_to_pin_ = true;
  if (service_->options_.pin) pinned_ = service_->options_.pin(tensors_.base(), tensors_.bytes());
}

absl::Status RingSession::Run(const v1::SessionRequest& request, absl::Duration timeout,
                              v1::SessionResponse* answer, const char** method, SequenceId* sequence) {
  if (cancellation_.cancelled()) return absl::CancelledError("the client has gone");
  const Verb* const verb = FindVerb(static_cast<int>(request.call_case()));
  if (verb == nullptr)
    return absl::InvalidArgumentError("the session request carries no call that this version knows");
  *method = verb->method;
  if (absl::Status status = service_->CheckNotDraining(); !status.ok()) return status;
  PinTensors(request);
  bulk_.store(service_->IsBulk(verb), std::memory_order_relaxed);
  MemoryBudget::Hold hold(&service_->memory_, &connection_->memory);
  Call call;
  call.context.caller = connection_->name;
  call.context.identity = connection_->identity->get();
  call.context.request_id = connection_->number + number_;
  if (timeout != absl::InfiniteDuration()) call.context.deadline = absl::Now() + timeout;
  call.context.cancellation = &cancellation_;
  call.memory = &hold;
  call.tensors = &tensors_;
  call.steps = owned_.steps();
  call.maps_pool = maps_pool_;
  if (places_.tier() >= 0) call.places = &places_;
  call.max_answer_bytes = max_answer_bytes_;
  KVTIDE_ASSIGN_OR_RETURN(const bool counted, service_->BeginCall(call.context.tenant()));
  const absl::Cleanup count = [&, counted] {
    if (counted) service_->EndCall(call.context.tenant());
  };
  const auto serve = [&] {
    const LockedTime locked(&locked_);
    return ServeMessage(&service_->handlers_, request, call, answer, sequence);
  };
  WorkerPool& lane = service_->IsBulk(verb) ? service_->bulk_ : service_->prompt_;
  absl::Status status;
  // A small attention takes no longer than handing it over: who waits in the queue waits no longer for it.
  const auto serve_briefly = [&] {
    if (!verb->may_be_brief || !lane.EnterBriefly()) return false;
    bool declined = false;
    call.declined = &declined;
    status = serve();
    call.declined = nullptr;
    lane.LeaveBriefly();
    if (!declined) return true;
    answer->Clear();
    hold.Drop(hold.bytes());  // what was kept for answers
    return false;
  };
  if (lane.Enter()) {
    status = serve();
    lane.Leave();
  } else if (!serve_briefly()) {
    const absl::Time queued = absl::Now();
    Turn turn([&, queued] {
      waited_ = absl::Now() - queued;
      return serve();
    });
    lane.Submit({std::hash<std::string>()(call.context.tenant()), connection_->number}, &turn);
    status = turn.Wait();
  }
  bulk_.store(false, std::memory_order_relaxed);
  if (!status.ok()) return status;
  owned_.Note(request, *answer);
  return status;
}

void RingSession::Serve(const std::string& bytes, absl::Duration timeout, v1::SessionResponse* answer) {
  ServiceGauges& gauges = *service_->options_.gauges;
  gauges.calls_under_way++;
  number_++;
  waited_ = locked_ = absl::ZeroDuration();
  const absl::Time start = absl::Now();
  alignas(16) char block[4096];
  google::protobuf::ArenaOptions options;
  options.initial_block = block;
  options.initial_block_size = sizeof(block);
  google::protobuf::Arena arena(options);
  auto* const request = google::protobuf::Arena::CreateMessage<v1::SessionRequest>(&arena);
  const char* method = "Session";
  SequenceId sequence = 0;
  absl::Status status;
  if (!request->ParseFromString(bytes)) {
    status = absl::InvalidArgumentError(
        "the request is no kvtide.v1.SessionRequest: the message is malformed or cut off, or one of its "
        "texts "
        "is not UTF-8");
  } else {
    status = Run(*request, timeout, answer, &method, &sequence);
  }
  const auto answer_bytes = status.ok() ? static_cast<int64_t>(answer->ByteSizeLong()) : 0;
  if (answer_bytes > max_answer_bytes_) {
    status = Refused(Refusal::kTooLarge, absl::ResourceExhaustedError(absl::StrCat(
                                             "the answer has ", answer_bytes, " bytes, the ring holds ",
                                             max_answer_bytes_, "; ask for less at once")));
  }
  const std::string name =
      IsRequestId(request->x_request_id()) ? request->x_request_id() : absl::StrCat(Name(), "/", number_);
  if (!status.ok()) {
    answer->Clear();
    ToProto(status, name, answer->mutable_error());
  }
  CallReport report;
  report.method = method;
  report.way = way();
  report.SetStatus(status);
  report.duration = absl::Now() - start;
  report.request_bytes = static_cast<int64_t>(bytes.size());
  report.response_bytes = status.ok() ? answer_bytes : 0;
  report.waited = waited_;
  report.locked = locked_;
  report.request_id = name;
  report.trace = TraceIdOf(request->traceparent());
  report.caller = connection_->name;
  report.tenant = (*connection_->identity)->tenant;
  report.sequence = sequence;
  service_->Report(report, connection_->client.get());
  gauges.calls_under_way--;
}

}  // namespace kvtide::service
