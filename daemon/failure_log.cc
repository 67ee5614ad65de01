#include "daemon/failure_log.h"

#include <algorithm>
#include <cctype>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvtide {
namespace {

constexpr double kBurst = 10, kPerSecond = 1;

const char* LevelOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return "error";
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      return "warning";
    default:
      return "info";
  }
}

}  // namespace

bool RateLimit::Pass(absl::Time now, int64_t* suppressed) {
  if (last_ != absl::InfinitePast())
    left_ = std::min(burst_, left_ + per_second_ * std::max(0.0, absl::ToDoubleSeconds(now - last_)));
  last_ = now;
  if (left_ < 1) {
    suppressed_++;
    return false;
  }
  left_ -= 1;
  *suppressed = std::exchange(suppressed_, 0);
  return true;
}

std::string Escaped(std::string_view text, size_t most) {
  std::string out;
  for (const char c : text.substr(0, most)) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (c == '\n') {
      out += "\\n";
    } else if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppend(&out, "\\x", absl::Hex(byte, absl::kZeroPad2));
    } else {
      out += c;
    }
  }
  if (text.size() > most) out += "...";
  return out;
}

void FailureLog::SetSlow(absl::Duration slow) {
  const MutexLock lock(mutex_);
  slow_ = slow;
}

void FailureLog::Add(const service::CallReport& call, absl::Time now) {
  int64_t suppressed = 0;
  bool slow = false;
  {
    const MutexLock lock(mutex_);
    slow = call.duration > slow_ && std::string_view(call.method) != "Session";
    if (call.code == 0 && !slow) return;
    const auto entry = limits_.try_emplace({call.method, call.code}, kBurst, kPerSecond).first;
    if (!entry->second.Pass(now, &suppressed)) return;
  }
  const auto code = static_cast<absl::StatusCode>(call.code);
  std::string line = absl::StrCat(call.code != 0 ? "call failed" : "slow call", " method=", call.method,
                                  " code=", absl::StatusCodeToString(code));
  if (call.sequence != 0) absl::StrAppend(&line, " sequence=", call.sequence);
  if (!call.request_id.empty()) absl::StrAppend(&line, " request=", Escaped(call.request_id));
  absl::StrAppend(&line, " caller=", Escaped(call.caller));
  absl::StrAppend(&line, " way=", service::NameOf(call.way));
  if (!call.tenant.empty()) absl::StrAppend(&line, " tenant=", Escaped(call.tenant));
  if (!call.trace.empty()) absl::StrAppend(&line, " trace=", Escaped(call.trace));
  absl::StrAppend(&line, " us=", absl::ToInt64Microseconds(call.duration));
  if (slow)
    absl::StrAppend(&line, " received_us=", absl::ToInt64Microseconds(call.received),
                    " waited_us=", absl::ToInt64Microseconds(call.waited),
                    " served_us=", absl::ToInt64Microseconds(call.duration - call.received - call.waited),
                    " locked_us=", absl::ToInt64Microseconds(call.locked),
                    " request_bytes=", call.request_bytes, " response_bytes=", call.response_bytes);
  if (call.refusal.has_value()) absl::StrAppend(&line, " reason=", NameOf(*call.refusal));
  if (call.code != 0) absl::StrAppend(&line, " message=\"", Escaped(call.message), "\"");
  if (suppressed > 0) absl::StrAppend(&line, " suppressed=", suppressed);
  write_(call.code == 0 ? "warning" : LevelOf(code), line);
}

}  // namespace kvtide
