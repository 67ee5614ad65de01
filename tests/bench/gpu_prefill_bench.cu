// Prefill on a GPU: chunks of many queries at the end of a long context, with the prefill kernels and with
// the kernels for few rows, which the prefill replaces; and where the two cross. Times are those of the
// kernels (decoding included), between events; median of several calls over buffers in turn. The relative
// error is between the two ways: the kernels for few rows are within 1e-5 (coded) or 1e-6 (f16) of float64.
//   gpu_prefill_bench [--json FILE] [--quick 1] [--compare 0] [--warpgroups 0]
// --compare 0: long chunks only, without the kernels for few rows; --warpgroups 0: the prefill kernels for
// any compute capability.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/layer_plan.h"
#include "kernels/cuda/prefill/prefill_call.h"
#include "tests/bench/gpu_fill.cuh"

namespace kvtide::cuda {
namespace {

struct Shape {
  const char* pair;
  int queries, tokens, heads, kv_heads, dim;
  bool compare;  // with the kernels for few rows
};
constexpr Shape kShapes[] = {
    {"f16", 512, 8192, 32, 8, 128, true},      {"turbo4", 512, 8192, 32, 8, 128, true},
    {"f16", 512, 32768, 32, 8, 128, false},    {"turbo4", 512, 32768, 32, 8, 128, true},
    {"f16", 2048, 8192, 32, 8, 128, false},    {"turbo4", 2048, 8192, 32, 8, 128, false},
    {"f16", 2048, 32768, 32, 8, 128, false},   {"turbo4", 2048, 32768, 32, 8, 128, true},
    {"turbo4", 2048, 2048, 32, 8, 128, true},  {"turbo3", 512, 32768, 32, 8, 128, false},
    {"q8_0", 512, 32768, 32, 8, 128, false},   {"turbo4", 512, 32768, 32, 8, 64, false},
    {"turbo4", 512, 32768, 16, 4, 256, false}, {"turbo4", 5, 8192, 32, 8, 128, true},
    {"turbo4", 8, 8192, 32, 8, 128, true},     {"turbo4", 16, 8192, 32, 8, 128, true},
    {"turbo4", 32, 8192, 32, 8, 128, true},    {"turbo4", 64, 8192, 32, 8, 128, true},
    {"turbo4", 128, 8192, 32, 8, 128, true},   {"turbo4", 64, 32768, 32, 8, 128, true},
    {"turbo4", 128, 32768, 32, 8, 128, true},  {"f16", 64, 8192, 32, 8, 128, true},
    {"f16", 64, 32768, 32, 8, 128, true},      {"f16", 8, 8192, 32, 8, 128, true},
    {"f16", 16, 8192, 32, 8, 128, true},       {"f16", 32, 8192, 32, 8, 128, true},
};

#define CHECK_OK(x)                                                \
  do {                                                             \
    const absl::Status status_ = (x);                              \
    if (!status_.ok()) {                                           \
      std::printf("%s\n", std::string(status_.message()).c_str()); \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

std::string RunShape(const Shape& s, int processors, bool warpgroups, bool compare) {
  const GroupShape shape{1, s.kv_heads, s.dim, s.dim};
  const BlockLayout layout(shape, *ParseCachePair(s.pair));
  const size_t pages = static_cast<size_t>(s.tokens / kBlockTokens);
  const size_t copies = std::clamp<size_t>((size_t{200} << 20) / (pages * layout.block_bytes()) + 1, 1, 8);
  std::byte* data = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&data, copies * pages * layout.block_bytes()));
  bench::FillBlocks(layout, copies * pages, data, 1);
  std::mt19937 rng(7);
  std::vector<std::vector<std::byte*>> blocks(copies);
  for (size_t i = 0; i < copies; i++) {
    for (size_t p = 0; p < pages; p++) blocks[i].push_back(data + (i * pages + p) * layout.block_bytes());
    std::shuffle(blocks[i].begin(), blocks[i].end(), rng);
  }
  const size_t rows = static_cast<size_t>(s.queries * s.heads);
  std::vector<float> q(rows * static_cast<size_t>(s.dim)), out[2], lse(rows);
  std::normal_distribution<float> normal;
  for (float& x : q) x = normal(rng);
  Rotations rotations;
  ProfileStore profiles;
  Workspace workspace;
  CHECK_OK(workspace.Create());
  AttendEnvironment environment;
  environment.processors = processors;
  environment.scratch_bytes = size_t{256} << 20;
  environment.rotations = &rotations;
  environment.profiles = &profiles;
  environment.warpgroups = warpgroups;
  KVTIDE_BENCH_CUDA(cudaEventCreate(&environment.begin));
  KVTIDE_BENCH_CUDA(cudaEventCreate(&environment.end));
  double us[2] = {0, 0};
  for (int way = 0; way < (compare ? 2 : 1); way++) {
    environment.most_decode_rows = way == 0 ? 0 : 1 << 30;
    out[way].assign(q.size(), NAN);
    std::vector<double> times;
    const int calls = way == 0 ? 9 : 3;
    for (int call = 0; call < calls; call++) {
      BlockRun run;
      run.layout = &layout;
      run.blocks = blocks[static_cast<size_t>(call + 1 == calls ? 0 : call) % copies];
      run.tokens = s.tokens;
      const PlanItem item{{&run, 1}, s.queries, s.tokens - s.queries};
      AttendPlanArgs plan_args;
      plan_args.heads = s.heads;
      plan_args.items = {&item, 1};
      auto plan = LayerPlan::Make(plan_args, environment, nullptr);
      CHECK_OK(plan.status());
      const LayerItem tensors{{q.data(), DataType::kF32}, {out[way].data(), DataType::kF32}, lse.data()};
      AttendLayerArgs args;
      args.scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
      args.items = {&tensors, 1};
      CHECK_OK((*plan)->Attend(args, environment, workspace));
      float ms = 0;
      KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, environment.begin, environment.end));
      if (call > 0) times.push_back(1e3 * static_cast<double>(ms));
    }
    std::sort(times.begin(), times.end());
    us[way] = times[times.size() / 2];
  }
  double worst = 0;
  for (size_t row = 0; compare && row < rows; row++) {
    double difference = 0, size = 0;
    for (size_t d = row * static_cast<size_t>(s.dim); d < (row + 1) * static_cast<size_t>(s.dim); d++) {
      const double a = static_cast<double>(out[0][d]), b = static_cast<double>(out[1][d]);
      difference += (a - b) * (a - b);
      size += b * b;
    }
    const double error = std::sqrt(difference / size);
    worst = error <= worst ? worst : error == error ? error : 1e9;
  }
  // Products of the visible part, times 2 for additions.
  const double seen =
      static_cast<double>(s.queries) * (static_cast<double>(s.tokens) - 0.5 * (s.queries - 1));
  const double flops = 4.0 * seen * s.heads * s.dim;
  KVTIDE_BENCH_CUDA(cudaFree(data));
  KVTIDE_BENCH_CUDA(cudaEventDestroy(environment.begin));
  KVTIDE_BENCH_CUDA(cudaEventDestroy(environment.end));
  std::printf(
      "%-7s %4d queries, %6d tokens, %2d/%d heads, d %3d | prefill %8.1f us %6.1f TFLOP/s | few rows %9.1f "
      "us (%5.1fx) | difference %.1e\n",
      s.pair, s.queries, s.tokens, s.heads, s.kv_heads, s.dim, us[0], flops / us[0] * 1e-6, us[1],
      us[1] / us[0], worst);
  std::fflush(stdout);
  char line[512];
  std::snprintf(line, sizeof(line),
                "{\"pair\": \"%s\", \"queries\": %d, \"tokens\": %d, \"heads\": %d, \"kv_heads\": %d, "
                "\"head_dim\": %d, \"prefill_us\": %.1f, "
                "\"tflops\": %.1f, \"few_rows_us\": %.1f, \"difference\": %.2e}",
                s.pair, s.queries, s.tokens, s.heads, s.kv_heads, s.dim, us[0], flops / us[0] * 1e-6, us[1],
                worst);
  return line;
}

}  // namespace

int Main(int argc, char** argv) {
  std::string json;
  bool quick = false, warpgroups = true, compare = true;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--json") == 0) json = argv[i + 1];
    if (std::strcmp(argv[i], "--quick") == 0) quick = true;
    if (std::strcmp(argv[i], "--compare") == 0) compare = argv[i + 1][0] != '0';
    if (std::strcmp(argv[i], "--warpgroups") == 0) warpgroups = argv[i + 1][0] != '0';
  }
  cudaDeviceProp device;
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  const auto image = FindDeviceImage(0);
  CHECK_OK(image.status());
  CHECK_OK(PrepareAttendKernels(*image));
  CHECK_OK(PreparePrefillKernels(*image));
  std::string rows;
  for (const Shape& s : kShapes) {
    if ((quick && (s.tokens > 8192 || s.dim != 128)) || (!compare && s.queries < 512)) continue;
    rows += (rows.empty() ? "\n    " : ",\n    ") +
            RunShape(s, device.multiProcessorCount, warpgroups, compare && s.compare);
  }
  if (!json.empty())
    std::ofstream(json) << "{\n  \"device\": \"" << device.name << "\",\n  \"shapes\": [" << rows
                        << "\n  ]\n}\n";
  return 0;
}

}  // namespace kvtide::cuda

int main(int argc, char** argv) { return kvtide::cuda::Main(argc, argv); }
