// The worked example of kernels/format/README.md, kept compiling: a new type is one struct.
#include <gtest/gtest.h>

#include "kernels/format/page_codec.h"
#include "kernels/format/turbo.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

struct ShortHadamard {
  static KVTIDE_HD void Forward(float* x, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 32) {
      Hadamard::Flip(x + i, 32, 0);
      Hadamard::Butterfly(x + i, 32);
    }
  }
  static KVTIDE_HD void Inverse(float* y, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 32) {
      Hadamard::Butterfly(y + i, 32);
      Hadamard::Flip(y + i, 32, 0);
    }
  }
};

struct ShortTurbo4 : CodebookCodec<4, ShortHadamard> {
  static constexpr char kName[] = "short_turbo4";
};

static_assert(CodedCodec<ShortTurbo4>);
static_assert(std::is_same_v<ShortTurbo4::Stored, Turbo4::Stored>,
              "attention kernels are shared with turbo4");

TEST(NewType, TheExampleCodesVectors) {
  const std::vector<float> x = test::BellRows(1, 1, 96);
  std::vector<float> y = x;
  uint8_t codes[96];
  uint16_t scale;
  EncodeVector<ShortTurbo4>(y.data(), 96, Side::kKey, codes, &scale);
  for (size_t i = 0; i < 96; i++)
    y[i] = F16ToF32(scale) * ShortTurbo4::kLevelUnit * static_cast<float>(ShortTurbo4::Level(codes[i]));
  ShortHadamard::Inverse(y.data(), 96);
  double error = 0;
  for (size_t i = 0; i < 96; i++) error += static_cast<double>((x[i] - y[i]) * (x[i] - y[i]));
  EXPECT_LT(error / test::Dot(x.data(), x.data(), 96), 0.02);
  EXPECT_GT(error, 0);
}

}  // namespace
}  // namespace kvtide
