// The products of a prefill tile by warpgroups: four warps, 16 rows each, multiply together (wgmma, compute
// capability 9.0). Sums lie in the registers of PrefillTile with 16 rows a warp, so all but the two products
// is shared with it; where wgmma is not compiled, so are the products.
#pragma once

#include "kernels/cuda/prefill_tile.h"

namespace kvtide::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace warpgroup {

// Of an operand in sub-tiles with the 128-byte swizzle. `leading`: bytes from 64 values of the operand's row
// to the next 64, where rows are its summed dimension (values); 1024 bytes from 8 rows to the next 8.
KVTIDE_DEVICE uint64_t Descriptor(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
KVTIDE_DEVICE void Begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KVTIDE_DEVICE void Commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
KVTIDE_DEVICE void WaitAll() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Keeps reads and writes of sums on their side of the asynchronous products.
KVTIDE_DEVICE void Hold(float (&sums)[8][4]) {
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(sums[j][e])::"memory");
}

#define KVTIDE_SUMS(x)                                                                                     \
  "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]), "+f"(x[1][2]), \
      "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]), "+f"(x[3][0]),            \
      "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]), "+f"(x[4][2]),            \
      "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]), "+f"(x[6][0]),            \
      "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]), "+f"(x[7][2]),            \
      "+f"(x[7][3])
#define KVTIDE_SUM_NAMES                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%" \
  "28,%29,%30,%31}"

// d (64 rows x 64) = a b, or += : both operands in shared memory, summed along their rows.
template <bool kAdd>
KVTIDE_DEVICE void MultiplyRows(float (&d)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 "
      "p,%34,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " KVTIDE_SUM_NAMES
      ",%32,%33,p,1,1,0,0;\n}"
      : KVTIDE_SUMS(d)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0));
}
// d += a b: a in registers, b summed over its rows.
KVTIDE_DEVICE void MultiplyColumns(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " KVTIDE_SUM_NAMES
               ",{%32,%33,%34,%35},%36,1,1,1,1;"
               : KVTIDE_SUMS(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace warpgroup

template <int D, int kQueryRows>
struct WarpgroupTile : PrefillTile<DeviceWarp, D, 1, kQueryRows> {
  using Base = PrefillTile<DeviceWarp, D, 1, kQueryRows>;
  static constexpr int kRowsTogether = 64;  // `query` of KeyStage is the warpgroup's first row

  KVTIDE_DEVICE void KeyStage(uint32_t query, uint32_t keys, float (&logits)[1][Base::kGroups][4]) const {
#pragma unroll
    for (int i = 0; i < Base::kGroups; i++)
      logits[0][i][0] = logits[0][i][1] = logits[0][i][2] = logits[0][i][3] = 0;
    warpgroup::Hold(logits[0]);
    warpgroup::Begin();
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
      const uint64_t a = warpgroup::Descriptor(query + s / 4 * kQueryRows * 128 + s % 4 * 32, 16);
      const uint64_t b = warpgroup::Descriptor(keys + s / 4 * kBlockTokens * 128 + s % 4 * 32, 16);
      if (s == 0) {
        warpgroup::MultiplyRows<false>(logits[0], a, b);
      } else {
        warpgroup::MultiplyRows<true>(logits[0], a, b);
      }
    }
    warpgroup::Commit();
    warpgroup::WaitAll();
    warpgroup::Hold(logits[0]);
  }
  KVTIDE_DEVICE void ValueStage(uint32_t values, const uint32_t (&weights)[1][Base::kGroups / 2][4]) {
#pragma unroll
    for (int block = 0; block < D / 64; block++) warpgroup::Hold(Sums(block));
    warpgroup::Begin();
#pragma unroll
    for (int block = 0; block < D / 64; block++)
#pragma unroll
      for (int u = 0; u < Base::kGroups / 2; u++)
        warpgroup::MultiplyColumns(
            Sums(block), weights[0][u],
            warpgroup::Descriptor(values + block * kBlockTokens * 128 + u * 16 * 128, kBlockTokens * 128));
    warpgroup::Commit();
    warpgroup::WaitAll();
#pragma unroll
    for (int block = 0; block < D / 64; block++) warpgroup::Hold(Sums(block));
  }

 private:
  KVTIDE_DEVICE float (&Sums(int block))[8][4] {
    return *reinterpret_cast<float(*)[8][4]>(&this->output[0][8 * block]);
  }
};

#else

template <int D, int kQueryRows>
struct WarpgroupTile : PrefillTile<DeviceWarp, D, 1, kQueryRows> {};

#endif

}  // namespace kvtide::cuda
