// Blocks to and from the remote tier, a redis-server on a Unix socket of this machine, in batches of eight:
// by RedisTier (names, labels, checksums, limits) and, beside it, by plain pipelined SET and GET of hiredis
// of the same bytes, as redis-benchmark -P 8 sends them. Processor time is that of this process; the server
// has its own, and on few processors both share them.
//     kvtide_bench_remote --benchmark_min_time=0.5 --benchmark_repetitions=5
//       --benchmark_enable_random_interleaving=true --benchmark_out=tests/bench/results/remote.json
#include <benchmark/benchmark.h>
#include <hiredis/hiredis.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "daemon/remote/redis_tier.h"
#include "kernels/base/check.h"
#include "tests/daemon/remote/redis_server.h"

namespace kvtide::bench {
namespace {

constexpr size_t kBlocks = 8;

// Without snapshots.
testing::RedisServer& Server() {
  static testing::RedisServer server;
  return server;
}

struct Blocks {
  explicit Blocks(size_t bytes) : content(kBlocks, std::vector<std::byte>(bytes, std::byte{7})) {}
  std::vector<std::vector<std::byte>> content;
};

// Range: bytes of a block, 1 = a write and 0 = a read.
void Tier(benchmark::State& state) {
  const auto bytes = static_cast<size_t>(state.range(0));
  const bool write = state.range(1) != 0;
  RedisTierOptions options;
  options.remote.address = Server().address();
  auto opened = RedisTier::Open(options);
  KVTIDE_CHECK(opened.ok(), opened.status().ToString());
  RedisTier& tier = **opened;
  Blocks blocks(bytes);
  uint64_t round = 0;
  const auto run = [&](bool now_write) {
    std::vector<RemoteJob> jobs(kBlocks);
    for (size_t i = 0; i < kBlocks; i++) {
      RemoteJob& job = jobs[i];
      job.name.key = {i, bytes};
      job.label.bytes = bytes;
      job.label.write_id = now_write ? ++round : 0;
      job.label.k_type = job.label.v_type = "opaque";
      job.copy = [&block = blocks.content[i], now_write](size_t at, std::span<std::byte> piece) {
        if (now_write) {
          std::memcpy(piece.data(), block.data() + at, piece.size());
        } else {
          std::memcpy(block.data() + at, piece.data(), piece.size());
        }
        return absl::OkStatus();
      };
    }
    const RemoteLimit limit{absl::Seconds(60), nullptr};
    if (now_write) {
      tier.Write("bench", jobs, limit);
    } else {
      tier.Read("bench", jobs, limit);
    }
    for (const RemoteJob& job : jobs) KVTIDE_CHECK(job.status.ok(), job.status.ToString());
  };
  run(true);
  for (auto step : state) {
    run(write);
    if (!write) continue;
    state.PauseTiming();  // what was written before stays as long as its time to live
    Server().Command({"FLUSHALL"});
    state.ResumeTiming();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(kBlocks * bytes));
}

void Plain(benchmark::State& state) {
  const auto bytes = static_cast<size_t>(state.range(0));
  const bool write = state.range(1) != 0;
  const std::unique_ptr<redisContext, void (*)(redisContext*)> context(
      redisConnectUnix(Server().path().c_str()), &redisFree);
  KVTIDE_CHECK(context != nullptr && context->err == 0, "no connection to the server");
  Blocks blocks(bytes);
  const auto run = [&](bool now_write) {
    for (size_t i = 0; i < kBlocks; i++) {
      const std::string name = "plain:" + std::to_string(bytes) + ":" + std::to_string(i);
      std::array<const char*, 3> words = {now_write ? "SET" : "GET", name.c_str(),
                                                reinterpret_cast<const char*>(blocks.content[i].data())};
      const std::array<size_t, 3> sizes = {3, name.size(), bytes};
      KVTIDE_CHECK(redisAppendCommandArgv(context.get(), now_write ? 3 : 2, words.data(), sizes.data()) ==
                   REDIS_OK);
    }
    for (size_t i = 0; i < kBlocks; i++) {
      void* got = nullptr;
      KVTIDE_CHECK(redisGetReply(context.get(), &got) == REDIS_OK);
      const std::unique_ptr<redisReply, void (*)(void*)> reply(static_cast<redisReply*>(got),
                                                               &freeReplyObject);
      if (now_write) {
        KVTIDE_CHECK(reply->type == REDIS_REPLY_STATUS);
        continue;
      }
      KVTIDE_CHECK(reply->type == REDIS_REPLY_STRING && reply->len == bytes);
      std::memcpy(blocks.content[i].data(), reply->str, bytes);
    }
  };
  run(true);
  for (auto step : state) run(write);
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(kBlocks * bytes));
}

void Ranges(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"bytes", "write"})
      ->ArgsProduct({{64 << 10, 1 << 20, 8 << 20}, {0, 1}})
      ->MeasureProcessCPUTime()
      ->UseRealTime();
}
BENCHMARK(Tier)->Apply(Ranges);
BENCHMARK(Plain)->Apply(Ranges);

}  // namespace
}  // namespace kvtide::bench
