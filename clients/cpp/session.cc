#include "clients/cpp/session.h"

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/call_trace_impl.h"
#include "clients/cpp/convert.h"
#include "kernels/base/status.h"

namespace kvtide::client {

absl::StatusOr<std::unique_ptr<Session>> Session::Start(v1::KvCacheService::Stub* stub,
                                                        absl::Duration timeout, TokenFile* token) {
  std::unique_ptr<Session> session(new Session(timeout));
  const MutexLock lock(session->mutex_);
  if (token != nullptr) token->AddTo(&session->context_);
  session->stream_ = stub->AsyncSession(&session->context_, &session->queue_, session.get());
  KVTIDE_RETURN_IF_ERROR(Annotate(session->Wait(absl::Now() + timeout), "session"));
  return session;
}

Session::~Session() {
  context_.TryCancel();
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

absl::Status Session::Wait(absl::Time deadline) {
  void* tag = nullptr;
  bool ok = false;
  switch (queue_.AsyncNext(&tag, &ok, absl::ToChronoTime(deadline))) {
    case grpc::CompletionQueue::GOT_EVENT:
      if (ok) return absl::OkStatus();
      Break();
      return absl::UnavailableError("the session with kvtided is lost; what it created is closed");
    case grpc::CompletionQueue::TIMEOUT:
      Break();
      return absl::DeadlineExceededError(
          absl::StrCat("no answer within ", absl::FormatDuration(timeout_), "; the session is given up"));
    case grpc::CompletionQueue::SHUTDOWN:
      break;
  }
  return absl::InternalError("the session's queue is shut down");
}

void Session::Break() {
  broken_ = true;
  context_.TryCancel();
}

absl::Status Session::Call(v1::SessionRequest* request, v1::SessionResponse* response) {
  const MutexLock lock(mutex_);
  if (broken_) return absl::UnavailableError("the session with kvtided is lost; connect again");
  const absl::Time deadline = absl::Now() + timeout_;
  request->set_request_id(++last_request_);
  AddTrace(request);
  stream_->Write(*request, this);
  KVTIDE_RETURN_IF_ERROR(Wait(deadline));
  // Broken sessions keep `response` in use by gRPC until the queue is drained, so the read goes through a
  // member.
  stream_->Read(&response_, this);
  KVTIDE_RETURN_IF_ERROR(Wait(deadline));
  response->Swap(&response_);
  if (response->request_id() != last_request_) {
    Break();
    return absl::InternalError("kvtided answered another request of the session");
  }
  if (response->has_error()) return FromProto(response->error());
  if (response->result_case() == v1::SessionResponse::RESULT_NOT_SET) {
    return absl::InternalError("kvtided sent an empty answer on the session");
  }
  return absl::OkStatus();
}

}  // namespace kvtide::client
