// Lookups of prefixes, and what the metadata of blocks takes: 2,048 prompts of 32,768 tokens, a million
// blocks, over a backend that does nothing. LookupPrefix gives the time of a call and its percentiles, by
// the clock and of the processor (which counts where others share the machine); Metadata the bytes of the
// heap in use for each block.
//     kvtide_bench_prefix --benchmark_out=tests/bench/results/prefix.json
//     EVICTION=s3-fifo kvtide_bench_prefix --benchmark_out=tests/bench/results/prefix_s3_fifo.json
#include <benchmark/benchmark.h>
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache.h"
#include "kernels/base/check.h"
#include "tests/bench/idle_backend.h"

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kPrompts = 2'048, kDim = 64;
constexpr int64_t kTokens = 32'768, kBlocksOfPrompt = kTokens / kBlockTokens;
constexpr double kBlocks = static_cast<double>(kPrompts) * kBlocksOfPrompt;

double ProcessorMicros() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}

double Percentile(std::vector<double>& values, double part) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
}

double HeapBytes() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd);
}

std::vector<TokenId> Prompt(int index) {
  std::mt19937 random(static_cast<uint32_t>(index) + 1);
  std::vector<TokenId> ids(kTokens);
  for (TokenId& id : ids) id = random() % 128'000;
  return ids;
}

struct World {
  World() {
    CacheOptions options;
    options.tiers.push_back({"device", &device, size_t{1} << 40, false});
    options.tiers.push_back({"host", &host, size_t{1} << 40, false});
    options.background_moves = false;
    if (const char* const eviction = std::getenv("EVICTION"); eviction != nullptr)
      options.eviction = ParseEvictionKind(eviction).value();
    options.max_sequences = kPrompts + 1;
    cache = KvCache::Create(options).value();
    model = cache->RegisterModel(UniformModel("m", {1, 1, kDim, kDim}, 1)).value();
  }
  SequenceId Append(const std::vector<TokenId>& ids) const {
    const SequenceId id = cache->CreateSequence(model, {}).value();
    static const std::vector<uint16_t> rows(kTokens * kDim, 0x3800);
    const LayerKv layer{0, {rows.data(), DataType::kF16}, {rows.data(), DataType::kF16}, 0, 0};
    AppendCall call;
    call.sequence = id;
    call.tokens = kTokens;
    call.layers = {&layer, 1};
    call.token_ids = ids;
    KVTIDE_CHECK(cache->Append(call).ok());
    return id;
  }

  IdleBackend device, host;
  std::unique_ptr<KvCache> cache;
  ModelId model = 0;
};

// Closed sequences have left all prompts.
World& TheWorld() {
  static World* const world = [] {
    auto* const made = new World();
    for (int i = 0; i < kPrompts; i++) KVTIDE_CHECK(made->cache->CloseSequence(made->Append(Prompt(i))).ok());
    KVTIDE_CHECK(made->cache->Stats().prefix_blocks == static_cast<uint64_t>(kBlocks));
    return made;
  }();
  return *world;
}

enum class Ask { kWhole, kHalf, kNothing };

// Of another prompt each time, so that nothing of it is in the processor's caches from the last one. `lease`:
// it is held and released, within the time.
void LookupPrefix(benchmark::State& state, Ask ask, bool lease) {
  const World& world = TheWorld();
  std::mt19937 random(7);
  std::vector<double> micros, processor;
  for (auto _ : state) {
    std::vector<TokenId> ids = Prompt(static_cast<int>(random() % kPrompts));
    if (ask != Ask::kWhole) ids[ask == Ask::kHalf ? kTokens / 2 : 0]++;
    PrefixCall call;
    call.model = world.model;
    call.token_ids = ids;
    call.lease = lease ? absl::Seconds(30) : absl::ZeroDuration();
    const auto begin = Clock::now();
    const double processor_begin = ProcessorMicros();
    const absl::StatusOr<PrefixReport> report = world.cache->LookupPrefix(call);
    if (lease) world.cache->ReleaseLease(report->lease);
    processor.push_back(ProcessorMicros() - processor_begin);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    state.SetIterationTime(seconds);
    micros.push_back(seconds * 1e6);
    KVTIDE_CHECK(report.ok() && report->tokens == (ask == Ask::kWhole  ? kTokens
                                                   : ask == Ask::kHalf ? kTokens / 2
                                                                       : 0));
  }
  state.counters["p50_us"] = Percentile(micros, 0.5);
  state.counters["p99_us"] = Percentile(micros, 0.99);
  state.counters["processor_p50_us"] = Percentile(processor, 0.5);
  state.counters["processor_p99_us"] = Percentile(processor, 0.99);
}
BENCHMARK_CAPTURE(LookupPrefix, whole, Ask::kWhole, false)->Unit(benchmark::kMicrosecond)->UseManualTime();
BENCHMARK_CAPTURE(LookupPrefix, whole_with_lease, Ask::kWhole, true)
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();
BENCHMARK_CAPTURE(LookupPrefix, half, Ask::kHalf, false)->Unit(benchmark::kMicrosecond)->UseManualTime();
BENCHMARK_CAPTURE(LookupPrefix, nothing, Ask::kNothing, false)
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// Lookup and a sequence that begins with it, as an engine asks for each prompt; then it is closed.
void BeginAndClose(benchmark::State& state) {
  const World& world = TheWorld();
  std::mt19937 random(8);
  for (auto _ : state) {
    const std::vector<TokenId> ids = Prompt(static_cast<int>(random() % kPrompts));
    PrefixCall call;
    call.model = world.model;
    call.token_ids = ids;
    call.lease = absl::Seconds(30);
    const auto begin = Clock::now();
    const absl::StatusOr<PrefixReport> report = world.cache->LookupPrefix(call);
    const absl::StatusOr<SequenceId> id = world.cache->CreateSequence(world.model, {}, {}, report->lease);
    KVTIDE_CHECK(id.ok() && world.cache->CloseSequence(*id).ok());
    state.SetIterationTime(std::chrono::duration<double>(Clock::now() - begin).count());
  }
}
BENCHMARK(BeginAndClose)->Unit(benchmark::kMicrosecond)->UseManualTime();

// In a cache of its own: blocks of open sequences, without and with token ids, and what closed ones leave.
void Metadata(benchmark::State& state) {
  double plain = 0, open = 0, closed = 0;
  for (auto _ : state) {
    for (const bool say : {false, true}) {
      auto world = std::make_unique<World>();
      std::vector<SequenceId> ids;
      std::vector<TokenId> tokens = Prompt(0);
      if (!say) tokens.clear();
      ids.push_back(world->Append(tokens));  // what is made once
      const double before = HeapBytes();
      for (int i = 1; i < kPrompts; i++) {
        if (say) tokens = Prompt(i);
        ids.push_back(world->Append(tokens));
      }
      const double bytes = (HeapBytes() - before) / (kBlocks - kBlocksOfPrompt);
      (say ? open : plain) = bytes;
      if (!say) continue;
      for (const SequenceId id : ids) KVTIDE_CHECK(world->cache->CloseSequence(id).ok());
      closed = (HeapBytes() - before) / (kBlocks - kBlocksOfPrompt);
    }
  }
  state.counters["bytes_per_block"] = plain;
  state.counters["bytes_per_block_with_token_ids"] = open;
  state.counters["bytes_per_cached_block"] = closed;
}
BENCHMARK(Metadata)->Iterations(1)->Unit(benchmark::kSecond);

}  // namespace
}  // namespace kvtide::bench

BENCHMARK_MAIN();
