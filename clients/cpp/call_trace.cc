#include "clients/cpp/call_trace.h"

#include <utility>

#include "absl/strings/cord.h"
#include "clients/cpp/call_trace_impl.h"
#include "proto/call_trace.h"

namespace kvtide::client {
namespace {

constexpr char kPayload[] = "kvtide/request-id";

CallTrace& OfThisThread() {
  thread_local CallTrace trace;
  return trace;
}

}  // namespace

TraceCalls::TraceCalls(CallTrace trace) : before_(std::exchange(OfThisThread(), std::move(trace))) {}
TraceCalls::~TraceCalls() { OfThisThread() = std::move(before_); }
const CallTrace& TraceCalls::Current() { return OfThisThread(); }

std::string RequestIdOf(const absl::Status& status) {
  const auto id = status.GetPayload(kPayload);
  return id.has_value() ? std::string(*id) : "";
}

absl::Status WithRequestId(absl::Status status, std::string_view id) {
  if (!status.ok() && IsRequestId(id)) status.SetPayload(kPayload, absl::Cord(std::string(id)));
  return status;
}

void AddTrace(grpc::ClientContext* context) {
  const CallTrace& trace = TraceCalls::Current();
  if (IsRequestId(trace.request_id)) context->AddMetadata(kRequestIdKey, trace.request_id);
  if (!TraceIdOf(trace.traceparent).empty()) context->AddMetadata(kTraceparentKey, trace.traceparent);
}

void AddTrace(v1::SessionRequest* request) {
  const CallTrace& trace = TraceCalls::Current();
  if (IsRequestId(trace.request_id)) request->set_x_request_id(trace.request_id);
  if (!TraceIdOf(trace.traceparent).empty()) request->set_traceparent(trace.traceparent);
}

absl::Status FromProto(const v1::SessionError& error) {
  return WithRequestId(absl::Status(static_cast<absl::StatusCode>(error.code()), error.message()),
                       error.x_request_id());
}

}  // namespace kvtide::client
