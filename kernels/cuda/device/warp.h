// The machine as the tile code sees it, on a GPU: one warp, its shuffles, byte permutes, tensor-core products
// and shared memory. Tile code (coded_tile.h, half_tile.h, query_row.h) takes such a class as a template
// argument, so that the same source also runs in an emulated warp on a CPU (tests/kernels/warp_emulator.h),
// where it is tested.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KVTIDE_DEVICE __device__ __forceinline__
#else
#define KVTIDE_DEVICE inline
#endif

namespace kvtide::cuda {

#ifdef __CUDACC__
struct DeviceWarp {
  using Shared = uint32_t;  // address in the shared window

  static KVTIDE_DEVICE int Lane() { return static_cast<int>(threadIdx.x & 31); }

  // Four bytes picked from {b, a} by the nibbles of `selector`; bit 3 of a nibble replicates the sign of the
  // byte.
  static KVTIDE_DEVICE uint32_t Prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t r;
    asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
  }
  // ~w and x + y in a form that the compiler may spread over two pipes; `ones` is 0xffffffff, unknown to the
  // compiler.
  static KVTIDE_DEVICE uint32_t Complement(uint32_t w, uint32_t ones) {
    uint32_t r;
    asm("sub.u32 %0,%1,%2;" : "=r"(r) : "r"(ones), "r"(w));
    return r;
  }
  static KVTIDE_DEVICE uint32_t Plus(uint32_t x, uint32_t y) {
    uint32_t r;
    asm("add.u32 %0,%1,%2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
  }
  template <class T>
  static KVTIDE_DEVICE T ShflXor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  static KVTIDE_DEVICE bool All(bool x) { return __all_sync(0xffffffffu, x); }

  // x, in a form that the compiler keeps in a register instead of computing it again for every page. Unless
  // `keep`, for code that has no register to spare.
  template <bool keep>
  static KVTIDE_DEVICE uint32_t Kept(uint32_t x) {
    return keep ? __shfl_sync(0xffffffffu, x, Lane()) : x;
  }

  static KVTIDE_DEVICE float Fma(float a, float b, float c) { return fmaf(a, b, c); }
  static KVTIDE_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
  static KVTIDE_DEVICE float Ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
  }
  static KVTIDE_DEVICE float Lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
  }
  static KVTIDE_DEVICE float Rcp(float x) { return __frcp_rn(x); }
  static KVTIDE_DEVICE float FastRcp(float x) {  // within an ulp
    float r;
    asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
  }
  static KVTIDE_DEVICE float Tanh(float x) { return tanhf(x); }
  static KVTIDE_DEVICE float ToFloat(int x) { return __int2float_rn(x); }
  static KVTIDE_DEVICE int Round(float x) { return __float2int_rn(x); }
  static KVTIDE_DEVICE uint32_t Bits(float x) { return __float_as_uint(x); }
  static KVTIDE_DEVICE float Float(uint32_t x) { return __uint_as_float(x); }

  static KVTIDE_DEVICE void HalfPair(uint32_t packed, float& low, float& high) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&packed));
    low = f.x;
    high = f.y;
  }
  static KVTIDE_DEVICE uint32_t HalfMax(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static KVTIDE_DEVICE uint32_t HalfAbs(uint32_t a) { return a & 0x7fff7fffu; }
  static KVTIDE_DEVICE uint32_t HalfNegative(uint32_t a) {
    uint32_t r;
    asm("neg.f16x2 %0,%1;" : "=r"(r) : "r"(a));
    return r;
  }
  static KVTIDE_DEVICE uint32_t HalfMul(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static KVTIDE_DEVICE uint32_t HalfFma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  // Two floats to 16 bits each, `low` in the low half.
  template <bool kBf16>
  static KVTIDE_DEVICE uint32_t Pack(float low, float high) {
    uint32_t r;
    if constexpr (kBf16) {
      asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
    }
    return r;
  }
  template <bool kBf16>
  static KVTIDE_DEVICE void Unpack(uint32_t packed, float& low, float& high) {
    if constexpr (kBf16) {
      low = __uint_as_float(packed << 16);
      high = __uint_as_float(packed & 0xffff0000u);
    } else {
      HalfPair(packed, low, high);
    }
  }

  // The next multiple of `bytes`, a power of two; an address at such a multiple and an offset below it.
  static KVTIDE_DEVICE Shared Align(Shared address, uint32_t bytes) {
    return (address + bytes - 1) & ~(bytes - 1);
  }
  static KVTIDE_DEVICE Shared Join(Shared base, uint32_t offset) { return base | offset; }
  // What lanes have written to shared memory is seen by the others.
  static KVTIDE_DEVICE void Sync() { __syncwarp(); }

  // From tables in global memory that nobody writes.
  static KVTIDE_DEVICE void LoadTable(const std::byte* from, uint32_t (&w)[4]) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
    w[0] = x.x;
    w[1] = x.y;
    w[2] = x.z;
    w[3] = x.w;
  }
  static KVTIDE_DEVICE uint32_t LoadTableWord(const std::byte* from) {
    return __ldg(reinterpret_cast<const uint32_t*>(from));
  }

  static KVTIDE_DEVICE uint32_t Load8(Shared address) {
    uint32_t r;
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(r) : "r"(address));
    return r;
  }
  static KVTIDE_DEVICE uint32_t Load16(Shared address) {
    uint16_t r;
    asm volatile("ld.shared.u16 %0,[%1];" : "=h"(r) : "r"(address));
    return r;
  }
  static KVTIDE_DEVICE uint32_t Load32(Shared address) {
    uint32_t r;
    asm volatile("ld.shared.u32 %0,[%1];" : "=r"(r) : "r"(address));
    return r;
  }
  static KVTIDE_DEVICE void Load128(Shared address, uint32_t* w) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address));
  }
  static KVTIDE_DEVICE void Load64(Shared address, uint32_t* w) {
    asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(address));
  }
  static KVTIDE_DEVICE void Store32(Shared address, uint32_t x) {
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(x) : "memory");
  }
  static KVTIDE_DEVICE void Store64(Shared address, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.b32 [%0],{%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
  }
  static KVTIDE_DEVICE void LoadMatrix(Shared row, uint32_t (&w)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(row));
  }
  static KVTIDE_DEVICE void LoadMatrixTransposed(Shared row, uint32_t (&w)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(row));
  }

  // d = a * b + c with m16n8k32 integers: a signed or unsigned bytes, b signed bytes.
  template <bool kSignedA>
  static KVTIDE_DEVICE void MmaBytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                     const int (&c)[4]) {
    if constexpr (kSignedA) {
      asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
          "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
          : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
            "r"(c[3]));
    } else {
      asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
          "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
          : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
            "r"(c[3]));
    }
  }
  // d = a * b + c with m16n8k16 halves (f16).
  static KVTIDE_DEVICE void MmaHalfFrom(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                        const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
  // d += a * b with m16n8k16 halves.
  template <bool kBf16>
  static KVTIDE_DEVICE void MmaHalf(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kBf16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }
};
#endif

}  // namespace kvtide::cuda
