#include "tests/daemon/cache/layer_call.h"

namespace kvtide::testing {

std::vector<float> RandomRows(std::mt19937& random, size_t count, float spread) {
  // The sum of four numbers of 16 bits, from a counter that is mixed (splitmix64): nearly normal, and many
  // times faster than std::normal_distribution of this generator, where simulations spent their time.
  constexpr float kMean = 2 * 65535.0f, kDeviation = 37837.23f;  // of the sum: 65536 / sqrt(3)
  uint64_t counter = random();
  counter = counter << 32 | random();
  std::vector<float> values(count);
  for (float& x : values) {
    uint64_t bits = counter += 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    const uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    x = (static_cast<float>(sum) - kMean) / kDeviation * spread;
  }
  return values;
}

NewRows::NewRows(const ModelSpec& model, int of_layer, int64_t count, std::mt19937& random)
    : layer(of_layer), tokens(count) {
  const GroupShape& shape = GroupOf(model, layer).shape;
  const auto rows = static_cast<size_t>(tokens * shape.kv_heads);
  k = RandomRows(random, rows * static_cast<size_t>(shape.head_dim_k));
  v = RandomRows(random, rows * static_cast<size_t>(shape.head_dim_v));
  for (size_t i = 0; i < k.size(); i += 8) k[i] += 2.0f;
}

LayerKv NewRows::Kv() const {
  return {layer, {k.data(), DataType::kF32}, {v.data(), DataType::kF32}, k.size(), v.size()};
}

LayerCall::LayerCall(const ModelSpec& model, int layer, SequenceId sequence, int64_t queries,
                     int64_t first_position, std::mt19937& random) {
  const LayerGroupSpec& group = GroupOf(model, layer);
  const auto rows = static_cast<size_t>(queries * group.heads);
  q = RandomRows(random, rows * static_cast<size_t>(group.shape.head_dim_k));
  out.resize(rows * static_cast<size_t>(group.shape.head_dim_v));
  lse.resize(rows);
  item_.sequence = sequence;
  item_.q = {q.data(), DataType::kF32};
  item_.q_elements = q.size();
  item_.queries = queries;
  item_.first_query_position = first_position;
  item_.out = out.data();
  item_.lse = lse.data();
  call_.layer = layer;
  call_.items = {&item_, 1};
}

void LayerCall::Append(const NewRows& rows) {
  const LayerKv kv = rows.Kv();
  item_.new_tokens = rows.tokens;
  item_.start_position = item_.first_query_position;
  item_.k = kv.k;
  item_.v = kv.v;
  item_.k_elements = kv.k_elements;
  item_.v_elements = kv.v_elements;
}

}  // namespace kvtide::testing
