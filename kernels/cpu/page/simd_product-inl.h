// Blocked products of f32 matrices. Included once for each instruction set.
#if defined(KVTIDE_KERNELS_CPU_SIMD_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIDE_KERNELS_CPU_SIMD_PRODUCT_INL_H_
#undef KVTIDE_KERNELS_CPU_SIMD_PRODUCT_INL_H_
#else
#define KVTIDE_KERNELS_CPU_SIMD_PRODUCT_INL_H_
#endif

#include "kernels/cpu/page/simd_page-inl.h"

KVTIDE_BEFORE_NAMESPACE();
namespace kvtide {
namespace HWY_NAMESPACE {
#if KVTIDE_VECTOR_TARGET

constexpr int kProductRows = 6, kProductVectors = kManyRegisters ? 4 : 2;

// c[r][..] = keep[r] * c[r][..] + a[r][0..depth) * b[0..depth)[..] for kRows rows and kVectors vectors of
// columns; without keep, c is overwritten.
template <int kRows, int kVectors>
HWY_INLINE void ProductBlock(const float* HWY_RESTRICT a, int a_stride, const float* HWY_RESTRICT b,
                             int b_stride, int depth, const float* keep, float* HWY_RESTRICT c,
                             int c_stride) {
  const TagF32 f32;
  VecF32 acc[kRows][kVectors];
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++)
    acc[r][i] = keep == nullptr
                    ? hn::Zero(f32)
                    : hn::Mul(hn::Load(f32, c + r * c_stride + i * kLanes), hn::Set(f32, keep[r]));
  for (int j = 0; j < depth; j++) {
    VecF32 value[kVectors];
    KVTIDE_UNROLL
    for (int i = 0; i < kVectors; i++) value[i] = hn::Load(f32, b + j * b_stride + i * kLanes);
    KVTIDE_UNROLL
    for (int r = 0; r < kRows; r++) {
      const VecF32 x = hn::Set(f32, a[r * a_stride + j]);
      KVTIDE_UNROLL
      for (int i = 0; i < kVectors; i++) acc[r][i] = hn::MulAdd(x, value[i], acc[r][i]);
    }
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; r++) KVTIDE_UNROLL
  for (int i = 0; i < kVectors; i++) hn::Store(acc[r][i], f32, c + r * c_stride + i * kLanes);
}

template <int kVectors>
HWY_INLINE void ProductColumns(const float* a, int a_stride, int rows, const float* b, int b_stride,
                               int depth, const float* keep, float* c, int c_stride) {
  int r = 0;
  for (; r + kProductRows <= rows; r += kProductRows)
    ProductBlock<kProductRows, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth,
                                         keep == nullptr ? nullptr : keep + r, c + r * c_stride, c_stride);
  for (; r < rows; r++)
    ProductBlock<1, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth,
                              keep == nullptr ? nullptr : keep + r, c + r * c_stride, c_stride);
}

// Columns are a multiple of 32. A slice of b (columns of one block) stays in the L1 cache while all rows
// pass.
HWY_NOINLINE inline void Product(const float* a, int a_stride, int rows, const float* b, int depth,
                                 int columns, const float* keep, float* c, int c_stride) {
  int first = 0;
  for (; first + kProductVectors * kLanes <= columns; first += kProductVectors * kLanes)
    ProductColumns<kProductVectors>(a, a_stride, rows, b + first, columns, depth, keep, c + first, c_stride);
  if constexpr (kProductVectors * kLanes > 32)
    for (; first < columns; first += 32)
      ProductColumns<32 / kLanes>(a, a_stride, rows, b + first, columns, depth, keep, c + first, c_stride);
}

#endif  // KVTIDE_VECTOR_TARGET
}  // namespace HWY_NAMESPACE
}  // namespace kvtide
HWY_AFTER_NAMESPACE();
#endif  // include guard
