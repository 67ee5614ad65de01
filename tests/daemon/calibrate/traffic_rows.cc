#include "tests/daemon/calibrate/traffic_rows.h"

#include <random>

namespace kvtide::testing {

ModelSpec TrafficModel() { return UniformModel("traffic", {2, 2, 32, 32}, 4); }

Rope TrafficRope() {
  Rope rope;
  float frequency = 1;
  for (int i = 0; i < 16; i++, frequency *= 0.6f) rope.frequencies.push_back(frequency);
  return rope;
}

TrafficTokens::TrafficTokens(uint32_t seed, int64_t first, int count, int strong)
    : position(first), tokens(count) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const Rope rope = TrafficRope();
  for (auto* rows : {&k, &q}) {
    const int heads = rows == &k ? 2 : 4;
    rows->resize(static_cast<size_t>(count * heads * 32));
    for (int t = 0; t < count; t++)
      for (int h = 0; h < heads; h++) {
        float* const row = rows->data() + static_cast<size_t>((t * heads + h) * 32);
        for (int c = 0; c < 32; c++) row[c] = 0.5f + normal(random) * (c % 8 == strong ? 4.0f : 0.3f);
        TurnKey(rope, position + t, 0, false, row);
      }
  }
}

TrafficRows TrafficTokens::Rows() const {
  return {position, tokens, {k.data(), DataType::kF32}, position, tokens, {q.data(), DataType::kF32}};
}

}  // namespace kvtide::testing
