// Which eviction policy finds more: workloads in the shapes of Mooncake's traces, and files in their format
// (github.com/kvcache-ai/Mooncake, FAST25-release/traces), replayed against every policy (daemon/trace), with
// host tiers of 2 to 50 % of all that is different, and with one of 10 % in front of a disk for all of it.
//     kvtide_bench_replay --json tests/bench/results/replay.json conversation tool-agent synthetic FILE.jsonl
//     ...
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "daemon/trace/replay.h"
#include "daemon/trace/workload.h"
#include "tests/bench/result_file.h"

namespace kvtide::bench {
namespace {

absl::StatusOr<std::vector<RecordedEvent>> Read(const std::string& source, const WorkloadOptions& options) {
  if (absl::EndsWith(source, ".jsonl")) return ReadMooncakeTrace(source, options.token_bytes, {});
  const absl::StatusOr<WorkloadShape> shape = FindWorkloadShape(source);
  if (!shape.ok()) return shape.status();
  return MakeWorkload(*shape, options);
}

double Rounded(double share) { return std::round(share * 1e4) / 1e4; }

int Main(int argc, char** argv) {
  CLI::App app("Compares eviction policies over workloads and traces");
  std::string json;
  std::vector<std::string> sources;
  WorkloadOptions options;
  app.add_option("--json", json, "Where the numbers go");
  app.add_option("--seed", options.seed, "Of generated workloads")->capture_default_str();
  app.add_option("sources", sources, "conversation, tool-agent, synthetic, files in Mooncake's format")
      ->required();
  CLI11_PARSE(app, argc, argv);
  Result result = {{"date", absl::FormatTime("%Y-%m-%d", absl::Now(), absl::UTCTimeZone())},
                   {"seed", options.seed},
                   {"rows", Result::array()}};
  for (const std::string& source : sources) {
    const absl::StatusOr<std::vector<RecordedEvent>> events = Read(source, options);
    if (!events.ok()) {
      std::printf("%s\n", std::string(events.status().message()).c_str());
      return 1;
    }
    const uint64_t all = DistinctBytes(*events);
    const std::string name = source.substr(source.rfind('/') + 1);
    for (const double share : {0.02, 0.05, 0.1, 0.2, 0.5, -0.1}) {
      const bool disk = share < 0;
      for (const EvictionKind kind : AllEvictionKinds()) {
        ReplayOptions replay;
        replay.eviction = kind;
        replay.host_bytes = static_cast<uint64_t>(std::abs(share) * static_cast<double>(all));
        replay.disk_bytes = disk ? all + all / 5 : 0;
        const absl::StatusOr<ReplayResult> played = Replay(*events, replay);
        if (!played.ok()) {
          std::printf("%s\n", std::string(played.status().message()).c_str());
          return 1;
        }
        std::printf("%-26s host %3.0f %%%s  %-8s tokens found %.4f\n", name.c_str(), 100 * std::abs(share),
                    disk ? " + disk" : "       ", NameOf(kind).c_str(), played->TokenHitRatio());
        std::fflush(stdout);
        result["rows"].push_back({{"source", name},
                                  {"host_share", std::abs(share)},
                                  {"disk", disk},
                                  {"eviction", NameOf(kind)},
                                  {"token_hit_ratio", Rounded(played->TokenHitRatio())},
                                  {"block_hit_ratio", Rounded(played->BlockHitRatio())},
                                  {"found_in_host", Rounded(static_cast<double>(played->host_hit_blocks) /
                                                            static_cast<double>(played->asked_blocks))},
                                  {"stored_gib", played->stored_bytes >> 30},
                                  {"host_to_disk_gib", played->down_bytes >> 30},
                                  {"disk_to_host_gib", played->up_bytes >> 30},
                                  {"dropped_blocks", played->dropped_blocks}});
      }
    }
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Main(argc, argv); }
