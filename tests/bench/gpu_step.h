// One decode step of a model in a CUDA graph, for the benchmarks that measure it or stand beside it:
// DeviceDecode plans the step and attends in all layers, every layer with the f16 blocks of the default
// window (the first block, the last two and the tail) beside its coded ones. Random codes and scales; each
// layer's records lie in the blocks as the daemon stores them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/step/device_decode.h"
#include "tests/bench/gpu_check.h"

namespace kvtide::bench {

inline constexpr int kLayers = 32, kKvHeads = 8, kHeads = 32, kDim = 128, kWindowTokens = 3 * kBlockTokens,
                     kTailTokens = 20;

template <class T>
T* Upload(const std::vector<T>& values, std::vector<void*>* owned) {
  void* p = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&p, values.size() * sizeof(T)));
  KVTIDE_BENCH_CUDA(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  owned->push_back(p);
  return static_cast<T*>(p);
}

// Blocks in device memory: a few random ones, repeated; the tables lead to each in shuffled order.
inline std::vector<std::byte*> MakeBlocks(const BlockLayout& layout, size_t blocks, std::mt19937& rng,
                                          std::vector<void*>* owned) {
  std::vector<std::byte> some(layout.block_bytes() * 4);
  for (std::byte& b : some) b = static_cast<std::byte>(rng());
  const bool calibrated = Info(layout.pair().k).calibrated;  // gains of 1 to 2
  for (size_t record = 0; calibrated && record < some.size(); record += layout.record_bytes())
    for (size_t i = 0; i < layout.k().scale_bytes; i++)
      some[record + layout.k().code_bytes + i] = static_cast<std::byte>(1 + rng() % 17);
  for (size_t record = 0; record < some.size(); record += layout.record_bytes())
    for (const auto& [half, start] :
         {std::pair{layout.k(), size_t{0}}, std::pair{layout.v(), layout.v_codes()}}) {
      if (calibrated && start == 0) continue;
      const size_t at = record + start + (half.groups == 0 ? 0 : half.code_bytes);
      for (size_t i = 1; i < (half.groups == 0 ? half.code_bytes : half.scale_bytes); i += 2)
        some[at + i] = static_cast<std::byte>(0x28 + rng() % 8);
    }
  void* data = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&data, layout.block_bytes() * blocks));
  owned->push_back(data);
  std::vector<std::byte*> table(blocks);
  for (size_t i = 0; i < blocks; i++) {
    table[i] = static_cast<std::byte*>(data) + i * layout.block_bytes();
    const size_t bytes = layout.block_bytes() * std::min<size_t>(4, blocks - i);
    if (i == 0)
      KVTIDE_BENCH_CUDA(cudaMemcpy(data, some.data(), bytes, cudaMemcpyHostToDevice));
    else if (i % 4 == 0)
      KVTIDE_BENCH_CUDA(cudaMemcpyAsync(table[i], data, bytes, cudaMemcpyDeviceToDevice));
  }
  std::shuffle(table.begin(), table.end(), rng);
  return table;
}

struct Step {
  int sequences, tokens;
};

// Microseconds of a step, median of 20 replays.
inline double StepMicroseconds(const char* pair_name, const Step& step, double* megabytes,
                               size_t* plan_bytes) {
  std::vector<void*> owned;
  std::mt19937 rng(3);
  const GroupShape shape{kLayers, kKvHeads, kDim, kDim};
  const CachePair pair = *ParseCachePair(pair_name);
  const bool all_exact = pair == ExactPair();
  const BlockLayout coded(shape, pair), exact(shape, ExactPair());
  const int exact_tokens = (all_exact ? step.tokens : kWindowTokens) + kTailTokens,
            coded_tokens = all_exact ? 0 : step.tokens - kWindowTokens;
  DecodeOptions options;
  options.shape = shape;
  options.pair = pair;
  options.heads = kHeads;
  options.max_sequences = step.sequences;
  options.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
  const size_t sequences = static_cast<size_t>(step.sequences);
  *megabytes = 0;
  const auto table = [&](const BlockLayout& layout, int tokens) {
    DecodeTable t;
    t.max_blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    const std::vector<std::byte*> blocks =
        MakeBlocks(layout, sequences * static_cast<size_t>(t.max_blocks), rng, &owned);
    t.blocks = Upload(blocks, &owned);
    t.tokens = Upload(std::vector<int32_t>(sequences, tokens), &owned);
    *megabytes += static_cast<double>(layout.block_bytes() * blocks.size()) / 1e6;
    return t;
  };
  if (coded_tokens > 0) options.coded = table(coded, coded_tokens);
  options.exact = table(exact, exact_tokens);
  const uint16_t* q = Upload(std::vector<uint16_t>(sequences * kHeads * kDim, 0x3400), &owned);
  uint16_t* out = Upload(std::vector<uint16_t>(sequences * kHeads * kDim), &owned);
  float* lse = Upload(std::vector<float>(sequences * kHeads), &owned);
  std::vector<DecodeLayer> layers(kLayers);
  for (int l = 0; l < kLayers; l++) {
    DecodeLayer& layer = layers[static_cast<size_t>(l)];
    layer.layer = l;
    layer.q = q;
    layer.out = out;
    layer.lse = lse;
  }
  auto decode = DeviceDecode::Make(options, layers);
  if (!decode.ok()) {
    std::printf("%s\n", std::string(decode.status().message()).c_str());
    std::exit(1);
  }
  *plan_bytes = (*decode)->device_bytes();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  KVTIDE_BENCH_CUDA(cudaStreamCreate(&stream));
  KVTIDE_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  bool ok = (*decode)->Plan(stream).ok();
  for (int l = 0; l < kLayers; l++) ok = (*decode)->Attend(l, stream).ok() && ok;
  KVTIDE_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
  if (!ok) std::exit(1);
  KVTIDE_BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  KVTIDE_BENCH_CUDA(cudaEventCreate(&begin));
  KVTIDE_BENCH_CUDA(cudaEventCreate(&end));
  std::vector<double> us;
  for (int i = 0; i < 23; i++) {
    KVTIDE_BENCH_CUDA(cudaEventRecord(begin, stream));
    KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec, stream));
    KVTIDE_BENCH_CUDA(cudaEventRecord(end, stream));
    KVTIDE_BENCH_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) us.push_back(1e3 * static_cast<double>(ms));
  }
  std::sort(us.begin(), us.end());
  KVTIDE_BENCH_CUDA(cudaGraphExecDestroy(exec));
  KVTIDE_BENCH_CUDA(cudaGraphDestroy(graph));
  KVTIDE_BENCH_CUDA(cudaStreamDestroy(stream));
  KVTIDE_BENCH_CUDA(cudaEventDestroy(begin));
  KVTIDE_BENCH_CUDA(cudaEventDestroy(end));
  for (void* p : owned) KVTIDE_BENCH_CUDA(cudaFree(p));
  return us[us.size() / 2];
}

}  // namespace kvtide::bench
