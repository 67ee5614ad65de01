// The planner's speed: every model x card x context x measured pair of the catalogue must take under 2
// seconds, one plan under 20 ms. Prints and, when a limit is passed, fails.
#include <benchmark/benchmark.h>

#include <chrono>

#include "planner/model/catalogue.h"
#include "planner/render/render.h"

namespace {

using namespace kvtide::planner;

// Harms for every pair that kvtide has, so that all of them take part.
std::vector<QualityRow> AllMeasured() {
  std::vector<QualityRow> rows;
  for (const TypePair& pair : DefaultPairs({.engine = Engine::kKvtide}, false)) {
    QualityRow row;
    row.model = "bench";
    row.pair = pair;
    row.window_policy = "default";
    row.context = 4096;
    row.ppl_change_percent = 0.01 * static_cast<double>(rows.size() + 1);
    rows.push_back(row);
  }
  return rows;
}

const std::vector<int64_t> kContexts = {1024,  2048,  4096,  8192,   16384,  24576,
                                        32768, 49152, 65536, 131072, 196608, 262144};

PlanRequest Request(const ModelGeometry& model, const DeviceBudget& device, Engine engine) {
  PlanRequest request;
  request.model = model;
  request.device = device;
  request.device.host_bytes = int64_t{64} << 30;
  request.engine.engine = engine;
  request.weights.bytes = model.params_total > 0 ? model.params_total / 2 : int64_t{4} << 30;
  request.workload.contexts = kContexts;
  request.quality = AllMeasured();
  return request;
}

int64_t PlanCatalogue(Engine engine) {
  int64_t plans = 0;
  for (const ModelGeometry& model : CatalogueModels()) {
    for (const DeviceBudget& device : CatalogueGpus()) {
      const auto plan = MakePlan(Request(model, device, engine));
      plans += plan.ok() ? static_cast<int64_t>(plan->contexts.size()) : 0;
    }
  }
  return plans;
}

void BM_OnePlan(benchmark::State& state) {
  PlanRequest request =
      Request(*FindModel("gemma-4-26b-a4b"), *FindGpu("RTX 5080"), static_cast<Engine>(state.range(0)));
  request.workload.contexts = {32768};
  double total_ms = 0;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    benchmark::DoNotOptimize(RenderJson(request, *MakePlan(request)));
    total_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  if (total_ms > 20 * static_cast<double>(state.iterations()))
    state.SkipWithError("one plan took more than 20 ms on average");
}
BENCHMARK(BM_OnePlan)->Arg(0)->Arg(1)->Arg(2)->Unit(benchmark::kMicrosecond);

void BM_WholeCatalogue(benchmark::State& state) {
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t plans = PlanCatalogue(static_cast<Engine>(state.range(0)));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    state.counters["contexts_planned"] = static_cast<double>(plans);
    if (seconds > 2) state.SkipWithError("the catalogue took more than 2 s");
  }
}
BENCHMARK(BM_WholeCatalogue)->Arg(0)->Arg(1)->Arg(2)->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
