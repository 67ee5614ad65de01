#include "tests/kernels/attend_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/format/page_codec.h"
#include "tests/kernels/rebuilt_keys.h"

namespace kvtide::testing {
namespace {

template <class Attend>
AttendResult Run(const TestSequence& sequence, const std::vector<BlockRun>& runs, const AttendCase& c,
                 const std::vector<float>& q, Attend attend) {
  const GroupShape& shape = sequence.shape();
  const int heads = shape.kv_heads * c.group;
  AttendResult result;
  // NaN shows what was not written.
  result.out.assign(static_cast<size_t>(c.queries * heads * shape.head_dim_v), NAN);
  result.lse.assign(static_cast<size_t>(c.queries * heads), NAN);
  AttendItem item;
  item.runs = runs;
  item.q = q.data();
  item.queries = c.queries;
  item.first_query_position =
      c.first_query_position >= 0 ? c.first_query_position : sequence.tokens() - c.queries;
  item.out = result.out.data();
  item.lse = result.lse.data();
  AttendArgs args;
  args.layer = c.layer;
  args.heads = heads;
  args.scale = c.scale != 0 ? c.scale : 1.0f / std::sqrt(static_cast<float>(shape.head_dim_k));
  args.causal = c.causal;
  args.window = c.window;
  args.softcap = c.softcap;
  args.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
  args.items = {&item, 1};
  const absl::Status status = attend(args);
  EXPECT_TRUE(status.ok()) << status;
  return result;
}

}  // namespace

std::vector<float> MakeQueries(const TestSequence& sequence, const AttendCase& c) {
  std::mt19937 random(c.seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> q(
      static_cast<size_t>(c.queries * sequence.shape().kv_heads * c.group * sequence.shape().head_dim_k));
  for (float& x : q) x = c.query_size * normal(random);
  return q;
}

AttendResult AttendOn(Backend& backend, const TestSequence& sequence, std::vector<BlockRun> runs,
                      const AttendCase& c, const std::vector<float>& q) {
  return Run(sequence, runs, c, q, [&](const AttendArgs& args) { return backend.Attend(args); });
}

std::vector<float> Rounded(const std::vector<float>& values, DataType type) {
  std::vector<float> rounded(values.size());
  uint32_t bits = 0;
  for (size_t i = 0; i < values.size(); i++) {
    MutableTensorView{&bits, type}.Set(0, values[i]);
    rounded[i] = TensorView{&bits, type}.At(0);
  }
  return rounded;
}

AttendResult AttendByPlan(Backend& backend, const TestSequence& sequence, const std::vector<BlockRun>& runs,
                          const AttendCase& c, const std::vector<float>& q, DataType type,
                          std::unique_ptr<AttendPlan>& plan) {
  return Run(sequence, runs, c, q, [&](const AttendArgs& args) -> absl::Status {
    const AttendItem& item = args.items[0];
    const PlanItem planned{item.runs, item.queries, item.first_query_position};
    absl::StatusOr<std::unique_ptr<AttendPlan>> made =
        backend.PlanAttend({args.heads, args.causal, args.window, {&planned, 1}}, std::move(plan));
    if (!made.ok()) return made.status();
    plan = *std::move(made);
    const size_t rows = static_cast<size_t>(item.queries) * static_cast<size_t>(args.heads);
    const size_t width = static_cast<size_t>(sequence.shape().head_dim_v);
    std::vector<float> typed_q(q.size()), typed_out(rows * width, NAN);
    for (size_t i = 0; i < q.size(); i++) MutableTensorView{typed_q.data(), type}.Set(i, q[i]);
    for (size_t i = 0; i < typed_out.size(); i++) MutableTensorView{typed_out.data(), type}.Set(i, NAN);
    const LayerItem tensors{{typed_q.data(), type}, {typed_out.data(), type}, item.lse};
    AttendLayerArgs layer;
    layer.layer = args.layer;
    layer.scale = args.scale;
    layer.softcap = args.softcap;
    layer.sinks = args.sinks;
    layer.items = {&tensors, 1};
    absl::Status status = backend.AttendLayer(*plan, layer);
    for (size_t i = 0; i < rows * width; i++) item.out[i] = TensorView{typed_out.data(), type}.At(i);
    return status;
  });
}

AttendResult AttendByReference(const TestSequence& sequence, const AttendCase& c,
                               const std::vector<float>& q) {
  return Run(sequence, sequence.host_runs(), c, q,
             [](const AttendArgs& args) { return ReferenceAttend(args); });
}

namespace {

// Keys coded before RoPE, of the pairs and head dims for which backends may have kernels that rebuild them.
bool MayBeRebuilt(const BlockLayout& layout, const HeadProfile* profile) {
  const CachePair& pair = layout.pair();
  const int dim = layout.k().stored_dim;
  return Info(pair.k).calibrated && !profile->rope.frequencies.empty() && (dim == 64 || dim == 128) &&
         dim == layout.v().stored_dim &&
         Name(pair.v) == "turbo" + std::to_string(std::max(2, int{Info(pair.k).bits}));
}

AttendResult AttendOverF16(const TestSequence& sequence, const AttendCase& c, const std::vector<float>& q,
                           bool rebuilt) {
  const GroupShape& shape = sequence.shape();
  const BlockLayout layout(shape, ExactPair());
  const std::vector<BlockRun> stored = sequence.host_runs();
  std::vector<BlockRun> runs = stored;
  std::deque<std::vector<std::byte>> bytes;
  std::deque<std::vector<std::byte*>> blocks(stored.size());
  for (size_t r = 0; r < stored.size(); r++) {
    for (const std::byte* block : stored[r].blocks) {
      bytes.emplace_back(layout.block_bytes());
      for (int layer = 0; layer < shape.layers; layer++)
        for (int head = 0; head < shape.kv_heads; head++)
          for (Side side : {Side::kKey, Side::kValue}) {
            const bool key = side == Side::kKey;
            const BlockLayout& from = *stored[r].layout;
            const HalfLayout &source = key ? from.k() : from.v(), &target = key ? layout.k() : layout.v();
            const HeadProfile* profile =
                key && stored[r].profile != nullptr ? &stored[r].profile->key(layer, head) : nullptr;
            std::vector<float> rows(static_cast<size_t>(kBlockTokens * source.head_dim));
            const int64_t position =
                stored[r].first_position + static_cast<int64_t>(blocks[r].size()) * kBlockTokens;
            const std::byte* const half = block + from.RecordOffset(layer, head) + (key ? 0 : from.v_codes());
            const CacheType type = key ? from.pair().k : from.pair().v;
            if (rebuilt && key && MayBeRebuilt(from, profile))
              rows = RebuiltKeys(type, source, *profile, position, half);
            else
              DecodeHalf(type, side, source, profile, position, half, rows.data());
            EncodeHalf(key ? layout.pair().k : layout.pair().v, side, target, nullptr, rows.data(),
                       kBlockTokens,
                       bytes.back().data() + layout.RecordOffset(layer, head) + (key ? 0 : layout.v_codes()));
          }
      blocks[r].push_back(bytes.back().data());
    }
    runs[r].layout = &layout;
    runs[r].profile = nullptr;
    runs[r].blocks = blocks[r];
  }
  return Run(sequence, runs, c, q, [](const AttendArgs& args) { return ReferenceAttend(args); });
}

}  // namespace

AttendResult AttendByReferenceOverF16(const TestSequence& sequence, const AttendCase& c,
                                      const std::vector<float>& q) {
  return AttendOverF16(sequence, c, q, false);
}
AttendResult AttendByReferenceOverRebuilt(const TestSequence& sequence, const AttendCase& c,
                                          const std::vector<float>& q) {
  return AttendOverF16(sequence, c, q, true);
}

double LargestDistance(const AttendResult& got, const AttendResult& wanted, int dim) {
  double largest = 0;
  const size_t width = static_cast<size_t>(dim);
  for (size_t row = 0; row < wanted.lse.size(); row++) {
    double difference = 0, size = 0;
    for (size_t d = row * width; d < (row + 1) * width; d++) {
      const double a = static_cast<double>(got.out[d]), b = static_cast<double>(wanted.out[d]);
      difference += (a - b) * (a - b);
      size += b * b;
    }
    if (!std::isfinite(difference)) return INFINITY;
    largest = std::max(largest, std::sqrt(difference) / (std::sqrt(size) + 1e-6));
  }
  return largest;
}

void ExpectClose(const AttendResult& got, const AttendResult& wanted, int dim, double tolerance) {
  ASSERT_EQ(got.lse.size(), wanted.lse.size());
  const size_t width = static_cast<size_t>(dim);
  for (size_t row = 0; row < got.lse.size(); row++) {
    double difference = 0, size = 0;
    for (size_t d = row * width; d < (row + 1) * width; d++) {
      const double a = static_cast<double>(got.out[d]), b = static_cast<double>(wanted.out[d]);
      ASSERT_TRUE(std::isfinite(a)) << "row " << row << " dim " << d % width;
      difference += (a - b) * (a - b);
      size += b * b;
    }
    ASSERT_LE(std::sqrt(difference), tolerance * std::sqrt(size) + 1e-6)
        << "output row " << row << " of size " << std::sqrt(size);
    if (wanted.lse[row] == -INFINITY) {
      ASSERT_EQ(got.lse[row], -INFINITY) << "row " << row;
    } else {
      ASSERT_NEAR(got.lse[row], wanted.lse[row],
                  std::max(2e-3, 2 * tolerance) + 2e-5 * std::fabs(static_cast<double>(wanted.lse[row])))
          << "row " << row;
    }
  }
}

void ExpectRounded(const AttendResult& got, const AttendResult& f32, int dim, DataType type) {
  AttendResult rounded = f32;
  rounded.out = Rounded(f32.out, type);
  ExpectClose(got, rounded, dim, type == DataType::kBf16 ? 5e-3 : 1e-3);
}

void CheckAttend(Backend& backend, const TestSequence& sequence, const AttendCase& c) {
  const std::vector<float> q = MakeQueries(sequence, c);
  const std::vector<BlockRun> stored = sequence.host_runs();
  const bool rebuilt = std::any_of(stored.begin(), stored.end(),
                                   [](const BlockRun& run) { return Info(run.layout->pair().k).calibrated; });
  const double tolerance = rebuilt ? 5e-3 : c.queries * c.group > kFewRows ? 3e-3 : 1e-3;
  const int dim = sequence.shape().head_dim_v;
  const AttendResult got = AttendOn(backend, sequence, sequence.device_runs(), c, q);
  AttendResult wanted = AttendByReference(sequence, c, q);
  if (LargestDistance(got, wanted, dim) > tolerance) {
    const AttendResult exact = std::move(wanted);
    wanted = AttendByReferenceOverF16(sequence, c, q);
    if (rebuilt && LargestDistance(got, wanted, dim) > tolerance) {
      wanted = AttendByReferenceOverRebuilt(sequence, c, q);
      EXPECT_LT(LargestDistance(wanted, exact, dim), kRebuiltDistance);
    }
  }
  ExpectClose(got, wanted, dim, tolerance);

  SCOPED_TRACE("by a plan");
  std::unique_ptr<AttendPlan> plan;
  const std::vector<BlockRun> runs = sequence.device_runs();
  ExpectClose(AttendByPlan(backend, sequence, runs, c, q, DataType::kF32, plan), wanted, dim, tolerance);
  const DataType type = c.queries % 2 == 0 ? DataType::kF16 : DataType::kBf16;
  SCOPED_TRACE(DataTypeName(type));
  ExpectRounded(AttendByPlan(backend, sequence, runs, c, q, type, plan),
                AttendOn(backend, sequence, runs, c, Rounded(q, type)), dim, type);
}

}  // namespace kvtide::testing
