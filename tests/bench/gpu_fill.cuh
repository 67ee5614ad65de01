// Random but tame blocks in device memory, for benchmarks: any bits as codes, scales between 1/64 and 1/32,
// gains of calibrated keys between 1 and 2, f16 values of magnitude 1/2 to 2.
#pragma once

#include <cstdint>

#include "kernels/format/block_layout.h"
#include "tests/bench/gpu_check.h"

namespace kvtide::bench {

static __global__ void FillRandomWords(uint32_t* words, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    words[i] = static_cast<uint32_t>(x ^ (x >> 31));
  }
}
static __global__ void TameHalfWords(uint16_t* base, size_t record_bytes, size_t records, size_t offset,
                                     size_t bytes, bool scales) {
  const size_t per = bytes / 2;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < per * records;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint16_t& h = base[(i / per * record_bytes + offset) / 2 + i % per];
    h = scales ? static_cast<uint16_t>(0x2400u | (h & 0x3ffu))
               : static_cast<uint16_t>(0x3800u | (h & 0x87ffu));
  }
}

static __global__ void TameGains(uint8_t* base, size_t record_bytes, size_t records, size_t offset) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < kBlockTokens * records;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint8_t& gain = base[i / kBlockTokens * record_bytes + offset + i % kBlockTokens];
    gain = static_cast<uint8_t>(1 + gain % 17);
  }
}

// Fills `blocks` blocks of a layout that lie side by side.
inline void FillBlocks(const BlockLayout& layout, size_t blocks, std::byte* data, uint32_t seed) {
  FillRandomWords<<<2048, 256>>>(reinterpret_cast<uint32_t*>(data), layout.block_bytes() * blocks / 4, seed);
  const size_t records = blocks * static_cast<size_t>(layout.shape().kv_heads * layout.shape().layers);
  const auto tame = [&](const HalfLayout& half, size_t at) {
    const bool coded = half.groups > 0;
    TameHalfWords<<<2048, 256>>>(reinterpret_cast<uint16_t*>(data), layout.record_bytes(), records,
                                 coded ? at + half.code_bytes : at,
                                 coded ? half.scale_bytes : half.code_bytes, coded);
  };
  if (Info(layout.pair().k).calibrated)
    TameGains<<<2048, 256>>>(reinterpret_cast<uint8_t*>(data), layout.record_bytes(), records,
                             layout.k().code_bytes);
  else
    tame(layout.k(), 0);
  tame(layout.v(), layout.v_codes());
  KVTIDE_BENCH_CUDA(cudaDeviceSynchronize());
}

}  // namespace kvtide::bench
