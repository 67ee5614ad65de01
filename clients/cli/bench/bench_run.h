// What a pool takes for its calls, by way and by tier, beside what the machine takes for the same bytes
// without kvtide (roofline.h). All of it in turns until the time is over, so that other load of the machine
// meets every row.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct BenchOptions {
  std::string address;  // of a running daemon; empty = one of its own
  client::Credentials credentials;
  std::string daemon_program;   // of its own daemon; empty = FindDaemonProgram
  std::string device = "auto";  // of its own daemon's first tier
  std::string disk_folder;      // of its own daemon's disk tier; empty = the folder for temporary files
  std::string pair;             // of the blocks that tiers attend and move; empty = the daemon's default
  double seconds = 20;          // for all measurements; setting up comes on top
  bool show_progress = true;
};

enum class BenchPart { kRoofline, kWay, kTier };
// "roofline", "way", "tier".
const char* NameOf(BenchPart part);

struct BenchRow {
  BenchPart part = BenchPart::kRoofline;
  std::string subject;  // "shared memory", "host"
  std::string call;     // "write", "attend"
  int64_t bytes = 0;    // that one call brings or reads; 0: only its latency counts
  std::string
      roofline;      // subject and call of the row that bounds it, "memory: copy"; empty = none was measured
  std::string note;  // why there are no numbers, or what they mean

  int64_t samples = 0;
  double p50_seconds = 0, p99_seconds = 0;
  // Of calls with bytes: of p50.
  double bytes_per_second() const { return p50_seconds > 0 ? static_cast<double>(bytes) / p50_seconds : 0; }
};

struct BenchReport {
  std::vector<BenchRow> rows;
  std::string version, machine, date, device, pair, daemon, disk_folder;
  double seconds = 0;

  const BenchRow* Find(const std::string& roofline) const;
  // How much of the roofline's speed a row has: of its bandwidth, or, of latencies, its time over the row's.
  // 0 where there is none.
  double ShareOfRoofline(const BenchRow& row) const;
};

// Cancelled when `stop` turns true. Sequences and models that it makes are closed.
absl::StatusOr<BenchReport> RunBench(const BenchOptions& options, const std::atomic<bool>& stop);

}  // namespace kvtide::cli
