#include "clients/engine/panel_matmul.h"

#include <cmath>
#include <random>

#include "clients/engine/vector_math.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"

namespace kvtide::engine {
namespace {

std::vector<float> Random(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = Bf16ToF32(F32ToBf16(normal(random)));
  return x;
}

std::vector<unsigned char> Encode(const std::vector<float>& x, DataType type) {
  std::vector<unsigned char> bytes;
  for (const float value : x) {
    const uint16_t half = type == DataType::kF16 ? F32ToF16(value) : F32ToBf16(value);
    const auto* from = type == DataType::kF32 ? reinterpret_cast<const unsigned char*>(&value)
                                              : reinterpret_cast<const unsigned char*>(&half);
    bytes.insert(bytes.end(), from, from + DataTypeBytes(type));
  }
  return bytes;
}

TEST(PackedMatrixTest, MultipliesAnyShapeInAnyTypeFromUnalignedBytes) {
  ThreadPool pool(2);
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16}) {
    for (const auto& [outputs, inputs, rows] : std::vector<std::tuple<int, int, int>>{
             {1, 1, 1}, {32, 8, 3}, {33, 7, 13}, {100, 300, 29}, {64, 2100, 5}, {7, 1025, 1}}) {
      const std::vector<float> w = Random(static_cast<size_t>(outputs) * inputs, 1),
                               x = Random(static_cast<size_t>(rows) * inputs, 2);
      const std::vector<float> bias = Random(outputs, 3);
      std::vector<unsigned char> bytes = Encode(w, type);
      bytes.insert(bytes.begin(), 0);
      const PackedMatrix matrix(bytes.data() + 1, type, outputs, inputs);
      std::vector<float> y(static_cast<size_t>(rows) * outputs, NAN);
      matrix.Multiply(pool, x.data(), rows, bias.data(), y.data());
      for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < outputs; ++o) {
          double sum = bias[o];
          for (int k = 0; k < inputs; ++k) sum += static_cast<double>(x[r * inputs + k]) * w[o * inputs + k];
          ASSERT_NEAR(y[r * outputs + o], sum, 1e-4 * std::sqrt(inputs))
              << outputs << "x" << inputs << " row " << r << " output " << o;
        }
      }
    }
  }
}

TEST(VectorMathTest, AgreesWithDoublePrecision) {
  for (const size_t n : {size_t{1}, size_t{5}, size_t{16}, size_t{131}, size_t{4096}}) {
    const std::vector<float> x = Random(n, 4), y = Random(n, 5);
    double squares = 0, exps = 0, most = -1e30;
    for (const float v : x) {
      squares += static_cast<double>(v) * v;
      exps += std::exp(static_cast<double>(v));
      most = std::max<double>(most, v);
    }
    std::vector<float> out(n);
    RmsNorm(x.data(), y.data(), n, 1e-5f, out.data());
    for (size_t i = 0; i < n; ++i) EXPECT_NEAR(out[i], x[i] / std::sqrt(squares / n + 1e-5) * y[i], 1e-5);
    out = x;
    SiluMultiply(out.data(), y.data(), n);
    for (size_t i = 0; i < n; ++i)
      EXPECT_NEAR(out[i], x[i] / (1 + std::exp(-static_cast<double>(x[i]))) * y[i], 1e-5);
    EXPECT_EQ(Maximum(x.data(), n), static_cast<float>(most));
    EXPECT_NEAR(LogSumExp(x.data(), n), std::log(exps), 1e-5);
    out = x;
    EXPECT_NEAR(ExpShifted(out.data(), n, 1.0f), exps / std::exp(1.0), 1e-5 * exps);
    double y_exps = 0, divergence = 0;
    for (const float v : y) y_exps += std::exp(static_cast<double>(v));
    for (size_t i = 0; i < n; ++i)
      divergence += std::exp(x[i]) / exps * (x[i] - std::log(exps) - y[i] + std::log(y_exps));
    EXPECT_NEAR(KlDivergence(x.data(), std::log(exps), y.data(), std::log(y_exps), n), divergence, 1e-5);
    EXPECT_NEAR(KlDivergence(x.data(), LogSumExp(x.data(), n), x.data(), LogSumExp(x.data(), n), n), 0, 1e-6);
  }
}

TEST(VectorMathTest, LogSumExpDoesNotOverflow) {
  const std::vector<float> x = {1000.0f, 1000.0f, -1000.0f};
  EXPECT_NEAR(LogSumExp(x.data(), x.size()), 1000 + std::log(2.0), 1e-3);
}

}  // namespace
}  // namespace kvtide::engine
