// Why a call is refused: nothing has changed, because of what it asks, who asks, or what there is room for.
// Where several reasons have one code the status carries its own, for those who count; clients are not told
// of it. What fails in the daemon (DATA_LOSS, INTERNAL) and what a client gives up is no refusal.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "kernels/base/status.h"

namespace kvtide {

enum class Refusal {
  kUnauthenticated,  // nobody: no token, an unknown or expired one, no certificate
  kPermission,       // somebody who may not
  kOtherTenant,      // names what is another tenant's; the caller is told that it is not there
  kQuota,            // the tenant has as much as it may
  kLimit,            // all together have: sequences, models, tokens of a sequence, leases, open steps
  kNoRoom,           // in the tiers
  kQueueFull,        // all threads are busy, and as many calls wait as may
  kCallMemory,       // for requests and answers of calls under way
  kTooLarge,         // the answer, or the work of the call
  kNotReceived,      // its request is larger than a message may be, or compressed, or its client took it back
  kSlowClient,       // its request took too long to come, or nobody took its answer
  kInvalidArgument,  // malformed, or a value that cannot be
  kNotFound,         // what it names is not there
  kConflict,         // it does not fit what is there: its position, a name that is taken, something open
  kDeadline,         // had passed before it was done
  kShuttingDown,     // the daemon
  kUnavailable,      // a device or tier that it needs
  kUnimplemented,    // a method that this version does not have
};
constexpr size_t kRefusals = 18;
constexpr std::array<const char*, kRefusals> kRefusalNames = {
    "unauthenticated", "permission",  "other_tenant", "quota",         "limit",       "no_room",
    "queue_full",      "call_memory", "too_large",    "not_received",  "slow_client", "invalid_argument",
    "not_found",       "conflict",    "deadline",     "shutting_down", "unavailable", "unimplemented"};
constexpr const char* NameOf(Refusal why) { return kRefusalNames[static_cast<size_t>(why)]; }

constexpr char kRefusalPayload[] = "kvtide/refusal";

// The status, which knows why from now on.
inline absl::Status Refused(Refusal why, absl::Status status) {
  status.SetPayload(kRefusalPayload, absl::Cord(std::string(1, static_cast<char>(why))));
  return status;
}

// As Annotate, and the status still knows why.
inline absl::Status AnnotateRefused(const absl::Status& status, const std::string& phrase) {
  absl::Status annotated = Annotate(status, phrase);
  if (const auto why = status.GetPayload(kRefusalPayload); why.has_value())
    annotated.SetPayload(kRefusalPayload, *why);
  return annotated;
}

// By what the status knows, else by its code; none: the call went well, failed, or was given up.
inline std::optional<Refusal> RefusalOf(const absl::Status& status) {
  if (status.ok()) return std::nullopt;
  if (const auto why = status.GetPayload(kRefusalPayload); why.has_value())
    return static_cast<Refusal>(std::string(*why).at(0));
  switch (status.code()) {
    case absl::StatusCode::kUnauthenticated:
      return Refusal::kUnauthenticated;
    case absl::StatusCode::kPermissionDenied:
      return Refusal::kPermission;
    case absl::StatusCode::kResourceExhausted:
      return Refusal::kNoRoom;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return Refusal::kInvalidArgument;
    case absl::StatusCode::kNotFound:
      return Refusal::kNotFound;
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kAborted:
      return Refusal::kConflict;
    case absl::StatusCode::kDeadlineExceeded:
      return Refusal::kDeadline;
    case absl::StatusCode::kUnavailable:
      return Refusal::kUnavailable;
    case absl::StatusCode::kUnimplemented:
      return Refusal::kUnimplemented;
    default:
      return std::nullopt;
  }
}

}  // namespace kvtide
