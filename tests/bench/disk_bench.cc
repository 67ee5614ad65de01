// Moves to and from the disk tier, in clear and encrypted: eight blocks of one Run. Processor time is that of
// the process, threads that read and write included; with a folder in memory what is left is copy, checksum,
// encryption and system calls:
//     KVTIDE_BENCH_FOLDER=/dev/shm kvtide_bench_disk --benchmark_min_time=0.5 --benchmark_repetitions=5
//       --benchmark_enable_random_interleaving=true --benchmark_out=tests/bench/results/disk.json
#include <benchmark/benchmark.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "daemon/disk/disk_tier.h"
#include "kernels/base/check.h"

namespace kvtide::bench {
namespace {

constexpr size_t kBlocks = 8;

std::string FolderFromEnvironment() {
  const char* const asked = std::getenv("KVTIDE_BENCH_FOLDER");
  std::string folder = std::string(asked != nullptr ? asked : "/tmp") + "/kvtide_bench_disk_XXXXXX";
  KVTIDE_CHECK(mkdtemp(folder.data()) != nullptr, "no folder in ", folder);
  return folder;
}

// Range: bytes of a block, 1 = a write and 0 = a read, 1 = encrypted.
void Moves(benchmark::State& state) {
  const auto bytes = static_cast<size_t>(state.range(0));
  const bool write = state.range(1) != 0;
  const std::string folder = FolderFromEnvironment();
  DiskTierOptions options;
  options.folder = folder;
  options.capacity_bytes = 2 * kBlocks * (bytes + 2 * kDiskPage) + (size_t{1} << 20);
  options.io = CheckUring().ok() ? IoKind::kUring : IoKind::kThreads;
  if (state.range(2) != 0) options.key = std::make_shared<SecretKey>(SecretKey::Random());
  {
    auto opened = DiskTier::Open(options);
    KVTIDE_CHECK(opened.ok(), opened.status().ToString());
    DiskTier& tier = **opened;
    std::vector<std::vector<std::byte>> blocks(kBlocks, std::vector<std::byte>(bytes));
    std::vector<IoJob> jobs(kBlocks);
    const auto run = [&](bool now_write) {
      for (size_t i = 0; i < kBlocks; i++) {
        IoJob& job = jobs[i];
        job.write = now_write;
        job.offset = i * tier.ExtentBytes(bytes);
        job.label.bytes = bytes;
        job.status = absl::OkStatus();
        if (now_write) {
          job.label.write_id = tier.NextWriteId();
          job.label.checksum = 0;
        }
        job.copy = [&block = blocks[i], now_write](size_t at, std::span<std::byte> piece) {
          if (now_write) {
            std::memcpy(piece.data(), block.data() + at, piece.size());
          } else {
            std::memcpy(block.data() + at, piece.data(), piece.size());
          }
          return absl::OkStatus();
        };
      }
      tier.Run(jobs);
      for (const IoJob& job : jobs) KVTIDE_CHECK(job.status.ok(), job.status.ToString());
    };
    run(true);
    for (auto step : state) run(write);
    state.SetLabel(options.io == IoKind::kUring ? "io_uring" : "threads");
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(kBlocks * bytes));
  std::filesystem::remove_all(folder);
}

BENCHMARK(Moves)
    ->ArgNames({"bytes", "write", "encrypted"})
    ->ArgsProduct({{64 << 10, 1 << 20, 8 << 20}, {0, 1}, {0, 1}})
    ->MeasureProcessCPUTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace kvtide::bench
