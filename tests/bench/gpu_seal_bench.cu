// Rates of the encoders (seals) and decoders of the CUDA backend, in bytes read plus bytes written, beside a
// copy inside the device in the same run. Kernels only, between events, over more data than three times the
// L2; median of several launches.
//   gpu_seal_bench [--json FILE] [--only TYPE]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/cuda/codec/codec_kernels.h"
#include "tests/bench/gpu_fill.cuh"

namespace kvtide::cuda {
namespace {

template <class F>
double MedianSeconds(F call) {
  cudaEvent_t begin, end;
  KVTIDE_BENCH_CUDA(cudaEventCreate(&begin));
  KVTIDE_BENCH_CUDA(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < 13; i++) {
    KVTIDE_BENCH_CUDA(cudaEventRecord(begin));
    call();
    KVTIDE_BENCH_CUDA(cudaEventRecord(end));
    KVTIDE_BENCH_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) seconds.push_back(1e-3 * static_cast<double>(ms));
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

template <class T>
T* Device(const std::vector<T>& values) {
  T* p = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&p, values.size() * sizeof(T)));
  KVTIDE_BENCH_CUDA(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

struct Row {
  std::string what;
  double gigabytes_per_second, of_copy;
};

int Main(int argc, char** argv) {
  cudaDeviceProp device;
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  std::vector<Row> rows;
  constexpr size_t kCopyBytes = size_t{512} << 20;
  std::byte *a = nullptr, *b = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&a, kCopyBytes));
  KVTIDE_BENCH_CUDA(cudaMalloc(&b, kCopyBytes));
  bench::FillRandomWords<<<2048, 256>>>(reinterpret_cast<uint32_t*>(a), kCopyBytes / 4, 1);
  const double copy =
      2e-9 * static_cast<double>(kCopyBytes) / MedianSeconds([&] {
        KVTIDE_BENCH_CUDA(cudaMemcpyAsync(b, a, kCopyBytes, cudaMemcpyDeviceToDevice, nullptr));
      });
  KVTIDE_BENCH_CUDA(cudaFree(a));
  KVTIDE_BENCH_CUDA(cudaFree(b));
  const auto report = [&](const std::string& what, double bytes, double seconds) {
    rows.push_back({what, 1e-9 * bytes / seconds, 1e-9 * bytes / seconds / copy});
    std::printf("%-44s %8.1f GB/s  %5.1f %% of a copy\n", what.c_str(), rows.back().gigabytes_per_second,
                100 * rows.back().of_copy);
    std::fflush(stdout);
  };
  report("copy inside the device", copy * 1e9, 1);

  const char* only = nullptr;
  for (int i = 1; i + 1 < argc; i += 2)
    if (std::strcmp(argv[i], "--only") == 0) only = argv[i + 1];
  for (const int dim : {128, 64, 256})
    for (const char* name :
         {"turbo4", "wht4", "turbo3", "turbo2", "q8_0", "q5_0", "q4_0", "planar4", "iso4", "rotor4", "f16"}) {
      if (dim != 128 && std::strcmp(name, "turbo4") != 0) continue;
      if (only != nullptr && std::strcmp(name, only) != 0) continue;
      const GroupShape shape{8, 8, dim, dim};
      const BlockLayout exact(shape, ExactPair()), coded(shape, *ParseCachePair(name));
      constexpr size_t kBlocks = 512;  // the f16 keys are as large as the copy at head dim 128
      std::byte *from = nullptr, *to = nullptr, *tiles = nullptr;
      KVTIDE_BENCH_CUDA(cudaMalloc(&from, exact.block_bytes() * kBlocks));
      KVTIDE_BENCH_CUDA(cudaMalloc(&to, coded.block_bytes() * kBlocks));
      KVTIDE_BENCH_CUDA(cudaMalloc(&tiles, exact.block_bytes() * kBlocks));
      bench::FillBlocks(exact, kBlocks, from, 3);
      const std::vector<float> mean(static_cast<size_t>(dim), 0.1f);
      const float* const mean_device = Device(mean);
      for (const bool key : {true, false})
        for (const bool centred : {false, true}) {
          if (centred && (!key || dim != 128)) continue;
          const size_t records = kBlocks * static_cast<size_t>(shape.layers * shape.kv_heads);
          std::vector<CodecJob> seals, decodes;
          for (size_t i = 0; i < records; i++) {
            CodecJob job;
            job.source = from + i * exact.record_bytes() + (key ? 0 : exact.v_codes());
            job.target = to + i * coded.record_bytes() + (key ? 0 : coded.v_codes());
            job.mean = centred ? mean_device : nullptr;
            seals.push_back(job);
            job.source = job.target;
            job.target = tiles + i * exact.record_bytes() + (key ? 0 : exact.v_codes());
            decodes.push_back(job);
          }
          const CodecJob *seals_device = Device(seals), *decodes_device = Device(decodes);
          const Side side = key ? Side::kKey : Side::kValue;
          const HalfLayout& half = key ? coded.k() : coded.v();
          const CacheType type = key ? coded.pair().k : coded.pair().v;
          const double bytes = static_cast<double>(records) *
                               static_cast<double>((key ? exact.k() : exact.v()).code_bytes +
                                                   half.code_bytes + static_cast<size_t>(half.groups) * 128);
          const std::string label = std::string(name) +
                                    (key ? centred ? " keys, centred" : " keys" : " values") + ", d " +
                                    std::to_string(dim);
          const int count = static_cast<int>(records);
          report("seal " + label, bytes, MedianSeconds([&] {
                   KVTIDE_BENCH_CUDA(
                       LaunchEncode(type, side, half, RowSource::kF16Page, seals_device, count, nullptr));
                 }));
          report("decode " + label, bytes, MedianSeconds([&] {
                   KVTIDE_BENCH_CUDA(LaunchDecode(type, side, half, RowTarget::kF16Tile, dim, decodes_device,
                                                  count, nullptr));
                 }));
          KVTIDE_BENCH_CUDA(cudaFree(const_cast<CodecJob*>(seals_device)));
          KVTIDE_BENCH_CUDA(cudaFree(const_cast<CodecJob*>(decodes_device)));
        }
      KVTIDE_BENCH_CUDA(cudaFree(from));
      KVTIDE_BENCH_CUDA(cudaFree(to));
      KVTIDE_BENCH_CUDA(cudaFree(tiles));
      KVTIDE_BENCH_CUDA(cudaFree(const_cast<float*>(mean_device)));
    }
  for (int i = 1; i + 1 < argc; i += 2)
    if (std::strcmp(argv[i], "--json") == 0) {
      std::ofstream file(argv[i + 1]);
      file << "{\n  \"device\": \"" << device.name << "\",\n  \"rates\": [";
      for (size_t r = 0; r < rows.size(); r++)
        file << (r == 0 ? "\n    " : ",\n    ") << "{\"what\": \"" << rows[r].what
             << "\", \"gigabytes_per_second\": " << rows[r].gigabytes_per_second
             << ", \"of_copy\": " << rows[r].of_copy << "}";
      file << "\n  ]\n}\n";
    }
  return 0;
}

}  // namespace
}  // namespace kvtide::cuda

int main(int argc, char** argv) { return kvtide::cuda::Main(argc, argv); }
