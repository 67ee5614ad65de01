// Pages of an engine to and from pinned host memory, as the vLLM connector moves them: a prompt of 4,032
// tokens of Llama 3.1 8B's dimensions in blocks of 64, in pieces that take turns, beside a plain copy of the
// same bytes in one piece. Median wall time from the call to the last byte.
//   gpu_pages_bench [--json FILE] [--piece-mib N]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/pages/cuda_page_copier.h"
#include "tests/bench/gpu_check.h"
#include "tests/bench/result_file.h"

namespace kvtide {
namespace {

constexpr int kLayers = 32, kHeads = 8, kDim = 128, kTokens = 64, kChunks = 63, kPages = 1024;

template <class F>
double MedianSeconds(F call) {
  std::vector<double> seconds;
  for (int i = 0; i < 13; i++) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    if (i >= 3)
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", std::string(status.message()).c_str());
  std::exit(1);
}

int Main(int argc, char** argv) {
  std::string json;
  size_t piece_bytes = size_t{32} << 20;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--json") == 0) json = argv[i + 1];
    if (std::strcmp(argv[i], "--piece-mib") == 0) piece_bytes = std::strtoul(argv[i + 1], nullptr, 10) << 20;
  }
  cudaDeviceProp device;
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  constexpr size_t kPageBytes = size_t{kTokens} * kHeads * 2 * kDim * 2;
  std::vector<std::byte*> layers(kLayers);
  std::vector<uint16_t> values(kPageBytes / 2 * kPages);
  std::mt19937 random(1);
  for (uint16_t& value : values)
    value =
        static_cast<uint16_t>((random() & 0x807f) | (0x3e80 + (random() & 1) * 0x80));  // bf16 of 0.25 to 1
  for (std::byte*& layer : layers) {
    KVTIDE_BENCH_CUDA(cudaMalloc(&layer, kPageBytes * kPages));
    KVTIDE_BENCH_CUDA(cudaMemcpy(layer, values.data(), kPageBytes * kPages, cudaMemcpyHostToDevice));
  }
  std::vector<int32_t> ids(kPages);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(kChunks);

  bench::Result result;
  result["device"] = device.name;
  result["what"] = "63 blocks of 64 tokens, 32 layers of 8 KV heads of 128, pieces of " +
                   std::to_string(piece_bytes >> 20) + " MiB";
  struct Case {
    const char *name, *pair;
    size_t bytes;
  };
  for (const Case& c : {Case{"turbo4 pages as they are", "", 67584},
                        {"16-bit pages as they are", "", kPageBytes},
                        {"bf16 rows in q8_0/turbo4", "q8_0/turbo4", 0},
                        {"bf16 rows in turbo4/turbo4", "turbo4/turbo4", 0},
                        {"bf16 rows in f16/f16", "f16/f16", 0}}) {
    PageCopyOptions options;
    options.page_stride = kPageBytes;
    options.pages = kPages;
    options.page_bytes = c.bytes;
    options.tokens = kTokens;
    options.kv_heads = kHeads;
    options.head_dim_k = options.head_dim_v = kDim;
    options.k = {0, 2 * kDim, kTokens * 2 * kDim, 1};
    options.v = {kDim, 2 * kDim, kTokens * 2 * kDim, 1};
    if (c.bytes == 0) options.pair = *ParseCachePair(c.pair);
    const size_t chunk = ChunkBytes(options, kLayers), per_piece = std::max<size_t>(1, piece_bytes / chunk);
    options.piece_bytes = per_piece * chunk;
    auto copier = MakeCudaPageCopier(options, layers);
    Check(copier.status());
    std::byte* const memory =
        static_cast<std::byte*>(std::aligned_alloc(4096, (chunk * kChunks + 4095) / 4096 * 4096));
    std::memset(memory, 0, chunk * kChunks);
    Check((*copier)->Pin(memory, chunk * kChunks));
    std::byte* plain = nullptr;
    KVTIDE_BENCH_CUDA(cudaMalloc(&plain, chunk * kChunks));
    const auto move = [&](bool read) {
      int slot = 0;
      for (size_t first = 0; first < kChunks; first += per_piece, slot ^= 1) {
        const std::span<const int32_t> pages =
            std::span(ids).subspan(first, std::min(per_piece, kChunks - first));
        Check((*copier)->Wait(slot));
        Check(read ? (*copier)->Read(slot, pages, memory + first * chunk)
                   : (*copier)->Write(slot, memory + first * chunk, 0, pages));
      }
      for (int i = 0; i < PageCopier::kSlots; i++) Check((*copier)->Wait(i));
    };
    const double bytes = 1e-9 * static_cast<double>(chunk * kChunks);
    const double read = MedianSeconds([&] { move(true); }), write = MedianSeconds([&] { move(false); });
    const auto copy = [&](bool out) {
      return MedianSeconds([&] {
        KVTIDE_BENCH_CUDA(cudaMemcpyAsync(out ? memory : plain, out ? plain : memory, chunk * kChunks,
                                          out ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, nullptr));
        KVTIDE_BENCH_CUDA(cudaStreamSynchronize(nullptr));
      });
    };
    const double out = copy(true), in = copy(false);
    std::printf(
        "%-28s %7.1f MB  from the pages %6.2f ms %5.1f GB/s (copy %5.1f)  to them %6.2f ms %5.1f GB/s (copy "
        "%5.1f), %zu MiB held\n",
        c.name, 1e3 * bytes, 1e3 * read, bytes / read, bytes / out, 1e3 * write, bytes / write, bytes / in,
        (*copier)->bytes() >> 20);
    std::fflush(stdout);
    result["rates"].push_back({{"pages", c.name},
                               {"megabytes", bench::Tenth(1e3 * bytes)},
                               {"from_gb_s", bench::Tenth(bytes / read)},
                               {"copy_out_gb_s", bench::Tenth(bytes / out)},
                               {"to_gb_s", bench::Tenth(bytes / write)},
                               {"copy_in_gb_s", bench::Tenth(bytes / in)}});
    (*copier)->Unpin(memory);
    KVTIDE_BENCH_CUDA(cudaFree(plain));
    std::free(memory);
  }
  return bench::WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide

int main(int argc, char** argv) { return kvtide::Main(argc, argv); }
