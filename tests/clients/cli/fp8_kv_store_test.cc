#include "clients/cli/eval/fp8_kv_store.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/format/e4m3.h"

namespace kvtide::cli {
namespace {

engine::KvGeometry OneHead() {
  engine::KvGeometry geometry;
  geometry.layers = 1;
  geometry.query_heads = geometry.kv_heads = 1;
  geometry.head_dim = 32;
  return geometry;
}

// The attention output of a single token is its value, as it was stored.
std::vector<float> StoredValue(const std::string& pair, const std::vector<Fp8Scales>& scales, float value) {
  ThreadPool pool(1);
  const auto parsed = ParseFp8Pair(pair);
  EXPECT_TRUE(parsed.ok() && parsed->has_value()) << pair;
  const auto store = MakeFp8KvStore(OneHead(), **parsed, scales, pool);
  const auto sequence = store->CreateSequence();
  EXPECT_TRUE(sequence.ok());
  std::vector<float> q(32, 1.0f), k(32, 1.0f), v(32, value), out(32);
  const absl::Status status =
      store->AppendAttend(*sequence, 0, 0, 1, q.data(), k.data(), v.data(), out.data());
  EXPECT_TRUE(status.ok()) << status;
  return out;
}

TEST(Fp8KvStore, KnowsItsPairsAndLeavesTheOthersAlone) {
  for (const char* pair : {"fp8/fp8", "fp8_calibrated/fp8_calibrated", "f16/fp8", "fp8/fp8_calibrated"}) {
    const auto parsed = ParseFp8Pair(pair);
    ASSERT_TRUE(parsed.ok() && parsed->has_value()) << pair;
    EXPECT_EQ((*parsed)->Name(), pair);
  }
  EXPECT_EQ((*ParseFp8Pair("f16/fp8"))->bits(), 12);
  EXPECT_EQ((*ParseFp8Pair("fp8/fp8"))->bits(), 8);
  for (const char* pair : {"f16/f16", "q8_0/turbo4", "fp8", "nonsense/f16"}) {
    const auto parsed = ParseFp8Pair(pair);
    EXPECT_TRUE(parsed.ok() && !parsed->has_value()) << pair;
  }
  EXPECT_THAT(std::string(ParseFp8Pair("q8_0/fp8").status().message()),
              testing::HasSubstr("no type of the pools"));
}

TEST(Fp8KvStore, RoundsToE4m3WithUnityScale) {
  for (const float value : {0.3f, -17.3f, 500.0f, 1e-3f}) {
    EXPECT_FLOAT_EQ(StoredValue("fp8/fp8", {}, value)[0], RoundToE4m3(value, 1)) << value;
    // Scales of a calibration are for calibrated sides only.
    EXPECT_FLOAT_EQ(StoredValue("fp8/fp8", {{3, 3}}, value)[5], RoundToE4m3(value, 1)) << value;
    EXPECT_FLOAT_EQ(StoredValue("fp8_calibrated/fp8_calibrated", {{1, 3}}, value)[5], RoundToE4m3(value, 3))
        << value;
  }
  EXPECT_FLOAT_EQ(StoredValue("fp8/f16", {}, 0.3f)[0], F16ToF32(F32ToF16(0.3f)));
}

TEST(Fp8KvStore, ACalibrationTakesTheLargestValueOfEachSide) {
  LayerVectors layer;
  layer.k = {1, -896, 2};
  layer.v = {0.5f, -0.25f, 0};
  const std::vector<Fp8Scales> scales = CalibratedScales({layer, LayerVectors{}});
  ASSERT_EQ(scales.size(), 2u);
  EXPECT_FLOAT_EQ(scales[0].k, 2);
  EXPECT_FLOAT_EQ(scales[0].v, 0.5f / 448);
  EXPECT_FLOAT_EQ(scales[1].k, 1);  // a layer that saw nothing
}

}  // namespace
}  // namespace kvtide::cli
