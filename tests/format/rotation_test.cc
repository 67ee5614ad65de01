// The tables of the rotations are literals; this recomputes them from their documented sources.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>
#include <vector>

#include "kernels/format/iso.h"
#include "kernels/format/planar.h"
#include "kernels/format/rotor.h"
#include "kernels/format/turbo.h"
#include "tests/format/test_rows.h"

namespace kvtide {
namespace {

// Rows of 4 standard normals, normalised: Box-Muller in blocks of 16 over 24-bit uniforms of mt19937.
std::vector<double> UnitQuaternions(uint32_t seed, size_t rows) {
  std::mt19937 generator(seed);
  std::vector<double> values;
  while (values.size() < 4 * rows) {
    double u[16];
    for (double& x : u) x = (generator() & 0xffffffu) / 16777216.0;
    double out[16];
    for (int j = 0; j < 8; j++) {
      const double radius = std::sqrt(-2 * std::log(1 - u[j])), angle = 2 * std::numbers::pi * u[j + 8];
      out[j] = radius * std::cos(angle);
      out[j + 8] = radius * std::sin(angle);
    }
    values.insert(values.end(), out, out + 16);
  }
  values.resize(4 * rows);
  for (size_t r = 0; r < rows; r++) {
    double square = 0;
    for (size_t i = 0; i < 4; i++) square += values[4 * r + i] * values[4 * r + i];
    for (size_t i = 0; i < 4; i++) values[4 * r + i] /= std::sqrt(square);
  }
  return values;
}

template <class F>
std::vector<std::vector<float>> MatrixOf(F forward, int d) {
  std::vector<std::vector<float>> columns;
  for (int i = 0; i < d; i++) {
    std::vector<float> x(static_cast<size_t>(d), 0.0f);
    x[static_cast<size_t>(i)] = 1;
    forward(x.data(), d);
    columns.push_back(x);
  }
  return columns;
}

template <class Rotation>
void ExpectOrthogonal() {
  for (const int d : {32, 64, 96, 128, 160, 192, 224, 256, 512}) {
    const auto columns = MatrixOf([](float* x, int n) { Rotation::Forward(x, n); }, d);
    for (size_t i = 0; i < columns.size(); i++)
      for (size_t j = 0; j <= i; j++)
        ASSERT_NEAR(test::Dot(columns[i].data(), columns[j].data(), d), i == j ? 1 : 0, 1e-6)
            << d << " " << i << " " << j;
  }
}

TEST(Rotation, AllAreOrthogonalForEveryStoredDim) {
  ExpectOrthogonal<Hadamard>();
  ExpectOrthogonal<GivensPairs>();
  ExpectOrthogonal<Quaternions>();
  ExpectOrthogonal<Rotors>();
}

TEST(Rotation, PlanarAnglesComeFromTheirGenerator) {
  uint64_t s = 42;
  for (int p = 0; p < 64; p++) {
    s = s * 6364136223846793005u + 1442695040888963407u;
    const double angle = 2 * std::numbers::pi * static_cast<double>(s >> 11) / 9007199254740992.0;
    EXPECT_NEAR(GivensPairs::Entry(p, 0), std::cos(angle), 4e-8) << p;
    EXPECT_NEAR(GivensPairs::Entry(p, 1), std::sin(angle), 4e-8) << p;
  }
  EXPECT_NEAR(GivensPairs::Entry(0, 0), -.9095053,
              1e-7);  // as published by the implementation that it is taken from
  EXPECT_NEAR(GivensPairs::Entry(3, 0), -.6827218, 1e-7);
}

TEST(Rotation, QuaternionsAndRotorsComeFromTheirGeneratorsAndAreUnits) {
  const std::vector<double> iso = UnitQuaternions(42, 32), rotor = UnitQuaternions(43, 42);
  for (int g = 0; g < 42; g++) {
    double square_iso = 0, square_rotor = 0;
    for (int i = 0; i < 4; i++) {
      EXPECT_NEAR(Rotors::Entry(g, i), rotor[static_cast<size_t>(4 * g + i)], 4e-8) << g;
      square_rotor += std::pow(static_cast<double>(Rotors::Entry(g, i)), 2);
      if (g >= 32) continue;
      EXPECT_NEAR(Quaternions::Entry(g, i), iso[static_cast<size_t>(4 * g + i)], 4e-8) << g;
      square_iso += std::pow(static_cast<double>(Quaternions::Entry(g, i)), 2);
    }
    EXPECT_NEAR(square_rotor, 1, 2e-7);
    if (g < 32) {
      EXPECT_NEAR(square_iso, 1, 2e-7);
    }
  }
}

TEST(Rotation, HamiltonProductOfTheUnits) {
  const auto times = [](std::vector<float> q, std::vector<float> v) {
    Quaternions::MultiplyLeft(q[0], q[1], q[2], q[3], v.data());
    return v;
  };
  EXPECT_EQ(times({0, 1, 0, 0}, {0, 0, 1, 0}), (std::vector<float>{0, 0, 0, 1}));   // i j = k
  EXPECT_EQ(times({0, 0, 1, 0}, {0, 0, 0, 1}), (std::vector<float>{0, 1, 0, 0}));   // j k = i
  EXPECT_EQ(times({0, 0, 0, 1}, {0, 1, 0, 0}), (std::vector<float>{0, 0, 1, 0}));   // k i = j
  EXPECT_EQ(times({0, 1, 0, 0}, {0, 1, 0, 0}), (std::vector<float>{-1, 0, 0, 0}));  // i i = -1
}

TEST(Rotation, ARotorTurnsByTwiceItsAngleInItsPlaneAndKeepsTheAxis) {
  const float c = std::cos(0.3f), s = std::sin(0.3f);
  float v[3] = {1, 0, 0};
  Rotors::Sandwich(c, 0, 0, s, v);  // plane e12
  EXPECT_NEAR(v[0], std::cos(0.6), 1e-6);
  EXPECT_NEAR(v[1], std::sin(0.6), 1e-6);
  EXPECT_NEAR(v[2], 0, 1e-7);
  float axis[3] = {0, 0, 1};
  Rotors::Sandwich(c, 0, 0, s, axis);
  EXPECT_NEAR(axis[2], 1, 1e-7);
}

TEST(Rotation, RotorsLeaveTheChannelsThatFormNoGroupAlone) {
  std::vector<float> x(128, 0.0f);
  x[126] = 2;
  x[127] = -3;
  Rotors::Forward(x.data(), 128);
  EXPECT_EQ(x[126], 2);
  EXPECT_EQ(x[127], -3);
}

TEST(Rotation, HadamardSpreadsOneChannelOverItsWholeRun) {
  for (const int d : {32, 64, 128}) {
    std::vector<float> x(static_cast<size_t>(d), 0.0f);
    x[5] = 1;
    Hadamard::Forward(x.data(), d);
    for (const float v : x) EXPECT_NEAR(std::fabs(v), 1 / std::sqrt(d), 1e-7);
  }
  std::vector<float> x(96, 0.0f);  // two thirds of the way in 32 + 64
  x[40] = 1;
  Hadamard::Forward(x.data(), 96);
  for (const float v : x) EXPECT_GT(std::fabs(v), 0.05f);
}

}  // namespace
}  // namespace kvtide
