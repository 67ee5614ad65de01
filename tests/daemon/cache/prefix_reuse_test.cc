// Prefixes: sequences that have the same tokens have one copy of their sealed blocks; what closed sequences
// leave is found by its token ids, taken over by new ones, and makes way for others; tenants, models, pairs
// and salts never meet; leases keep and end; what was durable is found after a restart, and what is not there
// is never said to be.
#include "daemon/cache/reuse/prefix_reuse.h"

#include <algorithm>
#include <map>
#include <set>

#include "daemon/cache/persist/manifest.h"
#include "tests/daemon/cache/token_client.h"

namespace kvtide::testing {
namespace {

constexpr size_t kBlock = 65536;
constexpr size_t kExtent = kBlock + kDiskPage;

class PrefixReuseTest : public CacheTest {
 protected:
  void StartSmall(size_t device = 40, size_t host = 40, size_t disk = 80) {
    StartWithDisk(device * kBlock, host * kBlock, (disk * kExtent) * 130 / 128 + 20 * kDiskPage);
  }
  TokenClient Make(const SequenceOptions& options, const ModelSpec& model = SmallModel(),
                   const CallContext& context = {}) {
    return TokenClient(*cache_, model, options, context);
  }
  // A sequence with these tokens comes and goes.
  void Leave(const SequenceOptions& options, const Tokens& tokens, const ModelSpec& model = SmallModel(),
             bool persist = false) {
    TokenClient client = Make(options, model);
    ASSERT_TRUE(client.Append(tokens).ok());
    if (persist) {
      ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
    }
    ASSERT_TRUE(client.Close().ok());
    cache_->CheckInvariants();
  }
  int64_t Cached(const SequenceOptions& options, const Tokens& tokens,
                 const ModelSpec& model = SmallModel()) {
    TokenClient client = Make(options, model);
    const absl::StatusOr<PrefixReport> report = client.Lookup(tokens, absl::ZeroDuration());
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(client.Close().ok());
    return report.ok() ? report->tokens : -1;
  }
  void TearDown() override {
    if (cache_ != nullptr) {
      cache_->CheckInvariants();
      EXPECT_EQ(cache_->Stats().leases, 0u) << "a test has left leases";
      for (const SequenceInfo& info : cache_->ListSequences())
        EXPECT_TRUE(cache_->CloseSequence(info.id).ok());
      for (const std::string& model : cache_->ModelNames()) cache_->UnregisterModel(model).IgnoreError();
      cache_->CheckInvariants();
    }
    CacheTest::TearDown();
  }
};

struct Form {
  const char* pair;
  ExactWindow window;
  bool mixed = false;
};
const Form kForms[] = {{"f16", {}},        {"q8_0/turbo4", {1, 2}},       {"turbo3", {0, 0}},
                       {"turbo4", {2, 1}}, {"q8_0/turbo4", {1, 1}, true}, {"f16", {}, true}};

TEST_F(PrefixReuseTest, ASequenceBeginsWithWhatAClosedOneLeft) {
  for (const Form& form : kForms) {
    SCOPED_TRACE(absl::StrCat(form.pair, form.mixed ? " mixed" : ""));
    Start(64 * kBlock, 64 * kBlock);
    const ModelSpec model = form.mixed ? MixedModel() : SmallModel();
    const SequenceOptions options = WithPair(form.pair, form.window);
    const Tokens common = SomeTokens(1, 64 * 6), first = common + SomeTokens(2, 400),
                 second = common + SomeTokens(3, 390);
    const std::vector<float> expected = ReadAlone(*cache_, model, options, second);
    Leave(options, first, model);
    EXPECT_EQ(cache_->Stats().sequences, 0u);
    EXPECT_GT(cache_->Stats().prefix_alone_bytes, 0u);
    TokenClient client = Make(options, model);
    const absl::StatusOr<int64_t> there = client.Begin(second);
    ASSERT_TRUE(there.ok()) << there.status();
    EXPECT_EQ(*there, 64 * 6);
    EXPECT_EQ(client.info().reused_tokens, 64 * 6);
    EXPECT_EQ(client.info().known_tokens, static_cast<int64_t>(second.size()));
    EXPECT_EQ(client.Read(), expected);
    // It goes on as one that was computed.
    TokenClient alone = Make(options, model);
    ASSERT_TRUE(alone.Append(second, false).ok());
    const Tokens more = SomeTokens(9, 70);
    for (TokenClient* each : {&client, &alone}) ASSERT_TRUE(each->Step(more).ok());
    EXPECT_EQ(client.Read(), alone.Read());
    EXPECT_EQ(client.Attend(), alone.Attend());
    cache_->CheckInvariants();
    ASSERT_TRUE(client.Close().ok());
    ASSERT_TRUE(alone.Close().ok());
    // What it has added is found as well.
    EXPECT_GE(Cached(options, second + more, model), 64 * 9);
    cache_.reset();
  }
}

TEST_F(PrefixReuseTest, TheSameTokensEndWithOneCopy) {
  for (const Form& form : kForms) {
    SCOPED_TRACE(absl::StrCat(form.pair, form.mixed ? " mixed" : ""));
    Start(64 * kBlock, 64 * kBlock);
    const ModelSpec model = form.mixed ? MixedModel() : SmallModel();
    const SequenceOptions options = WithPair(form.pair, form.window);
    const Tokens tokens = SomeTokens(1, 64 * 8 + 10);
    TokenClient a = Make(options, model), b = Make(options, model);
    ASSERT_TRUE(a.Append(tokens).ok());
    const uint64_t once = cache_->Stats().stored_bytes;
    for (size_t at = 0; at < tokens.size(); at += 33)
      ASSERT_TRUE(b.Append({tokens.begin() + static_cast<ptrdiff_t>(at),
                            tokens.begin() + static_cast<ptrdiff_t>(std::min(tokens.size(), at + 33))})
                      .ok());
    const SequenceInfo info = b.info();
    EXPECT_GE(info.shared_blocks, 8u - static_cast<uint64_t>(form.window.last_blocks));
    // Its own are the exact window and the tail, and what the index keeps behind sliding windows.
    const uint64_t own = static_cast<uint64_t>(form.window.last_blocks + 1) * 2 * kBlock;
    EXPECT_LE(cache_->Stats().stored_bytes, once + own);
    EXPECT_EQ(a.Read(), b.Read());
    EXPECT_EQ(a.Attend(), b.Attend());
    // They part.
    ASSERT_TRUE(a.Append(SomeTokens(5, 200)).ok());
    ASSERT_TRUE(b.Append(SomeTokens(6, 200)).ok());
    cache_->CheckInvariants();
    for (TokenClient* each : {&a, &b})
      EXPECT_EQ(each->Read(), ReadAlone(*cache_, model, options, each->tokens()));
    ASSERT_TRUE(a.Close().ok());
    EXPECT_EQ(b.Read(), ReadAlone(*cache_, model, options, b.tokens()));
    ASSERT_TRUE(b.Close().ok());
    cache_.reset();
  }
}

TEST_F(PrefixReuseTest, WhoWritesIntoSharedBlocksGetsACopy) {
  Start(64 * kBlock, 64 * kBlock);
  for (const char* pair : {"f16", "q8_0/turbo4"}) {
    const SequenceOptions options = WithPair(pair, {1, 1});
    const Tokens tokens = SomeTokens(1, 64 * 7);
    Leave(options, tokens);
    TokenClient a = Make(options), b = Make(options);
    const Tokens asked(tokens.begin(), tokens.begin() + 64 * 5);
    ASSERT_EQ(*a.Begin(asked), 64 * 5);
    ASSERT_EQ(*b.Begin(asked), 64 * 5);
    const std::vector<float> before = b.Read();
    for (const int64_t cut : {int64_t{64 * 4 + 20}, int64_t{100}, int64_t{30}, int64_t{0}}) {
      ASSERT_TRUE(a.Truncate(cut).ok());
      ASSERT_TRUE(a.Append(SomeTokens(static_cast<uint32_t>(cut), 150)).ok());
      cache_->CheckInvariants();
      EXPECT_EQ(b.Read(), before) << cut;
      EXPECT_GE(Cached(options, tokens), 64 * 5);
    }
    ASSERT_TRUE(a.Close().ok());
    ASSERT_TRUE(b.Close().ok());
  }
}

TEST_F(PrefixReuseTest, WithoutTokenIdsNothingIsCached) {
  Start();
  const SequenceOptions options = WithPair("q8_0/turbo4", {1, 1});
  const Tokens tokens = SomeTokens(1, 500);
  TokenClient silent = Make(options);
  ASSERT_TRUE(silent.Append(tokens, false).ok());
  EXPECT_EQ(Cached(options, tokens), 0);
  ASSERT_TRUE(silent.Close().ok());
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
  // What comes after tokens without ids is not found either.
  TokenClient late = Make(options);
  ASSERT_TRUE(late.Append(tokens, false).ok());
  ASSERT_TRUE(late.Append(SomeTokens(2, 300)).ok());
  EXPECT_EQ(late.info().known_tokens, 0);
  ASSERT_TRUE(late.Close().ok());
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(PrefixReuseTest, ACacheWithoutPrefixesLooksAtNoIds) {
  options_.max_prefix_blocks = 0;
  Start();
  const SequenceOptions options = WithPair("f16");
  Leave(options, SomeTokens(1, 300));
  EXPECT_EQ(Cached(options, SomeTokens(1, 300)), 0);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(PrefixReuseTest, BeyondTheLimitTheColdestGo) {
  options_.max_prefix_blocks = 6;
  Start();
  const SequenceOptions options = WithPair("f16");
  Leave(options, SomeTokens(1, 64 * 4));
  clock_.Advance(absl::Seconds(1));
  Leave(options, SomeTokens(2, 64 * 4));
  EXPECT_EQ(cache_->Stats().prefix_blocks, 6u);
  EXPECT_EQ(Cached(options, SomeTokens(2, 64 * 4)), 64 * 4);
  EXPECT_EQ(Cached(options, SomeTokens(1, 64 * 4)), 64 * 2);
}

TEST_F(PrefixReuseTest, IdsThatContradictOrDoNotCountAreErrors) {
  Start();
  const ModelSpec model = SmallModel();
  TokenClient client = Make(WithPair("f16"));
  std::mt19937 random(1);
  const Tokens tokens = SomeTokens(1, 10);
  const auto append = [&](int layer, int64_t start, const Tokens& ids, int64_t count) {
    const NewRows rows(model, layer, count, random);
    const LayerKv kv = rows.Kv();
    AppendCall call;
    call.sequence = client.id();
    call.start_position = start;
    call.tokens = count;
    call.layers = {&kv, 1};
    call.token_ids = ids;
    return cache_->Append(call);
  };
  EXPECT_TRUE(
      IsError(append(0, 0, tokens, 11), absl::StatusCode::kInvalidArgument, "10 token ids for 11 tokens"));
  EXPECT_TRUE(append(0, 0, tokens, 10).ok());
  Tokens others = tokens;
  others[3]++;
  EXPECT_TRUE(IsError(append(1, 0, others, 10), absl::StatusCode::kInvalidArgument, "token 3 has the id"));
  EXPECT_EQ(cache_->LayerLength(client.id(), 1).value(), 0);
  EXPECT_TRUE(append(1, 0, tokens, 10).ok());
}

// peers: vLLM's and PegaFlow's namespaces that lacked something that decides what bytes mean.
TEST_F(PrefixReuseTest, WhatDiffersInAnythingSharesNothing) {
  Start(64 * kBlock, 64 * kBlock);
  const Tokens tokens = SomeTokens(1, 64 * 5);
  const SequenceOptions base = WithPair("q8_0/turbo4", {1, 1});
  Leave(base, tokens);
  EXPECT_EQ(Cached(base, tokens), 64 * 4);
  std::vector<std::pair<const char*, SequenceOptions>> others;
  others.emplace_back("pair", WithPair("q8_0/turbo3", {1, 1}));
  others.emplace_back("first blocks", WithPair("q8_0/turbo4", {2, 1}));
  others.emplace_back("last blocks", WithPair("q8_0/turbo4", {1, 2}));
  others.emplace_back("salt", base);
  others.back().second.salt = "adapter 7";
  others.emplace_back("tenant", base);
  others.back().second.name_space = "other";
  others.emplace_back("centre", base);
  others.back().second.centre = Centre::kFirstBlock;
  others.emplace_back("equalising", base);
  others.back().second.equalise = Equalise::kFull;
  others.emplace_back("evaluation mode", base);
  others.back().second.seal_at_once = true;
  TokenClient client = Make(base);
  for (const auto& [what, options] : others) {
    EXPECT_EQ(Cached(options, tokens), 0) << what;
    const absl::StatusOr<PrefixReport> found = client.Lookup(tokens);
    ASSERT_TRUE(found.ok());
    EXPECT_TRUE(IsError(cache_->CreateSequence(client.model(), options, {}, found->lease).status(),
                        absl::StatusCode::kFailedPrecondition, "the prefix is of another"))
        << what;
    EXPECT_TRUE(cache_->ReleaseLease(found->lease));
  }
  ModelSpec narrower = SmallModel("other name");
  EXPECT_EQ(Cached(base, tokens, narrower), 0);
  EXPECT_EQ(Cached(base, tokens, WithMeans(SmallModel())), 0);
  // What only says how long it is to be kept is no difference.
  SequenceOptions kept = base;
  kept.persistence = Persistence::kAll;
  kept.allow_drop = true;
  EXPECT_EQ(Cached(kept, tokens), 64 * 4);
}

TEST_F(PrefixReuseTest, TenantsDoNotSeeEachOther) {
  Start();
  const Identity acme{"acme", false}, other{"other", false};
  CallContext of_acme, of_other;
  of_acme.identity = &acme;
  of_other.identity = &other;
  const Tokens tokens = SomeTokens(1, 64 * 5);
  const SequenceOptions options = WithPair("f16");
  TokenClient a = Make(options, SmallModel(), of_acme), b = Make(options, SmallModel(), of_other);
  ASSERT_TRUE(a.Append(tokens).ok());
  EXPECT_EQ(b.Lookup(tokens)->tokens, 0);
  ASSERT_TRUE(b.Append(tokens).ok());
  EXPECT_EQ(b.info().shared_blocks, 0u);
  EXPECT_EQ(cache_->Stats().stored_bytes, 10 * kBlock);
  const absl::StatusOr<PrefixReport> found = a.Lookup(tokens);
  EXPECT_TRUE(IsError(cache_->CreateSequence(b.model(), options, of_other, found->lease).status(),
                      absl::StatusCode::kNotFound, "unknown or over"));
  EXPECT_FALSE(cache_->ReleaseLease(found->lease, of_other));
  EXPECT_TRUE(cache_->ReleaseLease(found->lease, of_acme));
  PrefixCall call;
  call.model = b.model();
  call.options = options;
  call.options.name_space = "acme";
  call.token_ids = tokens;
  call.context = &of_other;
  EXPECT_EQ(cache_->LookupPrefix(call).status().code(), absl::StatusCode::kPermissionDenied);
  ASSERT_TRUE(a.Close().ok());
  ASSERT_TRUE(b.Close().ok());
  for (const CallContext* context : {&of_acme, &of_other})
    ASSERT_TRUE(cache_->UnregisterModel(SmallModel().name, *context).ok());
}

// peers: leases that leaked when their requester was gone, and leased blocks that fell out under pressure.
TEST_F(PrefixReuseTest, LeasesKeepWhatTheyHoldAndEnd) {
  Start(8 * kBlock, 4 * kBlock);
  const SequenceOptions options = WithPair("f16");
  const Tokens tokens = SomeTokens(1, 64 * 6);
  Leave(options, tokens);
  TokenClient client = Make(options);
  const absl::StatusOr<PrefixReport> found = client.Lookup(tokens, absl::Seconds(10));
  ASSERT_EQ(found->tokens, 64 * 6);
  // Pressure: the rest of the room, and not a block of the lease.
  TokenClient large = Make(options);
  absl::Status status;
  uint32_t seed = 100;
  while (status.ok()) status = large.Append(SomeTokens(seed++, 64), false);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Cached(options, tokens), 64 * 6);
  const absl::StatusOr<SequenceId> id = cache_->CreateSequence(client.model(), options, {}, found->lease);
  ASSERT_TRUE(id.ok()) << id.status();
  EXPECT_EQ(cache_->Length(*id).value(), 64 * 6);
  EXPECT_EQ(cache_->Stats().leases, 0u);
  EXPECT_TRUE(IsError(cache_->CreateSequence(client.model(), options, {}, found->lease).status(),
                      absl::StatusCode::kNotFound, "unknown or over"));
  ASSERT_TRUE(cache_->CloseSequence(*id).ok());
  // One that is abandoned ends by itself.
  const absl::StatusOr<PrefixReport> abandoned = client.Lookup(tokens, absl::Seconds(10));
  clock_.Advance(absl::Seconds(11));
  EXPECT_TRUE(IsError(cache_->CreateSequence(client.model(), options, {}, abandoned->lease).status(),
                      absl::StatusCode::kNotFound, "unknown or over"));
  EXPECT_EQ(cache_->Stats().leases, 0u);
  EXPECT_TRUE(large.Append(SomeTokens(seed, 64), false).ok());
  EXPECT_LT(Cached(options, tokens), 64 * 6);
}

TEST_F(PrefixReuseTest, WhatIsCachedMakesWayFromItsEnd) {
  Start(8 * kBlock, 4 * kBlock);
  const SequenceOptions options = WithPair("f16");
  const Tokens old = SomeTokens(1, 64 * 5), used = SomeTokens(2, 64 * 5);
  Leave(options, old);
  clock_.Advance(absl::Seconds(1));
  Leave(options, used);
  TokenClient client = Make(options);
  for (uint32_t i = 0; i < 4; i++) ASSERT_TRUE(client.Append(SomeTokens(10 + i, 64), false).ok());
  EXPECT_EQ(Cached(options, used), 64 * 5);
  EXPECT_EQ(Cached(options, old), 64 * 3);
  for (uint32_t i = 0; i < 8; i++) ASSERT_TRUE(client.Append(SomeTokens(20 + i, 64), false).ok());
  EXPECT_EQ(Cached(options, used), 0);
  ASSERT_TRUE(client.Close().ok());
}

TEST_F(PrefixReuseTest, WhatIsCachedKeepsThePriorityOfItsSequence) {
  StartSmall(8, 4, 20);
  SequenceOptions high = WithPair("f16");
  high.priority = Priority::kHigh;
  const SequenceOptions normal = WithPair("f16");
  const Tokens old = SomeTokens(1, 64 * 4), used = SomeTokens(2, 64 * 4);
  Leave(high, old, SmallModel(), true);
  clock_.Advance(absl::Seconds(1));
  Leave(normal, used, SmallModel(), true);
  const auto tiers = [&](const Tokens& tokens) {
    TokenClient client = Make(normal);
    const PrefixReport report = client.Lookup(tokens, absl::ZeroDuration()).value();
    EXPECT_TRUE(client.Close().ok());
    std::vector<int64_t> by_tier(3);
    for (const PrefixReport::Run& run : report.tiers) by_tier[static_cast<size_t>(run.tier)] += run.tokens;
    return by_tier;
  };
  TokenClient client = Make(normal);
  ASSERT_TRUE(client.Append(SomeTokens(10, 64 * 3), false).ok());
  EXPECT_EQ(tiers(old), (std::vector<int64_t>{64 * 4, 0, 0})) << "the older one";
  EXPECT_EQ(tiers(used), (std::vector<int64_t>{64, 64 * 3, 0}));
  ASSERT_TRUE(client.Close().ok());
  Restart(true);
  EXPECT_EQ(tiers(old), (std::vector<int64_t>{0, 0, 64 * 4}));
  EXPECT_EQ(cache_->Stats().tiers[2].high_priority_blocks, 4u);
  EXPECT_EQ(cache_->Stats().tiers[2].low_priority_blocks, 0u);
}

TEST_F(PrefixReuseTest, WhatATenantHasCachedMakesWayInItsQuota) {
  const std::string quota = absl::StrCat("acme:device=", 6 * kBlock, ",host=0");
  options_.quotas = TenantQuotas::Parse({{quota}}, {{std::string("device"), std::string("host")}}).value();
  Start(32 * kBlock, 32 * kBlock);
  const Identity acme{"acme", false};
  CallContext context;
  context.identity = &acme;
  const SequenceOptions options = WithPair("f16");
  TokenClient first = Make(options, SmallModel(), context);
  ASSERT_TRUE(first.Append(SomeTokens(1, 64 * 5)).ok());
  ASSERT_TRUE(first.Close().ok());
  TokenClient second = Make(options, SmallModel(), context);
  ASSERT_TRUE(second.Append(SomeTokens(2, 64 * 4)).ok());
  for (const TenantStats& tenant : cache_->Stats().tenants)
    if (tenant.tenant == "acme") {
      EXPECT_LE(tenant.tier_bytes[0], 6 * kBlock);
    }
  EXPECT_TRUE(IsError(second.Append(SomeTokens(3, 64 * 4)), absl::StatusCode::kResourceExhausted, "quota"));
  ASSERT_TRUE(second.Append(SomeTokens(3, 64 * 2)).ok());
  EXPECT_EQ(second.Lookup(SomeTokens(1, 64 * 5))->tokens, 0);
  ASSERT_TRUE(second.Close().ok());
  ASSERT_TRUE(cache_->UnregisterModel(SmallModel().name, context).ok());
}

TEST_F(PrefixReuseTest, PrefixesGoDownAndAreFoundThere) {
  StartSmall(8, 8, 30);
  const SequenceOptions options = WithPair("f16");
  const Tokens tokens = SomeTokens(1, 64 * 6);
  const std::vector<float> expected = ReadAlone(*cache_, SmallModel(), options, tokens + SomeTokens(3, 30));
  Leave(options, tokens);
  TokenClient other = Make(options);
  ASSERT_TRUE(other.Append(SomeTokens(2, 64 * 8), false).ok());
  ASSERT_TRUE(other.Append(SomeTokens(4, 64 * 6), false).ok());
  TokenClient client = Make(options);
  const absl::StatusOr<PrefixReport> found = client.Lookup(tokens, absl::ZeroDuration());
  EXPECT_EQ(found->tokens, 64 * 6);
  int64_t below = 0;
  for (const PrefixReport::Run& run : found->tiers) below += run.tier > 0 ? run.tokens : 0;
  EXPECT_GT(below, 0);
  ASSERT_TRUE(other.Close().ok());
  ASSERT_EQ(*client.Begin(tokens + SomeTokens(3, 30)), 64 * 6);
  EXPECT_EQ(client.Read(), expected);
  EXPECT_EQ(cache_->Stats().prefix_reused_tokens, 64u * 6);
  ASSERT_TRUE(client.Close().ok());
}

TEST_F(PrefixReuseTest, WhatWasDurableIsFoundAfterARestart) {
  for (const bool crash : {false, true}) {
    for (const Form& form : kForms) {
      SCOPED_TRACE(absl::StrCat(form.pair, form.mixed ? " mixed" : "", crash ? " crash" : ""));
      const ModelSpec model = form.mixed ? MixedModel() : SmallModel();
      const SequenceOptions options = WithPair(form.pair, form.window);
      StartSmall();
      // Behind a sliding window only the end of what was durable has all of it.
      const Tokens common = SomeTokens(1, 64 * 6), left = common + SomeTokens(2, 200);
      const Tokens asked = (form.mixed ? left : common) + SomeTokens(3, 390);
      const int64_t blocks = !form.mixed ? 6 : std::string(form.pair) == "f16" ? 9 : 8;
      const std::vector<float> expected = ReadAlone(*cache_, model, options, asked);
      // One that is closed, and one that is open and has a part in common with it.
      Leave(options, left, model, true);
      TokenClient open = Make(options, model);
      ASSERT_TRUE(open.Begin(common + SomeTokens(7, 210)).ok());
      ASSERT_TRUE(cache_->Persist({{open.id()}}).ok());
      Leave(options, SomeTokens(5, 64 * 6), model, false);  // that nobody has made durable
      const std::vector<float> of_open = open.Read();
      Restart(crash);
      EXPECT_EQ(cache_->restored().sequences, 1u);
      EXPECT_TRUE(cache_->restored().lost.empty());
      cache_->CheckInvariants();
      EXPECT_EQ(Cached(options, SomeTokens(5, 64 * 6), model), 0);
      TokenClient client = Make(options, model);
      const absl::StatusOr<PrefixReport> found = client.Lookup(asked, absl::ZeroDuration());
      ASSERT_TRUE(found.ok()) << found.status();
      EXPECT_EQ(found->tokens, 64 * blocks);
      ASSERT_EQ(found->tiers.size(), 1u);
      EXPECT_EQ(found->tiers[0].tier, 2);
      ASSERT_EQ(*client.Begin(asked), 64 * blocks);
      EXPECT_EQ(client.Read(), expected);
      open.Move(*cache_);
      EXPECT_EQ(open.Read(), of_open);
      ASSERT_TRUE(open.Append(SomeTokens(8, 100)).ok());
      EXPECT_EQ(open.info().known_tokens, static_cast<int64_t>(open.tokens().size()));
      cache_->CheckInvariants();
      ASSERT_TRUE(client.Close().ok());
      ASSERT_TRUE(open.Close().ok());
      // Once more: nothing is there twice, and what was closed stays closed.
      Restart(crash);
      EXPECT_EQ(cache_->restored().sequences, 0u);
      EXPECT_GE(Cached(options, asked, model), 64 * blocks);
      cache_->CheckInvariants();
      ASSERT_TRUE(cache_->UnregisterModel(model.name).ok());
      EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
      Restart(true);
      EXPECT_EQ(cache_->restored().prefix_blocks, 0u);
      cache_.reset();
      disk_.reset();
      files_ = std::make_unique<FaultFileSystem>();
    }
  }
}

// What was left last is the hottest after a restart too.
TEST_F(PrefixReuseTest, ARestartKeepsTheOrderOfWhatIsCached) {
  options_.max_prefix_blocks = 6;
  StartSmall();
  const SequenceOptions options = WithPair("f16");
  const Tokens first = SomeTokens(1, 192), second = SomeTokens(2, 192);
  Leave(options, first, SmallModel(), true);
  clock_.Advance(absl::Seconds(5));
  Leave(options, second, SmallModel(), true);
  Restart(false);
  ASSERT_EQ(Cached(options, first), 192);
  ASSERT_EQ(Cached(options, second), 192);
  Restart(false);  // lookups are uses
  Leave(options, SomeTokens(3, 64));
  EXPECT_EQ(Cached(options, first), 128);
  EXPECT_EQ(Cached(options, second), 192);
}

// peers: entries of a restored state whose places others had by then.
TEST_F(PrefixReuseTest, WhatWasDroppedAfterItWasWrittenDownIsNeverServed) {
  std::mt19937 random(4);
  for (int round = 0; round < 12; round++) {
    SCOPED_TRACE(round);
    StartSmall(6, 6, 14);
    const SequenceOptions options = WithPair("f16");
    std::map<uint32_t, Tokens> prompts;
    for (uint32_t i = 0; i < 6; i++) {
      prompts[i] = SomeTokens(1 + i / 2, 64 * 2) + SomeTokens(100 + i, 64 * (1 + random() % 3));
      TokenClient client = Make(options);
      const bool begun = client.Begin(prompts[i]).ok();
      if (begun && random() % 2 == 0) cache_->Persist({{client.id()}}).IgnoreError();
      ASSERT_TRUE(client.Close().ok());
      cache_->CheckInvariants();
    }
    Restart(true);
    for (const auto& [i, prompt] : prompts) {
      TokenClient client = Make(options);
      const absl::StatusOr<int64_t> there = client.Begin(prompt);
      ASSERT_TRUE(there.ok()) << there.status();
      const absl::Status status = client.TryRead().status();
      if (!status.ok()) {
        // The crash left other bytes under an old label: they are not served, and what the error advises
        // helps.
        ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
        const std::string text(status.message());
        const size_t at = text.find("truncate to ");
        ASSERT_NE(at, std::string::npos) << text;
        const int64_t left = std::stoll(text.substr(at + 12));
        ASSERT_TRUE(client.Truncate(left).ok());
        ASSERT_TRUE(client.Append({prompt.begin() + left, prompt.end()}).ok());
      }
      EXPECT_EQ(client.Read(), ReadAlone(*cache_, SmallModel(), options, prompt)) << i << " " << *there;
      ASSERT_TRUE(client.Close().ok());
      cache_->CheckInvariants();
    }
    cache_.reset();
    disk_.reset();
    files_ = std::make_unique<FaultFileSystem>(static_cast<uint32_t>(round) + 2);
  }
}

TEST_F(PrefixReuseTest, WhatTheDiskCannotReadIsLostAndNothingElse) {
  StartSmall();
  const SequenceOptions options = WithPair("f16");
  const Tokens asked = SomeTokens(1, 64 * 5), other = SomeTokens(2, 64 * 5);
  for (const Tokens& tokens : {asked, other}) Leave(options, tokens, SmallModel(), true);
  Restart(false);
  files_->Fail(FaultFileSystem::kRead, 3, 1000);
  EXPECT_EQ(Cached(options, asked), 64 * 3);
  files_->ClearFaults();
  EXPECT_EQ(Cached(options, asked), 64 * 3);
  EXPECT_EQ(cache_->Stats().lost_blocks, 2u);
  EXPECT_EQ(Cached(options, other), 64 * 5);
}

// peers: a removed key that came back by way of a queued write.
TEST_F(PrefixReuseTest, AModelThatIsForgottenTakesItsPrefixesAlong) {
  StartSmall();
  const SequenceOptions options = WithPair("f16");
  const Tokens tokens = SomeTokens(1, 64 * 5);
  Leave(options, tokens, SmallModel(), true);
  EXPECT_EQ(Cached(options, tokens), 64 * 5);
  ASSERT_TRUE(cache_->UnregisterModel(SmallModel().name).ok());
  EXPECT_EQ(Cached(options, tokens), 0);
  Restart(true);
  EXPECT_EQ(Cached(options, tokens), 0);
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
}

TEST_F(PrefixReuseTest, APrefixBelongsToADevice) {
  StartOn(2, 16 * kBlock, 16 * kBlock);
  SequenceOptions options = WithPair("f16");
  options.device = "second";
  const Tokens tokens = SomeTokens(1, 64 * 5);
  Leave(options, tokens);
  options.device = "first";
  EXPECT_EQ(Cached(options, tokens), 0);
  options.device.clear();
  EXPECT_EQ(Cached(options, tokens), 64 * 5);
  TokenClient client = Make(options);
  ASSERT_EQ(*client.Begin(tokens), 64 * 5);
  EXPECT_EQ(client.info().device, "second");
  const absl::StatusOr<PrefixReport> found = client.Lookup(tokens);
  options.device = "first";
  EXPECT_TRUE(IsError(cache_->CreateSequence(client.model(), options, {}, found->lease).status(),
                      absl::StatusCode::kFailedPrecondition, "lies on device 'second'"));
  EXPECT_TRUE(cache_->ReleaseLease(found->lease));
  ASSERT_TRUE(client.Close().ok());
}

// That they are found by their tokens does not make blocks shared: a sequence of its own is parked, dropped
// and described as one.
TEST_F(PrefixReuseTest, ASequenceThatNobodySharesIsParkedWhole) {
  Start(64 * kBlock, 64 * kBlock);
  SequenceOptions options = WithPair("q8_0/turbo4", {1, 1});
  options.allow_drop = true;
  TokenClient client = Make(options);
  ASSERT_TRUE(client.Append(SomeTokens(1, 64 * 6)).ok());
  EXPECT_EQ(client.info().shared_blocks, 0u);
  EXPECT_EQ(cache_->Stats().shared_blocks, 0u);
  const SequenceId id = client.id();
  const absl::StatusOr<MoveReport> parked = cache_->Evict({&id, 1}, 1);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->moved_blocks, 6u);
  EXPECT_EQ(parked->shared_blocks, 0u);
  EXPECT_EQ(cache_->Prefetch({&id, 1})->moved_blocks, 6u);
  // A second one that has the same tokens holds them in place.
  TokenClient other = Make(options);
  ASSERT_TRUE(other.Begin(SomeTokens(1, 64 * 6)).ok());
  EXPECT_EQ(client.info().shared_blocks, 5u);
  EXPECT_EQ(cache_->Evict({&id, 1}, 1)->shared_blocks, 5u);
  ASSERT_TRUE(other.Close().ok());
  EXPECT_EQ(client.info().shared_blocks, 0u);
  // Dropped, they are found no more; what a lease holds is not dropped.
  const absl::StatusOr<PrefixReport> lease = client.Lookup(SomeTokens(1, 64 * 2));
  EXPECT_EQ(lease->tokens, 64 * 2);
  const absl::StatusOr<MoveReport> dropped = cache_->Evict({&id, 1}, kDropTier);
  ASSERT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_EQ(dropped->dropped_blocks, 4u);
  EXPECT_EQ(dropped->left_blocks, 2u);
  EXPECT_EQ(client.Lookup(SomeTokens(1, 64 * 6), absl::ZeroDuration())->tokens, 64 * 2);
  EXPECT_TRUE(cache_->ReleaseLease(lease->lease));
  cache_->CheckInvariants();
  ASSERT_TRUE(client.Close().ok());
}

// Two tenants' models of one name and geometry; an admin makes a sequence of his for the other's tenant. Each
// model's prefixes go with it alone.
TEST_F(PrefixReuseTest, ModelsOfTwoTenantsShareNothingInOneTenant) {
  Start();
  const Identity acme{"acme", false}, ops{"ops", true};
  CallContext of_acme, of_ops;
  of_acme.identity = &acme;
  of_ops.identity = &ops;
  SequenceOptions options = WithPair("f16");
  options.name_space = "acme";
  const Tokens tokens = SomeTokens(1, 64 * 4);
  TokenClient theirs = Make(options, SmallModel(), of_ops);
  ASSERT_TRUE(theirs.Append(tokens).ok());
  TokenClient mine = Make(options, SmallModel(), of_acme);
  EXPECT_EQ(mine.Lookup(tokens)->tokens, 0);
  ASSERT_TRUE(mine.Append(tokens).ok());
  ASSERT_TRUE(theirs.Close().ok());
  ASSERT_TRUE(cache_->UnregisterModel(SmallModel().name, of_ops).ok());
  cache_->CheckInvariants();
  ASSERT_TRUE(mine.Append(SomeTokens(2, 64 * 2)).ok());
  ASSERT_TRUE(mine.Close().ok());
  cache_->CheckInvariants();
  ASSERT_TRUE(cache_->UnregisterModel(SmallModel().name, of_acme).ok());
}

TEST_F(PrefixReuseTest, ForksOfAReusedPrefixGoTheirWay) {
  Start(64 * kBlock, 64 * kBlock);
  const SequenceOptions options = WithPair("q8_0/turbo4", {1, 1});
  const Tokens common = SomeTokens(1, 64 * 5);
  Leave(options, common + SomeTokens(2, 64 * 2));
  TokenClient parent = Make(options);
  ASSERT_EQ(*parent.Begin(common + SomeTokens(3, 20)), 64 * 5);
  const absl::StatusOr<SequenceId> fork = cache_->ForkSequence(parent.id());
  ASSERT_TRUE(fork.ok());
  ASSERT_TRUE(parent.Append(SomeTokens(4, 300)).ok());
  EXPECT_EQ(parent.Read(), ReadAlone(*cache_, SmallModel(), options, parent.tokens()));
  cache_->CheckInvariants();
  ASSERT_TRUE(cache_->CloseSequence(*fork).ok());
  ASSERT_TRUE(parent.Close().ok());
  EXPECT_GE(Cached(options, parent.tokens()), 64 * 8);
}

}  // namespace
}  // namespace kvtide::testing
