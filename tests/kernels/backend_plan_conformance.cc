// Conformance of plans: layers on one plan, plans made of earlier ones, cancellation, logits beyond f32, and
// rows of tokens taken out of runs. What attends is right at all is backend_attend_conformance.cc, each of
// whose cases goes through a plan too.
#include <gmock/gmock.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <utility>

#include "kernels/base/cancellation.h"
#include "kernels/cpu/reference.h"
#include "kernels/format/catalogue.h"
#include "tests/kernels/attend_check.h"
#include "tests/kernels/backend_conformance.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

// One item of a batch: what it attends over and its tensors.
struct BatchItem {
  std::unique_ptr<TestSequence> sequence;
  std::vector<BlockRun> runs;
  AttendCase attend;
  std::vector<float> q;
  AttendResult result;

  BatchItem(Backend& backend, const GroupShape& shape, const char* pair, int64_t tokens, int queries,
            int group, uint32_t seed, const Profile* profile = nullptr)
      : sequence(std::make_unique<TestSequence>(backend, shape)) {
    sequence->AddRun("f16", 64, GaussianRows(seed));
    sequence->AddRun(pair, (tokens - 64) / 64 * 64, GaussianRows(seed + 1), profile);
    if (tokens % 64 != 0) sequence->AddRun("f16", tokens % 64, GaussianRows(seed + 2));
    runs = sequence->device_runs();
    attend.queries = queries;
    attend.group = group;
    attend.seed = seed;
    q = MakeQueries(*sequence, attend);
    const size_t rows = static_cast<size_t>(queries * shape.kv_heads * group);
    result = {std::vector<float>(rows * static_cast<size_t>(shape.head_dim_v)), std::vector<float>(rows)};
  }
  PlanItem Planned() const { return {runs, attend.queries, sequence->tokens() - attend.queries}; }
  LayerItem Tensors() {
    std::fill(result.out.begin(), result.out.end(), NAN);
    std::fill(result.lse.begin(), result.lse.end(), NAN);
    return {{q.data(), DataType::kF32}, {result.out.data(), DataType::kF32}, result.lse.data()};
  }
};

AttendLayerArgs LayerOf(int layer, int head_dim, std::span<const LayerItem> items) {
  AttendLayerArgs args;
  args.layer = layer;
  args.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  args.items = items;
  return args;
}

// Few rows and many, with profiles of each layer's own, f16 pages that may be read in place among them.
TEST_P(BackendConformance, RunsEveryLayerOnOnePlan) {
  for (const int dim : {128, 64}) {
    const GroupShape shape{5, 2, dim, 64};
    const Profile profile = RandomProfile(shape, 3);
    std::vector<BatchItem> batch;
    batch.emplace_back(backend(), shape, "turbo4/turbo3", 700, 1, 4, 10, &profile);
    batch.emplace_back(backend(), shape, "q8_0", 300, 40, 4, 20);
    batch.emplace_back(backend(), shape, "turbo3", 200, 2, 4, 30);
    batch.emplace_back(backend(), shape, "turbo4", 500, 90, 4, 40, &profile);
    batch.emplace_back(backend(), shape, "f16", 400, 70, 4, 50);
    std::vector<PlanItem> planned;
    for (const BatchItem& item : batch) planned.push_back(item.Planned());
    auto plan = backend().PlanAttend({8, true, 0, planned}, nullptr);
    ASSERT_TRUE(plan.ok()) << plan.status();
    // The plan keeps the blocks: the spans that it was made of are gone.
    planned.clear();
    for (BatchItem& item : batch) item.runs.clear();
    for (const int layer : {0, 3, 4, 1, 3}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " layer " << layer);
      std::vector<LayerItem> tensors;
      for (BatchItem& item : batch) tensors.push_back(item.Tensors());
      ASSERT_TRUE(backend().AttendLayer(**plan, LayerOf(layer, dim, tensors)).ok());
      for (BatchItem& item : batch) {
        item.attend.layer = layer;
        // Pages of unequal head dims may be converted to f16.
        ExpectClose(item.result, AttendByReference(*item.sequence, item.attend, item.q), 64, 3e-3);
      }
    }
  }
}

TEST_P(BackendConformance, MakesPlansOfEarlierOnes) {
  const GroupShape shape{2, 2, 64, 64};
  std::mt19937 random(5);
  std::unique_ptr<AttendPlan> plan;
  const char* pairs[] = {"turbo4", "q8_0", "f16", "turbo2"};
  for (int round = 0; round < 12; round++) {
    SCOPED_TRACE(round);
    std::vector<BatchItem> batch;
    const size_t count = 1 + random() % 4;
    for (size_t i = 0; i < count; i++)
      batch.emplace_back(backend(), shape, pairs[random() % 4], 130 + static_cast<int64_t>(random() % 400),
                         1 + static_cast<int>(random() % 3) * 20, 3, static_cast<uint32_t>(random()));
    std::vector<PlanItem> planned;
    std::vector<LayerItem> tensors;
    for (BatchItem& item : batch) planned.push_back(item.Planned());
    for (int twice = 0; twice < 2; twice++) {  // of another plan, and of an equal one
      auto next = backend().PlanAttend({6, true, 0, planned}, std::move(plan));
      ASSERT_TRUE(next.ok()) << next.status();
      plan = *std::move(next);
      tensors.clear();
      for (BatchItem& item : batch) tensors.push_back(item.Tensors());
      ASSERT_TRUE(backend().AttendLayer(*plan, LayerOf(1, 64, tensors)).ok());
      for (BatchItem& item : batch) {
        item.attend.layer = 1;
        ExpectClose(item.result, AttendByReference(*item.sequence, item.attend, item.q), 64, 3e-3);
      }
    }
    // One token more in the last item: nearly the same plan.
    BlockRun& last = batch.back().runs.back();
    if (last.tokens % 64 == 0) continue;
    last.tokens--;
    planned.back().first_query_position -= 1;
    auto next = backend().PlanAttend({6, true, 0, planned}, std::move(plan));
    ASSERT_TRUE(next.ok()) << next.status();
    plan = *std::move(next);
    tensors.clear();
    for (BatchItem& item : batch) tensors.push_back(item.Tensors());
    ASSERT_TRUE(backend().AttendLayer(*plan, LayerOf(1, 64, tensors)).ok());
    AttendCase shorter = batch.back().attend;
    shorter.first_query_position = planned.back().first_query_position;
    ExpectClose(
        batch.back().result,
        AttendOn(backend(), *batch.back().sequence, batch.back().runs, shorter, batch.back().q), 64,
        shorter.queries * 3 > kFewRows ? 1e-3 : 1e-5);  // many rows may be rounded otherwise in a batch
  }
}

// Rows of many chunks: a prefill that a backend may cut otherwise than a few rows.
TEST_P(BackendConformance, AttendsLongPrefillInEveryType) {
  const GroupShape shape{1, 2, 64, 64};
  const Profile profile = RandomProfile(shape, 7);
  BatchItem item(backend(), shape, "turbo4/turbo2", 1300, 700, 3, 40, &profile);
  std::unique_ptr<AttendPlan> plan;
  const AttendResult wanted = AttendByReference(*item.sequence, item.attend, item.q);
  ExpectClose(AttendByPlan(backend(), *item.sequence, item.runs, item.attend, item.q, DataType::kF32, plan),
              wanted, 64, 3e-3);
  for (const DataType type : {DataType::kF16, DataType::kBf16}) {
    SCOPED_TRACE(DataTypeName(type));
    ExpectRounded(AttendByPlan(backend(), *item.sequence, item.runs, item.attend, item.q, type, plan),
                  AttendOn(backend(), *item.sequence, item.runs, item.attend, Rounded(item.q, type)), 64,
                  type);
  }
  item.attend.window = 200;
  item.attend.softcap = 20;
  item.attend.sinks = {1, 0, -INFINITY, 4, 2, 9};
  plan.reset();
  ExpectClose(AttendByPlan(backend(), *item.sequence, item.runs, item.attend, item.q, DataType::kF32, plan),
              AttendByReference(*item.sequence, item.attend, item.q), 64, 3e-3);
}

TEST_P(BackendConformance, GivesNoLseWhereNoneIsWanted) {
  BatchItem item(backend(), {1, 2, 64, 64}, "q8_0", 200, 3, 2, 50);
  const PlanItem planned = item.Planned();
  auto plan = backend().PlanAttend({4, true, 0, {&planned, 1}}, nullptr);
  ASSERT_TRUE(plan.ok());
  LayerItem tensors = item.Tensors();
  tensors.lse = nullptr;
  ASSERT_TRUE(backend().AttendLayer(**plan, LayerOf(0, 64, {&tensors, 1})).ok());
  AttendResult wanted = AttendByReference(*item.sequence, item.attend, item.q);
  item.result.lse = wanted.lse;
  ExpectClose(item.result, wanted, 64, 1e-3);
}

TEST_P(BackendConformance, RefusesLayersThatDoNotFitThePlan) {
  BatchItem item(backend(), {2, 2, 64, 64}, "q8_0", 200, 1, 2, 60);
  const PlanItem planned = item.Planned();
  EXPECT_EQ(backend().PlanAttend({3, true, 0, {&planned, 1}}, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(backend().PlanAttend({4, true, -1, {&planned, 1}}, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
  auto plan = backend().PlanAttend({4, true, 0, {&planned, 1}}, nullptr);
  ASSERT_TRUE(plan.ok());
  const LayerItem tensors[] = {item.Tensors(), item.Tensors()};
  const auto code = [&](const AttendLayerArgs& args) { return backend().AttendLayer(**plan, args).code(); };
  AttendLayerArgs args = LayerOf(0, 64, {tensors, 1});
  EXPECT_EQ(code(args), absl::StatusCode::kOk);
  args.layer = 2;
  EXPECT_EQ(code(args), absl::StatusCode::kInvalidArgument);
  args.layer = -1;
  EXPECT_EQ(code(args), absl::StatusCode::kInvalidArgument);
  args = LayerOf(0, 64, {tensors, 2});
  EXPECT_EQ(code(args), absl::StatusCode::kInvalidArgument);
  args = LayerOf(0, 64, {});
  EXPECT_EQ(code(args), absl::StatusCode::kInvalidArgument);
  const LayerItem empty;
  args = LayerOf(0, 64, {&empty, 1});
  EXPECT_EQ(code(args), absl::StatusCode::kInvalidArgument);
}

TEST_P(BackendConformance, PlansOfNothingAreNothing) {
  auto plan = backend().PlanAttend({}, nullptr);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(backend().AttendLayer(**plan, {}).ok());
}

// One token more in the last block of every item, in several layers, with and without tensors of one type.
TEST_P(BackendConformance, WritesRowsOfALayerBeforeItIsAttended) {
  const GroupShape shape{3, 2, 64, 128};
  constexpr int kItems = 3;
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (const auto& types :
       {std::pair(DataType::kF16, DataType::kF16), std::pair(DataType::kF32, DataType::kBf16)}) {
    const DataType k_type = types.first, v_type = types.second;
    SCOPED_TRACE(DataTypeName(v_type));
    std::vector<BatchItem> at_once, apart;
    for (std::vector<BatchItem>* batch : {&at_once, &apart})
      for (uint32_t i = 0; i < kItems; i++)
        batch->emplace_back(backend(), shape, "turbo4", 64 * (i + 2) + 10 * (i + 1), 1 + static_cast<int>(i),
                            2, 100 + 10 * i);
    const auto plan_of = [&](std::vector<BatchItem>& batch) {
      std::vector<PlanItem> planned;
      for (BatchItem& item : batch) {
        item.runs.back().tokens++;
        planned.push_back(
            {item.runs, item.attend.queries, item.sequence->tokens() + 1 - item.attend.queries});
      }
      return backend().PlanAttend({4, true, 0, planned}, nullptr);
    };
    auto plan_at_once = plan_of(at_once), plan_apart = plan_of(apart);
    ASSERT_TRUE(plan_at_once.ok() && plan_apart.ok());
    for (const int layer : {2, 0}) {
      SCOPED_TRACE(layer);
      std::vector<float> k(kItems * 2 * 64), v(kItems * 2 * 128);
      for (std::vector<float>* rows : {&k, &v})
        for (float& x : *rows) x = normal(random);
      // Memory of the type, in words.
      const auto typed = [](const std::vector<float>& rows, DataType type) {
        std::vector<uint32_t> words(rows.size());
        for (size_t i = 0; i < rows.size(); i++) MutableTensorView(words.data(), type).Set(i, rows[i]);
        return words;
      };
      const std::vector<uint32_t> k_words = typed(k, k_type), v_words = typed(v, v_type);
      const auto pieces_of = [&](const std::vector<BatchItem>& batch) {
        std::vector<AppendPiece> pieces;
        for (size_t i = 0; i < kItems; i++) {
          const BlockRun& run = batch[i].runs.back();
          AppendPiece piece{run.layout, run.blocks.back(), layer, static_cast<int>(run.tokens) - 1, 1, i};
          piece.k = {k_words.data(), k_type};
          piece.v = {v_words.data(), v_type};
          pieces.push_back(piece);
        }
        return pieces;
      };
      const auto tensors_of = [](std::vector<BatchItem>& batch) {
        std::vector<LayerItem> tensors;
        for (BatchItem& item : batch) tensors.push_back(item.Tensors());
        return tensors;
      };
      const std::vector<AppendPiece> separate = pieces_of(apart), joined = pieces_of(at_once);
      AppendArgs append;
      append.pieces = separate;
      ASSERT_TRUE(backend().Append(append).ok());
      std::vector<LayerItem> tensors = tensors_of(apart);
      ASSERT_TRUE(backend().AttendLayer(**plan_apart, LayerOf(layer, 64, tensors)).ok());
      tensors = tensors_of(at_once);
      AttendLayerArgs args = LayerOf(layer, 64, tensors);
      args.append = joined;
      ASSERT_TRUE(backend().AttendLayer(**plan_at_once, args).ok());
      for (size_t i = 0; i < kItems; i++) ExpectClose(at_once[i].result, apart[i].result, 128, 1e-6);
    }
  }
}

TEST_P(BackendConformance, RefusesRowsThatLieOutsideTheirBlock) {
  BatchItem item(backend(), {1, 2, 64, 64}, "q8_0", 200, 1, 2, 60);
  const PlanItem planned = item.Planned();
  auto plan = backend().PlanAttend({4, true, 0, {&planned, 1}}, nullptr);
  ASSERT_TRUE(plan.ok());
  const LayerItem tensors = item.Tensors();
  AttendLayerArgs args = LayerOf(0, 64, {&tensors, 1});
  const std::vector<float> rows(2 * 64);
  AppendPiece piece{item.runs.back().layout, item.runs.back().blocks.back(), 0, 64, 1, 0};
  piece.k = piece.v = {rows.data(), DataType::kF32};
  args.append = {&piece, 1};
  EXPECT_EQ(backend().AttendLayer(**plan, args).code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(BackendConformance, RunsTheCallersWorkOnceAndFailsWithItsError) {
  BatchItem few(backend(), {2, 2, 64, 64}, "q8_0", 200, 1, 2, 60),
      many(backend(), {2, 2, 64, 64}, "q8_0", 300, 100, 2, 61);
  std::vector<PlanItem> planned = {few.Planned(), many.Planned()};
  auto plan = backend().PlanAttend({4, true, 0, planned}, nullptr);
  ASSERT_TRUE(plan.ok());
  const std::vector<LayerItem> tensors = {few.Tensors(), many.Tensors()};
  AttendLayerArgs args = LayerOf(1, 64, tensors);
  int calls = 0;
  absl::Status status;
  const std::thread::id here = std::this_thread::get_id();
  const std::function<absl::Status()> work = [&] {
    EXPECT_EQ(std::this_thread::get_id(), here);
    calls++;
    return status;
  };
  args.meanwhile = &work;
  ASSERT_TRUE(backend().AttendLayer(**plan, args).ok());
  EXPECT_EQ(calls, 1);
  for (BatchItem* item : {&few, &many}) {
    item->attend.layer = 1;
    ExpectClose(item->result, AttendByReference(*item->sequence, item->attend, item->q), 64, 3e-3);
  }
  status = absl::InvalidArgumentError("a value of q");
  const absl::Status failed = backend().AttendLayer(**plan, args);
  EXPECT_EQ(failed.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(failed.message()), HasSubstr("a value of q"));
  EXPECT_EQ(calls, 2);
  // The plan is as good as before.
  status = absl::OkStatus();
  ASSERT_TRUE(backend().AttendLayer(**plan, args).ok());
}

TEST_P(BackendConformance, StopsWhenCancelled) {
  BatchItem few(backend(), {1, 1, 64, 64}, "turbo4", 500, 1, 2, 70),
      many(backend(), {1, 1, 64, 64}, "turbo4", 500, 200, 2, 80);
  Cancellation cancelled, wanted;
  cancelled.Cancel();
  for (BatchItem* item : {&few, &many}) {
    const PlanItem planned = item->Planned();
    auto plan = backend().PlanAttend({2, true, 0, {&planned, 1}}, nullptr);
    ASSERT_TRUE(plan.ok());
    const LayerItem tensors = item->Tensors();
    AttendLayerArgs args = LayerOf(0, 64, {&tensors, 1});
    args.cancellation = &cancelled;
    EXPECT_EQ(backend().AttendLayer(**plan, args).code(), absl::StatusCode::kCancelled);
    // The plan is as good as before.
    args.cancellation = &wanted;
    ASSERT_TRUE(backend().AttendLayer(**plan, args).ok());
    ExpectClose(item->result, AttendByReference(*item->sequence, item->attend, item->q), 64, 3e-3);
    AttendItem whole{item->runs,
                     item->q.data(),
                     item->attend.queries,
                     planned.first_query_position,
                     item->result.out.data(),
                     item->result.lse.data()};
    AttendArgs at_once;
    at_once.heads = 2;
    at_once.scale = 1;
    at_once.items = {&whole, 1};
    at_once.cancellation = &cancelled;
    EXPECT_EQ(backend().Attend(at_once).code(), absl::StatusCode::kCancelled);
  }
}

// Logits that leave f32, one row of them among good ones. K is all ones, so the sign of the logits is that of
// q.
TEST_P(BackendConformance, SaysSoWhereLogitsLeaveF32) {
  for (const char* pair : {"f16", "bf16", "q8_0", "q5_0", "turbo4", "turbo3", "turbo2", "wht4"})
    for (const int queries : {2, 40, 150})
      for (const float sign : {1.0f, -1.0f}) {
        SCOPED_TRACE(std::string(pair) + " queries " + std::to_string(queries) + " sign " +
                     std::to_string(sign));
        TestSequence sequence(backend(), {1, 2, 64, 64});
        const RowFill gaussian = GaussianRows(90);
        sequence.AddRun(pair, 200, [&](Side side, int64_t token, int head, std::vector<float>& row) {
          gaussian(side, token, head, row);
          if (side == Side::kKey) std::fill(row.begin(), row.end(), 1.0f);
        });
        AttendCase c;
        c.queries = queries;
        c.group = 2;
        c.query_size = 1e-20f;
        std::vector<float> q = MakeQueries(sequence, c);
        const std::vector<BlockRun> runs = sequence.device_runs();
        AttendResult result{std::vector<float>(q.size()), std::vector<float>(q.size() / 64)};
        AttendItem item{
            runs, q.data(), queries, sequence.tokens() - queries, result.out.data(), result.lse.data()};
        AttendArgs args;
        args.heads = 4;
        args.scale = 1e20f;
        args.items = {&item, 1};
        EXPECT_TRUE(backend().Attend(args).ok());
        // Query 1, head 2: finite values, logits of 64e50.
        std::fill_n(q.begin() + (1 * 4 + 2) * 64, 64, sign * 1e30f);
        const std::vector<BlockRun> host = sequence.host_runs();
        AttendItem reference = item;
        reference.runs = host;
        args.items = {&reference, 1};
        ASSERT_EQ(ReferenceAttend(args).code(), absl::StatusCode::kInternal);
        args.items = {&item, 1};
        const absl::Status status = backend().Attend(args);
        EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
        EXPECT_THAT(std::string(status.message()), HasSubstr("item 0, query 1, head 2"));
        // A soft-cap bounds them.
        args.softcap = 10;
        ASSERT_TRUE(backend().Attend(args).ok());
        std::vector<float> wanted_out(q.size()), wanted_lse(q.size() / 64);
        reference.out = wanted_out.data();
        reference.lse = wanted_lse.data();
        args.items = {&reference, 1};
        ASSERT_TRUE(ReferenceAttend(args).ok());
        ExpectClose(result, {wanted_out, wanted_lse}, 64, 3e-3);
      }
}

// What a query times the scale is decides, not the query alone; and the scale may be negative.
TEST_P(BackendConformance, TinyQueriesWithLargeScales) {
  for (const char* pair : {"f16", "q5_0", "turbo4", "planar3"})
    for (const int queries : {1, 40, 150})
      for (const float size : {1e-16f, 1e-32f, 1e-36f})
        for (const float sign : {1.0f, -1.0f}) {
          SCOPED_TRACE(::testing::Message()
                       << pair << " queries " << queries << " of " << size << " sign " << sign);
          TestSequence sequence(backend(), {1, 2, 64, 64});
          sequence.AddRun(pair, 200, GaussianRows(91));
          AttendCase c;
          c.queries = queries;
          c.group = 2;
          c.query_size = size;
          c.scale = sign * 0.125f / size;
          CheckAttend(backend(), sequence, c);
        }
}

// Large caps change little, and rounding must not change more.
TEST_P(BackendConformance, CapsLogitsByLargeNumbers) {
  for (const char* pair : {"f16", "q8_0", "turbo4"})
    for (const float cap : {50.0f, 1e3f, 1e6f, 1e30f})
      for (const int queries : {1, 40}) {
        SCOPED_TRACE(std::string(pair) + " cap " + std::to_string(cap));
        TestSequence sequence(backend(), {1, 1, 64, 64});
        sequence.AddRun(pair, 150, GaussianRows(95));
        AttendCase c;
        c.softcap = cap;
        c.query_size = 4;
        c.queries = queries;
        CheckAttend(backend(), sequence, c);
      }
}

TEST_P(BackendConformance, DecodesTokensOfRuns) {
  const GroupShape shape{2, 3, 80, 64};
  const Profile profile = RandomProfile(shape, 11);
  std::mt19937 random(13);
  for (const char* pair : {"f16", "bf16/turbo3", "q8_0/turbo4", "turbo3/q4_0", "planar3/iso4"}) {
    SCOPED_TRACE(pair);
    TestSequence sequence(backend(), shape);
    sequence.AddRun(pair, 200, GaussianRows(99), &profile);
    const BlockRun run = sequence.device_runs()[0];
    for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
      for (const auto& [first, tokens] : {std::pair<int64_t, int64_t>{0, 200}, {63, 2}, {70, 0}, {1, 130}})
        for (const int layer : {0, 1}) {
          SCOPED_TRACE(std::string(DataTypeName(type)) + " from " + std::to_string(first));
          DecodePiece piece;
          piece.run = &run;
          piece.layer = layer;
          piece.first_token = first;
          piece.tokens = tokens;
          const size_t k_stride = 3 * 80 + random() % 2 * 24, v_stride = 3 * 64 + random() % 2 * 8;
          piece.k_stride = k_stride == 3 * 80 ? 0 : k_stride;
          piece.v_stride = v_stride == 3 * 64 ? 0 : v_stride;
          std::vector<float> k(200 * k_stride, -7.0f), v(200 * v_stride, -7.0f);
          piece.k = {k.data(), type};
          piece.v = {v.data(), type};
          const auto status = backend().DecodeTokens({&piece, 1}, nullptr);
          ASSERT_TRUE(status.ok()) << status;
          for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = first + t;
            std::vector<float> block_k(64 * 3 * 80), block_v(64 * 3 * 64);
            if (t == 0 || token % 64 == 0 || t % 50 == 0) {  // some tokens
              DecodeArgs args;
              args.layout = run.layout;
              args.profile = run.profile;
              args.block = run.blocks[static_cast<size_t>(token / 64)];
              args.layer = layer;
              args.k = block_k.data();
              args.v = block_v.data();
              ASSERT_TRUE(backend().Decode(args).ok());
              const std::vector<float> rounded_k = Rounded(block_k, type), rounded_v = Rounded(block_v, type);
              for (size_t i = 0; i < 3 * 80; i++)
                ASSERT_EQ((TensorView{k.data(), type}).At(static_cast<size_t>(t) * k_stride + i),
                          rounded_k[static_cast<size_t>(token % 64) * 3 * 80 + i]);
              for (size_t i = 0; i < 3 * 64; i++)
                ASSERT_EQ((TensorView{v.data(), type}).At(static_cast<size_t>(t) * v_stride + i),
                          rounded_v[static_cast<size_t>(token % 64) * 3 * 64 + i]);
            }
          }
          // Between rows and behind the last one nothing was written.
          if (type != DataType::kF32) continue;
          for (size_t i = 3 * 80; i < k_stride && tokens > 0; i++) EXPECT_EQ(k[i], -7.0f);
          const size_t behind = tokens == 0 ? 0 : static_cast<size_t>(tokens - 1) * v_stride + 3 * 64;
          EXPECT_TRUE(behind >= v.size() || v[behind] == -7.0f);
        }
    // One side only, refusals, and a caller that no longer waits.
    std::vector<float> v(10 * 3 * 64, NAN);
    DecodePiece piece;
    piece.run = &run;
    piece.tokens = 10;
    piece.v = {v.data(), DataType::kF32};
    EXPECT_TRUE(backend().DecodeTokens({&piece, 1}, nullptr).ok());
    EXPECT_TRUE(std::isfinite(v.back()));
    Cancellation cancelled;
    cancelled.Cancel();
    EXPECT_EQ(backend().DecodeTokens({&piece, 1}, &cancelled).code(), absl::StatusCode::kCancelled);
    for (const auto& [first, tokens] :
         {std::pair<int64_t, int64_t>{-1, 2}, {0, 257}, {257, 0}, {5, std::numeric_limits<int64_t>::max()}}) {
      piece.first_token = first;
      piece.tokens = tokens;
      EXPECT_EQ(backend().DecodeTokens({&piece, 1}, nullptr).code(), absl::StatusCode::kInvalidArgument);
    }
    piece.first_token = 0;
    piece.tokens = 10;
    piece.v_stride = 5;
    EXPECT_EQ(backend().DecodeTokens({&piece, 1}, nullptr).code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace kvtide::testing
