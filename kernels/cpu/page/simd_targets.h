// Include before any Highway header in a file of vector kernels: it names the instruction sets that the
// kernels are compiled for. They are written for vectors of 128 (NEON), 256 and 512 bits with byte shuffles;
// everything else runs the plain kernels.
#pragma once

#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

// NEON with products of bytes. Clang gives them to no function of a build for processors that may lack them.
#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
#define KVTIDE_NEON 0
#else
#define KVTIDE_NEON HWY_NEON
#endif

// After the target is known: true in the passes that compile kernels.
#define KVTIDE_VECTOR_TARGET \
  (HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == KVTIDE_NEON)

#if defined(__clang__)
#define KVTIDE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVTIDE_UNROLL _Pragma("GCC unroll 16")
#endif
