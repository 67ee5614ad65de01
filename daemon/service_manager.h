// What a service manager (systemd, Type=notify) is told: READY=1, STOPPING=1. Nothing happens without one.
#pragma once

#include <string>

namespace kvtide {

// Sends `state` to the socket in NOTIFY_SOCKET, if there is one. Failures are ignored: the daemon works
// without.
void NotifyServiceManager(const std::string& state);

// Whether the service manager waits for "WATCHDOG=1" from this process (sd_watchdog_enabled(3)).
bool WatchdogWanted();

}  // namespace kvtide
