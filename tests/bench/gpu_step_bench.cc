// One decode step of a model as an engine on the same GPU runs it: DeviceDecode in a CUDA graph, the plan of
// the step and the attention of all layers, every layer with the f16 blocks of the default window (the first
// block, the last two and the tail) beside its coded ones; against the same with f16 pages only.
//   gpu_step_bench [--json FILE]
// Random codes and scales; each layer's records lie in the blocks as the daemon stores them. Median of 20
// replays; a step reads more than L2 holds.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "tests/bench/gpu_step.h"

namespace kvtide::bench {
namespace {

int Run(const std::string& json) {
  cudaDeviceProp device{};
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d layers, %d KV heads, %d query heads, d %d; microseconds of attention per step\n",
              device.name, kLayers, kKvHeads, kHeads, kDim);
  std::string text = "{\n  \"device\": \"" + std::string(device.name) +
                     "\",\n  \"layers\": " + std::to_string(kLayers) + ",\n  \"steps\": [";
  bool first = true;
  for (const Step& step : {Step{1, 8192}, Step{1, 131072}, Step{16, 8192}, Step{64, 4096}, Step{128, 1024}}) {
    double f16 = 0;
    for (const char* pair : {"f16", "q8_0", "q8_0/turbo4", "turbo4", "wht4", "turbo3"}) {
      double megabytes = 0;
      size_t plan_bytes = 0;
      const double us = StepMicroseconds(pair, step, &megabytes, &plan_bytes);
      if (f16 == 0) f16 = us;
      std::printf("%4d x %6d  %-12s %9.0f us  %8.0f MB  %5.2fx of f16\n", step.sequences, step.tokens, pair,
                  us, megabytes, f16 / us);
      char line[400];
      std::snprintf(line, sizeof(line),
                    "%s\n    {\"pair\": \"%s\", \"sequences\": %d, \"tokens\": %d, \"step_us\": %.1f, "
                    "\"megabytes\": %.1f, "
                    "\"f16_pages_over_this\": %.3f, \"plan_and_state_bytes\": %zu}",
                    first ? "" : ",", pair, step.sequences, step.tokens, us, megabytes, f16 / us, plan_bytes);
      text += line;
      first = false;
    }
  }
  text += "\n  ]\n}\n";
  if (!json.empty()) {
    std::ofstream file(json);
    file << text;
    if (!file.flush()) {
      std::printf("cannot write %s\n", json.c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  std::string json;
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else {
      std::printf("usage: gpu_step_bench [--json FILE]\n");
      return 2;
    }
  }
  return kvtide::bench::Run(json);
}
