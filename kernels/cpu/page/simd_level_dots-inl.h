// LevelDots: units of codes times 16-bit words of several rows, summed in 32-bit lanes, exactly. The heart of
// attention of few rows, for K (words are queries) and V (words are weights) alike. Included once for each
// instruction set.
//
// One shape multiplies words with levels of 16 bits (x86, simd_word_dots-inl.h), the other bytes of the words
// with levels of 8 bits (NEON, simd_byte_dots-inl.h). Either has
//   LevelSum            the sums of a vector of units for a row; StartSum(n) and Total(sum)
//   VectorsFor          vectors of units that are worked on together: as many as leave the sums in registers
//   LevelDots<bits>     Add; kOffset, how much too large the levels are that it multiplies, so that the sums
//                       of a row begin with -kOffset times the sum of its words
//   kLargestWord        what words may be
//   PutWords, UnitWord  the words of a row for the eight codes of a unit of K, four integers of 32 bits
//   PackWords, PackedWord, StorePacked, AddToStart  those for the tokens of a page of V
#if defined(KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_LEVEL_DOTS_INL_H_
#endif

#include "kernels/cpu/page/simd_byte_dots-inl.h"
#include "kernels/cpu/page/simd_word_dots-inl.h"

#endif  // include guard
