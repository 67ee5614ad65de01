// One decode step through the daemon's cache, in process: KvCache on the CUDA backend, tensors in host
// memory, AppendAttend layer by layer with one new token of every sequence, as a server without the GPU's
// help of its own would call it; then with the tensors in memory that is registered with the driver, as the
// arenas of clients that share memory are. Beside it, in the same run: the kernels alone (DeviceDecode in a
// CUDA graph, gpu_step.h), and the backend alone (AttendLayer over a plan, Append of the new rows), so that
// what is between them has a name.
//   gpu_cache_step_bench [--json FILE] [--device cuda:0|cpu] [--quick] [--in-place BYTES] [--second-hand 0|1]
// Per layer: median and mean over all layers of `steps` steps after two that warm up; the mean holds what a
// step pays once, as its plan. --quick, which is what the CPU takes seconds for, has short sequences and few
// layers.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/result_file.h"
#ifdef KVTIDE_BENCH_HAS_CUDA
#include "kernels/cuda/cuda_backend.h"
#include "tests/bench/gpu_step.h"
#endif

namespace kvtide::bench {
namespace {

constexpr int kNumKvHeads = 8, kNumHeads = 32, kHeadDim = 128;
constexpr size_t kKvRow = kNumKvHeads * kHeadDim, kQRow = kNumHeads * kHeadDim;

struct Shape {
  const char* pair;
  int sequences, tokens;
};
struct Settings {
  std::string device = "cuda:0";
  bool quick = false;
  long in_place_bytes = -1;  // -1: the backend's own
  bool second_hand = true;
  int layers() const { return quick ? 4 : 32; }
  int steps() const { return quick ? 3 : 10; }
};
struct Measured {
  double cache_p50 = 0, cache_mean = 0, pinned_p50 = 0, pinned_mean = 0, attend_p50 = 0, append_p50 = 0,
         bare = 0, plan_us = 0;
};

double Now() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
double Median(std::vector<double> us) {
  std::nth_element(us.begin(), us.begin() + static_cast<std::ptrdiff_t>(us.size() / 2), us.end());
  return us[us.size() / 2];
}
double Mean(const std::vector<double>& us) {
  double sum = 0;
  for (const double x : us) sum += x;
  return sum / static_cast<double>(us.size());
}

std::unique_ptr<Backend> MakeBackend(const Settings& settings) {
  const std::string& device = settings.device;
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (device != "cpu") {
    CudaBackendOptions options;
    options.device = device.substr(device.find(':') + 1);
    options.second_hand = settings.second_hand;
    if (settings.in_place_bytes >= 0) options.in_place_bytes = static_cast<size_t>(settings.in_place_bytes);
    auto backend = MakeCudaBackend(options);
    KVTIDE_CHECK(backend.ok(), std::string(backend.status().message()));
    return std::move(backend).value();
  }
#endif
  KVTIDE_CHECK(device == "cpu", "this build has no CUDA backend; --device cpu");
  return MakeCpuBackend();
}

std::vector<uint16_t> RandomHalves(size_t count, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint16_t> values(count);  // magnitudes 1/2 to 2
  for (uint16_t& x : values) x = static_cast<uint16_t>(0x3800u | (rng() & 0x87ffu));
  return values;
}

// What a step brings and takes, f16, in one piece of memory that can be registered with the driver, as an
// engine's arena is.
class StepTensors {
 public:
  explicit StepTensors(size_t sequences)
      : lse(sequences * kNumHeads),
        q_values_(sequences * kQRow),
        kv_values_(sequences * kKvRow),
        values_(RandomHalves(bytes() / 2 + kPage / 2, 2)),
        begin_((kPage - reinterpret_cast<uintptr_t>(values_.data()) % kPage) % kPage / 2) {}
  uint16_t* q() { return values_.data() + begin_; }
  uint16_t* out() { return q() + q_values_; }
  uint16_t* k() { return out() + q_values_; }
  uint16_t* v() { return k() + kv_values_; }
  std::byte* data() { return reinterpret_cast<std::byte*>(q()); }
  size_t bytes() const { return (2 * q_values_ + 2 * kv_values_) * 2; }

  std::vector<float> lse;

 private:
  static constexpr size_t kPage = 4096;
  const size_t q_values_, kv_values_;
  std::vector<uint16_t> values_;
  const size_t begin_;
};

void MeasureCache(const Settings& settings, const Shape& shape, Measured* measured) {
  const std::unique_ptr<Backend> backend = MakeBackend(settings);
  const GroupShape group{settings.layers(), kNumKvHeads, kHeadDim, kHeadDim};
  const CachePair pair = ParseCachePair(shape.pair).value();
  const size_t sequences = static_cast<size_t>(shape.sequences), tokens = static_cast<size_t>(shape.tokens);
  const size_t chunk = std::min<size_t>(tokens, settings.quick ? 512 : 2048);
  CacheOptions options;
  const size_t blocks = tokens / kBlockTokens + 4;
  options.tiers.push_back(
      {"device",
       backend.get(),
       sequences * (blocks * BlockLayout(group, pair).block_bytes() +
                    (chunk / kBlockTokens + 8) * BlockLayout(group, ExactPair()).block_bytes()) +
           (size_t{64} << 20),
       false,
       {}});
  options.background_moves = false;
  options.max_tokens_per_append = 1 << 16;
  auto created = KvCache::Create(options);
  KVTIDE_CHECK(created.ok(), std::string(created.status().message()));
  const std::unique_ptr<KvCache> cache = std::move(created).value();
  const ModelId model = cache->RegisterModel(UniformModel("m", group, kNumHeads)).value();
  SequenceOptions sequence_options;
  sequence_options.pair = pair;
  std::vector<SequenceId> ids;
  for (size_t i = 0; i < sequences; i++)
    ids.push_back(cache->CreateSequence(model, sequence_options).value());

  // The same values in every layer: what is read costs the same.
  const std::vector<uint16_t> fill = RandomHalves(chunk * kKvRow + 4096, 1);
  std::vector<std::thread> threads;
  const size_t workers = settings.quick ? 1 : 8;
  for (size_t w = 0; w < workers; w++)
    threads.emplace_back([&, w] {
      for (size_t i = w; i < sequences; i += workers)
        for (size_t at = 0; at < tokens; at += chunk) {
          const size_t count = std::min(chunk, tokens - at);
          std::vector<LayerKv> layers;
          for (int l = 0; l < settings.layers(); l++)
            layers.push_back(
                {l, {fill.data() + i * 8, DataType::kF16}, {fill.data() + i * 16, DataType::kF16}, 0, 0});
          AppendCall append;
          append.sequence = ids[i];
          append.start_position = static_cast<int64_t>(at);
          append.tokens = static_cast<int64_t>(count);
          append.layers = layers;
          const absl::Status status = cache->Append(append);
          KVTIDE_CHECK(status.ok(), std::string(status.message()));
        }
    });
  for (std::thread& thread : threads) thread.join();

  StepTensors tensors(sequences);
  int64_t position = static_cast<int64_t>(tokens);
  // Microseconds of the layers of `steps` steps after two that warm up.
  const auto measure = [&] {
    std::vector<double> us;
    std::vector<AttendRequest> requests(sequences);
    for (int step = 0; step < settings.steps() + 2; step++, position++)
      for (int layer = 0; layer < settings.layers(); layer++) {
        const double begin = Now();
        for (size_t i = 0; i < sequences; i++) {
          AttendRequest& request = requests[i];
          request.sequence = ids[i];
          request.q = {tensors.q() + i * kQRow, DataType::kF16};
          request.queries = 1;
          request.first_query_position = request.start_position = position;
          request.out = {tensors.out() + i * kQRow, DataType::kF16};
          request.lse = tensors.lse.data() + i * kNumHeads;
          request.new_tokens = 1;
          request.k = {tensors.k() + i * kKvRow, DataType::kF16};
          request.v = {tensors.v() + i * kKvRow, DataType::kF16};
        }
        AttendCall call;
        call.layer = layer;
        call.items = requests;
        const absl::Status status = cache->AppendAttend(call);
        KVTIDE_CHECK(status.ok(), std::string(status.message()));
        if (step >= 2) us.push_back(Now() - begin);
      }
    for (const float x : tensors.lse) KVTIDE_CHECK(std::isfinite(x), "a result is not finite");
    return us;
  };
  const std::vector<double> us = measure();
  measured->cache_p50 = Median(us);
  measured->cache_mean = Mean(us);
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (settings.device == "cpu") return;
  const auto range = PinnedRange::Make(tensors.data(), tensors.bytes());
  KVTIDE_CHECK(range.ok(), std::string(range.status().message()));
  const std::vector<double> pinned = measure();
  measured->pinned_p50 = Median(pinned);
  measured->pinned_mean = Mean(pinned);
#endif
}

// The backend's own calls over blocks of one layer.
void MeasureBackend(const Settings& settings, const Shape& shape, Measured* measured) {
  const std::unique_ptr<Backend> backend = MakeBackend(settings);
  const GroupShape group{settings.layers(), kNumKvHeads, kHeadDim, kHeadDim};
  const BlockLayout coded(group, ParseCachePair(shape.pair).value()), exact(group, ExactPair());
  const size_t sequences = static_cast<size_t>(shape.sequences);
  const int64_t coded_tokens = shape.tokens - 3 * kBlockTokens, coded_blocks = coded_tokens / kBlockTokens;
  // Every sequence reads the same blocks: what the kernels take is not asked here, gpu_step.h says it.
  auto slab = backend->AllocateSlab(coded.block_bytes() * static_cast<size_t>(coded_blocks) +
                                    exact.block_bytes() * 4 * sequences);
  KVTIDE_CHECK(slab.ok(), std::string(slab.status().message()));
  std::vector<std::byte*> coded_table, exact_table;
  std::byte* at = (*slab)->data();
  for (int64_t b = 0; b < coded_blocks; b++, at += coded.block_bytes()) coded_table.push_back(at);
  for (size_t b = 0; b < 4 * sequences; b++, at += exact.block_bytes()) exact_table.push_back(at);
  std::vector<BlockRun> runs(3 * sequences);
  std::vector<PlanItem> items(sequences);
  for (size_t i = 0; i < sequences; i++) {
    const std::span<std::byte* const> own(exact_table.data() + 4 * i, 4);
    runs[3 * i] = {&exact, nullptr, own.first(1), 0, kBlockTokens};
    runs[3 * i + 1] = {&coded, nullptr, coded_table, kBlockTokens, coded_tokens};
    runs[3 * i + 2] = {&exact, nullptr, own.subspan(1), kBlockTokens + coded_tokens, 2 * kBlockTokens + 1};
    items[i] = {{&runs[3 * i], 3}, 1, shape.tokens};
  }
  const std::vector<uint16_t> q = RandomHalves(sequences * kQRow, 2), k = RandomHalves(sequences * kKvRow, 3),
                              v = RandomHalves(sequences * kKvRow, 4);
  std::vector<uint16_t> out(sequences * kQRow);
  std::vector<float> lse(sequences * kNumHeads);
  std::vector<LayerItem> layer_items(sequences);
  for (size_t i = 0; i < sequences; i++)
    layer_items[i] = {{q.data() + i * kQRow, DataType::kF16},
                      {out.data() + i * kQRow, DataType::kF16},
                      lse.data() + i * kNumHeads};
  AttendPlanArgs plan_args;
  plan_args.heads = kNumHeads;
  plan_args.items = items;
  std::unique_ptr<AttendPlan> plan;
  std::vector<double> plan_us, attend_us, append_us;
  for (int step = 0; step < settings.steps() + 2; step++) {
    for (PlanItem& item : items) item.first_query_position = shape.tokens + step % 40;
    for (size_t i = 0; i < sequences; i++) runs[3 * i + 2].tokens = 2 * kBlockTokens + 1 + step % 40;
    double begin = Now();
    auto made = backend->PlanAttend(plan_args, std::move(plan));
    KVTIDE_CHECK(made.ok(), std::string(made.status().message()));
    plan = std::move(made).value();
    if (step >= 2) plan_us.push_back(Now() - begin);
    for (int layer = 0; layer < settings.layers(); layer++) {
      begin = Now();
      std::vector<AppendPiece> pieces(sequences);
      for (size_t i = 0; i < sequences; i++) {
        pieces[i] = {&exact, exact_table[4 * i + 3], layer, step % 40, 1, 0};
        pieces[i].k = {k.data() + i * kKvRow, DataType::kF16};
        pieces[i].v = {v.data() + i * kKvRow, DataType::kF16};
      }
      AppendArgs append;
      append.pieces = pieces;
      KVTIDE_CHECK(backend->Append(append).ok(), "append");
      const double appended = Now();
      AttendLayerArgs args;
      args.layer = layer;
      args.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
      args.items = layer_items;
      const absl::Status status = backend->AttendLayer(*plan, args);
      KVTIDE_CHECK(status.ok(), std::string(status.message()));
      if (step >= 2) {
        append_us.push_back(appended - begin);
        attend_us.push_back(Now() - appended);
      }
    }
  }
  measured->plan_us = Median(plan_us);
  measured->attend_p50 = Median(attend_us);
  measured->append_p50 = Median(append_us);
}

int Run(const Settings& settings, const std::string& json) {
  Result result = {{"layers", settings.layers()}, {"device", settings.device}, {"steps", Result::array()}};
  std::printf("%s, %d layers, %d KV heads, %d query heads, d %d; microseconds per layer\n",
              settings.device.c_str(), settings.layers(), kNumKvHeads, kNumHeads, kHeadDim);
  const std::vector<Shape> shapes =
      settings.quick ? std::vector<Shape>{{"turbo4", 2, 1024}, {"q8_0", 1, 512}}
                     : std::vector<Shape>{{"turbo4", 33, 32768}, {"turbo4", 1, 8192}, {"f16", 1, 8192}};
  for (const Shape& shape : shapes) {
    Measured m;
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (settings.device != "cpu") {
      double megabytes = 0;
      size_t plan_bytes = 0;
      m.bare =
          StepMicroseconds(shape.pair, {shape.sequences, shape.tokens}, &megabytes, &plan_bytes) / kLayers;
    }
#endif
    MeasureBackend(settings, shape, &m);
    MeasureCache(settings, shape, &m);
    std::printf(
        "%-8s %3d x %6d  AppendAttend %8.1f (mean %8.1f), in registered memory %8.1f (mean %8.1f)  kernels "
        "%8.1f  above them %7.1f, %7.1f   backend: attend %8.1f, append %7.1f, plan %7.1f a step\n",
        shape.pair, shape.sequences, shape.tokens, m.cache_p50, m.cache_mean, m.pinned_p50, m.pinned_mean,
        m.bare, m.cache_p50 - m.bare, m.pinned_p50 - m.bare, m.attend_p50, m.append_p50, m.plan_us);
    result["steps"].push_back({{"pair", shape.pair},
                               {"sequences", shape.sequences},
                               {"tokens", shape.tokens},
                               {"append_attend_p50_us", Tenth(m.cache_p50)},
                               {"append_attend_mean_us", Tenth(m.cache_mean)},
                               {"registered_p50_us", Tenth(m.pinned_p50)},
                               {"registered_mean_us", Tenth(m.pinned_mean)},
                               {"kernels_us", Tenth(m.bare)},
                               {"above_kernels_us", Tenth(m.cache_p50 - m.bare)},
                               {"registered_above_kernels_us", Tenth(m.pinned_p50 - m.bare)},
                               {"backend_attend_p50_us", Tenth(m.attend_p50)},
                               {"backend_append_p50_us", Tenth(m.append_p50)},
                               {"backend_plan_us", Tenth(m.plan_us)}});
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  kvtide::bench::Settings settings;
  std::string json;
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
      settings.device = argv[++i];
    } else if (std::strcmp(argv[i], "--in-place") == 0 && i + 1 < argc) {
      settings.in_place_bytes = std::atol(argv[++i]);
    } else if (std::strcmp(argv[i], "--second-hand") == 0 && i + 1 < argc) {
      settings.second_hand = std::atoi(argv[++i]) != 0;
    } else if (std::strcmp(argv[i], "--quick") == 0) {
      settings.quick = true;
    } else {
      std::printf(
          "usage: gpu_cache_step_bench [--json FILE] [--device cuda:0|cpu] [--quick] [--in-place BYTES] "
          "[--second-hand 0|1]\n");
      return 2;
    }
  }
  return kvtide::bench::Run(settings, json);
}
