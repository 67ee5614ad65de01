// What the calls of a thread are called in the daemon's log: the id of the program's own request that they
// are made for, and the W3C trace that this belongs to. It goes with every call by every way, gRPC and shared
// memory; the daemon's lines about calls that failed or were slow have both.
//
//   const client::TraceCalls trace({.request_id = "chat-17", .traceparent = span.traceparent()});
//   pool->AppendAttend(...);
//   if (!status.ok()) LOG(ERROR) << status << " request=" << client::RequestIdOf(status);
#pragma once

#include <string>

#include "absl/status/status.h"

namespace kvtide::client {

// A text that is empty or not well formed is not sent.
struct CallTrace {
  std::string request_id;   // 1 to 128 letters, digits and -_.:/+=; empty: the daemon makes one for each call
  std::string traceparent;  // "00-TRACE-PARENT-FLAGS"
};

// The calls of this thread have it for as long as this lives, which begins and ends in one thread; of those
// that live at the same time the last one counts.
class TraceCalls {
 public:
  explicit TraceCalls(CallTrace trace);
  ~TraceCalls();
  TraceCalls(const TraceCalls&) = delete;
  TraceCalls& operator=(const TraceCalls&) = delete;

  // Of this thread; empty texts where there is none.
  static const CallTrace& Current();

 private:
  CallTrace before_;
};

// What the call that failed with this status is called in the daemon's log; empty where the daemon has not
// answered.
std::string RequestIdOf(const absl::Status& status);

}  // namespace kvtide::client
