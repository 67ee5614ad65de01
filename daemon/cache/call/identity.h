// On whose behalf a call is made. The daemon derives it from how the caller has proved who it is (its user at
// the other end of a Unix socket, its certificate, its token), never from what a request says.
#pragma once

#include <string>

namespace kvtide {

constexpr char kDefaultTenant[] = "default";

struct Identity {
  std::string tenant = kDefaultTenant;
  bool admin = false;  // sees and manages what all tenants have, and may create on behalf of any

  // Whether what belongs to `owner` is there at all for this caller.
  bool MaySee(const std::string& owner) const { return admin || owner == tenant; }
  // The process itself: the default tenant, an admin.
  static const Identity& OfThisProcess() {
    static const Identity* const kThisProcess = new Identity{kDefaultTenant, true};
    return *kThisProcess;
  }
};

}  // namespace kvtide
