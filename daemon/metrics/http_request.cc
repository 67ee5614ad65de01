#include "daemon/metrics/http_request.h"

#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace kvtide::metrics {
namespace {

absl::Status NoRequest(const char* why) { return absl::InvalidArgumentError(why); }

// Whether a list as "zstd, gzip;q=0.5" has gzip, and not with a weight of 0.
bool HasGzip(absl::string_view list) {
  for (const absl::string_view one : absl::StrSplit(list, ',')) {
    const std::vector<absl::string_view> parts = absl::StrSplit(one, ';');
    if (!absl::EqualsIgnoreCase(absl::StripAsciiWhitespace(parts[0]), "gzip")) continue;
    for (absl::string_view part : parts) {
      part = absl::StripAsciiWhitespace(part);
      double weight = 1;
      if (absl::ConsumePrefix(&part, "q=") && absl::SimpleAtod(part, &weight) && weight == 0) return false;
    }
    return true;
  }
  return false;
}

absl::Status ReadLine(absl::string_view line, HttpRequest* request) {
  const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
  if (words.size() != 3 || words[0].empty() || words[1].empty() || !absl::StartsWith(words[2], "HTTP/1."))
    return NoRequest("the first line is none of HTTP/1");
  request->method = std::string(words[0]);
  request->path = std::string(words[1].substr(0, words[1].find('?')));
  request->keeps_alive = words[2] != "HTTP/1.0";
  return absl::OkStatus();
}

absl::Status ReadHeader(absl::string_view line, HttpRequest* request) {
  const size_t colon = line.find(':');
  if (colon == absl::string_view::npos || colon == 0) return NoRequest("a header without a name");
  const absl::string_view name = line.substr(0, colon);
  const absl::string_view value = absl::StripAsciiWhitespace(line.substr(colon + 1));
  if (absl::EqualsIgnoreCase(name, "connection")) {
    if (absl::EqualsIgnoreCase(value, "close")) request->keeps_alive = false;
    if (absl::EqualsIgnoreCase(value, "keep-alive")) request->keeps_alive = true;
  } else if (absl::EqualsIgnoreCase(name, "accept-encoding")) {
    request->takes_gzip = HasGzip(value);
  } else if (absl::EqualsIgnoreCase(name, "transfer-encoding") ||
             (absl::EqualsIgnoreCase(name, "content-length") && value != "0")) {
    return NoRequest("a request with a body");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::optional<HttpRequest>> TakeHttpRequest(std::string* bytes) {
  constexpr char kEnd[] = "\r\n\r\n";
  const size_t end = bytes->find(kEnd);
  if (end == std::string::npos ? bytes->size() > kMostRequestBytes : end > kMostRequestBytes)
    return absl::ResourceExhaustedError("a request of more than 16 KiB");
  if (end == std::string::npos) return std::optional<HttpRequest>();
  HttpRequest request;
  bool first = true;
  for (const absl::string_view line : absl::StrSplit(absl::string_view(bytes->data(), end), "\r\n")) {
    const absl::Status read = first ? ReadLine(line, &request) : ReadHeader(line, &request);
    if (!read.ok()) return read;
    first = false;
  }
  bytes->erase(0, end + sizeof(kEnd) - 1);
  return std::optional<HttpRequest>(std::move(request));
}

}  // namespace kvtide::metrics
