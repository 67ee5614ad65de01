// The verbs by name: where each is served, and how one is served from the bytes of a request to those of an
// answer. Requests and answers live in an arena for as long as that takes.
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "daemon/service/call.h"
#include "daemon/service/handlers.h"
#include "daemon/service/open_steps.h"
#include "grpcpp/support/byte_buffer.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::service {

// Which threads serve a verb: those for calls that engines wait for, or the few for calls that may take long,
// so that no number of these keeps the others waiting.
// Lookups are of the second kind where they may ask a remote tier.
enum class Lane { kPrompt, kBulk, kLookup };

struct Verb {
  const char* method;  // "Append"
  Lane lane;
  int session_field;  // of SessionRequest
  bool may_be_brief;  // its handler looks at Call::declined
  // Serves a request, which is cleared once it is read. `sequence` gets the first sequence that it names. An
  // OK status comes with an answer.
  absl::Status (*serve)(Handlers* handlers, grpc::ByteBuffer* request, const Call& call,
                        grpc::ByteBuffer* answer, SequenceId* sequence);
};

// By the path of a call, "/kvtide.v1.KvCacheService/Append"; null if there is none.
const Verb* FindVerb(absl::string_view path);
// By the field of a SessionRequest that carries it.
const Verb* FindVerb(int session_field);

// What stands around the call of a session request, found without reading the call.
struct SessionHead {
  const Verb* verb = nullptr;  // null: none that is known was found
  uint64_t request_id = 0;
  std::string x_request_id, traceparent;  // as they were sent
};
SessionHead ReadSessionHead(const grpc::ByteBuffer& request);

// Serves the call of a session request, which stays the caller's. The answer has no request id.
absl::Status ServeMessage(Handlers* handlers, const v1::SessionRequest& request, const Call& call,
                          v1::SessionResponse* answer, SequenceId* sequence);

// What was made on a session and ends with it: sequences, leases and steps.
class SessionOwned {
 public:
  // A call of the session went well.
  void Note(const v1::SessionRequest& request, const v1::SessionResponse& answer);
  void Release(Handlers* handlers);
  OpenSteps* steps() { return &steps_; }

 private:
  absl::flat_hash_set<SequenceId> sequences_;
  absl::flat_hash_set<LeaseId> leases_;  // some may be over
  OpenSteps steps_;
};

// Serves one request of a session, as Verb::serve; `verb` is that of its head. There is no answer to one that
// went wrong.
absl::Status ServeSessionRequest(Handlers* handlers, const Verb* verb, grpc::ByteBuffer* request,
                                 const Call& call, grpc::ByteBuffer* answer, SequenceId* sequence,
                                 SessionOwned* owned);

// What a client is told of a call of a session that went wrong; `name` is what the log has.
void ToProto(const absl::Status& status, absl::string_view name, v1::SessionError* error);
// The answer to one, by the request_id of its request.
void AnswerSessionError(uint64_t request_id, const absl::Status& status, absl::string_view name,
                        grpc::ByteBuffer* answer);

}  // namespace kvtide::service
