// How long an attention holds the cache's mutex: the calls of one layer over many long sequences, with a
// backend that does nothing. The process's pthread_mutex_lock, trylock and unlock are measured, whoever calls
// them, so that the number is the same whatever the cache's parts are called. On a machine with other work
// the least of many interleaved rounds counts:
//     kvtide_bench_attend_metadata --benchmark_min_time=0.05 --benchmark_repetitions=20
//       --benchmark_enable_random_interleaving=true --benchmark_report_aggregates_only=true
//       --benchmark_out=tests/bench/results/attend_metadata.json
#include <benchmark/benchmark.h>
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "kernels/base/check.h"
#include "tests/bench/idle_backend.h"

namespace {

// Of this thread's time on a processor: what others do meanwhile does not count.
int64_t Nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

using MutexCall = int (*)(pthread_mutex_t*);

struct Held {
  int depth = 0;
  int64_t since = 0, total = 0;
};
thread_local Held held;

MutexCall Real(const char* name) { return reinterpret_cast<MutexCall>(dlsym(RTLD_NEXT, name)); }

}  // namespace

extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  static const MutexCall real = Real("pthread_mutex_lock");
  const int result = real(mutex);
  if (held.depth++ == 0) held.since = Nanoseconds();
  return result;
}

extern "C" int pthread_mutex_trylock(pthread_mutex_t* mutex) noexcept {
  static const MutexCall real = Real("pthread_mutex_trylock");
  const int result = real(mutex);
  if (result == 0 && held.depth++ == 0) held.since = Nanoseconds();
  return result;
}

extern "C" int pthread_mutex_unlock(pthread_mutex_t* mutex) noexcept {
  static const MutexCall real = Real("pthread_mutex_unlock");
  if (--held.depth == 0) held.total += Nanoseconds() - held.since;
  return real(mutex);
}

namespace kvtide::bench {
namespace {

// Small rows: the mutex is held for tables, not for values.
constexpr int kLayers = 8, kKvHeads = 1, kHeads = 4, kDim = 64;

// Range: tokens of each sequence, sequences, 1 = every call appends a token first. A time is that of one
// layer's call; layers come in turn, as in decode steps.
void MutexOfOneLayer(benchmark::State& state) {
  const int64_t tokens = state.range(0);
  const auto items = static_cast<size_t>(state.range(1));
  const bool append = state.range(2) != 0;
  IdleBackend backend;
  CacheOptions options;
  options.tiers.push_back({"device", &backend, size_t{1} << 42, false});
  options.background_moves = false;
  options.max_tokens_per_append = tokens;
  const std::unique_ptr<KvCache> cache = KvCache::Create(options).value();
  const ModelId model =
      cache->RegisterModel(UniformModel("m", {kLayers, kKvHeads, kDim, kDim}, kHeads)).value();
  SequenceOptions sequence;
  sequence.pair = ParseCachePair("turbo4").value();
  const std::vector<uint16_t> kv(static_cast<size_t>(tokens) * kKvHeads * kDim, F32ToF16(0.5f));
  const std::vector<float> q(kHeads * kDim, 0.1f);
  std::vector<float> out(items * kHeads * kDim), lse(items * kHeads);
  std::vector<AttendRequest> requests(items);
  for (size_t i = 0; i < items; i++) {
    AttendRequest& request = requests[i];
    request.sequence = cache->CreateSequence(model, sequence).value();
    std::vector<LayerKv> layers;
    for (int l = 0; l < kLayers; l++)
      layers.push_back({l, {kv.data(), DataType::kF16}, {kv.data(), DataType::kF16}, 0, 0});
    AppendCall call;
    call.sequence = request.sequence;
    call.tokens = tokens;
    call.layers = layers;
    KVTIDE_CHECK(cache->Append(call).ok());
    request.q = {q.data(), DataType::kF32};
    request.queries = 1;
    request.out = out.data() + i * kHeads * kDim;
    request.lse = lse.data() + i * kHeads;
    request.first_query_position = append ? tokens : tokens - 1;
    if (!append) continue;
    request.new_tokens = 1;
    request.start_position = tokens;
    request.k = request.v = {kv.data(), DataType::kF16};
  }
  AttendCall call;
  call.items = requests;
  held.total = 0;
  for (auto _ : state) {
    const absl::Status status = append ? cache->AppendAttend(call) : cache->Attend(call);
    KVTIDE_CHECK(status.ok(), status.ToString());
    if (++call.layer < kLayers) continue;
    call.layer = 0;
    if (append)
      for (AttendRequest& request : requests) request.start_position = ++request.first_query_position;
  }
  state.counters["mutex_us_per_layer"] =
      1e-3 * static_cast<double>(held.total) / static_cast<double>(state.iterations());
}
double Least(const std::vector<double>& rounds) { return *std::min_element(rounds.begin(), rounds.end()); }

BENCHMARK(MutexOfOneLayer)
    ->ComputeStatistics("least", Least)
    ->ArgNames({"tokens", "sequences", "append"})
    ->Args({32768, 33, 0})
    ->Args({131072, 33, 0})
    ->Args({32768, 33, 1})
    ->Args({131072, 33, 1})
    ->Args({8192, 1, 0})
    ->Args({8192, 1, 1})
    ->UseRealTime();

}  // namespace
}  // namespace kvtide::bench
