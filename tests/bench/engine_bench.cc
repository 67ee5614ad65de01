// Speed of the reference engine by itself: matrix products, attention over its own memory, whole chunks of
// tokens, and the tokenizer. Run from the repository root: build/dev/tests/bench/engine_bench
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/panel_matmul.h"
#include "clients/engine/tokenizer.h"

namespace kvtide::engine {
namespace {

constexpr char kModel[] = "clients/engine/models/tidelm-7m";

std::vector<float> Random(size_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(random);
  return x;
}

// Rows, outputs and inputs as in a 1B model's projections.
void BM_Multiply(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), n = 2048;
  ThreadPool pool(static_cast<int>(state.range(1)));
  std::vector<uint16_t> weights(static_cast<size_t>(n) * n, 0x3c00);
  const PackedMatrix matrix(weights.data(), DataType::kBf16, n, n);
  const std::vector<float> x = Random(static_cast<size_t>(rows) * n);
  std::vector<float> y(x.size());
  for (auto _ : state) matrix.Multiply(pool, x.data(), rows, nullptr, y.data());
  state.counters["FLOP/s"] = benchmark::Counter(
      2.0 * rows * n * n, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(BM_Multiply)->ArgNames({"rows", "threads"})->ArgsProduct({{1, 8, 512}, {1, 2}})->UseRealTime();

void BM_LocalDecode(benchmark::State& state) {
  const int64_t length = state.range(0);
  const KvGeometry g{1, 32, 8, 128, 0};
  ThreadPool pool(2);
  LocalKvStore store(g, DataType::kF16, pool);
  const SequenceId sequence = *store.CreateSequence();
  const std::vector<float> q = Random(length * g.query_width()), k = Random(length * g.kv_width());
  std::vector<float> out(q.size());
  for (int64_t at = 0; at < length; at += 512) {
    if (!store.AppendAttend(sequence, 0, at, 512, q.data(), k.data(), k.data(), out.data()).ok())
      std::abort();
  }
  for (auto _ : state) {
    if (!store.AppendAttend(sequence, 0, length, 1, q.data(), k.data(), k.data(), out.data()).ok())
      std::abort();
    if (!store.Truncate(sequence, length).ok()) std::abort();
  }
  state.SetBytesProcessed(state.iterations() * length * static_cast<int64_t>(g.kv_width()) * 2 * 2);
}
BENCHMARK(BM_LocalDecode)->ArgName("tokens")->Arg(4096)->Arg(32768)->UseRealTime();

void Prefill(benchmark::State& state, const std::string& path) {
  const int chunk = static_cast<int>(state.range(0));
  ThreadPool pool(2);
  const auto model = LlamaModel::Load(path, pool);
  if (!model.ok()) {
    state.SkipWithError(std::string(model.status().message()).c_str());
    return;
  }
  LocalKvStore store((*model)->kv_geometry(), DataType::kF16, pool);
  std::vector<int32_t> tokens(2048);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % 4096);
  std::vector<float> hidden;
  for (auto _ : state) {
    const SequenceId sequence = *store.CreateSequence();
    for (size_t at = 0; at < tokens.size(); at += chunk) {
      if (!(*model)
               ->Forward(store, sequence, at, {tokens.data() + at, static_cast<size_t>(chunk)}, &hidden)
               .ok()) {
        std::abort();
      }
    }
    if (!store.Close(sequence).ok()) std::abort();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<int64_t>(tokens.size()));
}

void BM_Prefill(benchmark::State& state) { Prefill(state, kModel); }
BENCHMARK(BM_Prefill)->ArgName("chunk")->Arg(64)->Arg(512)->Unit(benchmark::kMillisecond)->UseRealTime();

// A real model of 135M parameters; KVTIDE_MODELS is the folder of tests/models.sh.
void BM_PrefillSmolLm2(benchmark::State& state) {
  const char* folder = std::getenv("KVTIDE_MODELS");
  Prefill(state, std::string(folder == nullptr ? "." : folder) + "/smollm2-135m-q4_1.gguf");
}
BENCHMARK(BM_PrefillSmolLm2)
    ->ArgName("chunk")
    ->Arg(64)
    ->Arg(512)
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Encode(benchmark::State& state) {
  const auto tokenizer = Tokenizer::Load(kModel);
  std::ifstream in("tests/data/wikitext2_slice.txt", std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(in), {});
  if (!tokenizer.ok() || text.empty()) {
    state.SkipWithError("run it from the repository root");
    return;
  }
  for (auto _ : state) benchmark::DoNotOptimize((*tokenizer)->Encode(text));
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(text.size()));
}
BENCHMARK(BM_Encode)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace kvtide::engine

BENCHMARK_MAIN();
