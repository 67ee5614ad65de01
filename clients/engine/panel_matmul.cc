#include "clients/engine/panel_matmul.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/check.h"

// Sums are arrays of vectors, which those of SVE cannot be, as the compiler does not know their size: arm64 takes NEON.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "clients/engine/panel_matmul.cc"
// What follows foreach_target.h is compiled once for each instruction set.
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#if defined(__clang__)
#define KVTIDE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVTIDE_UNROLL _Pragma("GCC unroll 12")
#endif

HWY_BEFORE_NAMESPACE();
namespace kvtide::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;

struct F32Panel {
  using Element = float;
  static HWY_INLINE Vector Load(Floats d, const Element* p) { return hn::LoadU(d, p); }
};
struct Bf16Panel {
  using Element = uint16_t;
  static HWY_INLINE Vector Load(Floats d, const Element* p) {
    const hn::Rebind<uint16_t, Floats> narrow;
    const hn::Rebind<uint32_t, Floats> wide;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, p))));
  }
};
struct F16Panel {
  using Element = uint16_t;
  static HWY_INLINE Vector Load(Floats d, const Element* p) {
    const hn::Rebind<hwy::float16_t, Floats> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(p)));
  }
};

// kRows rows times two vectors of columns; the sums stay in registers over the whole of k.
template <class Panel, int kRows>
HWY_INLINE void Tile(const float* HWY_RESTRICT a, size_t a_stride,
                     const typename Panel::Element* HWY_RESTRICT b, int k, float* HWY_RESTRICT c,
                     size_t c_stride, bool accumulate) {
  const Floats d;
  const size_t lanes = hn::Lanes(d);
  Vector sum0[kRows], sum1[kRows];
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sum0[r] = accumulate ? hn::LoadU(d, c + r * c_stride) : hn::Zero(d);
    sum1[r] = accumulate ? hn::LoadU(d, c + r * c_stride + lanes) : hn::Zero(d);
  }
  for (int i = 0; i < k; ++i) {
    const Vector b0 = Panel::Load(d, b + static_cast<size_t>(i) * kPanelWidth);
    const Vector b1 = Panel::Load(d, b + static_cast<size_t>(i) * kPanelWidth + lanes);
    KVTIDE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector x = hn::Set(d, a[r * a_stride + i]);
      sum0[r] = hn::MulAdd(x, b0, sum0[r]);
      sum1[r] = hn::MulAdd(x, b1, sum1[r]);
    }
  }
  KVTIDE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(sum0[r], d, c + r * c_stride);
    hn::StoreU(sum1[r], d, c + r * c_stride + lanes);
  }
}

// One row: four independent sums per column, so that additions do not wait for each other.
template <class Panel>
HWY_INLINE void RowTile(const float* HWY_RESTRICT a, const typename Panel::Element* HWY_RESTRICT b, int k,
                        float* HWY_RESTRICT c, bool accumulate) {
  const Floats d;
  const size_t lanes = hn::Lanes(d);
  Vector sum0[4], sum1[4];
  KVTIDE_UNROLL
  for (int u = 0; u < 4; ++u) sum0[u] = sum1[u] = hn::Zero(d);
  int i = 0;
  for (; i + 4 <= k; i += 4) {
    KVTIDE_UNROLL
    for (int u = 0; u < 4; ++u) {
      const auto* row = b + static_cast<size_t>(i + u) * kPanelWidth;
      const Vector x = hn::Set(d, a[i + u]);
      sum0[u] = hn::MulAdd(x, Panel::Load(d, row), sum0[u]);
      sum1[u] = hn::MulAdd(x, Panel::Load(d, row + lanes), sum1[u]);
    }
  }
  for (; i < k; ++i) {
    const auto* row = b + static_cast<size_t>(i) * kPanelWidth;
    const Vector x = hn::Set(d, a[i]);
    sum0[0] = hn::MulAdd(x, Panel::Load(d, row), sum0[0]);
    sum1[0] = hn::MulAdd(x, Panel::Load(d, row + lanes), sum1[0]);
  }
  Vector total0 = hn::Add(hn::Add(sum0[0], sum0[1]), hn::Add(sum0[2], sum0[3]));
  Vector total1 = hn::Add(hn::Add(sum1[0], sum1[1]), hn::Add(sum1[2], sum1[3]));
  if (accumulate) {
    total0 = hn::Add(total0, hn::LoadU(d, c));
    total1 = hn::Add(total1, hn::LoadU(d, c + lanes));
  }
  hn::StoreU(total0, d, c);
  hn::StoreU(total1, d, c + lanes);
}

template <class Panel>
void MultiplyTyped(const float* a, size_t a_stride, int rows, const void* panel, int k, float* c,
                   size_t c_stride, bool accumulate) {
  const Floats d;
  const int columns = static_cast<int>(2 * hn::Lanes(d));
  // 12 x 2 sums fill the 32 registers of AVX-512 with room for the operands, 6 x 2 the 16 of AVX2.
  constexpr int kMostRows = HWY_TARGET <= HWY_AVX3 ? 12 : 6;
  const auto* b = static_cast<const typename Panel::Element*>(panel);
  for (int column = 0; column < kPanelWidth; column += columns) {
    int r = 0;
    for (; r + kMostRows <= rows; r += kMostRows) {
      Tile<Panel, kMostRows>(a + r * a_stride, a_stride, b + column, k, c + r * c_stride + column, c_stride,
                             accumulate);
    }
    for (; r + 4 <= rows; r += 4) {
      Tile<Panel, 4>(a + r * a_stride, a_stride, b + column, k, c + r * c_stride + column, c_stride,
                     accumulate);
    }
    for (; r < rows; ++r)
      RowTile<Panel>(a + r * a_stride, b + column, k, c + r * c_stride + column, accumulate);
  }
}

void MultiplyAnyPanel(const float* a, size_t a_stride, int rows, const void* panel, DataType type, int k,
                      float* c, size_t c_stride, bool accumulate) {
  switch (type) {
    case DataType::kF32:
      return MultiplyTyped<F32Panel>(a, a_stride, rows, panel, k, c, c_stride, accumulate);
    case DataType::kF16:
      return MultiplyTyped<F16Panel>(a, a_stride, rows, panel, k, c, c_stride, accumulate);
    case DataType::kBf16:
      return MultiplyTyped<Bf16Panel>(a, a_stride, rows, panel, k, c, c_stride, accumulate);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtide::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvtide::engine {

HWY_EXPORT(MultiplyAnyPanel);

void MultiplyPanel(const float* a, size_t a_stride, int rows, const void* panel, DataType type, int k,
                   float* c, size_t c_stride, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(MultiplyAnyPanel)(a, a_stride, rows, panel, type, k, c, c_stride, accumulate);
}

PackedMatrix::PackedMatrix(const void* weights, DataType type, int outputs, int inputs)
    : type_(type), outputs_(outputs), inputs_(inputs) {
  KVTIDE_CHECK(outputs > 0 && inputs > 0);
  const size_t element = DataTypeBytes(type);
  const int panels = (outputs + kPanelWidth - 1) / kPanelWidth;
  storage_.resize((static_cast<size_t>(panels) * kPanelWidth * inputs * element + 3) / 4);
  const auto* from = static_cast<const unsigned char*>(weights);
  auto* to = reinterpret_cast<unsigned char*>(storage_.data());
  for (int o = 0; o < outputs; ++o) {
    unsigned char* column =
        to + (static_cast<size_t>(o / kPanelWidth) * inputs * kPanelWidth + o % kPanelWidth) * element;
    const unsigned char* row = from + static_cast<size_t>(o) * inputs * element;
    for (int k = 0; k < inputs; ++k) {
      std::memcpy(column + static_cast<size_t>(k) * kPanelWidth * element, row + k * element, element);
    }
  }
}

PackedMatrix::PackedMatrix(const WeightTensor& weights) {
  const int outputs = static_cast<int>(weights.rows()), inputs = static_cast<int>(weights.row_values());
  if (weights.type.has_value() && weights.paired_heads == 0) {
    *this = PackedMatrix(weights.bytes.data(), *weights.type, outputs, inputs);
    return;
  }
  outputs_ = outputs;
  inputs_ = inputs;
  const int panels = (outputs + kPanelWidth - 1) / kPanelWidth;
  storage_.resize(static_cast<size_t>(panels) * kPanelWidth * static_cast<size_t>(inputs));
  std::vector<float> row(static_cast<size_t>(inputs));
  for (int o = 0; o < outputs; ++o) {
    weights.Row(o, row.data());
    uint32_t* column =
        storage_.data() + static_cast<size_t>(o / kPanelWidth) * inputs * kPanelWidth + o % kPanelWidth;
    for (int k = 0; k < inputs; ++k) column[static_cast<size_t>(k) * kPanelWidth] = FloatBits(row[k]);
  }
}

const void* PackedMatrix::Panel(int index) const {
  const size_t bytes = static_cast<size_t>(inputs_) * kPanelWidth * DataTypeBytes(type_);
  return reinterpret_cast<const unsigned char*>(storage_.data()) + index * bytes;
}

void PackedMatrix::Multiply(ThreadPool& pool, const float* x, int rows, const float* bias, float* y) const {
  // A slice of 1,024 inputs of one panel (64-128 KB) stays in the L2 cache while all rows pass over it.
  constexpr int kSlice = 1024;
  const int panels = (outputs_ + kPanelWidth - 1) / kPanelWidth;
  const auto panel_job = [&](int64_t p) {
    const int first = static_cast<int>(p) * kPanelWidth;
    const int width = std::min(kPanelWidth, outputs_ - first);
    std::vector<float> edge;  // the padded last panel is computed aside
    float* out = y + first;
    size_t stride = outputs_;
    if (width < kPanelWidth) {
      edge.resize(static_cast<size_t>(rows) * kPanelWidth);
      out = edge.data();
      stride = kPanelWidth;
    }
    const auto* panel = static_cast<const unsigned char*>(Panel(static_cast<int>(p)));
    for (int k = 0; k < inputs_; k += kSlice) {
      MultiplyPanel(x + k, inputs_, rows, panel + static_cast<size_t>(k) * kPanelWidth * DataTypeBytes(type_),
                    type_, std::min(kSlice, inputs_ - k), out, stride, k > 0);
    }
    for (int r = 0; r < rows && (bias != nullptr || width < kPanelWidth); ++r) {
      for (int o = 0; o < width; ++o) {
        y[static_cast<size_t>(r) * outputs_ + first + o] =
            out[r * stride + o] + (bias != nullptr ? bias[first + o] : 0.0f);
      }
    }
  };
  // Waking the threads costs about as much as 100,000 multiplications.
  if (static_cast<int64_t>(rows) * outputs_ * inputs_ < 400'000) {
    for (int p = 0; p < panels; ++p) panel_job(p);
  } else {
    pool.ParallelFor(panels, panel_job);
  }
}

}  // namespace kvtide::engine
#endif  // HWY_ONCE
