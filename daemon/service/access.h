// Who may use the daemon, and as which tenant. Rules are tried in their order, the first that fits decides;
// behind them stand the daemon's own user and root, who are admins of the default tenant. A rule:
//
//   WHO[=TENANT[:admin]]      tenant "default" where none is named
//
//   uid:1001, user:alice      a user at the other end of a Unix socket
//   gid:44, group:kvtide      one of that user's groups
//   group                     kvtided's own group, which its Unix sockets belong to
//   anyone                    whoever may open the Unix socket's file
//   cert:engine-1             a name in the client's certificate (mTLS); without such a rule the
//   certificate's
//                             common name is the tenant
//   tcp                       TCP without a certificate and without a token
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/identity.h"

namespace kvtide::service {

using IdentityPtr = std::shared_ptr<const Identity>;

// The user at the other end of a Unix socket, as the kernel noted it when the socket was connected.
struct UnixPeer {
  uint32_t user = 0, group = 0;
  std::vector<uint32_t> groups;  // the others
};
absl::StatusOr<UnixPeer> PeerOf(int socket);

// InvalidArgument unless it is 1 to 64 letters, digits and "-_.", so that it can stand in logs and labels.
absl::Status CheckTenant(const std::string& tenant);

class Access {
 public:
  // The rules of `texts`. InvalidArgument names one that is none, or whose user or group does not exist.
  static absl::StatusOr<Access> Parse(const std::vector<std::string>& texts);

  // PermissionDenied with what to do.
  absl::StatusOr<IdentityPtr> OfUnixPeer(const UnixPeer& peer) const;
  // A client that has shown a certificate with these names, the common name first. PermissionDenied where
  // none of them is in a rule or can be a tenant's name.
  absl::StatusOr<IdentityPtr> OfCertificate(const std::vector<std::string>& names) const;
  // TCP without a certificate and without a token: by the first "tcp" rule, else the default tenant, no
  // admin.
  IdentityPtr OfPlainTcp() const;
  // By the kind of the connected socket. PermissionDenied as OfUnixPeer.
  absl::StatusOr<IdentityPtr> OfSocket(int socket) const;

 private:
  enum class Who { kUser, kGroup, kAnyone, kCertificate, kTcp };
  struct Rule {
    Who who = Who::kAnyone;
    uint32_t id = 0;
    std::string name;  // of a certificate
    IdentityPtr identity;
  };
  static absl::StatusOr<Rule> ParseRule(const std::string& text);

  std::vector<Rule> rules_;
};

}  // namespace kvtide::service
