#include "daemon/remote/remote_options.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvtide {

std::string RemoteAddress::Text() const {
  const std::string behind = database != 0 ? absl::StrCat("/", database) : "";
  if (host.empty()) return absl::StrCat("unix:", path);
  const bool v6 = absl::StrContains(host, ':');
  return absl::StrCat(tls ? "rediss://" : "redis://", v6 ? "[" : "", host, v6 ? "]" : "", ":", port, behind);
}

absl::StatusOr<RemoteAddress> ParseRemoteAddress(const std::string& text) {
  const auto wrong = [&](const std::string& why) {
    return absl::InvalidArgumentError(
        absl::StrCat("remote \"", absl::StrContains(text, '@') ? "(hidden)" : text, "\": ", why,
                     "; give HOST:PORT, rediss://HOST:PORT or unix:/path/to/socket"));
  };
  RemoteAddress address;
  if (absl::StartsWith(text, "unix:")) {
    address.path = text.substr(5);
    if (!absl::StartsWith(address.path, "/")) return wrong("the path of the socket does not begin with /");
    if (address.path.size() > 107) return wrong("the path of the socket is longer than 107 bytes");
    return address;
  }
  std::string rest = text;
  if (absl::StartsWith(rest, "rediss://")) {
    address.tls = true;
    rest.erase(0, 9);
  } else if (absl::StartsWith(rest, "redis://")) {
    rest.erase(0, 8);
  }
  if (absl::StrContains(rest, '@')) return wrong("user and password belong into a file (remote_auth_file)");
  if (const size_t slash = rest.find('/'); slash != std::string::npos) {
    const std::string number = rest.substr(slash + 1);
    if (!number.empty() && (!absl::SimpleAtoi(number, &address.database) || address.database < 0))
      return wrong(absl::StrCat("\"", number, "\" is no number of a database"));
    rest.resize(slash);
  }
  std::string port;
  if (absl::StartsWith(rest, "[")) {
    const size_t end = rest.find(']');
    if (end == std::string::npos) return wrong("] is missing");
    address.host = rest.substr(1, end - 1);
    rest.erase(0, end + 1);
    if (!rest.empty() && rest[0] != ':') return wrong("behind ] comes :PORT");
    port = rest.empty() ? "" : rest.substr(1);
    if (!rest.empty() && port.empty()) return wrong("the port is missing");
  } else {
    const size_t colon = rest.rfind(':');
    if (colon != rest.find(':')) return wrong("an address of IPv6 stands in []");
    address.host = rest.substr(0, colon);
    if (colon != std::string::npos) {
      port = rest.substr(colon + 1);
      if (port.empty()) return wrong("the port is missing");
    }
  }
  if (address.host.empty()) return wrong("the host is missing");
  if (!port.empty() && (!absl::SimpleAtoi(port, &address.port) || address.port < 1 || address.port > 65535))
    return wrong(absl::StrCat("\"", port, "\" is no port"));
  return address;
}

const char* NameOf(RemoteWrites writes) {
  constexpr const char* kNames[] = {"none", "on-demote", "all"};
  return kNames[static_cast<size_t>(writes)];
}

absl::StatusOr<RemoteWrites> ParseRemoteWrites(const std::string& name) {
  for (const RemoteWrites writes : {RemoteWrites::kNone, RemoteWrites::kOnDemote, RemoteWrites::kAll})
    if (name == NameOf(writes)) return writes;
  return absl::InvalidArgumentError(
      absl::StrCat("remote_write \"", name, "\" is unknown; use all, on-demote or none"));
}

absl::Status CheckRemoteOptions(const RemoteOptions& options) {
  const auto plain = [](char c) { return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.'; };
  if (options.prefix.empty() || options.prefix.size() > 64 ||
      !std::all_of(options.prefix.begin(), options.prefix.end(), plain))
    return absl::InvalidArgumentError(
        absl::StrCat("remote_prefix \"", options.prefix, "\" must have 1 to 64 letters, digits and -_."));
  if (!options.ca_file.empty() && !options.address.tls)
    return absl::InvalidArgumentError("remote_ca is for TLS: remote rediss://HOST:PORT");
  return absl::OkStatus();
}

}  // namespace kvtide
