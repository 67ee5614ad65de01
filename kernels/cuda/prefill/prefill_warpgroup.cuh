// The products of a prefill tile by warpgroups: four warps, 16 rows each, multiply together (wgmma, compute
// capability 9.0). A product is begun and goes on while its warps compute other things; what it reads and
// writes may be touched only after Await. Sums lie in the registers of PrefillTile with 16 rows a warp, so
// all but the two products is shared with it; where wgmma is not compiled, so are the products.
#pragma once

#include "kernels/cuda/prefill/prefill_tile.h"

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
template <int kPending>
KVTIDE_DEVICE void Wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps reads and writes of sums on their side of the asynchronous products.
template <int N>
KVTIDE_DEVICE void Hold(float (&sums)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(sums[j][e])::"memory");
}
template <int N>
KVTIDE_DEVICE void Hold(uint32_t (&fragments)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+r"(fragments[j][e])::"memory");
}

#define KVTIDE_SUMS_4(x, j) "+f"(x[j][0]), "+f"(x[j][1]), "+f"(x[j][2]), "+f"(x[j][3])
#define KVTIDE_SUMS_32(x, j)                                                                      \
  KVTIDE_SUMS_4(x, j), KVTIDE_SUMS_4(x, j + 1), KVTIDE_SUMS_4(x, j + 2), KVTIDE_SUMS_4(x, j + 3), \
      KVTIDE_SUMS_4(x, j + 4), KVTIDE_SUMS_4(x, j + 5), KVTIDE_SUMS_4(x, j + 6), KVTIDE_SUMS_4(x, j + 7)
#define KVTIDE_NAMES_32                                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31"
#define KVTIDE_NAMES_64                                                                                      \
  KVTIDE_NAMES_32                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57" \
  ",%58,%59,%60,%61,%62,%63"

// d (64 rows x 64 or 128) = a b, or += : both operands in shared memory, summed along their rows.
template <bool kAdd>
KVTIDE_DEVICE void MultiplyRows(float (&d)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p,%34,0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{" KVTIDE_NAMES_32 "},%32,%33,p,1,1,0,0;\n}"
      : KVTIDE_SUMS_32(d, 0)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0));
}
template <bool kAdd>
KVTIDE_DEVICE void MultiplyRows(float (&d)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p,%66,0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{" KVTIDE_NAMES_64 "},%64,%65,p,1,1,0,0;\n}"
      : KVTIDE_SUMS_32(d, 0), KVTIDE_SUMS_32(d, 8)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0));
}
// d += a b: a in registers, b summed over its rows.
KVTIDE_DEVICE void MultiplyColumns(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" KVTIDE_NAMES_32
               "},{%32,%33,%34,%35},%36,1,1,1,1;"
               : KVTIDE_SUMS_32(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
KVTIDE_DEVICE void MultiplyColumns(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" KVTIDE_NAMES_64
               "},{%64,%65,%66,%67},%68,1,1,1,1;"
               : KVTIDE_SUMS_32(d, 0), KVTIDE_SUMS_32(d, 8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace warpgroup

template <int D, int kQueryRows, int kTokens>
struct WarpgroupTile : PrefillTile<DeviceWarp, D, 1, kQueryRows, kTokens> {
  using Base = PrefillTile<DeviceWarp, D, 1, kQueryRows, kTokens>;
  static constexpr int kRowsTogether = 64;  // `query` of BeginKeys is the warpgroup's first row
  static constexpr int kBlock = D % 128 == 0 ? 16 : 8, kBlocks = D / 8 / kBlock;  // of output, in 8 dims

  // Before the products of a turn, after their operands in registers were written.
  static KVTIDE_DEVICE void Open() { warpgroup::Begin(); }
  KVTIDE_DEVICE void BeginKeys(uint32_t query, uint32_t keys, float (&logits)[1][Base::kGroups][4]) const {
    warpgroup::Hold(logits[0]);
    const uint64_t first_a = warpgroup::Descriptor(query, 16), first_b = warpgroup::Descriptor(keys, 16);
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
      const uint64_t a = first_a + (s / 4 * kQueryRows * 128 + s % 4 * 32) / 16;
      const uint64_t b = first_b + (s / 4 * kTokens * 128 + s % 4 * 32) / 16;
      if (s == 0) {
        warpgroup::MultiplyRows<false>(logits[0], a, b);
      } else {
        warpgroup::MultiplyRows<true>(logits[0], a, b);
      }
    }
    warpgroup::Commit();
  }
  KVTIDE_DEVICE void BeginValues(uint32_t values, const uint32_t (&weights)[1][Base::kGroups / 2][4]) {
#pragma unroll
    for (int block = 0; block < kBlocks; block++) warpgroup::Hold(Sums(block));
    const uint64_t first = warpgroup::Descriptor(values, kTokens * 128);
#pragma unroll
    for (int u = 0; u < Base::kGroups / 2; u++)
#pragma unroll
      for (int block = 0; block < kBlocks; block++)
        warpgroup::MultiplyColumns(Sums(block), weights[0][u],
                                   first + (block * (kBlock / 8) * kTokens * 128 + u * 16 * 128) / 16);
    warpgroup::Commit();
  }
  // Until at most kPending of the products begun last go on.
  template <int kPending>
  static KVTIDE_DEVICE void AwaitKeys(float (&logits)[1][Base::kGroups][4]) {
    warpgroup::Wait<kPending>();
    warpgroup::Hold(logits[0]);
  }
  // What was computed from `logits` so far is not put off.
  static KVTIDE_DEVICE void Settle(float (&logits)[1][Base::kGroups][4]) { warpgroup::Hold(logits[0]); }
  KVTIDE_DEVICE void AwaitValues(uint32_t (&weights)[1][Base::kGroups / 2][4]) {
    warpgroup::Wait<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; block++) warpgroup::Hold(Sums(block));
    warpgroup::Hold(weights[0]);
  }

 private:
  KVTIDE_DEVICE float (&Sums(int block))[kBlock][4] {
    return *reinterpret_cast<float(*)[kBlock][4]>(&this->output[0][kBlock * block]);
  }
};

#else

template <int D, int kQueryRows, int kTokens>
struct WarpgroupTile : PrefillTile<DeviceWarp, D, 1, kQueryRows, kTokens> {
  using Base = PrefillTile<DeviceWarp, D, 1, kQueryRows, kTokens>;

  static KVTIDE_DEVICE void Open() {}
  KVTIDE_DEVICE void BeginKeys(uint32_t query, uint32_t keys, float (&logits)[1][Base::kGroups][4]) const {
    this->KeyStage(query, keys, logits);
  }
  KVTIDE_DEVICE void BeginValues(uint32_t values, const uint32_t (&weights)[1][Base::kGroups / 2][4]) {
    this->ValueStage(values, weights);
  }
  template <int kPending>
  static KVTIDE_DEVICE void AwaitKeys(float (&)[1][Base::kGroups][4]) {}
  static KVTIDE_DEVICE void Settle(float (&)[1][Base::kGroups][4]) {}
  KVTIDE_DEVICE void AwaitValues(uint32_t (&)[1][Base::kGroups / 2][4]) {}
};

#endif

}  // namespace kvtide::cuda
