#include "daemon/service/verbs.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "google/protobuf/arena.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::service {
namespace {

// The messages of a call; the first of them need no allocation.
class Messages {
 public:
  template <class Message>
  Message* New() {
    return google::protobuf::Arena::CreateMessage<Message>(&arena_);
  }

 private:
  static google::protobuf::ArenaOptions Options(char* block, size_t size) {
    google::protobuf::ArenaOptions options;
    options.initial_block = block;
    options.initial_block_size = size;
    return options;
  }
  alignas(16) char block_[4096];
  google::protobuf::Arena arena_{Options(block_, sizeof(block_))};
};

// Reads a message and gives its bytes back. What is only malformed and what has a text that is not UTF-8
// cannot be told apart.
template <class Message>
absl::Status Read(grpc::ByteBuffer* bytes, const Call& call, Message* message) {
  const auto size = static_cast<int64_t>(bytes->Length());
  bool good = false;
  {
    grpc::ProtoBufferReader reader(bytes);
    good = reader.status().ok() && message->ParseFromZeroCopyStream(&reader);
  }
  bytes->Clear();
  if (call.memory != nullptr) call.memory->Drop(size);
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the request is no ", Message::descriptor()->full_name(),
                   ": the message is malformed or cut off, or one of its texts is not UTF-8"));
}

template <class Message>
void Write(const Message& message, grpc::ByteBuffer* bytes) {
  bool own = false;
  const grpc::Status status = grpc::SerializationTraits<Message>::Serialize(message, bytes, &own);
  KVTIDE_CHECK(status.ok(), status.error_message());
}

// The first sequence that a request names; 0 = none.
template <class Request>
SequenceId SequenceOf(const Request& request) {
  if constexpr (requires { request.sequence_id(); }) {
    return request.sequence_id();
  } else if constexpr (requires { request.sequence_ids(0); }) {
    return request.sequence_ids_size() > 0 ? request.sequence_ids(0) : 0;
  } else if constexpr (requires { request.items(0).sequence_id(); }) {
    return request.items_size() > 0 ? request.items(0).sequence_id() : 0;
  } else {
    return 0;
  }
}

template <class Request, class Answer>
using Handler = absl::Status (Handlers::*)(const Request&, Answer*, const Call&);

template <class Request, class Answer, Handler<Request, Answer> kHandler>
absl::Status Serve(Handlers* handlers, grpc::ByteBuffer* bytes, const Call& call,
                   grpc::ByteBuffer* answer_bytes, SequenceId* sequence) {
  Messages messages;
  auto* request = messages.New<Request>();
  KVTIDE_RETURN_IF_ERROR(Read(bytes, call, request));
  *sequence = SequenceOf(*request);
  auto* answer = messages.New<Answer>();
  KVTIDE_RETURN_IF_ERROR((handlers->*kHandler)(*request, answer, call));
  Write(*answer, answer_bytes);
  return absl::OkStatus();
}

#define KVTIDE_VERB(Method, lane, may_be_brief)                                    \
  {                                                                                \
#Method, Lane::lane, v1::SessionRequest::k##Method##FieldNumber, may_be_brief, \
        Serve < v1::Method##Request, v1::Method##Response, &Handlers::Method>      \
  }
constexpr Verb kVerbs[] = {
    KVTIDE_VERB(AppendAttend, kPrompt, true),
    KVTIDE_VERB(Append, kPrompt, false),
    KVTIDE_VERB(Attend, kPrompt, true),
    KVTIDE_VERB(GetServerInfo, kPrompt, false),
    KVTIDE_VERB(UnregisterModel, kPrompt, false),
    KVTIDE_VERB(RegisterModel, kPrompt, false),
    KVTIDE_VERB(CreateSequence, kPrompt, false),
    KVTIDE_VERB(LookupPrefix, kLookup, false),
    KVTIDE_VERB(ForkSequence, kPrompt, false),
    KVTIDE_VERB(TruncateSequence, kPrompt, false),
    KVTIDE_VERB(CloseSequence, kPrompt, false),
    KVTIDE_VERB(ListSequences, kPrompt, false),
    KVTIDE_VERB(GetStats, kPrompt, false),
    KVTIDE_VERB(PinSequences, kPrompt, false),
    KVTIDE_VERB(SetPriority, kPrompt, false),
    KVTIDE_VERB(GetConfig, kPrompt, false),
    KVTIDE_VERB(ReloadConfig, kBulk, false),
    KVTIDE_VERB(ReadTokens, kBulk, false),
    KVTIDE_VERB(EvictSequences, kBulk, false),
    KVTIDE_VERB(PrefetchSequences, kBulk, false),
    KVTIDE_VERB(PersistSequences, kBulk, false),
    KVTIDE_VERB(Plan, kBulk, false),
    KVTIDE_VERB(OpenNamespace, kPrompt, false),
    KVTIDE_VERB(StoreBlocks, kBulk, false),
    KVTIDE_VERB(LookupBlocks, kLookup, false),
    KVTIDE_VERB(LoadBlocks, kBulk, false),
    KVTIDE_VERB(ReleaseLease, kPrompt, false),
    KVTIDE_VERB(DeleteNamespace, kBulk, false),
    KVTIDE_VERB(PersistNamespace, kBulk, false),
    KVTIDE_VERB(ListNamespaces, kPrompt, false),
    KVTIDE_VERB(BeginStep, kPrompt, false),
    KVTIDE_VERB(EndStep, kPrompt, false),
    KVTIDE_VERB(GetStepProfile, kPrompt, false),
    KVTIDE_VERB(PinStep, kPrompt, false),
    KVTIDE_VERB(StartCalibration, kPrompt, false),
    KVTIDE_VERB(StopCalibration, kPrompt, false),
    KVTIDE_VERB(ListCalibrations, kPrompt, false),
    KVTIDE_VERB(ExportProfile, kBulk, false),
    KVTIDE_VERB(InstallProfile, kBulk, false),
};
#undef KVTIDE_VERB

}  // namespace

absl::Status ServeMessage(Handlers* handlers, const v1::SessionRequest& request, const Call& call,
                          v1::SessionResponse* answer, SequenceId* sequence) {
  using Case = v1::SessionRequest::CallCase;
#define KVTIDE_SESSION_VERB(Method, field)   \
  case Case::k##Method:                      \
    *sequence = SequenceOf(request.field()); \
    return handlers->Method(request.field(), answer->mutable_##field(), call);
  switch (request.call_case()) {
    KVTIDE_SESSION_VERB(RegisterModel, register_model)
    KVTIDE_SESSION_VERB(UnregisterModel, unregister_model)
    KVTIDE_SESSION_VERB(CreateSequence, create_sequence)
    KVTIDE_SESSION_VERB(LookupPrefix, lookup_prefix)
    KVTIDE_SESSION_VERB(ForkSequence, fork_sequence)
    KVTIDE_SESSION_VERB(TruncateSequence, truncate_sequence)
    KVTIDE_SESSION_VERB(CloseSequence, close_sequence)
    KVTIDE_SESSION_VERB(Append, append)
    KVTIDE_SESSION_VERB(Attend, attend)
    KVTIDE_SESSION_VERB(AppendAttend, append_attend)
    KVTIDE_SESSION_VERB(ReadTokens, read_tokens)
    KVTIDE_SESSION_VERB(EvictSequences, evict_sequences)
    KVTIDE_SESSION_VERB(PrefetchSequences, prefetch_sequences)
    KVTIDE_SESSION_VERB(PersistSequences, persist_sequences)
    KVTIDE_SESSION_VERB(ListSequences, list_sequences)
    KVTIDE_SESSION_VERB(GetStats, get_stats)
    KVTIDE_SESSION_VERB(GetServerInfo, get_server_info)
    KVTIDE_SESSION_VERB(PinSequences, pin_sequences)
    KVTIDE_SESSION_VERB(SetPriority, set_priority)
    KVTIDE_SESSION_VERB(GetConfig, get_config)
    KVTIDE_SESSION_VERB(ReloadConfig, reload_config)
    KVTIDE_SESSION_VERB(Plan, plan)
    KVTIDE_SESSION_VERB(OpenNamespace, open_namespace)
    KVTIDE_SESSION_VERB(StoreBlocks, store_blocks)
    KVTIDE_SESSION_VERB(LookupBlocks, lookup_blocks)
    KVTIDE_SESSION_VERB(LoadBlocks, load_blocks)
    KVTIDE_SESSION_VERB(ReleaseLease, release_lease)
    KVTIDE_SESSION_VERB(DeleteNamespace, delete_namespace)
    KVTIDE_SESSION_VERB(PersistNamespace, persist_namespace)
    KVTIDE_SESSION_VERB(ListNamespaces, list_namespaces)
    KVTIDE_SESSION_VERB(BeginStep, begin_step)
    KVTIDE_SESSION_VERB(EndStep, end_step)
    KVTIDE_SESSION_VERB(GetStepProfile, get_step_profile)
    KVTIDE_SESSION_VERB(PinStep, pin_step)
    KVTIDE_SESSION_VERB(StartCalibration, start_calibration)
    KVTIDE_SESSION_VERB(StopCalibration, stop_calibration)
    KVTIDE_SESSION_VERB(ListCalibrations, list_calibrations)
    KVTIDE_SESSION_VERB(ExportProfile, export_profile)
    KVTIDE_SESSION_VERB(InstallProfile, install_profile)
    case Case::CALL_NOT_SET:
      break;
  }
#undef KVTIDE_SESSION_VERB
  return absl::InvalidArgumentError("the session request carries no call that this version knows");
}

const Verb* FindVerb(absl::string_view path) {
  if (!absl::ConsumePrefix(&path, "/kvtide.v1.KvCacheService/")) return nullptr;
  for (const Verb& verb : kVerbs) {
    if (path == verb.method) return &verb;
  }
  return nullptr;
}

const Verb* FindVerb(int session_field) {
  for (const Verb& verb : kVerbs) {
    if (session_field == verb.session_field) return &verb;
  }
  return nullptr;
}

SessionHead ReadSessionHead(const grpc::ByteBuffer& request) {
  using google::protobuf::internal::WireFormatLite;
  using Request = v1::SessionRequest;
  // As everybody writes them there are no more than these four. The thread looks after sockets: it does not
  // walk through a message of millions.
  constexpr int kMostFields = 8;
  constexpr uint32_t kMostText = 256;
  SessionHead head;
  // The reader borrows what it does not change.
  grpc::ProtoBufferReader reader(const_cast<grpc::ByteBuffer*>(&request));
  if (!reader.status().ok()) return head;
  google::protobuf::io::CodedInputStream stream(&reader);
  for (int i = 0; i < kMostFields; i++) {
    const uint32_t tag = stream.ReadTag();
    if (tag == 0) break;
    const int field = WireFormatLite::GetTagFieldNumber(tag);
    const auto type = WireFormatLite::GetTagWireType(tag);
    bool read = false;
    if (field == Request::kRequestIdFieldNumber && type == WireFormatLite::WIRETYPE_VARINT) {
      read = stream.ReadVarint64(&head.request_id);
    } else if (type == WireFormatLite::WIRETYPE_LENGTH_DELIMITED &&
               (field == Request::kXRequestIdFieldNumber || field == Request::kTraceparentFieldNumber)) {
      std::string* const text =
          field == Request::kXRequestIdFieldNumber ? &head.x_request_id : &head.traceparent;
      uint32_t bytes = 0;
      read = stream.ReadVarint32(&bytes) &&
             (bytes <= kMostText ? stream.ReadString(text, static_cast<int>(bytes))
                                 : stream.Skip(static_cast<int>(bytes)));
    } else if (type != WireFormatLite::WIRETYPE_START_GROUP) {
      if (const Verb* const verb = FindVerb(field); verb != nullptr) head.verb = verb;
      read = WireFormatLite::SkipField(&stream, tag);
    }
    if (!read) break;
  }
  return head;
}

absl::Status ServeSessionRequest(Handlers* handlers, const Verb* verb, grpc::ByteBuffer* bytes,
                                 const Call& call, grpc::ByteBuffer* answer_bytes, SequenceId* sequence,
                                 SessionOwned* owned) {
  Messages messages;
  auto* request = messages.New<v1::SessionRequest>();
  auto* answer = messages.New<v1::SessionResponse>();
  absl::Status status = Read(bytes, call, request);
  Call of_session = call;
  of_session.steps = owned->steps();
  // It has waited in the lane of `verb`, and is no other one.
  if (status.ok() && verb != nullptr && verb != FindVerb(static_cast<int>(request->call_case())))
    status = absl::InvalidArgumentError("the session request carries more than one call");
  if (status.ok()) status = ServeMessage(handlers, *request, of_session, answer, sequence);
  if (!status.ok()) return status;
  owned->Note(*request, *answer);
  answer->set_request_id(request->request_id());
  Write(*answer, answer_bytes);
  return absl::OkStatus();
}

void SessionOwned::Note(const v1::SessionRequest& request, const v1::SessionResponse& answer) {
  if (answer.has_create_sequence()) sequences_.insert(answer.create_sequence().sequence_id());
  if (answer.has_fork_sequence()) sequences_.insert(answer.fork_sequence().sequence_id());
  if (request.has_close_sequence()) {
    sequences_.erase(request.close_sequence().sequence_id());
    steps_.Forget(request.close_sequence().sequence_id());
  }
  if (answer.lookup_blocks().lease_id() != 0) leases_.insert(answer.lookup_blocks().lease_id());
  if (answer.lookup_prefix().lease_id() != 0) leases_.insert(answer.lookup_prefix().lease_id());
  if (answer.has_create_sequence()) leases_.erase(request.create_sequence().prefix_lease());
  if (request.has_release_lease()) leases_.erase(request.release_lease().lease_id());
}

void SessionOwned::Release(Handlers* handlers) {
  steps_.RollBackAll();
  for (const SequenceId sequence : sequences_) handlers->Release(sequence);
  for (const LeaseId lease : leases_) handlers->EndLease(lease);
  sequences_.clear();
  leases_.clear();
}

void ToProto(const absl::Status& status, absl::string_view name, v1::SessionError* error) {
  const grpc::Status wire = ToGrpc(status);
  error->set_code(wire.error_code());
  error->set_message(wire.error_message());
  error->set_x_request_id(name.data(), name.size());
}

void AnswerSessionError(uint64_t request_id, const absl::Status& status, absl::string_view name,
                        grpc::ByteBuffer* bytes) {
  v1::SessionResponse answer;
  answer.set_request_id(request_id);
  ToProto(status, name, answer.mutable_error());
  Write(answer, bytes);
}

}  // namespace kvtide::service
