// The example of clients/cpp/README.md over an embedded pool: one token is written and attended over, which
// gives its value; and the engine's own kernels are there (DirectAttention).
#include <cmath>
#include <cstdio>
#include <vector>

#include "clients/cpp/direct_attention.h"
#include "clients/cpp/pool.h"

namespace {

constexpr int kHeads = 8, kDim = 64;

int Fail(const absl::Status& status) {
  std::printf("%s\n", status.ToString().c_str());
  return 1;
}

bool Near(const std::vector<float>& out, float value) {
  for (const float x : out)
    if (std::fabs(x - value) > .01F) return false;
  return true;
}

}  // namespace

int main() {
  auto pool = kvtide::Pool::Connect(
      "embedded", {.embedded_config = R"({"device": "cpu", "device_memory": "64MiB", "host_memory": "0"})",
                   .direct_device = "cpu"});
  if (!pool.ok()) return Fail(pool.status());
  kvtide::client::Model model{
      "my-model", {{.kv_heads = kHeads, .head_dim_k = kDim, .head_dim_v = kDim, .query_heads = kHeads}}};
  if (const absl::Status status = (*pool)->RegisterModel(model); !status.ok()) return Fail(status);
  const auto sequence = (*pool)->CreateSequence("my-model", {.pair = "q8_0/turbo4"});
  if (!sequence.ok()) return Fail(sequence.status());

  const std::vector<float> ones(kHeads * kDim, 1), halves(kHeads * kDim, .5F);
  std::vector<float> output(kHeads * kDim);
  kvtide::client::AppendAttendItem item;
  item.sequence = *sequence;
  item.start_position = 0;
  item.q = kvtide::client::TensorRef::F32(ones, {1, kHeads, kDim});
  item.k = kvtide::client::TensorRef::F32(ones, {1, kHeads, kDim});
  item.v = kvtide::client::TensorRef::F32(halves, {1, kHeads, kDim});
  item.output = output;
  if (const absl::Status status = (*pool)->AppendAttend(0, std::span(&item, 1)); !status.ok())
    return Fail(status);
  if (!Near(output, .5F)) return Fail(absl::InternalError("attention over one token is not its value"));

  auto attention = kvtide::DirectAttention::Make(
      pool->get(), model,
      {.pairs = {"q8_0/turbo4"}, .type = kvtide::DataType::kF32, .output_type = kvtide::DataType::kF32});
  if (!attention.ok()) return Fail(attention.status());
  std::printf("%s: %s\n", kvtide::client::WayName((*pool)->way()), (*pool)->why().c_str());
  return 0;
}
