// A kvtided of this process's own, on a Unix socket in a private temporary folder: started as a child,
// stopped and cleaned up when the object goes. The child also ends when this process dies.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::cli {

struct DaemonOptions {
  std::string program;  // path of kvtided; empty = FindDaemonProgram
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  int compute_threads = 0;    // 0 = one per core
  std::string device;         // empty = as kvtided chooses
  std::string disk;           // "FOLDER:SIZE"; empty = no disk tier
  bool share_pool = false;    // the memory of CPU devices can be mapped
  bool host_sharing = false;  // the tier of host memory can be, for reading
  std::string shared_memory;  // of arenas, all together and of one; empty = kvtided's default
  std::string metrics_address = "off";
};

// Beside this program, in the build tree that it belongs to, or in PATH; NOT_FOUND says where it looked.
absl::StatusOr<std::string> FindDaemonProgram(const std::string& asked);

class DaemonProcess {
 public:
  // Returns when the socket is there. When the daemon stops before, its last words are in the status.
  static absl::StatusOr<std::unique_ptr<DaemonProcess>> Start(const DaemonOptions& options);
  // SIGTERM, a few seconds of patience, SIGKILL; removes the folder.
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  const std::string& address() const { return address_; }  // "unix:/tmp/.../kvtided.sock"
  pid_t pid() const { return pid_; }
  bool running() const;
  // True once it has ended; waits for that at most `patience`. A peer sees its sockets close before this
  // process can see its end.
  bool EndsWithin(std::chrono::milliseconds patience) const;
  // The end of what it wrote to its log.
  std::string LogTail() const;

 private:
  DaemonProcess(std::string folder, pid_t pid);

  const std::string folder_;
  const std::string address_;
  const pid_t pid_;
  mutable bool reaped_ = false;
};

}  // namespace kvtide::cli
