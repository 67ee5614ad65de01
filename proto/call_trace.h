// The texts by which a call is found in the logs of both ends: an id of the client's request, and the trace
// of W3C that it belongs to. The same rules for all ways: what is not well formed is as if it were not there,
// since it could break a line of a log, or gRPC would refuse to carry it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace kvtide {

// Metadata of gRPC.
constexpr char kRequestIdKey[] = "x-request-id";
constexpr char kTraceparentKey[] = "traceparent";

// 1 to 128 letters, digits and what ids are written with.
inline bool IsRequestId(std::string_view id) {
  constexpr size_t kLongest = 128;
  return !id.empty() && id.size() <= kLongest && std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("-_.:/+=").find(c) != std::string_view::npos;
  });
}

// The trace id of a traceparent, 32 hexadecimal digits within it; empty where it is none. Versions that are
// yet to come may have more behind the flags.
inline std::string_view TraceIdOf(std::string_view traceparent) {
  // 00-32 digits-16 digits-2 digits, all of them small hexadecimal ones.
  constexpr size_t kBytes = 55, kTrace = 3, kTraceDigits = 32, kParent = 36, kParentDigits = 16;
  if (traceparent.size() < kBytes) return {};
  for (size_t i = 0; i < kBytes; i++) {
    const char c = traceparent[i];
    const bool dash = i == 2 || i == kParent - 1 || i == kParent + kParentDigits;
    if (dash ? c != '-' : !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return {};
  }
  const std::string_view version = traceparent.substr(0, 2);
  if (version == "ff") return {};
  if (traceparent.size() > kBytes && (version == "00" || traceparent[kBytes] != '-')) return {};
  const auto zeros = [&](size_t at, size_t count) {
    return traceparent.substr(at, count).find_first_not_of('0') == std::string_view::npos;
  };
  if (zeros(kTrace, kTraceDigits) || zeros(kParent, kParentDigits)) return {};
  return traceparent.substr(kTrace, kTraceDigits);
}

}  // namespace kvtide
