#include "daemon/service/session_verbs.h"

namespace kvtide::service {

absl::Status HandleSessionRequest(Handlers* handlers, const v1::SessionRequest& request,
                                  v1::SessionResponse* response, const Cancelled& cancelled,
                                  const char** method) {
  using Call = v1::SessionRequest::CallCase;
#define KVTIDE_SESSION_VERB(Method, field) \
  case Call::k##Method:                    \
    *method = #Method;                     \
    return handlers->Method(request.field(), response->mutable_##field(), cancelled);
  switch (request.call_case()) {
    KVTIDE_SESSION_VERB(RegisterModel, register_model)
    KVTIDE_SESSION_VERB(CreateSequence, create_sequence)
    KVTIDE_SESSION_VERB(ForkSequence, fork_sequence)
    KVTIDE_SESSION_VERB(TruncateSequence, truncate_sequence)
    KVTIDE_SESSION_VERB(CloseSequence, close_sequence)
    KVTIDE_SESSION_VERB(Append, append)
    KVTIDE_SESSION_VERB(Attend, attend)
    KVTIDE_SESSION_VERB(AppendAttend, append_attend)
    KVTIDE_SESSION_VERB(EvictSequences, evict_sequences)
    KVTIDE_SESSION_VERB(PrefetchSequences, prefetch_sequences)
    KVTIDE_SESSION_VERB(ListSequences, list_sequences)
    KVTIDE_SESSION_VERB(GetStats, get_stats)
    KVTIDE_SESSION_VERB(GetServerInfo, get_server_info)
    KVTIDE_SESSION_VERB(Plan, plan)
    case Call::CALL_NOT_SET:
      break;
  }
#undef KVTIDE_SESSION_VERB
  return absl::InvalidArgumentError("the session request carries no call that this version knows");
}

}  // namespace kvtide::service
