// One suite over every way to a pool: what a caller may rely on whichever way it goes.
#include "clients/cpp/pool.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <thread>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using client::TensorRef;

class PoolTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    pool_ = ways_.Open(GetParam());
    ASSERT_NE(pool_, nullptr);
  }

  client::SequenceId Make(const std::string& pair = "f16/f16") {
    EXPECT_TRUE(pool_->RegisterModel(e2e::SmallModel()).ok());
    const auto id = pool_->CreateSequence("small", {.pair = pair});
    EXPECT_TRUE(id.ok()) << id.status();
    return id.value_or(0);
  }
  absl::Status Append(client::SequenceId id, int64_t first, int64_t tokens) {
    return pool_->Append(id, first, e2e::Tokens(1, first, tokens).layers).status();
  }

  Ways ways_;
  std::unique_ptr<Pool> pool_;
};

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << "\nexpected: " << part;
}

TEST_P(PoolTest, AnswersEqualTheModelOfTheCacheAndThoseOfTheEmbeddedWayToTheBit) {
  for (const uint32_t seed : {1u, 2u, 3u}) {
    ScriptOptions script{.seed = seed, .steps = GetParam() != "grpc"};
    const std::vector<float> answers = RunScript(*pool_, script);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
    const std::unique_ptr<Pool> embedded = ways_.Open("embedded");
    const std::vector<float> expected = RunScript(*embedded, script);
    ASSERT_EQ(answers.size(), expected.size()) << "seed " << seed;
    EXPECT_EQ(std::memcmp(answers.data(), expected.data(), answers.size() * sizeof(float)), 0)
        << "seed " << seed;
    script.moves = true;
    RunScript(*pool_, script);
  }
  const auto stats = pool_->GetStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->sequences, 0);
  EXPECT_EQ(stats->stored_bytes, 0);
  EXPECT_GT(stats->sealed_blocks, 0);
}

TEST_P(PoolTest, SaysWhichWayItIsAndWhatItHas) {
  EXPECT_EQ(pool_->way() == client::Way::kEmbedded, GetParam() == "embedded");
  EXPECT_EQ(pool_->why(), "asked for");
  const auto info = pool_->GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->block_tokens, 64);
  ASSERT_EQ(info->tiers.size(), 2u);
  EXPECT_EQ(info->tiers[0].capacity_bytes, 24 << 20);
  const client::SequenceId id = Make("q8_0/turbo4");
  ASSERT_TRUE(Append(id, 0, 200).ok());
  const auto all = pool_->ListSequences("small");
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->size(), 1u);
  EXPECT_EQ((*all)[0].tokens, 200);
  EXPECT_EQ((*all)[0].pair, "q8_0/turbo4");
  client::PlanQuestion question;
  question.model = "small";
  question.contexts = {1024};
  const auto plan = pool_->Plan(question);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->contexts.size(), 1u);
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

TEST_P(PoolTest, ABatchAnswersEveryItem) {
  std::vector<client::SequenceId> ids;
  for (int i = 0; i < 5; i++) ids.push_back(Make());
  for (int i = 0; i < 5; i++) ASSERT_TRUE(Append(ids[static_cast<size_t>(i)], 0, 10 + 40 * i).ok());
  std::vector<std::vector<float>> q, out(5), lse(5);
  std::vector<client::AttendItem> items(5);
  for (size_t i = 0; i < 5; i++) {
    q.push_back(e2e::Rows(static_cast<int>(i), 0, 2, e2e::kHeads));
    out[i].resize(q[i].size());
    lse[i].resize(2 * e2e::kHeads);
    items[i].sequence = ids[i];
    items[i].q = TensorRef::F32(q[i], {2, e2e::kHeads, e2e::kDim});
    items[i].output = out[i];
    // Whoever does not want it leaves it away.
    if (i % 2 == 0) items[i].lse = lse[i];
  }
  const absl::Status status = pool_->Attend(1, items);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < 5; i++) {
    const int64_t tokens = 10 + 40 * static_cast<int64_t>(i);
    const e2e::Tokens rows(1, 0, tokens);
    EXPECT_LT(e2e::LargestDifference(out[i], e2e::ReferenceAttention(q[i], rows.k[1], rows.v[1], tokens, 2)),
              1e-3);
    EXPECT_EQ(lse[i][0] != 0, i % 2 == 0);
  }
  for (const client::SequenceId id : ids) EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

TEST_P(PoolTest, RowsComeBackInTheTypeThatWasAskedFor) {
  const client::SequenceId id = Make();
  ASSERT_TRUE(Append(id, 0, 100).ok());
  const e2e::Tokens rows(1, 0, 100);
  const size_t count = 50 * e2e::kKvHeads * e2e::kDim;
  std::vector<uint16_t> k(count), v(count);
  const std::vector<int64_t> shape = {50, e2e::kKvHeads, e2e::kDim};
  const client::ReadItem item{1, {k.data(), DataType::kF16, shape}, {v.data(), DataType::kF16, shape}};
  const absl::Status status = pool_->ReadTokens(id, 40, {&item, 1});
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < count; i++) {
    ASSERT_EQ(k[i], F32ToF16(rows.k[1][40 * e2e::kKvHeads * e2e::kDim + i]));
    ASSERT_EQ(v[i], F32ToF16(rows.v[1][40 * e2e::kKvHeads * e2e::kDim + i]));
  }
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

TEST_P(PoolTest, HalfTensorsGoAsTheyAre) {
  const client::SequenceId id = Make();
  const std::vector<float> values = e2e::Rows(3, 0, 8, e2e::kKvHeads);
  std::vector<uint16_t> f16(values.size()), bf16(values.size());
  for (size_t i = 0; i < values.size(); i++) f16[i] = F32ToF16(values[i]), bf16[i] = F32ToBf16(values[i]);
  const std::vector<int64_t> shape = {8, e2e::kKvHeads, e2e::kDim};
  const client::LayerTokens layers[] = {
      {0, {f16.data(), DataType::kF16, shape}, {bf16.data(), DataType::kBf16, shape}},
      {1, {bf16.data(), DataType::kBf16, shape}, {f16.data(), DataType::kF16, shape}}};
  ASSERT_TRUE(pool_->Append(id, 0, layers).ok());
  std::vector<float> k(values.size()), v(values.size());
  const client::ReadItem item{0, client::MutableTensorRef::F32(k, shape),
                              client::MutableTensorRef::F32(v, shape)};
  ASSERT_TRUE(pool_->ReadTokens(id, 0, {&item, 1}).ok());
  for (size_t i = 0; i < k.size(); i++) {
    ASSERT_EQ(k[i], F16ToF32(f16[i]));
    ASSERT_EQ(v[i], Bf16ToF32(bf16[i]));
  }
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

TEST_P(PoolTest, ASequenceBeginsWithWhatAnotherHasLeft) {
  std::vector<client::TokenId> ids(64 * 5);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<client::TokenId>(i * i % 991);
  const client::SequenceId first = Make();
  ASSERT_TRUE(pool_->Append(first, 0, e2e::Tokens(1, 0, 320).layers, ids).ok());
  ASSERT_TRUE(pool_->CloseSequence(first).ok());
  const client::SequenceOptions options{.pair = "f16/f16"};
  std::vector<client::TokenId> asked(ids.begin(), ids.begin() + 64 * 3);
  asked.resize(64 * 4, 7);
  const auto found = pool_->LookupPrefix("small", options, asked);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->tokens, 64 * 3);
  ASSERT_EQ(found->tiers.size(), 1u);
  EXPECT_EQ(found->tiers[0], std::pair(std::string("device"), int64_t{64 * 3}));
  int64_t tokens = 0;
  const auto second = pool_->CreateSequence("small", options, found->lease, &tokens);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(tokens, 64 * 3);
  // One layer says what the tokens are.
  const e2e::Tokens rows(2, 192, 64);
  const std::vector<client::TokenId> next(64, 7);
  const std::vector<float> q = e2e::Rows(3, 192, 64, e2e::kHeads);
  for (int layer = 0; layer < e2e::kLayers; layer++) {
    std::vector<float> out(q.size());
    client::AppendAttendItem item;
    item.sequence = *second;
    item.start_position = 192;
    item.q = TensorRef::F32(q, {64, e2e::kHeads, e2e::kDim});
    item.k = rows.layers[static_cast<size_t>(layer)].k;
    item.v = rows.layers[static_cast<size_t>(layer)].v;
    item.output = out;
    if (layer == 1) item.token_ids = next;
    const absl::Status status = pool_->AppendAttend(layer, {&item, 1});
    ASSERT_TRUE(status.ok()) << status;
  }
  const auto whole = pool_->LookupPrefix("small", options, asked, -1, true);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(whole->tokens, 64 * 4);
  EXPECT_EQ(whole->lease, 0u);
  ExpectError(pool_->CreateSequence("small", options, found->lease).status(), absl::StatusCode::kNotFound,
              "unknown or over");
  ExpectError(pool_->Append(*second, 256, e2e::Tokens(1, 256, 2).layers, {{1}}).status(),
              absl::StatusCode::kInvalidArgument, "1 token ids for 2 tokens");
  ASSERT_TRUE(pool_->CloseSequence(*second).ok());
  const auto stats = pool_->GetStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->prefix_lookups, 1);
  EXPECT_EQ(stats->prefix_reused_tokens, 64 * 3);
  EXPECT_EQ(stats->tiers[0].prefix_hit_tokens, 64 * 3);
  EXPECT_EQ(stats->prefix_blocks, 6);
  EXPECT_GT(stats->prefix_alone_bytes, 0);
  // A model that is forgotten takes its prefixes along.
  ASSERT_TRUE(pool_->UnregisterModel("small").ok());
  EXPECT_EQ(pool_->GetStats()->stored_bytes, 0);
}

TEST_P(PoolTest, MistakesAreNamedAndChangeNothing) {
  const client::SequenceId id = Make();
  ASSERT_TRUE(Append(id, 0, 10).ok());
  using absl::StatusCode;
  ExpectError(Append(id, 5, 10), StatusCode::kOutOfRange, "");
  ExpectError(pool_->CreateSequence("nobody").status(), StatusCode::kNotFound, "nobody");
  ExpectError(pool_->ForkSequence(id + 1).status(), StatusCode::kNotFound, "");
  ExpectError(pool_->TruncateSequence(id, 11), StatusCode::kOutOfRange, "");
  ExpectError(pool_->TruncateSequence(id, -1), StatusCode::kInvalidArgument, "tokens is -1");
  ExpectError(pool_->PrefetchSequences({}).status(), StatusCode::kInvalidArgument, "");

  std::vector<float> row = e2e::Rows(9, 0, 1, e2e::kHeads), output(row.size());
  client::AttendItem item;
  item.sequence = id;
  item.output = output;
  item.q = TensorRef::F32(row, {1, e2e::kHeads, e2e::kDim - 1});
  ExpectError(pool_->Attend(0, {&item, 1}), StatusCode::kInvalidArgument,
              "items[0]: q: the shape is [1, 4, 63], expected [tokens, 4, 64]");
  item.q = TensorRef::F32(row, {1, e2e::kHeads, e2e::kDim});
  ExpectError(pool_->Attend(7, {&item, 1}), StatusCode::kInvalidArgument, "layer is 7");
  ExpectError(pool_->Attend(0, {}), StatusCode::kInvalidArgument, "items");
  item.output = std::span(output).subspan(1);
  EXPECT_EQ(pool_->Attend(0, {&item, 1}).code(), StatusCode::kInvalidArgument);
  item.output = output;
  row[70] = std::numeric_limits<float>::quiet_NaN();
  ExpectError(pool_->Attend(0, {&item, 1}), StatusCode::kInvalidArgument, "NaN at token 0, head 1, index 6");

  e2e::Tokens bad(1, 10, 2);
  bad.v[1][200] = std::numeric_limits<float>::infinity();
  ExpectError(pool_->Append(id, 10, bad.layers).status(), StatusCode::kInvalidArgument, "token 1");
  const client::ReadItem none{0, {}, {}};
  ExpectError(pool_->ReadTokens(id, 0, {&none, 1}), StatusCode::kInvalidArgument, "k and v");
  ExpectError(pool_->ReadTokens(id, 0, {}), StatusCode::kInvalidArgument, "no layer");
  const auto all = pool_->ListSequences();
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->size(), 1u);
  EXPECT_EQ((*all)[0].tokens, 10);
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
  ExpectError(pool_->CloseSequence(id), StatusCode::kNotFound, "");
}

TEST_P(PoolTest, SequencesSayWhatTheirColdBlocksMayBecome) {
  ASSERT_TRUE(pool_->RegisterModel(e2e::SmallModel()).ok());
  client::SequenceOptions options{.pair = "q8_0/turbo4"};
  options.degrade = {"turbo4/turbo3", "turbo2"};
  const auto id = pool_->CreateSequence("small", options);
  ASSERT_TRUE(id.ok()) << id.status();
  ASSERT_TRUE(Append(*id, 0, 300).ok());
  ASSERT_TRUE(pool_->ForkSequence(*id).ok());
  const auto all = pool_->ListSequences();
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->size(), 2u);
  for (const client::SequenceInfo& info : *all) {
    EXPECT_EQ(info.degrade, (std::vector<std::string>{"turbo4/turbo3", "turbo2/turbo2"}));
    EXPECT_EQ(info.degraded_blocks, 0) << "there is room";
  }
  const auto refused = [&](std::vector<std::string> degrade, const std::string& part) {
    client::SequenceOptions other = options;
    other.degrade = std::move(degrade);
    ExpectError(pool_->CreateSequence("small", other).status(), absl::StatusCode::kInvalidArgument, part);
  };
  refused({"turbo9"}, "degrade[0]");
  refused({"turbo2", "turbo3"}, "degrade[1]");
}

TEST_P(PoolTest, PrioritiesAreSaidAndSet) {
  const client::SequenceId id = Make();
  const auto priority = [&] { return pool_->ListSequences("small").value().at(0).priority; };
  EXPECT_EQ(priority(), client::Priority::kNormal);
  ASSERT_TRUE(Append(id, 0, 70).ok());
  ASSERT_TRUE(pool_->SetPriority({{id}}, client::Priority::kHigh).ok());
  EXPECT_EQ(priority(), client::Priority::kHigh);
  EXPECT_EQ(pool_->GetStats()->tiers[0].high_priority_blocks, 2);
  ASSERT_TRUE(pool_->SetPriority({{id}}, client::Priority::kLow).ok());
  EXPECT_EQ(pool_->GetStats()->tiers[0].low_priority_blocks, 2);
  ExpectError(pool_->SetPriority({{id}}, client::Priority::kDefault), absl::StatusCode::kInvalidArgument,
              "priority is not set");
  ExpectError(pool_->SetPriority({{id + 1}}, client::Priority::kLow), absl::StatusCode::kNotFound, "");
  ExpectError(pool_->SetPriority({}, client::Priority::kLow), absl::StatusCode::kInvalidArgument,
              "sequence_ids is empty");
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

// One layer of a step over SmallModel, for sequences that all have the rows of seed 1.
absl::Status RunStepLayer(Pool& pool, int layer, const client::Step& step,
                          std::span<const client::StepItem> of, std::span<const client::TokenId> said = {}) {
  std::vector<e2e::Tokens> rows;
  std::vector<std::vector<float>> q, out;
  for (size_t i = 0; i < of.size(); i++) {
    rows.emplace_back(1, step.starts[i], of[i].new_tokens);
    q.push_back(e2e::Rows(3, step.starts[i], of[i].new_tokens, e2e::kHeads));
    out.emplace_back(q[i].size());
  }
  std::vector<client::AppendAttendItem> items(of.size());
  for (size_t i = 0; i < of.size(); i++) {
    items[i].sequence = of[i].sequence;
    items[i].start_position = step.starts[i];
    items[i].q = TensorRef::F32(q[i], {of[i].new_tokens, e2e::kHeads, e2e::kDim});
    items[i].k = rows[i].layers[static_cast<size_t>(layer)].k;
    items[i].v = rows[i].layers[static_cast<size_t>(layer)].v;
    items[i].output = out[i];
  }
  items.back().token_ids = said;
  return pool.AppendAttend(layer, items, {}, step.id);
}

// When it begins, with a layer, or when it ends: the blocks are found, and there is one copy of them.
TEST_P(PoolTest, StepsSayWhatTheirTokensAre) {
  if (GetParam() == "grpc") GTEST_SKIP() << "steps belong to a session";
  constexpr int64_t kChunk = 96, kChunks = 5;
  std::vector<client::TokenId> ids(kChunk * kChunks);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<client::TokenId>(i * i % 991);
  const client::SequenceOptions options{.pair = "q8_0/turbo4", .exact_window = ExactWindow{1, 1}};
  ASSERT_TRUE(pool_->RegisterModel(e2e::SmallModel()).ok());
  std::vector<client::SequenceId> all;
  for (int i = 0; i < 4; i++) all.push_back(pool_->CreateSequence("small", options).value());
  for (int64_t at = 0; at < kChunk * kChunks; at += kChunk) {
    const std::span<const client::TokenId> said(ids.data() + at, kChunk);
    const std::vector<client::StepItem> items = {
        {all[0], kChunk, said}, {all[1], kChunk}, {all[2], kChunk}, {all[3], kChunk}};
    const auto step = pool_->BeginStep(items);
    ASSERT_TRUE(step.ok()) << step.status();
    for (int layer = 0; layer < e2e::kLayers; layer++) {
      const absl::Status status =
          RunStepLayer(*pool_, layer, *step, items, layer == 0 ? said : std::span<const client::TokenId>());
      ASSERT_TRUE(status.ok()) << status;
    }
    if (at == 0) {
      using absl::StatusCode;
      const auto end = [&](size_t item, std::span<const client::TokenId> what) {
        const client::StepTokens tokens{item, what};
        return pool_->EndStep(step->id, {&tokens, 1});
      };
      ExpectError(end(4, said), StatusCode::kInvalidArgument, "tokens of item 4: the step has 4 items");
      ExpectError(end(1, said.first(3)), StatusCode::kInvalidArgument, "items[1]: 3 token ids for 96 tokens");
      std::vector<client::TokenId> others(said.begin(), said.end());
      others[7] = 5;
      ExpectError(end(0, others), StatusCode::kInvalidArgument,
                  "items[0]: token 7 has the id 5, but came with the id 49 before");
      ExpectError(end(3, others), StatusCode::kInvalidArgument, "items[3]: token 7");
    }
    const std::vector<client::StepTokens> late = {{1, said}, {0, said}};
    const absl::Status status = pool_->EndStep(step->id, late);
    ASSERT_TRUE(status.ok()) << status;
  }
  // The first block and those that are coded: all that does not change any more.
  const int64_t sealed = kChunk * kChunks / 64 - 1;
  const auto list = pool_->ListSequences("small");
  ASSERT_TRUE(list.ok()) << list.status();
  for (const client::SequenceInfo& info : *list) {
    const bool said = info.id != all[2];
    EXPECT_EQ(info.known_tokens, said ? kChunk * kChunks : 0);
    EXPECT_EQ(info.shared_blocks, said ? sealed : 0);
  }
  auto found = pool_->LookupPrefix("small", options, ids);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->tokens, sealed * 64);
  int64_t tokens = 0;
  const auto next = pool_->CreateSequence("small", options, found->lease, &tokens);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(tokens, sealed * 64);
  // It goes on by steps, the next of which begins before it is known what the tokens of the one before are.
  const int64_t rest = kChunk * kChunks - tokens;
  const std::vector<client::StepItem> first = {{*next, rest}}, second = {{*next, 64}};
  const auto one = pool_->BeginStep(first);
  ASSERT_TRUE(one.ok()) << one.status();
  const auto two = pool_->BeginStep(second, {.after = one->id});
  ASSERT_TRUE(two.ok()) << two.status();
  for (int layer = 0; layer < e2e::kLayers; layer++)
    ASSERT_TRUE(RunStepLayer(*pool_, layer, *one, first).ok());
  for (int layer = 0; layer < e2e::kLayers; layer++)
    ASSERT_TRUE(RunStepLayer(*pool_, layer, *two, second).ok());
  const std::vector<client::TokenId> more(64, 7);
  const client::StepTokens of_one{0, std::span(ids).last(static_cast<size_t>(rest))}, of_two{0, more};
  EXPECT_TRUE(pool_->EndStep(one->id, {&of_one, 1}).ok());
  EXPECT_TRUE(pool_->EndStep(two->id, {&of_two, 1}).ok());
  ids.insert(ids.end(), more.begin(), more.end());
  found = pool_->LookupPrefix("small", options, ids, -1, true);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->tokens, sealed * 64 + 64);
  // A step that is taken back has said nothing.
  const std::vector<client::StepItem> lost = {{*next, 64, more}};
  const auto taken_back = pool_->BeginStep(lost);
  ASSERT_TRUE(taken_back.ok()) << taken_back.status();
  EXPECT_TRUE(pool_->RollBackStep(taken_back->id).ok());
  const auto after = pool_->ListSequences("small");
  ASSERT_TRUE(after.ok()) << after.status();
  for (const client::SequenceInfo& info : *after)
    EXPECT_EQ(info.known_tokens,
              info.id == *next ? kChunk * kChunks + 64 : (info.id == all[2] ? 0 : kChunk * kChunks));
  all.push_back(*next);
  for (const client::SequenceId id : all) EXPECT_TRUE(pool_->CloseSequence(id).ok());
  ASSERT_TRUE(pool_->UnregisterModel("small").ok());
  EXPECT_EQ(pool_->GetStats()->stored_bytes, 0);
}

TEST_P(PoolTest, MistakesAboutStepsAreNamedAndChangeNothing) {
  using absl::StatusCode;
  const client::SequenceId id = Make(), other = Make();
  ASSERT_TRUE(Append(id, 0, 10).ok());
  const std::vector<client::StepItem> both = {{id, 1}, {other, 2}};
  if (GetParam() == "grpc") {
    ExpectError(pool_->BeginStep(both).status(), StatusCode::kFailedPrecondition,
                "steps belong to a session");
    ExpectError(pool_->EndStep(1), StatusCode::kFailedPrecondition, "steps belong to a session");
    return;
  }
  const auto begin = [&](std::vector<client::StepItem> items, uint64_t after = 0) {
    return pool_->BeginStep(items, {.after = after});
  };
  ExpectError(begin({}).status(), StatusCode::kInvalidArgument, "without items");
  ExpectError(begin({{id, 0}}).status(), StatusCode::kInvalidArgument, "items[0]: a step of 0 tokens");
  ExpectError(begin({{id, 1}, {id, 1}}).status(), StatusCode::kInvalidArgument, "items[1]: sequence");
  ExpectError(begin({{id + 1, 1}}).status(), StatusCode::kNotFound, "items[0]");
  ExpectError(begin({{id, 1}}, 77).status(), StatusCode::kNotFound, "step 77 is not open on this session");
  const std::vector<client::TokenId> three(3);
  ExpectError(begin({{other, 1}, {id, 2, three}}).status(), StatusCode::kInvalidArgument,
              "items[1]: 3 token ids for 2 tokens");
  ExpectError(begin({{id, 1'000'000'000'000}}).status(), StatusCode::kInvalidArgument,
              "max_tokens_per_append");
  ExpectError(pool_->EndStep(77), StatusCode::kNotFound, "step 77");
  const auto step = begin(both);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->starts, (std::vector<int64_t>{10, 0}));
  ExpectError(begin({{id, 1}}).status(), StatusCode::kAborted, "written by another call");
  ExpectError(Append(id, 10, 1), StatusCode::kAborted, "");
  ExpectError(pool_->EndStep(step->id), StatusCode::kFailedPrecondition, "the rows of layer 0 have not come");
  const e2e::Tokens one(1, 10, 1), two(1, 0, 2);
  std::vector<float> output(static_cast<size_t>(2 * e2e::kHeads * e2e::kDim));
  std::vector<std::vector<float>> q = {e2e::Rows(1, 0, 1, e2e::kHeads), e2e::Rows(1, 0, 2, e2e::kHeads)};
  std::vector<client::AppendAttendItem> items(2);
  for (size_t i = 0; i < 2; i++) {
    items[i].sequence = both[i].sequence;
    items[i].start_position = step->starts[i];
    const int64_t tokens = both[i].new_tokens;
    items[i].q = TensorRef::F32(q[i], {tokens, e2e::kHeads, e2e::kDim});
    items[i].output = std::span(output).first(q[i].size());
  }
  const auto run = [&](int layer, uint64_t id_of_step) {
    const e2e::Tokens* const rows[] = {&one, &two};
    for (size_t i = 0; i < 2; i++) {
      const int64_t tokens = both[i].new_tokens;
      items[i].k =
          TensorRef::F32(rows[i]->k[static_cast<size_t>(layer) % 2], {tokens, e2e::kKvHeads, e2e::kDim});
      items[i].v =
          TensorRef::F32(rows[i]->v[static_cast<size_t>(layer) % 2], {tokens, e2e::kKvHeads, e2e::kDim});
    }
    return pool_->AppendAttend(layer, items, {}, id_of_step);
  };
  ExpectError(run(0, 77), StatusCode::kNotFound, "step 77");
  ExpectError(run(5, step->id), StatusCode::kInvalidArgument, "layer is 5");
  std::swap(items[0].sequence, items[1].sequence);
  ExpectError(run(0, step->id), StatusCode::kInvalidArgument, "items[0] has 1 tokens of sequence");
  std::swap(items[0].sequence, items[1].sequence);
  q[1][3] = std::numeric_limits<float>::quiet_NaN();
  ExpectError(run(0, step->id), StatusCode::kInvalidArgument, "NaN");
  q[1][3] = 0;
  absl::Status status = run(0, step->id);
  ASSERT_TRUE(status.ok()) << status;
  ExpectError(pool_->EndStep(step->id), StatusCode::kFailedPrecondition, "the rows of layer 1 have not come");
  const auto next = begin({{id, 1}}, step->id);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->starts[0], 11);
  status = run(1, step->id);
  ASSERT_TRUE(status.ok()) << status;
  ExpectError(pool_->EndStep(next->id), StatusCode::kFailedPrecondition, "end that one first");
  status = pool_->EndStep(step->id);
  ASSERT_TRUE(status.ok()) << status;
  ExpectError(pool_->EndStep(step->id), StatusCode::kNotFound, "");
  EXPECT_TRUE(pool_->RollBackStep(next->id).ok());
  const auto all = pool_->ListSequences();
  ASSERT_TRUE(all.ok());
  for (const client::SequenceInfo& info : *all) EXPECT_EQ(info.tokens, info.id == id ? 11 : 2);
  // A sequence that is closed takes the step with it.
  const auto lost = begin(both);
  ASSERT_TRUE(lost.ok()) << lost.status();
  EXPECT_TRUE(pool_->CloseSequence(other).ok());
  EXPECT_TRUE(pool_->RollBackStep(lost->id).ok());
  std::vector<uint64_t> open;
  for (;;) {
    const auto more = begin({{id, 1}}, open.empty() ? 0 : open.back());
    if (!more.ok()) {
      ExpectError(more.status(), StatusCode::kResourceExhausted, "end some");
      break;
    }
    open.push_back(more->id);
  }
  EXPECT_EQ(open.size(), 64u);
  EXPECT_TRUE(pool_->RollBackStep(open.front()).ok());
  for (size_t i = 1; i < open.size(); i++) EXPECT_TRUE(pool_->RollBackStep(open[i]).ok());
  EXPECT_TRUE(Append(id, 11, 3).ok());
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

TEST_P(PoolTest, MistakesAboutPinnedStepsAreNamed) {
  using absl::StatusCode;
  const client::SequenceId id = Make(), other = Make();
  ASSERT_TRUE(Append(id, 0, 10).ok());
  const std::vector<client::SequenceId> both = {id, other}, one = {id};
  if (GetParam() == "grpc") {
    ExpectError(pool_->PinStep(one).status(), StatusCode::kFailedPrecondition, "steps belong to a session");
    return;
  }
  ExpectError(pool_->PinStep({}).status(), StatusCode::kInvalidArgument, "without sequences");
  ExpectError(pool_->PinStep(both).status(), StatusCode::kInvalidArgument, "items[1]: sequence");
  const auto step = pool_->PinStep(one, true);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->starts, std::vector<int64_t>{10});
  ASSERT_EQ(step->tables.size(), 1u);
  EXPECT_EQ(step->tables[0][0].blocks.size(), 1u);
  const std::vector<float> q = e2e::Rows(1, 0, 2, e2e::kHeads);
  std::vector<float> then(q.size()), now(q.size());
  client::AttendItem item;
  item.sequence = id;
  item.q = TensorRef::F32(q, {2, e2e::kHeads, e2e::kDim});
  item.output = then;
  ASSERT_TRUE(pool_->Attend(0, {&item, 1}, {}, step->id).ok());
  ASSERT_TRUE(Append(id, 10, 5).ok());
  item.output = now;
  ASSERT_TRUE(pool_->Attend(0, {&item, 1}, {}, step->id).ok());
  EXPECT_EQ(now, then) << "the queries belong to the last of the tokens that are pinned";
  ASSERT_TRUE(pool_->Attend(0, {&item, 1}).ok());
  EXPECT_NE(now, then);
  item.sequence = other;
  ExpectError(pool_->Attend(0, {&item, 1}, {.causal = false}, step->id), StatusCode::kInvalidArgument, "");
  item.first_query_position = 0;
  ExpectError(pool_->Attend(0, {&item, 1}, {}, step->id), StatusCode::kInvalidArgument,
              "is not one of those that the step has pinned");
  ExpectError(pool_->Attend(0, {&item, 1}, {}, 77), StatusCode::kNotFound, "step 77");
  const std::vector<client::StepItem> next = {{id, 1}};
  ExpectError(pool_->BeginStep(next, {.after = step->id}).status(), StatusCode::kInvalidArgument,
              "nothing follows it");
  const auto writing = pool_->BeginStep(next);
  ASSERT_TRUE(writing.ok()) << writing.status();
  item.sequence = id;
  ExpectError(pool_->Attend(0, {&item, 1}, {}, writing->id), StatusCode::kFailedPrecondition,
              "the step takes new tokens");
  EXPECT_TRUE(pool_->RollBackStep(writing->id).ok());
  EXPECT_TRUE(pool_->EndStep(step->id).ok());
  ExpectError(pool_->EndStep(step->id), StatusCode::kNotFound, "");
  for (const client::SequenceId each : both) EXPECT_TRUE(pool_->CloseSequence(each).ok());
}

TEST_P(PoolTest, ThreadsShareAPool) {
  Make();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++) {
    threads.emplace_back([this, t] {
      for (int round = 0; round < 10; round++) {
        const auto id = pool_->CreateSequence("small");
        ASSERT_TRUE(id.ok()) << id.status();
        ASSERT_TRUE(Append(*id, 0, 20 + t).ok());
        const std::vector<float> q = e2e::Rows(t, 0, 1, e2e::kHeads);
        std::vector<float> output(q.size());
        client::AttendItem item;
        item.sequence = *id;
        item.q = TensorRef::F32(q, {1, e2e::kHeads, e2e::kDim});
        item.output = output;
        ASSERT_TRUE(pool_->Attend(0, {&item, 1}).ok());
        const e2e::Tokens rows(1, 0, 20 + t);
        ASSERT_LT(e2e::LargestDifference(output, e2e::ReferenceAttention(q, rows.k[0], rows.v[0], 20 + t, 1)),
                  1e-3);
        ASSERT_TRUE(pool_->CloseSequence(*id).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(PoolTest, TensorsOfThePoolAreUsedWhereTheyLie) {
  const client::SequenceId id = Make();
  const e2e::Tokens rows(1, 0, 100);
  const std::vector<int64_t> shape = {100, e2e::kKvHeads, e2e::kDim};
  auto k = pool_->Allocate(rows.k[0].size() * sizeof(float)),
       v = pool_->Allocate(rows.k[0].size() * sizeof(float));
  ASSERT_TRUE(k.ok() && v.ok()) << k.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(k->data()) % 64, 0u);
  std::copy(rows.k[0].begin(), rows.k[0].end(), k->As<float>().begin());
  std::copy(rows.v[0].begin(), rows.v[0].end(), v->As<float>().begin());
  const client::LayerTokens layer{0, TensorRef::F32(k->As<float>(), shape),
                                  TensorRef::F32(v->As<float>(), shape)};
  ASSERT_TRUE(pool_->Append(id, 0, {&layer, 1}).ok());
  // Rows come back into the same memory.
  std::fill(k->As<float>().begin(), k->As<float>().end(), 0.0f);
  const client::ReadItem item{0, client::MutableTensorRef::F32(k->As<float>(), shape),
                              client::MutableTensorRef::F32(v->As<float>(), shape)};
  ASSERT_TRUE(pool_->ReadTokens(id, 0, {&item, 1}).ok());
  for (size_t i = 0; i < rows.k[0].size(); i++)
    ASSERT_EQ(k->As<float>()[i], F16ToF32(F32ToF16(rows.k[0][i])));
  // Queries, outputs and log-sum-exps in it, beginning in the middle of a piece.
  const std::vector<float> q = e2e::Rows(5, 0, 1, e2e::kHeads);
  std::copy(q.begin(), q.end(), k->As<float>().begin() + 4);
  client::AttendItem attend;
  attend.sequence = id;
  attend.q = TensorRef::F32(k->As<float>().subspan(4, q.size()), {1, e2e::kHeads, e2e::kDim});
  attend.output = v->As<float>().subspan(8, q.size());
  attend.lse = v->As<float>().subspan(8 + q.size(), e2e::kHeads);
  ASSERT_TRUE(pool_->Attend(0, {&attend, 1}).ok());
  const std::vector<float> output(attend.output.begin(), attend.output.end());
  EXPECT_LT(e2e::LargestDifference(output, e2e::ReferenceAttention(q, rows.k[0], rows.v[0], 100, 1)), 1e-3);
  EXPECT_TRUE(pool_->CloseSequence(id).ok());
}

INSTANTIATE_TEST_SUITE_P(Ways, PoolTest, ::testing::ValuesIn(kWays),
                         [](const auto& way) { return way.param; });

TEST(PoolConnect, AutoFindsTheDaemonThatIsNamedAndElseOpensAPoolOfItsOwn) {
  client::PoolOptions options;
  options.embedded_config = R"({"device": "cpu", "device_memory": "1MiB", "host_memory": "0"})";
  const std::string folder = e2e::MakeFolder();
  ::setenv("XDG_RUNTIME_DIR", folder.c_str(), 1);
  ::unsetenv("KVTIDE_ADDRESS");
  if (::geteuid() != 0) {  // root's default socket is not in a folder that a test may choose
    const auto pool = Pool::Connect("auto", options);
    ASSERT_TRUE(pool.ok()) << pool.status();
    EXPECT_EQ((*pool)->way(), client::Way::kEmbedded);
    EXPECT_TRUE(absl::StartsWith((*pool)->why(), "no kvtided answers at unix:")) << (*pool)->why();
  }
  Ways ways;
  ::setenv("KVTIDE_ADDRESS", ways.daemon().address().c_str(), 1);
  auto pool = Pool::Connect("auto", options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->way(), client::Way::kSharedMemory);
  EXPECT_TRUE(absl::StrContains((*pool)->why(), ways.daemon().address())) << (*pool)->why();
  // Who names a daemon does not get another pool.
  ::setenv("KVTIDE_ADDRESS", ("unix:" + folder + "/nobody.sock").c_str(), 1);
  options.client.connect_timeout = absl::Milliseconds(100);
  ExpectError(Pool::Connect("auto", options).status(), absl::StatusCode::kUnavailable,
              "auto: no kvtided at unix:" + folder + "/nobody.sock");
  ::unsetenv("KVTIDE_ADDRESS");
}

TEST(PoolConnect, AutoTakesGrpcWhereNoMemoryIsSharedAndSaysWhy) {
  const auto daemon = e2e::TestDaemon::Start({"--shared-memory", "0"});
  ::setenv("KVTIDE_ADDRESS", daemon->address().c_str(), 1);
  const auto pool = Pool::Connect("auto");
  ::unsetenv("KVTIDE_ADDRESS");
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->way(), client::Way::kGrpc);
  EXPECT_TRUE(absl::StrContains((*pool)->why(), "no shared memory: no kvtided offers shared memory at"))
      << (*pool)->why();
  ExpectError(Pool::Connect("shm:" + daemon->address()).status(), absl::StatusCode::kNotFound,
              "--shared-memory 0");
  ExpectError(Pool::Connect("shm:127.0.0.1:7").status(), absl::StatusCode::kInvalidArgument,
              "shm:unix:/path");
}

TEST(PoolConnect, AConfigurationThatIsNoneIsRefused) {
  client::PoolOptions options;
  options.embedded_config = R"({"device_memory": "1MiB", "colour": "red"})";
  ExpectError(Pool::Connect("embedded", options).status(), absl::StatusCode::kInvalidArgument, "colour");
}

// Root of the mean square of what attention of the last tokens is off by, to that of what it should be.
double AttentionError(Pool& pool, client::SequenceId id, int64_t tokens) {
  constexpr int kQueries = 8;
  const std::vector<float> q = e2e::Rows(9, tokens - kQueries, kQueries, e2e::kHeads);
  std::vector<float> output(q.size());
  client::AttendItem item;
  item.sequence = id;
  item.q = TensorRef::F32(q, {kQueries, e2e::kHeads, e2e::kDim});
  item.output = output;
  const absl::Status status = pool.Attend(0, {&item, 1});
  EXPECT_TRUE(status.ok()) << status;
  const e2e::Tokens all(1, 0, tokens);
  const std::vector<float> expected = e2e::ReferenceAttention(q, all.k[0], all.v[0], tokens, kQueries);
  double off = 0, whole = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    off += (output[i] - expected[i]) * (output[i] - expected[i]);
    whole += expected[i] * expected[i];
  }
  return std::sqrt(off / whole);
}

// More tokens than would fit, without a permission to drop any.
TEST(EmbeddedPool, BlocksAreRecodedToFewerBitsBeforeTheTiersAreFull) {
  client::PoolOptions pool_options;
  pool_options.embedded_config =
      R"({"device": "cpu", "device_memory": "2MiB", "host_memory": "2MiB", "compute_threads": 1})";
  const auto pool = Pool::Connect("embedded", pool_options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  ASSERT_TRUE((*pool)->RegisterModel(e2e::SmallModel()).ok());
  const auto fill = [&](const std::vector<std::string>& degrade) {
    client::SequenceOptions options{.pair = "q8_0/q8_0"};
    options.degrade = degrade;
    const client::SequenceId id = (*pool)->CreateSequence("small", options).value();
    int64_t tokens = 0;
    while (tokens < 64 * 1000 && (*pool)->Append(id, tokens, e2e::Tokens(1, tokens, 64).layers).ok())
      tokens += 64;
    return std::pair(id, tokens);
  };
  const auto [plain, before] = fill({});
  ASSERT_GT(before, 0);
  const double error_before = AttentionError(**pool, plain, before);
  ASSERT_TRUE((*pool)->CloseSequence(plain).ok());
  const auto [id, tokens] = fill({"turbo4", "turbo3"});
  EXPECT_GT(tokens, before * 4 / 3);
  const double error = AttentionError(**pool, id, tokens);
  std::cout << "q8_0: " << before << " tokens, attention off by " << 100 * error_before
            << " %; recoded: " << tokens << " tokens, " << 100 * error << " %\n";
  EXPECT_LT(error_before, 0.02);
  EXPECT_GT(error, error_before);
  EXPECT_LT(error, 0.3);
  const auto all = (*pool)->ListSequences();
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->size(), 1u);
  EXPECT_GT((*all)[0].degraded_blocks, 0);
  EXPECT_EQ((*all)[0].dropped_blocks, 0);
  EXPECT_TRUE((*all)[0].degraded.empty()) << "of one that is asked for";
  const auto info = (*pool)->GetSequence(id);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->degraded_blocks, (*all)[0].degraded_blocks);
  int64_t named = 0, end = 0;
  for (const client::DegradedTokens& range : info->degraded) {
    EXPECT_EQ(range.layer_group, 0);
    EXPECT_GE(range.first_token, end);
    EXPECT_TRUE(range.pair == "turbo4/turbo4" || range.pair == "turbo3/turbo3") << range.pair;
    end = range.first_token + range.tokens;
    named += range.tokens;
  }
  EXPECT_LE(end, tokens);
  EXPECT_EQ(named, 64 * info->degraded_blocks);
  ExpectError((*pool)->GetSequence(id + 1).status(), absl::StatusCode::kNotFound, "holds no sequence");
  const auto stats = (*pool)->GetStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  int64_t blocks = 0, bytes = 0, of_fewer_bits = 0;
  for (const client::TierStats& tier : stats->tiers) {
    blocks += tier.degraded_blocks;
    bytes += tier.degraded_bytes;
    for (const client::PairStats& pair : tier.pairs)
      if (pair.pair == "turbo4/turbo4" || pair.pair == "turbo3/turbo3") of_fewer_bits += pair.blocks;
  }
  EXPECT_GE(blocks, (*all)[0].degraded_blocks);
  EXPECT_GT(bytes, 0);
  EXPECT_EQ(of_fewer_bits, (*all)[0].degraded_blocks);
  const int layers[] = {0, 1};
  EXPECT_TRUE((*pool)->ReadTokens(id, layers, 0, tokens).ok());
}

// The embedded way has the daemon's tiers, that on disk too.
TEST(EmbeddedPool, WhatIsDurableIsThereInTheNextPool) {
  client::PoolOptions options;
  options.embedded_config = absl::StrCat(
      R"({"device": "cpu", "device_memory": "4MiB", "host_memory": "4MiB", "compute_threads": 1, )",
      R"("disk_io": "threads", "disk": ")", e2e::MakeFolder(), R"(/tier:64MiB"})");
  const int layers[] = {0, 1};
  client::SequenceId kept = 0;
  std::vector<client::LayerRows> rows;
  {
    const auto pool = Pool::Connect("embedded", options);
    ASSERT_TRUE(pool.ok()) << pool.status();
    ASSERT_TRUE((*pool)->RegisterModel(e2e::SmallModel()).ok());
    for (int i = 0; i < 2; i++) {
      kept = (*pool)->CreateSequence("small", {.pair = "q8_0/turbo4"}).value();
      ASSERT_TRUE((*pool)->Append(kept, 0, e2e::Tokens(1, 0, 300).layers).ok());
    }
    const auto persisted = (*pool)->PersistSequences({&kept, 1});
    ASSERT_TRUE(persisted.ok()) << persisted.status();
    EXPECT_EQ(persisted->tokens, 300);
    rows = (*pool)->ReadTokens(kept, layers, 0, 300).value();
  }
  const auto pool = Pool::Connect("embedded", options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  const auto all = (*pool)->ListSequences("small");
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->size(), 1u);
  EXPECT_EQ((*all)[0].id, kept);
  const auto again = (*pool)->ReadTokens(kept, layers, 0, 300);
  ASSERT_TRUE(again.ok()) << again.status();
  for (size_t l = 0; l < 2; l++) {
    EXPECT_EQ((*again)[l].k, rows[l].k);
    EXPECT_EQ((*again)[l].v, rows[l].v);
  }
}

}  // namespace
}  // namespace kvtide::testing
