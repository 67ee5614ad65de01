// A warp emulated on a CPU: the class that kernels/cuda tile code takes as its machine. The 32 lanes are
// coroutines; a collective (shuffle, vote, matrix product, matrix load) parks its lane, and when all lanes
// are parked on the same one it is computed from its definition in the PTX manual. A collective that not all
// lanes reach alike stops the process. Shared memory is a plain buffer. Not for several threads at once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "kernels/base/float16.h"

namespace kvtide::testing {

// Runs `lane_code` on all 32 lanes to the end.
void RunWarp(const std::function<void(int lane)>& lane_code);

// What parks a lane: `kind` names the collective, in/out are its operands and results.
enum class Collective {
  kNone,
  kShuffle,
  kAll,
  kMmaSigned,
  kMmaUnsigned,
  kMmaF16,
  kMmaBf16,
  kLoadMatrix,
  kLoadMatrixTransposed
};
struct LaneOperands {
  uint32_t in[12];
  const uint8_t* address;
  uint32_t out[4];
};
LaneOperands& CurrentOperands();
int CurrentLane();
void Park(Collective kind);

struct EmulatedWarp {
  using Shared = uint8_t*;

  static int Lane() { return CurrentLane(); }
  static uint32_t Prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
      const uint32_t s = selector >> (4 * i) & 15;
      uint32_t x = bytes >> (8 * (s & 7)) & 255;
      if (s & 8) x = x & 128 ? 255 : 0;
      r |= x << (8 * i);
    }
    return r;
  }
  static uint32_t Complement(uint32_t w, uint32_t ones) { return ones - w; }
  static uint32_t Plus(uint32_t x, uint32_t y) { return x + y; }
  template <class T>
  static T ShflXor(T x, int mask) {
    LaneOperands& op = CurrentOperands();
    std::memcpy(&op.in[0], &x, 4);
    op.in[1] = static_cast<uint32_t>(mask);
    Park(Collective::kShuffle);
    T r;
    std::memcpy(&r, &op.out[0], 4);
    return r;
  }
  static bool All(bool x) {
    CurrentOperands().in[0] = x;
    Park(Collective::kAll);
    return CurrentOperands().out[0] != 0;
  }
  template <bool keep>
  static uint32_t Kept(uint32_t x) {
    return x;
  }
  static float Fma(float a, float b, float c) { return std::fma(a, b, c); }
  static float Max(float a, float b) { return std::fmax(a, b); }
  static float Ex2(float x) { return std::exp2(x); }
  static float Lg2(float x) { return std::log2(x); }
  static float Cos(float x) { return std::cos(x); }
  static float Sin(float x) { return std::sin(x); }
  static float Rcp(float x) { return 1.0f / x; }
  static float FastRcp(float x) { return 1.0f / x; }
  static float Tanh(float x) { return std::tanh(x); }
  static float ToFloat(int x) { return static_cast<float>(x); }
  static int Round(float x) { return static_cast<int>(std::lrint(x)); }
  static uint32_t Bits(float x) { return FloatBits(x); }
  static float Float(uint32_t x) { return FloatFromBits(x); }
  static void HalfPair(uint32_t packed, float& low, float& high) {
    low = F16ToF32(static_cast<uint16_t>(packed & 0xffff));
    high = F16ToF32(static_cast<uint16_t>(packed >> 16));
  }
  static uint32_t HalfMax(uint32_t a, uint32_t b) {
    float a0, a1, b0, b1;
    HalfPair(a, a0, a1);
    HalfPair(b, b0, b1);
    return static_cast<uint32_t>(F32ToF16(std::fmax(a1, b1))) << 16 | F32ToF16(std::fmax(a0, b0));
  }
  static uint32_t HalfAbs(uint32_t a) { return a & 0x7fff7fffu; }
  static uint32_t HalfNegative(uint32_t a) { return a ^ 0x80008000u; }
  static uint32_t HalfMul(uint32_t a, uint32_t b) {
    float a0, a1, b0, b1;
    HalfPair(a, a0, a1);
    HalfPair(b, b0, b1);
    return Pack<false>(a0 * b0, a1 * b1);
  }
  static uint32_t HalfFma(uint32_t a, uint32_t b, uint32_t c) {
    float a0, a1, b0, b1, c0, c1;
    HalfPair(a, a0, a1);
    HalfPair(b, b0, b1);
    HalfPair(c, c0, c1);
    return Pack<false>(std::fma(a0, b0, c0), std::fma(a1, b1, c1));
  }
  template <bool kBf16>
  static uint32_t Pack(float low, float high) {
    const uint32_t l = kBf16 ? F32ToBf16(low) : F32ToF16(low), h = kBf16 ? F32ToBf16(high) : F32ToF16(high);
    return h << 16 | l;
  }
  template <bool kBf16>
  static void Unpack(uint32_t packed, float& low, float& high) {
    const uint16_t l = static_cast<uint16_t>(packed & 0xffff), h = static_cast<uint16_t>(packed >> 16);
    low = kBf16 ? Bf16ToF32(l) : F16ToF32(l);
    high = kBf16 ? Bf16ToF32(h) : F16ToF32(h);
  }
  static Shared Align(Shared address, uint32_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return address + ((at + bytes - 1) / bytes * bytes - at);
  }
  static Shared Join(Shared base, uint32_t offset) { return base + offset; }
  static void Sync() { (void)All(true); }
  static void LoadTable(const std::byte* from, uint32_t (&w)[4]) { std::memcpy(w, from, 16); }
  static uint32_t LoadTableWord(const std::byte* from) {
    uint32_t w;
    std::memcpy(&w, from, 4);
    return w;
  }
  static uint32_t Load8(Shared address) { return *address; }
  static uint32_t Load16(Shared address) {
    uint16_t w;
    std::memcpy(&w, address, 2);
    return w;
  }
  static uint32_t Load32(Shared address) {
    uint32_t w;
    std::memcpy(&w, address, 4);
    return w;
  }
  static void Load128(Shared address, uint32_t* w) { std::memcpy(w, address, 16); }
  static void Load64(Shared address, uint32_t* w) { std::memcpy(w, address, 8); }
  static void Store16(Shared address, uint32_t x) { std::memcpy(address, &x, 2); }
  static void Store32(Shared address, uint32_t x) { std::memcpy(address, &x, 4); }
  static void Store64(Shared address, uint32_t x, uint32_t y) {
    std::memcpy(address, &x, 4);
    std::memcpy(address + 4, &y, 4);
  }
  static void Store128(Shared address, const uint32_t (&w)[4]) { std::memcpy(address, w, 16); }
  static void LoadMatrix(Shared row, uint32_t (&w)[4]) { LoadFrom(row, w, Collective::kLoadMatrix); }
  static void LoadMatrixTransposed(Shared row, uint32_t (&w)[4]) {
    LoadFrom(row, w, Collective::kLoadMatrixTransposed);
  }
  template <bool kSignedA>
  static void MmaBytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
    LaneOperands& op = CurrentOperands();
    std::memcpy(&op.in[0], a, 16);
    op.in[4] = b0;
    op.in[5] = b1;
    std::memcpy(&op.in[6], c, 16);
    Park(kSignedA ? Collective::kMmaSigned : Collective::kMmaUnsigned);
    std::memcpy(d, CurrentOperands().out, 16);
  }
  static void MmaHalfFrom(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          const float (&c)[4]) {
    float sum[4] = {c[0], c[1], c[2], c[3]};
    MmaHalf<false>(sum, a, b0, b1);
    std::memcpy(d, sum, 16);
  }
  template <bool kBf16>
  static void MmaHalf(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    LaneOperands& op = CurrentOperands();
    std::memcpy(&op.in[0], a, 16);
    op.in[4] = b0;
    op.in[5] = b1;
    std::memcpy(&op.in[6], d, 16);
    Park(kBf16 ? Collective::kMmaBf16 : Collective::kMmaF16);
    std::memcpy(d, CurrentOperands().out, 16);
  }

 private:
  static void LoadFrom(Shared row, uint32_t (&w)[4], Collective kind) {
    CurrentOperands().address = row;
    Park(kind);
    std::memcpy(w, CurrentOperands().out, 16);
  }
};

}  // namespace kvtide::testing
