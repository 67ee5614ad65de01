// The findings of `kvtide doctor`: pure functions from what a machine and a daemon say to lines with a
// verdict and what to do. Gathering is in doctor_command.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "clients/cli/ops/status_report.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/cpp/ways.h"

namespace kvtide::cli {

enum class Verdict { kOk, kWarn, kFail };

struct Finding {
  Verdict verdict = Verdict::kOk;
  std::string subject;  // "socket"
  std::string text;     // what is there
  std::string advice;   // what to do; empty when all is well
};

struct GpuFacts {
  bool device_files = false;  // the kernel driver is loaded
  absl::Status found;         // of asking NVML; NotFound without a driver
  std::string name;
  int64_t memory_bytes = 0;
  std::string driver_library;  // why libcuda.so.1 cannot be opened; empty = opened
  int cuda_version = 0;        // 12080 = 12.8; 0 = unknown
};

Finding CheckConnection(const std::string& address, const absl::Status& status);
Finding CheckServing(bool serving);
// By which ways engines of this host reach the daemon.
Finding CheckWays(const client::DaemonWays& ways);
Finding CheckVersions(const std::string& client, const std::string& daemon);
// `flags`: the flags of /proc/cpuinfo, on arm64 its Features.
Finding CheckCpu(const std::string& flags);
// `setting`: /sys/kernel/mm/transparent_hugepage/enabled, "always [madvise] never".
Finding CheckHugePages(const std::string& setting);
// Of this shell; kvtided has its own (LimitMEMLOCK). nullopt = unlimited. `gpu`: pinned pools are of use.
Finding CheckLockedMemory(std::optional<int64_t> limit_bytes, bool gpu);
Finding CheckGpu(const GpuFacts& facts);
// Does a GPU lie idle beside a daemon on the CPU?
std::optional<Finding> CheckGpuUse(const GpuFacts& facts, const std::vector<client::TierInfo>& tiers);
// `tiers`: those of the daemon, or empty when it cannot be asked. `limit_bytes`: of the control group;
// nullopt = none.
Finding CheckMemory(int64_t total_bytes, int64_t available_bytes, std::optional<int64_t> limit_bytes,
                    const std::vector<client::TierInfo>& tiers);
// The socket's folder, where a log or a core may fill it.
Finding CheckDisk(const std::string& folder, int64_t free_bytes);
// Does the server that daemons share answer, does it take blocks, and what does it do when it is full?
Finding CheckRemote(const client::RemoteStats& remote);
// What the daemon itself knows to be wrong; tiers aside, which have checks of their own.
std::vector<Finding> CheckTroubles(const std::vector<client::Trouble>& troubles);
// That, full tiers, failed moves, bad checksums of a running daemon. `dropped_of_sequences`: blocks that open
// sequences miss; others that are dropped were only cached.
std::vector<Finding> CheckContents(const client::ServerStats& stats, int64_t dropped_of_sequences = 0);

std::string RenderFindings(const std::vector<Finding>& findings, const Terminal& terminal);
std::string RenderFindingsJson(const std::vector<Finding>& findings);
bool AnyFailed(const std::vector<Finding>& findings);

}  // namespace kvtide::cli
