// What a codec is: the code of one cache type, a struct of static functions without state, usable on CPU and
// GPU.
//
// Two kinds of storage exist. kHalf keeps values as they are (f16, bf16). kCodes keeps an integer level in
// -128..127 for every value and one f16 scale for every group of values of a head vector, after the type's
// rotation:
//     stored vector = scale[group] * kLevelUnit * Level(code)          (in the rotated frame)
// so that logits are integer dot products times a scale on every machine. The rotation of V is taken back
// once per attention output and queries are rotated once into K's frame; no codec ever rotates stored values
// while attending.
//
// To add a type: write one header with a struct that models Codec and add the struct to CacheTypes in
// catalogue.h.
#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/base/float16.h"
#include "kernels/base/host_device.h"

namespace kvtide {

enum class Storage : uint8_t { kHalf, kCodes };
// The side that a vector is coded for. K and V have different code orders; today's types code their values
// alike.
enum class Side : uint8_t { kKey, kValue };

// How strongly a profile equalises the channels of keys before a type codes them: channel i is multiplied by
// rms_i^-exponent (and queries are divided), with exponent 0, 1/2 or 1. Types whose rotation mixes only a few
// channels need kFull once exact keys stand beside coded ones.
enum class Equalise : uint8_t { kNone, kRoot, kFull };

// The largest number of values that share a scale; longer head vectors are cut into groups of this size.
constexpr int kMaxGroup = 128;

template <class C>
concept Codec = requires {
  { C::kName } -> std::convertible_to<const char*>;
  { C::kStorage } -> std::convertible_to<Storage>;
  { C::kBits } -> std::convertible_to<int>;     // bits of a code; 16 for kHalf
  { C::kGroup } -> std::convertible_to<int>;    // values per scale; 0 for kHalf
  { C::kVersion } -> std::convertible_to<int>;  // raised with every change of what stored bytes mean
};

// Any codec may say besides:
//
// * kKeys: an Equalise; kNone if absent.
// * kAliasOf: the name of the type with the same bytes.
//
// A codec of storage kCodes says:
//
// * Rotation: a type with Forward(float* x, int stored_dim) and Inverse of the same, in place, orthogonal.
// * Stored: the codec without its rotation; attention needs no more (see VisitStored).
// * kLevelUnit: a power of two (float).
// * int Level(int code): -128..127.
// * uint16_t EncodeGroup(const float* y, int n, Side side, uint8_t* codes): y holds the n rotated values of a
//   group, all finite. Writes n codes and returns the f16 bits of the scale. Deterministic: the same bytes on
//   every backend (no fused multiply-add, sums by TreeSum).
template <class C>
concept CodedCodec = Codec<C> && requires(const float* y, float* x, uint8_t* codes) {
  typename C::Rotation;
  typename C::Stored;
  { C::kLevelUnit } -> std::convertible_to<float>;
  { C::Level(0) } -> std::convertible_to<int>;
  { C::EncodeGroup(y, 32, Side::kKey, codes) } -> std::convertible_to<uint16_t>;
  C::Rotation::Forward(x, 32);
  C::Rotation::Inverse(x, 32);
};

// a*b rounded, then added: never fused, on CPU (-ffp-contract=off) and GPU alike.
KVTIDE_HD inline float MulAdd(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}
KVTIDE_HD inline float Mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// The sum of f(0) .. f(n-1) in one fixed order that suits a warp and vector units: 32 partial sums of every
// 32nd term, then halving. n is a multiple of 32.
template <class F>
KVTIDE_HD inline float TreeSum(int n, F f) {
  float partial[32];
  for (int l = 0; l < 32; l++) partial[l] = f(l);
  for (int i = 32; i < n; i += 32)
    for (int l = 0; l < 32; l++) partial[l] += f(i + l);
  for (int h = 16; h > 0; h /= 2)
    for (int l = 0; l < h; l++) partial[l] += partial[l + h];
  return partial[0];
}

// f16 bits of a scale; values beyond f16 saturate at 65504, so that a stored scale is always finite.
KVTIDE_HD inline uint16_t ScaleBits(float scale) {
  if (scale > 65504.0f) scale = 65504.0f;
  if (scale < -65504.0f) scale = -65504.0f;
  return F32ToF16(scale);
}

// Rotation of types that store values in their own frame.
struct NoRotation {
  static KVTIDE_HD void Forward(float*, int) {}
  static KVTIDE_HD void Inverse(float*, int) {}
};

}  // namespace kvtide
