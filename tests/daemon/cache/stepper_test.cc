// Steps: an engine that writes rows and attends over the blocks itself, here with the backend of the tests on
// the memory that the step shows.
#include "daemon/cache/stepper.h"

#include <cmath>
#include <functional>

#include "tests/daemon/cache/cache_fixture.h"
#include "tests/daemon/cache/step_layer.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;

class StepTest : public CacheTest {
 protected:
  void SetUp() override {
    CpuBackendOptions cpu;
    cpu.threads = 1;
    engine_ = MakeCpuBackend(cpu);
  }
  // The engine of these tests reads host memory.
  bool OnCpu() { return device_->name() == engine_->name(); }

  absl::StatusOr<std::unique_ptr<Step>> Begin(const std::vector<StepItem>& items) {
    StepCall call;
    call.items = items;
    return cache_->BeginStep(call);
  }

  // One layer of one item, as an engine does it: rows into the blocks, then attention over them. The shadow
  // gets the rows if they are to stay.
  void RunLayer(const Step& step, size_t item, int layer, Client& client, ShadowSequence& shadow) {
    const ModelSpec& model = client.model();
    const int64_t start = step.start(item), tokens = step.end(item) - start;
    const NewRows rows(model, layer, tokens, random_);
    const StepLayer work(step, item, model, rows);
    ASSERT_TRUE(work.complete()) << "new tokens go into exact blocks";
    AppendArgs append;
    for (const auto& [tier, pieces] : work.pieces()) {
      append.pieces = pieces;
      ASSERT_TRUE(engine_->Append(append).ok());
    }
    shadow.Append(layer, rows.k, rows.v, tokens);
    const LayerGroupSpec& group = GroupOf(model, layer);
    const std::vector<float> q =
        RandomRows(random_, static_cast<size_t>(tokens * group.heads * group.shape.head_dim_k));
    std::vector<float> out, lse;
    const absl::Status status = work.Attend(*engine_, q, &out, &lse);
    ASSERT_TRUE(status.ok()) << status;
    ExpectClose(shadow.Attend(layer, q, tokens, start), out, lse,
                "step of " + std::to_string(tokens) + " at " + std::to_string(start) + ", layer " +
                    std::to_string(layer));
  }

  void RunLayers(const Step& step, size_t item, Client& client, ShadowSequence& shadow) {
    for (size_t layer = 0; layer < client.model().layers.size(); layer++)
      RunLayer(step, item, static_cast<int>(layer), client, shadow);
  }

  std::unique_ptr<Backend> engine_;
};

TEST_F(StepTest, WhatTheEngineWroteCountsWhenTheStepEnds) {
  if (!OnCpu()) GTEST_SKIP() << "the engine of this test reads host memory";
  Start();
  Client a(*cache_, MixedModel(), WithPair("q8_0/turbo4", {1, 1}), random_);
  Client b(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(300).ok());
  for (int round = 0; round < 40; round++) {
    auto step = Begin({{a.id(), 1 + round % 3}, {b.id(), round == 0 ? 100 : 5}});
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_EQ((*step)->start(0), a.length());
    RunLayers(**step, 0, a, a.shadow());
    RunLayers(**step, 1, b, b.shadow());
    EXPECT_EQ(*cache_->Length(b.id()), (*step)->start(1)) << "not before the end";
    const absl::Status status = cache_->EndStep(*std::move(step));
    ASSERT_TRUE(status.ok()) << status;
    a.shadow().Settle();
    b.shadow().Settle();
    EXPECT_EQ(*cache_->Length(a.id()), a.length());
    a.CheckAllLayers();
    b.CheckAllLayers();
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  EXPECT_GT(cache_->Stats().sealed_blocks, 0u);
}

// Who is closed while blocks are sealed takes nothing from the others: their tokens were published.
TEST_F(StepTest, ACloseDuringSealsDoesNotTakeTheTokensOfOthersBack) {
  Start();
  Client closed(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  Client kept(*cache_, SmallModel(), WithPair("q8_0", {0, 0}), random_);
  auto step = Begin({{closed.id(), 64}, {kept.id(), 64}});
  ASSERT_TRUE(step.ok()) << step.status();
  device_->SetHook([&](FaultyBackend::Call call) {
    if (call == FaultyBackend::kRecode && cache_->Length(closed.id()).ok()) {
      EXPECT_TRUE(closed.Close().ok());
    }
  });
  EXPECT_TRUE(cache_->EndStep(*std::move(step)).ok());
  device_->SetHook(nullptr);
  EXPECT_FALSE(cache_->Length(closed.id()).ok());
  EXPECT_EQ(*cache_->Length(kept.id()), 64);
}

TEST_F(StepTest, ATableThatHasNotChangedKeepsItsSerial) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(client.Append(10).ok());
  uint64_t serial = 0;
  for (int round = 0; round < 3; round++) {
    auto step = Begin({{client.id(), 1}});
    ASSERT_TRUE(step.ok()) << step.status();
    if (round > 0) {
      EXPECT_EQ((*step)->Serial(0, 0), serial);
    }
    serial = (*step)->Serial(0, 0);
    ASSERT_TRUE(cache_->EndStep(*std::move(step)).ok());
  }
  auto step = Begin({{client.id(), 60}});  // one more block
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_NE((*step)->Serial(0, 0), serial);
}

TEST_F(StepTest, AStepThatDoesNotEndHasNeverBeen) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(client.Append(50).ok());
  const uint64_t bytes = UsedBytes(cache_->Stats());
  {
    const auto step = Begin({{client.id(), 200}});
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_GT(UsedBytes(cache_->Stats()), bytes);
  }
  EXPECT_EQ(UsedBytes(cache_->Stats()), bytes);
  client.CheckAllLayers();
  ASSERT_TRUE(client.Append(20).ok());
  client.CheckAllLayers();
}

TEST_F(StepTest, OthersReadMeanwhileAndDoNotWrite) {
  if (!OnCpu()) GTEST_SKIP() << "the engine of this test reads host memory";
  Start();
  Client client(*cache_, SmallModel(), WithPair("q8_0/turbo4"), random_);
  ASSERT_TRUE(client.Append(300).ok());
  ShadowSequence later = client.shadow();
  auto step = Begin({{client.id(), 3}});
  ASSERT_TRUE(step.ok()) << step.status();
  RunLayers(**step, 0, client, later);
  client.CheckAllLayers();  // the tokens from before
  IsError(client.Append(1), StatusCode::kAborted, "");
  IsError(client.Truncate(10), StatusCode::kAborted, "");
  IsError(Begin({{client.id(), 1}}).status(), StatusCode::kAborted, "");
  // Moves copy what the step shows; it stays where the step saw it.
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  ShadowSequence again = client.shadow();
  RunLayers(**step, 0, client, again);
  ASSERT_TRUE(cache_->EndStep(*std::move(step)).ok());
  again.Settle();
  client.shadow() = again;
  client.CheckAllLayers();
}

TEST_F(StepTest, AClosedSequenceTakesTheWholeStepBack) {
  Start();
  Client a(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client b(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(10).ok());
  auto step = Begin({{a.id(), 1}, {b.id(), 1}});
  ASSERT_TRUE(step.ok()) << step.status();
  ASSERT_TRUE(b.Close().ok());
  IsError(cache_->EndStep(*std::move(step)), StatusCode::kAborted, "closed");
  EXPECT_EQ(*cache_->Length(a.id()), 10);
  a.CheckAllLayers();
}

TEST_F(StepTest, MistakesAreNamedAndChangeNothing) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client other(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  SequenceOptions at_once = WithPair("q8_0/turbo4");
  at_once.seal_at_once = true;
  Client coded(*cache_, SmallModel(), at_once, random_);
  IsError(Begin({}).status(), StatusCode::kInvalidArgument, "without items");
  IsError(Begin({{client.id(), 0}}).status(), StatusCode::kInvalidArgument, "items[0]: a step of 0 tokens");
  IsError(Begin({{client.id(), 1}, {client.id(), 1}}).status(), StatusCode::kInvalidArgument, "");
  IsError(Begin({{client.id(), 1}, {other.id(), 1}}).status(), StatusCode::kInvalidArgument,
          "items[1]: the sequence is of model mixed");
  IsError(Begin({{coded.id(), 1}}).status(), StatusCode::kInvalidArgument, "evaluation mode");
  IsError(Begin({{client.id() + 1, 1}}).status(), StatusCode::kNotFound, "items[0]");
  IsError(Begin({{client.id(), 100'000}, {other.id(), 1}}).status(), StatusCode::kInvalidArgument, "");
  Cancellation cancelled;
  cancelled.Cancel();
  CallContext context;
  context.cancellation = &cancelled;
  const StepItem item{client.id(), 1};
  StepCall call;
  call.items = {&item, 1};
  call.context = &context;
  IsError(cache_->BeginStep(call).status(), StatusCode::kCancelled, "nothing has begun");
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(StepTest, NoRoomTakesAllOfItBack) {
  Start(kMiB, 0);
  Client a(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client b(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(10).ok());
  const uint64_t bytes = UsedBytes(cache_->Stats());
  IsError(Begin({{a.id(), 64}, {b.id(), 1024}}).status(), StatusCode::kResourceExhausted, "");
  EXPECT_EQ(UsedBytes(cache_->Stats()), bytes);
  EXPECT_TRUE(Begin({{a.id(), 64}, {b.id(), 64}}).ok());
  a.CheckAllLayers();
}

// The next step begins while the engine still works on this one.
TEST_F(StepTest, AStepMayFollowOneThatIsStillOpen) {
  if (!OnCpu()) GTEST_SKIP() << "the engine of this test reads host memory";
  Start();
  Client a(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  Client b(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(50).ok());
  Client fork = a.Fork();
  std::unique_ptr<Step> last;
  ShadowSequence ahead = a.shadow();
  for (int round = 0; round < 30; round++) {
    StepCall call;
    const std::vector<StepItem> items = {{a.id(), 1 + round % 40}, {b.id(), 3}};
    call.items = std::span(items).first(round % 2 == 0 ? 1 : 2);  // b takes part now and then
    call.after = last.get();
    auto step = cache_->BeginStep(call);
    ASSERT_TRUE(step.ok()) << step.status();
    ASSERT_EQ((*step)->start(0), ahead.Length());
    RunLayers(**step, 0, a, ahead);
    if (round % 2 == 1) RunLayers(**step, 1, b, b.shadow());
    // The first of them ends later.
    if (last != nullptr) {
      const absl::Status status = cache_->EndStep(std::move(last));
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(*cache_->Length(a.id()), (*step)->start(0));
    }
    cache_->CheckInvariants();
    ahead.Settle();
    b.shadow().Settle();
    last = *std::move(step);
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  ASSERT_TRUE(cache_->EndStep(std::move(last)).ok());
  a.shadow() = ahead;
  a.CheckAllLayers();
  b.CheckAllLayers();
  fork.CheckAllLayers();
  EXPECT_TRUE(a.Append(5).ok());
  a.CheckAllLayers();
}

TEST_F(StepTest, WhatFollowsAStepThatIsRolledBackHasNeverBeen) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client other(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(client.Append(60).ok());
  const uint64_t bytes = UsedBytes(cache_->Stats());
  const auto follow = [&](Step* after, const Client& of, int64_t tokens) {
    const StepItem item{of.id(), tokens};
    StepCall call;
    call.items = {&item, 1};
    call.after = after;
    return cache_->BeginStep(call);
  };
  auto first = Begin({{client.id(), 2}});
  ASSERT_TRUE(first.ok()) << first.status();
  auto second = follow(first->get(), client, 100);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ((*second)->start(0), 62);
  IsError(follow(first->get(), other, 1).status(), StatusCode::kInvalidArgument, "in a row");
  auto third = follow(second->get(), other, 1);
  ASSERT_TRUE(third.ok()) << third.status();
  first->reset();
  cache_->CheckInvariants();
  IsError(follow(third->get(), other, 1).status(), StatusCode::kAborted, "rolled back");
  IsError(cache_->EndStep(*std::move(third)), StatusCode::kAborted, "rolled back");
  IsError(cache_->EndStep(*std::move(second)), StatusCode::kAborted, "rolled back");
  EXPECT_EQ(UsedBytes(cache_->Stats()), bytes);
  client.CheckAllLayers();
  ASSERT_TRUE(client.Append(20).ok());
  ASSERT_TRUE(other.Append(20).ok());
  client.CheckAllLayers();
  // The later one is taken back alone; or ends too early, which takes it back.
  for (const bool ends : {false, true}) {
    first = Begin({{client.id(), 1}});
    second = follow(first->get(), client, 1);
    ASSERT_TRUE(second.ok()) << second.status();
    if (ends) {
      IsError(cache_->EndStep(*std::move(second)), StatusCode::kFailedPrecondition, "still open");
    } else {
      second->reset();
    }
    second = follow(first->get(), client, 3);
    ASSERT_TRUE(second.ok()) << second.status();
    second->reset();
    first->reset();
  }
  // Who is closed takes all of them back.
  first = Begin({{client.id(), 10}, {other.id(), 1}});
  second = follow(first->get(), client, 200);
  ASSERT_TRUE(client.Close().ok());
  IsError(cache_->EndStep(*std::move(first)), StatusCode::kAborted, "closed");
  IsError(cache_->EndStep(*std::move(second)), StatusCode::kAborted, "rolled back");
  other.CheckAllLayers();
  cache_->CheckInvariants();
}

// Appends, cuts, moves and closes of others change nothing of what is pinned, for those who ask the cache and
// for those who read the blocks themselves.
TEST_F(StepTest, APinnedStepShowsWhatWasThere) {
  Start();
  Client a(*cache_, MixedModel(), WithPair("q8_0/turbo4", {1, 1}), random_);
  Client b(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(300).ok());
  ASSERT_TRUE(b.Append(70).ok());
  const std::vector<SequenceId> ids = {a.id(), b.id()};
  PinCall pin;
  pin.sequences = ids;
  auto step = cache_->PinStep(pin);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_TRUE((*step)->pinned());
  EXPECT_EQ((*step)->start(0), 300);
  EXPECT_EQ((*step)->end(1), 70);
  EXPECT_EQ((*step)->FirstLayerLeft(), -1);
  const ShadowSequence then[] = {a.shadow(), b.shadow()};
  const auto check = [&] {
    for (size_t layer = 0; layer < a.model().layers.size(); layer++) {
      const LayerGroupSpec& group = GroupOf(a.model(), static_cast<int>(layer));
      // The later one first.
      std::vector<AttendRequest> requests(2);
      std::vector<std::vector<float>> q(2), out(2), lse(2);
      for (size_t i = 0; i < 2; i++) {
        const size_t item = 1 - i;
        q[i] = RandomRows(random_, static_cast<size_t>(group.heads * group.shape.head_dim_k));
        out[i].resize(static_cast<size_t>(group.heads * group.shape.head_dim_v));
        lse[i].resize(static_cast<size_t>(group.heads));
        requests[i].sequence = ids[item];
        requests[i].queries = 1;
        requests[i].first_query_position = (*step)->end(item);
        requests[i].q = {q[i].data(), DataType::kF32};
        requests[i].out = out[i].data();
        requests[i].lse = lse[i].data();
      }
      AttendCall call;
      call.layer = static_cast<int>(layer);
      call.items = requests;
      const absl::Status status = cache_->AttendPinned(**step, call);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t i = 0; i < 2; i++)
        ExpectClose(then[1 - i].Attend(static_cast<int>(layer), q[i], 1, (*step)->end(1 - i)), out[i], lse[i],
                    "layer " + std::to_string(layer));
    }
  };
  check();
  ASSERT_TRUE(a.Append(200).ok()) << "nobody is kept from writing";
  ASSERT_TRUE(b.Truncate(65).ok());
  check();
  ASSERT_TRUE(cache_->Evict({{a.id()}}, 1).ok());
  auto writing = Begin({{a.id(), 3}});
  ASSERT_TRUE(writing.ok()) << writing.status();
  check();
  const uint64_t bytes = UsedBytes(cache_->Stats());
  ASSERT_TRUE(b.Close().ok());
  writing->reset();
  ASSERT_TRUE(a.Close().ok());
  check();
  EXPECT_GT(UsedBytes(cache_->Stats()), 0u);
  EXPECT_LT(UsedBytes(cache_->Stats()), bytes);
  EXPECT_TRUE(cache_->EndStep(*std::move(step)).ok());
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(StepTest, MistakesAboutPinnedStepsAreNamed) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client empty(*cache_, SmallModel(), WithPair("f16/f16"), random_);
  Client other(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(client.Append(10).ok());
  ASSERT_TRUE(other.Append(10).ok());
  const auto pin = [&](std::vector<SequenceId> ids) {
    PinCall call;
    call.sequences = ids;
    return cache_->PinStep(call);
  };
  IsError(pin({}).status(), StatusCode::kInvalidArgument, "without sequences");
  IsError(pin({client.id(), client.id()}).status(), StatusCode::kInvalidArgument, "items[1]: sequence");
  IsError(pin({client.id(), other.id()}).status(), StatusCode::kInvalidArgument,
          "items[1]: the sequence is of model mixed");
  IsError(pin({client.id(), empty.id()}).status(), StatusCode::kInvalidArgument, "has no tokens");
  IsError(pin({client.id() + 1}).status(), StatusCode::kNotFound, "items[0]");
  auto step = pin({client.id()});
  ASSERT_TRUE(step.ok()) << step.status();
  StepCall follow;
  const StepItem item{client.id(), 1};
  follow.items = {&item, 1};
  follow.after = step->get();
  IsError(cache_->BeginStep(follow).status(), StatusCode::kInvalidArgument, "nothing follows it");
  AttendRequest request;
  request.sequence = client.id();
  request.queries = 1;
  AttendCall call;
  call.items = {&request, 1};
  IsError(cache_->AttendStepLayer(**step, call), StatusCode::kInvalidArgument, "it takes no rows");
  IsError(cache_->AttendPinned(**step, call), StatusCode::kInvalidArgument, "q or the output is missing");
  const std::vector<float> q(1024);
  std::vector<float> out(1024);
  request.q = {q.data(), DataType::kF32};
  request.out = out.data();
  request.sequence = empty.id();
  IsError(cache_->AttendPinned(**step, call), StatusCode::kInvalidArgument, "the step has pinned");
  auto writing = Begin({{client.id(), 1}});
  ASSERT_TRUE(writing.ok()) << writing.status();
  IsError(cache_->AttendPinned(**writing, call), StatusCode::kFailedPrecondition, "PinStep");
  IsError((*step)->SayTokens(0, std::vector<TokenId>{1}), StatusCode::kInvalidArgument, "1 token ids for 0");
  EXPECT_TRUE((*step)->SayTokens(0, {}).ok());
}

// For engines that cannot reach the blocks.
TEST_F(StepTest, TheCacheWritesAndAttendsALayerForTheEngine) {
  Start();
  Client a(*cache_, MixedModel(), WithPair("q8_0/turbo4", {0, 1}), random_);
  Client b(*cache_, MixedModel(), WithPair("f16/f16"), random_);
  ASSERT_TRUE(a.Append(100).ok());
  for (int round = 0; round < 12; round++) {
    std::vector<StepItem> items = {{a.id(), 1 + 13 * (round % 3)}, {b.id(), 2}};
    auto step = Begin(items);
    ASSERT_TRUE(step.ok()) << step.status();
    Client* const clients[] = {&a, &b};
    for (size_t layer = 0; layer < a.model().layers.size(); layer++) {
      EXPECT_EQ((*step)->FirstLayerLeft(), static_cast<int>(layer));
      const LayerGroupSpec& group = GroupOf(a.model(), static_cast<int>(layer));
      std::vector<NewRows> rows;
      std::vector<std::vector<float>> q(2), out(2), lse(2);
      std::vector<AttendRequest> requests(2);
      for (size_t i = 0; i < 2; i++) {
        const int64_t tokens = items[i].new_tokens;
        rows.emplace_back(a.model(), static_cast<int>(layer), tokens, random_);
        q[i] = RandomRows(random_, static_cast<size_t>(tokens * group.heads * group.shape.head_dim_k));
        out[i].resize(static_cast<size_t>(tokens * group.heads * group.shape.head_dim_v));
        lse[i].resize(static_cast<size_t>(tokens * group.heads));
      }
      for (size_t i = 0; i < 2; i++) {
        AttendRequest& request = requests[i];
        request.sequence = items[i].sequence;
        request.q = {q[i].data(), DataType::kF32};
        request.queries = request.new_tokens = items[i].new_tokens;
        request.first_query_position = request.start_position = (*step)->start(i);
        request.k = {rows[i].k.data(), DataType::kF32};
        request.v = {rows[i].v.data(), DataType::kF32};
        request.out = out[i].data();
        request.lse = lse[i].data();
      }
      AttendCall call;
      call.layer = static_cast<int>(layer);
      call.items = std::span(requests).first(1);
      IsError(cache_->AttendStepLayer(**step, call), StatusCode::kInvalidArgument, "the step has 2");
      call.items = requests;
      requests[1].new_tokens++;
      IsError(cache_->AttendStepLayer(**step, call), StatusCode::kInvalidArgument, "items[1] has 3 tokens");
      requests[1].new_tokens--;
      for (int again = 0; again < 2; again++) {  // a layer may be repeated
        const absl::Status status = cache_->AttendStepLayer(**step, call);
        ASSERT_TRUE(status.ok()) << status;
      }
      for (size_t i = 0; i < 2; i++) {
        ShadowSequence& shadow = clients[i]->shadow();
        shadow.Append(static_cast<int>(layer), rows[i].k, rows[i].v, items[i].new_tokens);
        ExpectClose(shadow.Attend(static_cast<int>(layer), q[i], items[i].new_tokens, (*step)->start(i)),
                    out[i], lse[i], "layer");
      }
    }
    EXPECT_EQ((*step)->FirstLayerLeft(), -1);
    ASSERT_TRUE(cache_->EndStep(*std::move(step)).ok());
    a.shadow().Settle();
    b.shadow().Settle();
    a.CheckAllLayers();
    b.CheckAllLayers();
  }
}

// Steps between all other verbs; some end, some do not.
TEST_F(StepTest, RandomScripts) {
  if (!OnCpu()) GTEST_SKIP() << "the engine of this test reads host memory";
  for (uint32_t seed = 1; seed <= 4; seed++) {
    random_.seed(seed);
    Start(3 * kMiB, 8 * kMiB);
    {
      std::vector<Client> clients;
      const char* const kPairs[] = {"f16/f16", "q8_0/turbo4", "turbo4/turbo3"};
      for (int i = 0; i < 3; i++)
        clients.emplace_back(*cache_, MixedModel(), WithPair(kPairs[i], {i % 2, i}), random_);
      const auto pick = [this](size_t below) { return random_() % below; };
      for (int round = 0; round < 150 && !HasFailure(); round++) {
        Client& one = clients[pick(clients.size())];
        switch (pick(8)) {
          case 0:
            EXPECT_TRUE(one.Append(1 + static_cast<int64_t>(pick(90))).ok());
            break;
          case 1:
            EXPECT_TRUE(one.Step(1).ok());
            break;
          case 2: {
            const auto cut =
                one.Truncate(std::max<int64_t>(0, one.length() - static_cast<int64_t>(pick(10))));
            EXPECT_TRUE(cut.ok() || cut.code() == StatusCode::kOutOfRange) << cut;
            break;
          }
          case 3:
            if (clients.size() < 5) {
              clients.push_back(one.Fork());
            } else {
              EXPECT_TRUE(one.Close().ok());
              std::swap(one, clients.back());
              clients.pop_back();
            }
            break;
          case 4:
            EXPECT_TRUE(
                (pick(2) == 0 ? cache_->Evict({{one.id()}}, 1) : cache_->Prefetch({{one.id()}})).ok());
            cache_->RunMovesOnce();
            break;
          default: {
            std::vector<StepItem> items;
            for (const Client& client : clients)
              if (pick(2) == 0 || client.id() == one.id())
                items.push_back({client.id(), 1 + static_cast<int64_t>(pick(pick(4) == 0 ? 70 : 3))});
            auto step = Begin(items);
            ASSERT_TRUE(step.ok()) << step.status();
            const bool ends = pick(3) != 0;
            size_t item = 0;
            std::vector<std::pair<Client*, ShadowSequence>> written;
            for (Client& client : clients) {
              if (item == items.size() || items[item].sequence != client.id()) continue;
              ShadowSequence shadow = client.shadow();
              RunLayers(**step, item++, client, shadow);
              written.emplace_back(&client, shadow);
              if (pick(3) == 0) client.CheckAllLayers();
              if (pick(4) == 0) {
                EXPECT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
              }
            }
            if (!ends) {
              step->reset();
              break;
            }
            const absl::Status status = cache_->EndStep(*std::move(step));
            ASSERT_TRUE(status.ok()) << status;
            for (auto& [client, shadow] : written) {
              shadow.Settle();
              client->shadow() = shadow;
            }
            break;
          }
        }
        cache_->CheckInvariants();
        for (Client& client : clients) client.CheckAllLayers();
      }
      ASSERT_FALSE(HasFailure()) << "seed " << seed;
    }
    for (const SequenceInfo& info : cache_->ListSequences()) EXPECT_TRUE(cache_->CloseSequence(info.id).ok());
    EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
  }
}

}  // namespace
}  // namespace kvtide::testing
