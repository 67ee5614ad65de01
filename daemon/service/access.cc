#include "daemon/service/access.h"

#include <grp.h>
#include <pwd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

constexpr size_t kLongestTenant = 64;
constexpr char kForms[] =
    "use uid:N, user:NAME, gid:N, group:NAME, group, anyone, cert:NAME or tcp, then perhaps =TENANT or "
    "=TENANT:admin";

IdentityPtr Admin() { return std::make_shared<const Identity>(Identity{kDefaultTenant, true}); }

absl::StatusOr<uint32_t> UserNumber(const std::string& name) {
  if (const passwd* const user = ::getpwnam(name.c_str()); user != nullptr) return user->pw_uid;
  return absl::InvalidArgumentError(absl::StrCat("this machine has no user ", name));
}

absl::StatusOr<uint32_t> GroupNumber(const std::string& name) {
  if (const group* const group = ::getgrnam(name.c_str()); group != nullptr) return group->gr_gid;
  return absl::InvalidArgumentError(absl::StrCat("this machine has no group ", name));
}

}  // namespace

absl::StatusOr<UnixPeer> PeerOf(int socket) {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
    return absl::InternalError(
        absl::StrCat("the peer's user is unknown: ", std::system_category().message(errno)));
  UnixPeer peer{credentials.uid, credentials.gid, {}};
  // Asked again where there are more than there was room for. Old kernels do not tell: then there are none.
  peer.groups.resize(64);
  for (int i = 0; i < 2; i++) {
    size = static_cast<socklen_t>(peer.groups.size() * sizeof(gid_t));
    const int got = ::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, peer.groups.data(), &size);
    const int error = errno;
    peer.groups.resize(got == 0 || error == ERANGE ? size / sizeof(gid_t) : 0);
    if (got == 0 || error != ERANGE) break;
  }
  return peer;
}

absl::Status CheckTenant(const std::string& tenant) {
  const bool sane = std::all_of(tenant.begin(), tenant.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
  });
  if (sane && !tenant.empty() && tenant.size() <= kLongestTenant) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("a tenant's name has 1 to ", kLongestTenant,
                                                 " letters, digits, '-', '_' and '.'; this one does not"));
}

absl::StatusOr<Access::Rule> Access::ParseRule(const std::string& text) {
  Rule rule;
  Identity identity;
  const size_t equals = text.find('=');
  const std::string who = text.substr(0, equals);
  if (equals != std::string::npos) {
    absl::string_view tenant = absl::string_view(text).substr(equals + 1);
    identity.admin = absl::ConsumeSuffix(&tenant, ":admin");
    identity.tenant = std::string(tenant);
    KVTIDE_RETURN_IF_ERROR(CheckTenant(identity.tenant));
  }
  rule.identity = std::make_shared<const Identity>(identity);
  const size_t colon = who.find(':');
  const std::string kind = who.substr(0, colon),
                    name = colon == std::string::npos ? "" : who.substr(colon + 1);
  const bool numbered = absl::SimpleAtoi(name, &rule.id);
  if (who == "anyone") {
    rule.who = Who::kAnyone;
  } else if (who == "group") {
    rule.who = Who::kGroup;
    rule.id = ::getegid();
  } else if (who == "tcp") {
    rule.who = Who::kTcp;
  } else if (kind == "cert" && !name.empty()) {
    rule.who = Who::kCertificate;
    rule.name = name;
  } else if (kind == "uid" && numbered) {
    rule.who = Who::kUser;
  } else if (kind == "gid" && numbered) {
    rule.who = Who::kGroup;
  } else if (kind == "user" && !name.empty()) {
    rule.who = Who::kUser;
    KVTIDE_ASSIGN_OR_RETURN(rule.id, UserNumber(name));
  } else if (kind == "group" && !name.empty()) {
    rule.who = Who::kGroup;
    KVTIDE_ASSIGN_OR_RETURN(rule.id, GroupNumber(name));
  } else {
    return absl::InvalidArgumentError(kForms);
  }
  return rule;
}

absl::StatusOr<Access> Access::Parse(const std::vector<std::string>& texts) {
  Access access;
  for (const std::string& text : texts) {
    absl::StatusOr<Rule> rule = ParseRule(text);
    if (!rule.ok()) return Annotate(rule.status(), absl::StrCat("allow \"", text, "\""));
    access.rules_.push_back(*std::move(rule));
  }
  return access;
}

absl::StatusOr<IdentityPtr> Access::OfUnixPeer(const UnixPeer& peer) const {
  for (const Rule& rule : rules_) {
    const bool fits = rule.who == Who::kAnyone || (rule.who == Who::kUser && rule.id == peer.user) ||
                      (rule.who == Who::kGroup &&
                       (rule.id == peer.group ||
                        std::find(peer.groups.begin(), peer.groups.end(), rule.id) != peer.groups.end()));
    if (fits) return rule.identity;
  }
  if (peer.user == 0 || peer.user == ::geteuid()) return Admin();
  return absl::PermissionDeniedError(absl::StrCat(
      "user ", peer.user, " may not use this kvtided, which runs as user ", ::geteuid(),
      "; start it with --allow uid:", peer.user, ", or --allow group and join group ", ::getegid()));
}

absl::StatusOr<IdentityPtr> Access::OfCertificate(const std::vector<std::string>& names) const {
  for (const Rule& rule : rules_)
    if (rule.who == Who::kCertificate && std::find(names.begin(), names.end(), rule.name) != names.end())
      return rule.identity;
  for (const std::string& name : names)
    if (CheckTenant(name).ok()) return std::make_shared<const Identity>(Identity{name, false});
  return absl::PermissionDeniedError(
      names.empty()
          ? "the client's certificate has no name; issue one with a common name"
          : "no name of the client's certificate can be a tenant's (1 to 64 letters, digits, '-', '_' "
            "and '.'); start kvtided with --allow cert:NAME=TENANT");
}

IdentityPtr Access::OfPlainTcp() const {
  for (const Rule& rule : rules_)
    if (rule.who == Who::kTcp) return rule.identity;
  return std::make_shared<const Identity>();
}

absl::StatusOr<IdentityPtr> Access::OfSocket(int socket) const {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  if (::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0)
    return absl::InternalError("the socket has no name");
  if (address.ss_family != AF_UNIX) return OfPlainTcp();
  KVTIDE_ASSIGN_OR_RETURN(const UnixPeer peer, PeerOf(socket));
  return OfUnixPeer(peer);
}

}  // namespace kvtide::service
