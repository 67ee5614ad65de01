// The direct way on the CPU: a real kvtided whose first tier is mapped into this process, which writes,
// attends and seals over it; the same over an embedded pool. tests/gpu does so on GPUs.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/direct_attention.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_direct_device.h"
#include "tests/base/eventually.h"
#include "tests/clients/cpp/direct_script.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;

void ExpectError(const absl::Status& status, StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << "\nexpected: " << part;
}

client::PoolOptions OnCpu() {
  client::PoolOptions options;
  options.direct_device = "cpu";
  options.direct_threads = 1;
  options.embedded_config =
      R"({"device": "cpu", "device_memory": "24MiB", "host_memory": "24MiB", "compute_threads": 1})";
  return options;
}

std::unique_ptr<e2e::TestDaemon> SharingDaemon() {
  return e2e::TestDaemon::Start(
      {"--device", "cpu", "--device-memory", "24MiB", "--host-memory", "24MiB", "--share-pool"}, 1);
}

std::unique_ptr<Pool> Connect(const std::string& address) {
  auto pool = Pool::Connect(address, OnCpu());
  EXPECT_TRUE(pool.ok()) << pool.status();
  return pool.ok() ? *std::move(pool) : nullptr;
}

TEST(Direct, StepsEqualTheModelOfTheCacheAndTheDaemonsOwnBytes) {
  const auto daemon = SharingDaemon();
  for (const std::string pair : {"turbo4/turbo3", "q8_0/turbo4", "f16/f16"}) {
    for (const uint32_t seed : {1u, 2u}) {
      const auto direct = Connect("direct:" + daemon->address()), embedded = Connect("embedded");
      ASSERT_EQ(direct->way(), client::Way::kDirect);
      const std::vector<float> answers = RunDirectScript(*direct, {.pairs = {pair}, .seed = seed});
      ASSERT_FALSE(HasFailure()) << pair << " seed " << seed;
      EXPECT_EQ(answers, RunDirectScript(*embedded, {.pairs = {pair}, .seed = seed}))
          << pair << " seed " << seed;
      const auto stats = direct->GetStats();
      ASSERT_TRUE(stats.ok()) << stats.status();
      EXPECT_EQ(stats->stored_bytes, 0);
      if (pair != "f16/f16") {
        EXPECT_GT(stats->sealed_blocks, 0);
      }
    }
  }
}

// Sequences of several pairs, in one step.
TEST(Direct, StepsOfSeveralPairsEqualTheModelOfTheCacheAndTheDaemonsOwnBytes) {
  const auto daemon = SharingDaemon();
  const DirectScriptOptions script{.pairs = {"turbo4/turbo3", "q8_0/turbo4", "f16/f16"}, .seed = 5};
  const auto direct = Connect("direct:" + daemon->address()), embedded = Connect("embedded");
  const std::vector<float> answers = RunDirectScript(*direct, script);
  ASSERT_FALSE(HasFailure());
  EXPECT_EQ(answers, RunDirectScript(*embedded, script));
}

TEST(Direct, StepsOfSeveralPairsEqualThoseOfEachPairAlone) {
  const auto daemon = SharingDaemon();
  for (const std::string& address : {"direct:" + daemon->address(), std::string("embedded")}) {
    for (const bool graphs : {false, true}) {
      const auto pool = Connect(address);
      CheckMixedSteps(*pool, {.pairs = {"turbo4/turbo3", "q8_0/turbo4", "f16/f16", "turbo2/turbo2"},
                              .graphs = graphs,
                              .steps = graphs ? 150 : 24});
      ASSERT_FALSE(HasFailure()) << address << (graphs ? ", as graphs" : "");
      EXPECT_EQ(pool->GetStats()->stored_bytes, 0);
    }
  }
}

TEST(Direct, WhatIsNotMappedSaysWhy) {
  const auto plain = e2e::TestDaemon::Start();
  ExpectError(Pool::Connect("direct:" + plain->address(), OnCpu()).status(), StatusCode::kFailedPrecondition,
              "start kvtided with --share-pool");
  client::PoolOptions nowhere;
  ExpectError(Pool::Connect("direct:" + plain->address(), nowhere).status(), StatusCode::kInvalidArgument,
              "is no device on which an engine computes");
  const auto best = Connect("auto:" + plain->address());
  EXPECT_EQ(best->way(), client::Way::kSharedMemory);
  EXPECT_TRUE(absl::StrContains(best->why(), "not direct: ")) << best->why();
  ExpectError(client::DirectAttention::Make(best.get(), e2e::SmallModel(), {.pairs = {"f16/f16"}}).status(),
              StatusCode::kFailedPrecondition, "this pool is not mapped (way: shared memory)");
  const auto sharing = SharingDaemon();
  EXPECT_EQ(Connect("auto:" + sharing->address())->way(), client::Way::kDirect);
  // Calibrated keys are not among what engines attend by themselves.
  const auto mapped = Connect("auto:" + sharing->address());
  ASSERT_TRUE(mapped->RegisterModel(e2e::SmallModel()).ok());
  ExpectError(
      client::DirectAttention::Make(mapped.get(), e2e::SmallModel(), {.pairs = {"tide3/turbo3"}}).status(),
      StatusCode::kInvalidArgument, "no profiles of sequences");
  // Blocks of those who have mapped nothing are not written by themselves.
  const auto shared = Connect("shm:" + sharing->address());
  ASSERT_TRUE(shared->RegisterModel(e2e::SmallModel()).ok());
  ExpectError(client::DirectAttention::Make(shared.get(), e2e::SmallModel(), {.pairs = {"f16/f16"}}).status(),
              StatusCode::kFailedPrecondition, "this pool is not mapped");
}

TEST(Direct, ADescriptorOfAnotherDeviceIsRefusedAndClosed) {
  SlabHandle handle;
  handle.kind = SlabHandle::Kind::kFile;
  handle.bytes = 1 << 20;
  std::strcpy(handle.device.data(), "GPU-1");
  handle.fd = ::open("/dev/null", O_RDWR);
  const int fd = handle.fd;
  ASSERT_GE(fd, 0);
  ExpectError(MakeCpuDirectDevice(1)->Map(handle).status(), StatusCode::kFailedPrecondition,
              "the pool lies on GPU-1, this engine computes on the CPU");
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
}

TEST(Direct, OnlyAnAdminMapsThePool) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs to become somebody else";
  const auto daemon = e2e::TestDaemon::Start({"--share-pool", "--allow", "uid:4321"});
  EXPECT_EQ(e2e::AnswerAs(4321, *daemon,
                          [&] {
                            const auto status =
                                Pool::Connect("direct:" + daemon->address(), OnCpu()).status();
                            return absl::IsPermissionDenied(status) &&
                                           absl::StrContains(status.message(), "only an admin")
                                       ? 3
                                       : 1;
                          }),
            3);
}

TEST(Direct, MistakesAreNamedAndTheStepIsTakenBack) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  const client::Model model = e2e::SmallModel();
  const auto make = [&](client::DirectOptions options) {
    return client::DirectAttention::Make(pool.get(), model, options);
  };
  ExpectError(make({.pairs = {"nothing"}}).status(), StatusCode::kInvalidArgument, "DirectOptions::pairs");
  ExpectError(make({.pairs = {"f16/f16"}, .max_sequences = 0}).status(), StatusCode::kInvalidArgument, "");
  auto attention = make(
      {.pairs = {"q8_0/turbo4"}, .type = DataType::kF32, .max_sequences = 2, .max_sequence_tokens = 128});
  ASSERT_TRUE(attention.ok()) << attention.status();
  const auto id = pool->CreateSequence("small", {.pair = "q8_0/turbo4"});
  const auto other =
      pool->CreateSequence("small", {.pair = "turbo4/turbo4", .exact_window = ExactWindow{0, 0}});
  ASSERT_TRUE(id.ok() && other.ok());
  ASSERT_TRUE(pool->Append(*other, 0, e2e::Tokens(1, 0, 64).layers).ok());
  const auto begin = [&](std::vector<client::StepItem> items) { return (*attention)->Begin(items, nullptr); };
  ExpectError(begin({{*id, 3}}).status(), StatusCode::kInvalidArgument, "made for 2 and 2");
  ExpectError(begin({{*id, 0}}).status(), StatusCode::kInvalidArgument, "a step of 0 tokens");
  ExpectError(begin({{*other, 1}}).status(), StatusCode::kInvalidArgument,
              "the sequence is coded as turbo4/turbo4, this object was made for q8_0/turbo4; name it");
  ExpectError(make({.graphs = true}).status(), StatusCode::kInvalidArgument, "name them in");
  ExpectError((*attention)->Write(9, {}, {}, nullptr), StatusCode::kInvalidArgument, "layer 9 of 2");
  ASSERT_TRUE(pool->Append(*id, 0, e2e::Tokens(1, 0, 128).layers).ok());
  ExpectError(begin({{*id, 1}}).status(), StatusCode::kInvalidArgument, "max_sequence_tokens is 128");
  ASSERT_TRUE(pool->TruncateSequence(*id, 100).ok()) << "the steps before were taken back";
  auto step = begin({{*id, 1}});
  ASSERT_TRUE(step.ok()) << step.status();
  ExpectError((*attention)->End(*std::move(step)), StatusCode::kFailedPrecondition, "the step has no mark");
}

// All that a sequence has goes up to the first tier before it is attended there.
TEST(Direct, WhatLiesBelowIsBroughtUp) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  DirectScript script(*pool, {.pairs = {"turbo4/turbo3"}, .seed = 7});
  script.Create();
  for (int i = 0; i < 20; i++) {
    script.Steps(1);
    const auto moved = pool->EvictSequences(script.ids());
    ASSERT_TRUE(moved.ok()) << moved.status();
    if (i > 2) {
      EXPECT_GT(moved->blocks, 0);
    }
    ASSERT_FALSE(HasFailure()) << i;
  }
}

// An engine that computes by itself, over sequences whose rows are those of seed 1.
class SameRows {
 public:
  SameRows(Pool& pool, const std::string& pair, client::KeyCentring centring = client::KeyCentring::kDefault)
      : pool_(pool), options_{.pair = pair} {
    options_.key_centring = centring;
    options_.exact_window = ExactWindow{1, 1};
    auto made = client::DirectAttention::Make(
        &pool, e2e::SmallModel(),
        {.pairs = {pair}, .type = DataType::kF32, .output_type = DataType::kF32, .max_new_tokens = 512});
    EXPECT_TRUE(made.ok()) << made.status();
    attention_ = *std::move(made);
  }

  const client::SequenceOptions& options() const { return options_; }
  client::SequenceId Make(client::LeaseId lease = 0) {
    return pool_.CreateSequence("small", options_, lease).value();
  }
  // The outputs of all layers. The items' ids are said when the step begins, `late` when it ends.
  std::vector<float> Step(const std::vector<client::StepItem>& items,
                          std::span<const client::StepTokens> late = {}) {
    std::vector<float> all;
    auto step = attention_->Begin(items, nullptr);
    EXPECT_TRUE(step.ok()) << step.status();
    if (!step.ok()) return all;
    for (int layer = 0; layer < e2e::kLayers; layer++) {
      std::vector<float> k, v, q;
      for (size_t i = 0; i < items.size(); i++) {
        const e2e::Tokens rows(1, step->starts[i], items[i].new_tokens);
        const std::vector<float> queries = e2e::Rows(3, step->starts[i], items[i].new_tokens, e2e::kHeads);
        k.insert(k.end(), rows.k[static_cast<size_t>(layer)].begin(),
                 rows.k[static_cast<size_t>(layer)].end());
        v.insert(v.end(), rows.v[static_cast<size_t>(layer)].begin(),
                 rows.v[static_cast<size_t>(layer)].end());
        q.insert(q.end(), queries.begin(), queries.end());
      }
      const size_t width = e2e::kHeads * e2e::kDim, kv_width = e2e::kKvHeads * e2e::kDim;
      std::vector<float> out(q.size()), lse(q.size() / e2e::kDim);
      EXPECT_TRUE(attention_->Write(layer, {k.data(), kv_width}, {v.data(), kv_width}, nullptr).ok());
      EXPECT_TRUE(
          attention_->Attend(layer, {q.data(), width}, {out.data(), width}, lse.data(), nullptr).ok());
      all.insert(all.end(), out.begin(), out.end());
    }
    EXPECT_TRUE(attention_->Seal(nullptr).ok());
    EXPECT_TRUE(attention_->Mark(*step, nullptr).ok());
    const absl::Status status = attention_->End(*std::move(step), late);
    EXPECT_TRUE(status.ok()) << status;
    return all;
  }
  client::SequenceInfo Info(client::SequenceId id) {
    const auto all = pool_.ListSequences("small");
    EXPECT_TRUE(all.ok()) << all.status();
    for (const client::SequenceInfo& info : all.value_or(std::vector<client::SequenceInfo>()))
      if (info.id == id) return info;
    return {};
  }

 private:
  Pool& pool_;
  client::SequenceOptions options_;
  std::unique_ptr<client::DirectAttention> attention_;
};

TEST(Direct, StepsThatSayTheirTokensEndWithOneCopyAndAreFound) {
  const auto daemon = SharingDaemon();
  for (const std::string& address : {"direct:" + daemon->address(), std::string("embedded")}) {
    const auto pool = Connect(address);
    for (const std::string pair : {"turbo4/turbo4", "f16/f16"}) {
      SameRows engine(*pool, pair);
      std::vector<client::TokenId> ids(64 * 6);
      for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<client::TokenId>(i * i % 991);
      const client::SequenceId a = engine.Make(), b = engine.Make(), alone = engine.Make();
      for (size_t at = 0; at < ids.size(); at += 48) {
        const auto said = std::span<const client::TokenId>(ids).subspan(at, 48);
        const client::StepTokens late{1, said};
        engine.Step({{a, 48, said}, {b, 48}, {alone, 48}}, {&late, 1});
      }
      ASSERT_FALSE(HasFailure()) << address << " " << pair;
      // Every block that is sealed by now; the last one waits for the next step.
      const int64_t sealed = engine.Info(a).shared_blocks;
      EXPECT_GE(sealed, 4) << pair;
      EXPECT_EQ(engine.Info(b).shared_blocks, sealed);
      EXPECT_EQ(engine.Info(alone).shared_blocks, 0);
      const auto found = pool->LookupPrefix("small", engine.options(), ids);
      ASSERT_TRUE(found.ok()) << found.status();
      EXPECT_EQ(found->tokens, sealed * 64);
      const client::SequenceId c = engine.Make(found->lease);
      EXPECT_EQ(engine.Info(c).reused_tokens, sealed * 64);
      const auto left = static_cast<int64_t>(ids.size()) - sealed * 64;
      if (left > 0)
        engine.Step({{c, left, std::span<const client::TokenId>(ids).last(static_cast<size_t>(left))}});
      // All have the same tokens, and read the same of them.
      const std::vector<float> of_a = engine.Step({{a, 1}}), of_c = engine.Step({{c, 1}});
      EXPECT_EQ(of_a, engine.Step({{b, 1}})) << pair;
      EXPECT_EQ(of_a, of_c) << address << " " << pair;
      for (const client::SequenceId id : {a, b, c, alone}) EXPECT_TRUE(pool->CloseSequence(id).ok());
      EXPECT_TRUE(pool->UnregisterModel("small").ok());
    }
  }
}

// Equal tokens whose keys differ, as by the rounding of another batch, have other means: an engine that reads
// a sequence with one never meets both.
TEST(Direct, ASequenceThatBeginsWithAPrefixHasOneMean) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  SameRows engine(*pool, "turbo4/turbo4", client::KeyCentring::kFirstBlock);
  std::vector<client::TokenId> ids(64 * 8, 3);
  const auto append = [&](int seed, int64_t tokens) {
    const client::SequenceId id = engine.Make();
    const auto status = pool->Append(id, 0, e2e::Tokens(seed, 0, tokens).layers,
                                     std::span(ids).first(static_cast<size_t>(tokens)));
    EXPECT_TRUE(status.ok()) << status.status();
    return id;
  };
  const client::SequenceId a = append(1, 64 * 5), b = append(2, 64 * 8);
  // The exact first block is one, the coded ones are not.
  EXPECT_EQ(engine.Info(b).shared_blocks, 1);
  const auto found = pool->LookupPrefix("small", engine.options(), ids);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->tokens, 64 * 4);
  const client::SequenceId c = engine.Make(found->lease);
  engine.Step({{a, 1}, {b, 1}, {c, 1}});
  for (const client::SequenceId id : {a, b, c}) EXPECT_TRUE(pool->CloseSequence(id).ok());
}

// Appends, cuts and closes of others change nothing of what a reader has pinned.
TEST(Direct, WhatIsPinnedIsAttendedWhereItLies) {
  const auto daemon = SharingDaemon();
  for (const std::string& address : {"direct:" + daemon->address(), std::string("embedded")}) {
    const auto pool = Connect(address);
    auto attention = client::DirectAttention::Make(
        pool.get(), e2e::SmallModel(),
        {.type = DataType::kF32, .output_type = DataType::kF32, .max_new_tokens = 64});
    ASSERT_TRUE(attention.ok()) << attention.status();
    const std::vector<std::pair<std::string, int64_t>> kinds = {
        {"q8_0/turbo4", 300}, {"f16/f16", 100}, {"turbo4/turbo4", 200}};
    std::vector<client::SequenceId> ids;
    for (const auto& [pair, tokens] : kinds) {
      ids.push_back(pool->CreateSequence("small", {.pair = pair, .exact_window = ExactWindow{1, 1}}).value());
      ASSERT_TRUE(pool->Append(ids.back(), 0, e2e::Tokens(1, 0, tokens).layers).ok());
    }
    const auto queries = [](const client::PinnedItem& item) {
      return e2e::Rows(3, 0, item.queries, e2e::kHeads);
    };
    // What the pool says of the same queries, of all layers.
    const auto expect = [&](const std::vector<client::PinnedItem>& items) {
      std::vector<float> all;
      for (int layer = 0; layer < e2e::kLayers; layer++) {
        for (const client::PinnedItem& item : items) {
          const std::vector<float> q = queries(item);
          std::vector<float> out(q.size());
          client::AttendItem call;
          call.sequence = item.sequence;
          if (item.tokens > 0) call.first_query_position = item.tokens - item.queries;
          call.q = client::TensorRef::F32(q, {item.queries, e2e::kHeads, e2e::kDim});
          call.output = out;
          const absl::Status status = pool->Attend(layer, {&call, 1});
          EXPECT_TRUE(status.ok()) << status;
          all.insert(all.end(), out.begin(), out.end());
        }
      }
      return all;
    };
    const auto attend = [&](const std::vector<client::PinnedItem>& items, const client::DirectStep& step) {
      std::vector<float> all;
      for (int layer = 0; layer < e2e::kLayers; layer++) {
        std::vector<float> q;
        for (const client::PinnedItem& item : items) {
          const std::vector<float> rows = queries(item);
          q.insert(q.end(), rows.begin(), rows.end());
        }
        const size_t width = e2e::kHeads * e2e::kDim;
        std::vector<float> out(q.size()), lse(q.size() / e2e::kDim);
        EXPECT_EQ(q.size(), static_cast<size_t>(step.tokens) * width);
        const absl::Status status =
            (*attention)->Attend(layer, {q.data(), width}, {out.data(), width}, lse.data(), nullptr);
        EXPECT_TRUE(status.ok()) << status;
        all.insert(all.end(), out.begin(), out.end());
      }
      return all;
    };
    const auto end = [&](client::DirectStep step) {
      EXPECT_TRUE((*attention)->Mark(step, nullptr).ok());
      const absl::Status status = (*attention)->End(std::move(step));
      EXPECT_TRUE(status.ok()) << status;
    };
    const auto expect_near = [](const std::vector<float>& a, const std::vector<float>& b) {
      ASSERT_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); i++) ASSERT_NEAR(a[i], b[i], 1e-5) << i;
    };
    const std::vector<client::PinnedItem> last = {{ids[0], 3}, {ids[1], 2}, {ids[2], 1}};
    const std::vector<client::PinnedItem> prefix = {{ids[1], 4, 70}, {ids[0], 1, 128}, {ids[2], 20, 50}};
    const std::vector<float> of_last = expect(last), of_prefix = expect(prefix);
    auto step = (*attention)->Pin(last, nullptr);
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_EQ(step->starts, (std::vector<int64_t>{297, 98, 199}));
    expect_near(attend(last, *step), of_last);
    ExpectError((*attention)->Write(0, {}, {}, nullptr), StatusCode::kFailedPrecondition, "takes no rows");
    ASSERT_TRUE(pool->Append(ids[0], 300, e2e::Tokens(1, 300, 200).layers).ok());
    ASSERT_TRUE(pool->TruncateSequence(ids[1], 80).ok());
    expect_near(attend(last, *step), of_last);
    auto another = (*attention)->Pin(prefix, nullptr);
    ASSERT_TRUE(another.ok()) << another.status();
    EXPECT_EQ(another->starts, (std::vector<int64_t>{66, 127, 30}));
    expect_near(attend(prefix, *another), of_prefix);
    ASSERT_TRUE(pool->CloseSequence(ids[2]).ok());
    expect_near(attend(prefix, *another), of_prefix);
    end(*std::move(step));
    end(*std::move(another));
    const auto pin = [&](client::PinnedItem item) { return (*attention)->Pin({&item, 1}, nullptr).status(); };
    // Before, among and behind the coded blocks.
    for (const int64_t tokens : {1, 63, 64, 65, 100, 128, 129, 200, 320, 383, 384, 385, 447, 448, 449, 500})
      for (const int64_t asked : {1, 2, 63})
        if (asked <= tokens) {
          const std::vector<client::PinnedItem> among = {{ids[0], asked, tokens}, {ids[1], 1, 70}};
          auto cut = (*attention)->Pin(among, nullptr);
          ASSERT_TRUE(cut.ok()) << cut.status();
          expect_near(attend(among, *cut), expect(among));
          end(*std::move(cut));
        }
    ExpectError(pin({ids[1], 81}), StatusCode::kInvalidArgument, "made for 64 and 64");
    ExpectError(pin({ids[1], 3, 81}), StatusCode::kInvalidArgument, "the sequence has 80");
    ExpectError(pin({ids[1], 0}), StatusCode::kInvalidArgument, "0 queries");
    ExpectError(pin({ids[2], 1}), StatusCode::kNotFound, "items[0]");
    for (const client::SequenceId id : {ids[0], ids[1]}) EXPECT_TRUE(pool->CloseSequence(id).ok());
    EXPECT_EQ(pool->GetStats()->stored_bytes, 0) << "nothing is pinned any more";
    EXPECT_TRUE(pool->UnregisterModel("small").ok());
  }
}

TEST(Direct, PinnedQueriesBeforeWhatASlidingWindowKeepsAreRefused) {
  const auto pool = Connect("embedded");
  client::Model model = e2e::SmallModel();
  model.name = "windows";
  for (client::ModelLayer& layer : model.layers) layer.window = 100;
  ASSERT_TRUE(pool->RegisterModel(model).ok());
  auto attention = client::DirectAttention::Make(
      pool.get(), model, {.type = DataType::kF32, .output_type = DataType::kF32, .max_new_tokens = 64});
  ASSERT_TRUE(attention.ok()) << attention.status();
  const auto id =
      pool->CreateSequence("windows", {.pair = "q8_0/turbo4", .exact_window = ExactWindow{0, 1}}).value();
  ASSERT_TRUE(pool->Append(id, 0, e2e::Tokens(1, 0, 500).layers).ok());
  const auto pin = [&](int64_t tokens) -> absl::Status {
    const client::PinnedItem item{id, 2, tokens};
    auto step = (*attention)->Pin({&item, 1}, nullptr);
    return step.ok() ? (*attention)->RollBack(*std::move(step)) : step.status();
  };
  ExpectError(pin(100), StatusCode::kOutOfRange, "the query at 98 sees tokens from 0 on");
  EXPECT_TRUE(pin(499).ok());
  EXPECT_TRUE(pool->CloseSequence(id).ok());
}

// Whoever did not get an answer does not know any table, those of other sequences either.
TEST(Direct, AStepThatDoesNotBeginLosesNoTable) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  SameRows engine(*pool, "turbo4/turbo4");
  const client::SequenceId a = engine.Make(), b = engine.Make();
  engine.Step({{a, 200}, {b, 200}});
  const std::vector<client::StepItem> none = {{b, 0}};
  EXPECT_EQ(pool->BeginStep(none, {.tables = true}).status().code(), StatusCode::kInvalidArgument);
  const std::vector<float> of_a = engine.Step({{a, 1}});
  EXPECT_EQ(of_a, engine.Step({{b, 1}}));
}

[[noreturn]] void WorkUntilKilled(const std::string& address, uint32_t seed) {
  auto pool = Pool::Connect("direct:" + address, OnCpu());
  if (!pool.ok()) ::_exit(1);
  for (; !::testing::Test::HasFailure(); seed += 1000)
    RunDirectScript(**pool, {.pairs = {"turbo4/turbo3"}, .seed = seed});
  ::_exit(1);
}

TEST(Direct, AKilledEngineLeavesNothingAndAKilledDaemonIsAnError) {
  const char* const asked = std::getenv("KVTIDE_TEST_DEATHS");
  const int rounds = asked != nullptr ? std::atoi(asked) : 5;
  const auto daemon = SharingDaemon();
  const auto watcher = daemon->Connect();
  std::mt19937 random(20260101);
  for (int round = 0; round < rounds; round++) {
    const pid_t child = ::fork();
    if (child == 0) WorkUntilKilled(daemon->address(), static_cast<uint32_t>(round));
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences > 0; }));
    absl::SleepFor(absl::Microseconds(random() % 20000));
    ::kill(child, SIGKILL);
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] {
      const auto stats = watcher->GetStats();
      return stats.ok() && stats->sequences == 0 &&
             stats->tiers[0].used_bytes + stats->tiers[1].used_bytes == 0;
    })) << "round "
        << round;
  }
  const auto pool = Connect("direct:" + daemon->address());
  DirectScript script(*pool, {.pairs = {"turbo4/turbo3"}, .seed = 3});
  script.Create();
  script.Steps(1);
  daemon->Kill();
  // The mapped memory stays; the next step says what has happened.
  const client::StepItem item{script.ids()[0], 1};
  ExpectError(script.attention().Begin({&item, 1}, nullptr).status(), StatusCode::kUnavailable,
              "connect again");
  script.Abandon();
}

}  // namespace
}  // namespace kvtide::testing
