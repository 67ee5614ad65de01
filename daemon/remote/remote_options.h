// Where the remote tier is and how it is used; the texts of the configuration.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/tier/remote_tier.h"

namespace kvtide {

// "HOST", "HOST:PORT", "[::1]:PORT", "redis://HOST:PORT/NUMBER", "rediss://HOST:PORT" (TLS), "unix:/path".
struct RemoteAddress {
  std::string host;  // empty: a Unix socket
  int port = 6379;
  std::string path;  // of the socket
  bool tls = false;
  int database = 0;
  // As a URL.
  std::string Text() const;
};
// InvalidArgument that says what is wrong with the text. Passwords do not belong there: they would stand in
// logs.
absl::StatusOr<RemoteAddress> ParseRemoteAddress(const std::string& text);

struct RemoteOptions {
  RemoteAddress address;
  std::string prefix = "kvtide";         // of the names of all values: letters, digits, "-_.", at most 64
  std::string auth_file;                 // "PASSWORD" or "USER PASSWORD"; empty = none
  std::string ca_file;                   // PEM; empty = the system's
  absl::Duration ttl = absl::Hours(24);  // infinite: none
  // Of a connection, and of bytes that stand still.
  absl::Duration timeout = absl::Milliseconds(250);
  absl::Duration read_time = absl::Seconds(1);  // of the fetches of one lookup
  RemoteWrites writes = RemoteWrites::kAll;
};
// "none", "on-demote", "all".
const char* NameOf(RemoteWrites writes);
// InvalidArgument with the known names.
absl::StatusOr<RemoteWrites> ParseRemoteWrites(const std::string& name);
absl::Status CheckRemoteOptions(const RemoteOptions& options);

}  // namespace kvtide
