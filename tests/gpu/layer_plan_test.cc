// Plans of the CUDA backend: what is sent again, what types and ways of the tensors give, and how a call
// stops. That plans give what Attend gives is the conformance suite's.
#include "kernels/cuda/layer_plan.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/second_hand.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/prefill/prefill_call.h"
#include "tests/kernels/test_sequence.h"

namespace kvtide::cuda {
namespace {

using kvtide::testing::GaussianRows;
using kvtide::testing::RandomProfile;
using kvtide::testing::TestSequence;

constexpr int kHeads = 4, kDim = 128;

class LayerPlanTest : public ::testing::Test {
 protected:
  void SetUp() override {
    backend_ = MakeCudaBackend().value();
    ASSERT_TRUE(workspace_.Create().ok());
    ASSERT_EQ(cudaDeviceGetAttribute(&environment_.processors, cudaDevAttrMultiProcessorCount, 0),
              cudaSuccess);
    const DeviceImage image = FindDeviceImage(0).value();
    environment_.scratch_bytes = 1u << 20;
    environment_.in_place_bytes = 1u << 20;
    environment_.rotations = &rotations_;
    environment_.profiles = &profiles_;
    environment_.shared_limit = image.shared_limit;
    environment_.warpgroups = HasWarpgroups(image.image_capability);
    environment_.dependent_launches = HasBulkCopies(image.image_capability);
  }
  // f32 rows of an attention whose tensors are of `type`.
  std::vector<float> Attend(LayerPlan& plan, int queries, int layer, DataType type,
                            absl::Status* status = nullptr) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const size_t values = static_cast<size_t>(queries) * kHeads * kDim;
    std::vector<std::byte> q(values * DataTypeBytes(type)), out(q.size(), std::byte{0xff});
    for (size_t i = 0; i < values; i++)
      MutableTensorView{q.data(), type}.Set(i, F16ToF32(F32ToF16(Bf16ToF32(F32ToBf16(normal(random))))));
    const LayerItem item{{q.data(), type}, {out.data(), type}, nullptr};
    AttendLayerArgs args;
    args.layer = layer;
    args.scale = 0.09f;
    args.items = {&item, 1};
    const absl::Status result = plan.Attend(args, environment_, workspace_);
    workspace_.Abandon();
    EXPECT_TRUE(result.ok()) << result;
    std::vector<float> rows;
    for (size_t i = 0; i < values; i++) rows.push_back(TensorView{out.data(), type}.At(i));
    if (status != nullptr) *status = result;
    return rows;
  }
  std::unique_ptr<LayerPlan> Plan(std::span<const BlockRun> runs, int queries, int64_t position,
                                  std::unique_ptr<LayerPlan> previous) {
    const PlanItem item{runs, queries, position};
    auto plan = LayerPlan::Make({kHeads, true, 0, {&item, 1}}, environment_, std::move(previous));
    KVTIDE_CHECK(plan.ok(), std::string(plan.status().message()));
    return std::move(plan).value();
  }

  std::unique_ptr<Backend> backend_;
  Rotations rotations_;
  ProfileStore profiles_;
  AttendEnvironment environment_;
  Workspace workspace_;
  const GroupShape shape_{3, 2, kDim, kDim};
};

TEST_F(LayerPlanTest, SendsOnlyWhatHasChanged) {
  const Profile profile = RandomProfile(shape_, 3);
  TestSequence sequence(*backend_, shape_);
  sequence.AddRun("f16", 64, GaussianRows(1));
  sequence.AddRun("turbo4", 64 * 3000, GaussianRows(2), &profile);
  sequence.AddRun("f16", 120, GaussianRows(3));
  std::vector<BlockRun> runs = sequence.device_runs();
  runs[2].tokens = 100;
  auto plan = Plan(runs, 1, sequence.tokens(), nullptr);
  for (int layer = 0; layer < 3; layer++) (void)Attend(*plan, 1, layer, DataType::kF16);
  const size_t first = plan->sent_bytes();
  EXPECT_GT(first, 3000 * sizeof(void*));
  // The next step, with one token more.
  runs[2].tokens = 101;
  plan = Plan(runs, 1, sequence.tokens() + 1, std::move(plan));
  for (int layer = 0; layer < 3; layer++) (void)Attend(*plan, 1, layer, DataType::kF16);
  const size_t second = plan->sent_bytes() - first;
  EXPECT_GT(second, 0u);
  EXPECT_LE(second, size_t{16} << 10);
  // The same again.
  plan = Plan(runs, 1, sequence.tokens() + 1, std::move(plan));
  (void)Attend(*plan, 1, 0, DataType::kF16);
  EXPECT_EQ(plan->sent_bytes(), first + second);
  EXPECT_EQ(profiles_.count(), 1u);
}

TEST_F(LayerPlanTest, GivesTheSameBitsFromKeptMemoryAndFromNew) {
  const Profile profile = RandomProfile(shape_, 3);
  TestSequence sequence(*backend_, shape_), other(*backend_, shape_);
  for (TestSequence* s : {&sequence, &other}) {
    s->AddRun("f16", 64, GaussianRows(1));
    s->AddRun("turbo4/turbo3", s == &other ? 64 * 90 : 64 * 11, GaussianRows(2), &profile);
    s->AddRun("f16", 90, GaussianRows(3));
  }
  std::unique_ptr<LayerPlan> kept;
  for (int round = 0; round < 6; round++) {
    const TestSequence& s = round % 2 == 0 ? sequence : other;
    const std::vector<BlockRun> runs = s.device_runs();
    const int queries = 1 + round;
    kept = Plan(runs, queries, s.tokens() - queries, std::move(kept));
    auto fresh = Plan(runs, queries, s.tokens() - queries, nullptr);
    for (int layer = 0; layer < 3; layer++)
      EXPECT_EQ(Attend(*kept, queries, layer, DataType::kF32),
                Attend(*fresh, queries, layer, DataType::kF32));
  }
}

// Queries that all types hold exactly; results are the f32 ones, rounded.
TEST_F(LayerPlanTest, TypesAndPlacesOfTensorsChangeOnlyTheRounding) {
  TestSequence sequence(*backend_, shape_);
  sequence.AddRun("f16", 64, GaussianRows(1));
  sequence.AddRun("turbo4", 640, GaussianRows(2));
  const std::vector<BlockRun> runs = sequence.device_runs();
  for (const int queries : {1, 3, 40, 200}) {  // 40 are sent by a kernel, the last is a prefill
    auto plan = Plan(runs, queries, sequence.tokens() - queries, nullptr);
    const std::vector<float> wanted = Attend(*plan, queries, 1, DataType::kF32);
    for (const size_t in_place : {size_t{0}, size_t{1} << 20})
      for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16}) {
        SCOPED_TRACE(std::string(DataTypeName(type)) + " queries " + std::to_string(queries));
        environment_.in_place_bytes = in_place;
        const std::vector<float> got = Attend(*plan, queries, 1, type);
        for (size_t i = 0; i < got.size(); i++) {
          const float x = type == DataType::kF32   ? wanted[i]
                          : type == DataType::kF16 ? F16ToF32(F32ToF16(wanted[i]))
                                                   : Bf16ToF32(F32ToBf16(wanted[i]));
          ASSERT_EQ(got[i], x) << "value " << i;
        }
      }
  }
}

// Queries, rows and results of many items: copied by one thread or by two, read in place or sent, or left
// where they are. All ways give the same bits.
TEST_F(LayerPlanTest, ManyItemsComeByEveryWay) {
  constexpr int kItems = 30, kQueries = 2, kTail = 20;
  constexpr size_t kQueryValues = size_t{kQueries} * kHeads * kDim, kRowValues = size_t{2} * kDim;
  TestSequence sequence(*backend_, shape_);
  sequence.AddRun("turbo4", 640, GaussianRows(2));
  const std::vector<BlockRun> coded = sequence.device_runs();
  const BlockLayout exact(shape_, ExactPair());
  const auto slab = backend_->AllocateSlab(kItems * exact.block_bytes()).value();
  std::vector<std::byte*> blocks;
  for (int i = 0; i < kItems; i++)
    blocks.push_back(slab->data() + static_cast<size_t>(i) * exact.block_bytes());
  std::vector<std::vector<BlockRun>> runs;
  std::vector<PlanItem> items;
  for (size_t i = 0; i < kItems; i++)
    runs.push_back({coded[0], {&exact, nullptr, std::span(blocks).subspan(i, 1), 640, kTail}});
  for (const std::vector<BlockRun>& run : runs) items.push_back({run, kQueries, 640 + kTail - kQueries});
  auto plan = LayerPlan::Make({kHeads, true, 0, items}, environment_, nullptr);
  ASSERT_TRUE(plan.ok()) << plan.status();
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  // One piece of memory, so that it can be registered.
  std::vector<float> memory(2 * kItems * kQueryValues + kItems * kTail * kRowValues + 4);
  const size_t begin = (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / sizeof(float);
  const std::span<float> q(memory.data() + begin, kItems * kQueryValues),
      rows(q.data() + q.size(), kItems * kTail * kRowValues), out(rows.data() + rows.size(), q.size());
  for (const std::span<float> values : {q, rows})
    for (float& x : values) x = normal(random);
  std::vector<AppendPiece> pieces;
  for (size_t i = 0; i < kItems; i++) {
    AppendPiece& piece = pieces.emplace_back();
    piece.layout = &exact;
    piece.block = blocks[i];
    piece.layer = 1;
    piece.tokens = kTail;
    piece.k = piece.v = {rows.data() + i * kTail * kRowValues, DataType::kF32};
  }
  const auto attend = [&] {
    std::fill(out.begin(), out.end(), NAN);
    std::vector<float> lse(kItems * kQueries * kHeads, NAN);
    std::vector<LayerItem> tensors;
    for (size_t i = 0; i < kItems; i++)
      tensors.push_back({{q.data() + i * kQueryValues, DataType::kF32},
                         {out.data() + i * kQueryValues, DataType::kF32},
                         lse.data() + i * kQueries * kHeads});
    AttendLayerArgs args;
    args.layer = 1;
    args.scale = 0.09f;
    args.items = tensors;
    args.append = pieces;
    EXPECT_TRUE((*plan)->QueuesAppend(args));
    const absl::Status status = (*plan)->Attend(args, environment_, workspace_);
    workspace_.Abandon();
    EXPECT_TRUE(status.ok()) << status;
    std::vector<float> results(out.begin(), out.end());
    results.insert(results.end(), lse.begin(), lse.end());
    return results;
  };
  environment_.in_place_bytes = 0;
  const std::vector<float> wanted = attend();
  for (const float x : wanted) ASSERT_TRUE(std::isfinite(x));
  SecondHand hand;
  for (SecondHand* const helper : {static_cast<SecondHand*>(nullptr), &hand})
    for (const size_t in_place : {size_t{0}, size_t{1} << 20}) {
      environment_.hand = helper;
      environment_.in_place_bytes = in_place;
      for (int round = 0; round < 20; round++) ASSERT_EQ(attend(), wanted);
    }
  // In registered memory the kernels read and write them where they are: all, or only some of the three.
  const auto registered = [&](std::span<float> part) {
    return PinnedRange::Make(reinterpret_cast<std::byte*>(part.data()), part.size_bytes()).value();
  };
  for (const bool append : {true, false})
    for (const std::span<float> part : {std::span(memory), q, rows, out}) {
      const auto range = registered(part);
      if (!append) pieces.clear();
      for (int round = 0; round < 5; round++) ASSERT_EQ(attend(), wanted);
    }
}

// Kernels of one call follow each other before they are over: pages are not read before their rows are there,
// however many others are written beside them.
TEST_F(LayerPlanTest, AttendsTheRowsThatTheSameCallAppends) {
  constexpr int kBlocks = 160;  // the last one is attended
  constexpr size_t kRowValues = 2 * kDim, kBlockValues = kBlockTokens * kRowValues;
  const BlockLayout exact(shape_, ExactPair());
  const auto slab = backend_->AllocateSlab(kBlocks * exact.block_bytes()).value();
  const auto block = [&](int i) { return slab->data() + static_cast<size_t>(i) * exact.block_bytes(); };
  std::byte* const attended[] = {block(kBlocks - 1)};
  const BlockRun run{&exact, nullptr, attended, 0, kBlockTokens};
  auto plan = Plan({&run, 1}, 1, kBlockTokens - 1, nullptr);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> q(kHeads * kDim), rows(2 * kBlockValues);  // two fillings of the block, in turns
  for (std::vector<float>* const values : {&q, &rows})
    for (float& x : *values) x = normal(random);
  const auto attend = [&](size_t filling, std::span<const AppendPiece> append) {
    std::vector<float> out(q.size(), NAN);
    const LayerItem item{{q.data(), DataType::kF32}, {out.data(), DataType::kF32}, nullptr};
    AttendLayerArgs args;
    args.scale = 0.09f;
    args.items = {&item, 1};
    args.append = append;
    const absl::Status status = plan->Attend(args, environment_, workspace_);
    workspace_.Abandon();
    EXPECT_TRUE(status.ok()) << status << " filling " << filling;
    return out;
  };
  std::vector<AppendPiece> pieces[2];
  std::vector<float> wanted[2];
  for (const size_t filling : {size_t{0}, size_t{1}}) {
    for (int i = 0; i < kBlocks; i++) {
      AppendPiece& piece = pieces[filling].emplace_back();
      piece.layout = &exact;
      piece.block = block(i);
      piece.tokens = kBlockTokens;
      piece.k = piece.v = {rows.data() + filling * kBlockValues, DataType::kF32};
    }
    AppendArgs append;
    append.pieces = pieces[filling];
    ASSERT_TRUE(backend_->Append(append).ok());
    wanted[filling] = attend(filling, {});
  }
  ASSERT_NE(wanted[0], wanted[1]);
  for (const size_t in_place : {size_t{0}, size_t{1} << 28}) {
    environment_.in_place_bytes = in_place;
    for (size_t round = 0; round < 60; round++)
      ASSERT_EQ(attend(round % 2, pieces[round % 2]), wanted[round % 2]) << "round " << round;
  }
}

// 16,384 queries over 131,072 tokens take most of a second.
TEST_F(LayerPlanTest, StopsWhenItIsCancelled) {
  const GroupShape shape{1, 8, kDim, kDim};
  const BlockLayout layout(shape, *ParseCachePair("turbo4"));
  auto slab = backend_->AllocateSlab(layout.block_bytes()).value();  // zeros, read again and again
  constexpr int kQueries = 16384, kTokens = 131072, kAllHeads = 32;
  const std::vector<std::byte*> blocks(kTokens / kBlockTokens, slab->data());
  const BlockRun run{&layout, nullptr, blocks, 0, kTokens};
  const PlanItem item{{&run, 1}, kQueries, kTokens - kQueries};
  environment_.scratch_bytes = size_t{256} << 20;
  auto plan = LayerPlan::Make({kAllHeads, true, 0, {&item, 1}}, environment_, nullptr);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const std::vector<uint16_t> q(size_t{kQueries} * kAllHeads * kDim, 0x3400);
  std::vector<uint16_t> out(q.size());
  const LayerItem tensors{{q.data(), DataType::kF16}, {out.data(), DataType::kF16}, nullptr};
  AttendLayerArgs args;
  args.scale = 0.09f;
  args.items = {&tensors, 1};
  Cancellation cancellation;
  args.cancellation = &cancellation;
  using Clock = std::chrono::steady_clock;
  std::atomic<Clock::time_point> cancelled{Clock::time_point{}};
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    cancelled = Clock::now();
    cancellation.Cancel();
  });
  const absl::Status status = (*plan)->Attend(args, environment_, workspace_);
  workspace_.Abandon();
  const auto end = Clock::now();
  canceller.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
  std::printf("stopped %.1f ms after the wish\n",
              std::chrono::duration<double, std::milli>(end - cancelled.load()).count());
  Cancellation before;
  before.Cancel();
  args.cancellation = &before;
  EXPECT_EQ((*plan)->Attend(args, environment_, workspace_).code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace kvtide::cuda
