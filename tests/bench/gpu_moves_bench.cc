// Seals and moves of the CUDA backend through the Backend interface: recoding f16 blocks into a pair, and
// copies of blocks between device and pinned host memory, beside the machine's own copy rates.
//   gpu_moves_bench [--json FILE]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/cuda_backend.h"

namespace kvtide {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class F>
double BestSeconds(int rounds, F call) {
  double best = 1e9;
  for (int i = 0; i < rounds; i++) {
    const double begin = Now();
    call();
    best = std::min(best, Now() - begin);
  }
  return best;
}

void CopyAndWait(Backend& backend, const std::vector<CopyPiece>& pieces, CopyDirection direction) {
  const auto ticket = backend.StartCopy(pieces, direction);
  KVTIDE_CHECK(ticket.ok(), std::string(ticket.status().message()));
  for (;;) {
    const auto done = backend.Poll(*ticket);
    KVTIDE_CHECK(done.ok(), std::string(done.status().message()));
    if (*done) return;
  }
}

int Main(int argc, char** argv) {
  auto made = MakeCudaBackend();
  KVTIDE_CHECK(made.ok(), std::string(made.status().message()));
  Backend& backend = **made;
  std::string rows;
  const auto report = [&](const std::string& name, double gigabytes_per_second) {
    std::printf("%-44s %8.1f GB/s\n", name.c_str(), gigabytes_per_second);
    rows += (rows.empty() ? "" : ",") + std::string("\n    {\"what\": \"") + name +
            "\", \"gigabytes_per_second\": " + std::to_string(gigabytes_per_second) + "}";
  };

  // Moves: 1 GiB in blocks of 1 MiB, from and to pinned memory; and one copy of the driver for comparison.
  constexpr size_t kBytes = size_t{1} << 30, kBlock = size_t{1} << 20;
  auto slab = *backend.AllocateSlab(kBytes);
  void* host = nullptr;
  KVTIDE_CHECK(cudaHostAlloc(&host, kBytes, cudaHostAllocDefault) == cudaSuccess, "pinned memory");
  std::memset(host, 1, kBytes);
  auto* pinned = static_cast<std::byte*>(host);
  for (const bool in : {true, false}) {
    const cudaMemcpyKind kind = in ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    const double raw = BestSeconds(4, [&] {
      (void)cudaMemcpy(in ? static_cast<void*>(slab->data()) : host,
                       in ? host : static_cast<void*>(slab->data()), kBytes, kind);
    });
    std::vector<CopyPiece> pieces;
    for (size_t at = 0; at < kBytes; at += kBlock)
      pieces.push_back(in ? CopyPiece{slab->data() + at, pinned + at, kBlock}
                          : CopyPiece{pinned + at, slab->data() + at, kBlock});
    const double mine = BestSeconds(
        4, [&] { CopyAndWait(backend, pieces, in ? CopyDirection::kFromHost : CopyDirection::kToHost); });
    report(in ? "one cudaMemcpy, host to device" : "one cudaMemcpy, device to host",
           1e-9 * static_cast<double>(kBytes) / raw);
    report(in ? "blocks of 1 MiB, host to device" : "blocks of 1 MiB, device to host",
           1e-9 * static_cast<double>(kBytes) / mine);
  }
  // Inside: read plus written.
  const double inside = BestSeconds(4, [&] {
    CopyAndWait(backend, {{slab->data(), slab->data() + kBytes / 2, kBytes / 2}}, CopyDirection::kInside);
  });
  report("copy inside the device, read plus written", 1e-9 * static_cast<double>(kBytes) / inside);

  // Seals: blocks of 64 layers x 8 heads, f16 to each pair; read plus written.
  for (const char* name : {"turbo4", "turbo3", "q8_0"}) {
    const GroupShape shape{64, 8, 128, 128};
    const BlockLayout exact(shape, ExactPair()), coded(shape, *ParseCachePair(name));
    constexpr int kBlocks = 16;
    auto from = *backend.AllocateSlab(exact.block_bytes() * kBlocks);
    auto to = *backend.AllocateSlab(coded.block_bytes() * kBlocks);
    std::vector<uint16_t> values(exact.block_bytes() / 2);
    std::mt19937 rng(3);
    for (uint16_t& x : values) x = static_cast<uint16_t>(0x3000u + rng() % 0x1000u + (rng() % 2) * 0x8000u);
    for (int i = 0; i < kBlocks; i++)
      CopyAndWait(backend,
                  {{from->data() + exact.block_bytes() * static_cast<size_t>(i),
                    reinterpret_cast<std::byte*>(values.data()), exact.block_bytes()}},
                  CopyDirection::kFromHost);
    std::vector<RecodePiece> pieces(kBlocks);
    for (int i = 0; i < kBlocks; i++) {
      pieces[static_cast<size_t>(i)].from = &exact;
      pieces[static_cast<size_t>(i)].source = from->data() + exact.block_bytes() * static_cast<size_t>(i);
      pieces[static_cast<size_t>(i)].to = &coded;
      pieces[static_cast<size_t>(i)].target = to->data() + coded.block_bytes() * static_cast<size_t>(i);
      pieces[static_cast<size_t>(i)].layers = shape.layers;
    }
    const double seconds = BestSeconds(4, [&] { KVTIDE_CHECK(backend.Recode(pieces).ok(), "recode"); });
    report(std::string("seal f16 to ") + name + ", read plus written",
           1e-9 * static_cast<double>((exact.block_bytes() + coded.block_bytes()) * kBlocks) / seconds);
  }
  for (int i = 1; i + 1 < argc; i += 2)
    if (std::strcmp(argv[i], "--json") == 0)
      std::ofstream(argv[i + 1]) << "{\n  \"rates\": [" << rows << "\n  ]\n}\n";
  (void)cudaFreeHost(host);
  return 0;
}

}  // namespace
}  // namespace kvtide

int main(int argc, char** argv) { return kvtide::Main(argc, argv); }
