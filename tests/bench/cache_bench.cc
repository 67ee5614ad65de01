// What the cache itself costs, without the backends' work: a backend whose calls return at once, so that the
// time is checks, locks, tables, pins and the order of eviction.
//     kvtide_bench_cache --benchmark_min_time=0.2
#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "kernels/base/check.h"
#include "tests/bench/idle_backend.h"

namespace kvtide::bench {
namespace {

// One AppendAttend call of one layer: `items` sequences of `tokens` tokens, one new token each. 8 KV heads of
// 128, 32 query heads.
void AppendAttendCall(benchmark::State& state) {
  const int64_t tokens = state.range(0);
  const auto items = static_cast<size_t>(state.range(1));
  IdleBackend backend;
  CacheOptions options;
  options.tiers.push_back({"device", &backend, size_t{1} << 42, false});
  options.background_moves = false;
  options.max_tokens_per_append = tokens;
  const std::unique_ptr<KvCache> cache = KvCache::Create(options).value();
  const ModelId model = cache->RegisterModel(UniformModel("m", {1, 8, 128, 128}, 32)).value();
  SequenceOptions sequence;
  sequence.pair = ParseCachePair("q8_0/turbo4").value();
  const std::vector<float> kv(static_cast<size_t>(tokens) * 8 * 128, 0.5f), q(32 * 128, 0.1f);
  std::vector<float> out(items * 32 * 128), lse(items * 32);
  std::vector<AttendRequest> requests(items);
  for (size_t i = 0; i < items; i++) {
    AttendRequest& request = requests[i];
    request.sequence = cache->CreateSequence(model, sequence).value();
    const LayerKv layer{0, {kv.data(), DataType::kF32}, {kv.data(), DataType::kF32}, 0, 0};
    AppendCall append;
    append.sequence = request.sequence;
    append.tokens = tokens;
    append.layers = {&layer, 1};
    KVTIDE_CHECK(cache->Append(append).ok());
    request.q = {q.data(), DataType::kF32};
    request.queries = 1;
    request.out = out.data() + i * 32 * 128;
    request.lse = lse.data() + i * 32;
    request.new_tokens = 1;
    request.start_position = request.first_query_position = tokens;
    request.k = request.v = {kv.data(), DataType::kF32};
  }
  AttendCall call;
  call.items = requests;
  for (auto _ : state) {
    KVTIDE_CHECK(cache->AppendAttend(call).ok());
    for (AttendRequest& request : requests) request.start_position = ++request.first_query_position;
  }
  state.SetItemsProcessed(static_cast<int64_t>(items) * state.iterations());
}
BENCHMARK(AppendAttendCall)
    ->Args({64, 1})
    ->Args({4096, 1})
    ->Args({32768, 1})
    ->Args({131072, 1})
    ->Args({4096, 64})
    ->UseRealTime();

}  // namespace
}  // namespace kvtide::bench
