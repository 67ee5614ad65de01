// What `kvtide status` shows: one snapshot of a daemon, as tables for people and JSON for programs. Pure.
#pragma once

#include <string>
#include <vector>

#include "clients/cli/terminal/terminal.h"
#include "clients/cpp/calibration.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct DaemonSnapshot {
  std::string address;
  bool serving = true;
  client::ServerInfo info;
  client::ServerStats stats;
  std::vector<client::SequenceInfo> sequences;
  client::CalibrationReport profiles;  // of keys: on their way, and installed
};

// Which sequences come first: the longest idle, the last used, or those that hold most bytes.
enum class SequenceOrder { kColdest, kHottest, kLargest };

// At most `max_sequences` sequences; tenants where there are several.
std::string RenderStatus(const DaemonSnapshot& snapshot, size_t max_sequences, const Terminal& terminal,
                         SequenceOrder order = SequenceOrder::kColdest);
// All sequences. Ids are texts: 64 bits do not survive in every JSON reader.
std::string RenderStatusJson(const DaemonSnapshot& snapshot);

// At most `max_sequences` of them; empty where there is none. And all of them, as JSON.
std::string RenderSequences(std::vector<client::SequenceInfo> sequences, size_t max_sequences,
                            const Terminal& terminal, SequenceOrder order = SequenceOrder::kColdest);
std::string RenderSequencesJson(const std::vector<client::SequenceInfo>& sequences);
// What the tenants of these sequences have, most bytes first. Blocks that forks share count for each.
struct TenantTotal {
  std::string tenant;
  int64_t sequences = 0, tokens = 0, bytes = 0;
  double idle_seconds = 0;  // since any of them was used
};
std::vector<TenantTotal> TotalsOfTenants(const std::vector<client::SequenceInfo>& sequences);
// All that is known of one.
std::string RenderSequence(const client::SequenceInfo& sequence);

// "host", or "device cuda:1" where the sequence could lie on several devices of a tier.
std::string TierName(const client::SequenceInfo& sequence, const client::TierShare& share);

// A red line for each thing that is wrong and stays so; empty where there is none.
std::string RenderTroubles(const client::ServerStats& stats, const Terminal& terminal);

// "29 %"; "-" when there is no whole.
std::string LatencyText(double seconds);                    // "85 us", "2.4 ms", "1.5 s"
std::string FailedText(const client::MethodStats& method);  // "NOT_FOUND 3, ABORTED 1"
// Whose calls were refused for this reason, "acme 9, shop 3"; empty where that is evident.
std::string RefusedTenantsText(const client::ServerStats& stats, const std::string& reason);
std::string RefusedText(const client::ServerStats& stats);  // "quota 12 (acme 9, shop 3), queue_full 3"
std::string PercentText(double part, double whole);
// "shared memory" for "shared_memory", as people say it.
std::string WayText(const std::string& way);
// Green below `warn`, yellow below `alarm`, red from there; shares from 0 to 1.
Paint ShareColour(double share, double warn, double alarm);

}  // namespace kvtide::cli
