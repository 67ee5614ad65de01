// Caches that share a remote tier: what one has sealed or stored another one begins with or loads, to the
// bit; what cannot be had is a miss and nothing else; who may not see it never does; no attention and no
// append ever asks.
#include "daemon/cache/reuse/remote_exchange.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "tests/daemon/cache/cache_node.h"
#include "tests/daemon/cache/fault_remote.h"
#include "tests/daemon/cache/token_client.h"

namespace kvtide::testing {
namespace {

constexpr size_t kBlock = 65536;
using Fault = FaultRemote::Fault;

class RemoteExchangeTest : public ::testing::Test {
 protected:
  // A node leaves what it has computed of the tokens.
  void Leave(CacheNode& node, const ModelSpec& model, const SequenceOptions& options, const Tokens& tokens,
             const CallContext& context = {}) {
    TokenClient client(*node.cache, model, options, context);
    ASSERT_TRUE(client.Append(tokens).ok());
    ASSERT_TRUE(client.Close().ok());
    node.WriteAll();
  }
  int64_t Found(CacheNode& node, const ModelSpec& model, const SequenceOptions& options, const Tokens& tokens,
                const CallContext& context = {}) {
    TokenClient client(*node.cache, model, options, context);
    const absl::StatusOr<PrefixReport> report = client.Lookup(tokens, absl::ZeroDuration());
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(client.Close().ok());
    node.cache->CheckInvariants();
    return report.ok() ? report->tokens : -1;
  }

  RemoteStore store_;
  FaultRemote remote_a_{&store_}, remote_b_{&store_};
};

struct Form {
  const char* pair;
  ExactWindow window;
  bool mixed = false;
  bool means = false;
};
const Form kForms[] = {{"f16", {}},        {"q8_0/turbo4", {1, 2}},       {"turbo3", {0, 0}},
                       {"turbo4", {2, 1}}, {"q8_0/turbo4", {1, 1}, true}, {"turbo4", {1, 1}, false, true},
                       {"planar3", {1, 0}}};

TEST_F(RemoteExchangeTest, AnotherCacheBeginsWithThePrefixToTheBit) {
  for (const Form& form : kForms) {
    SCOPED_TRACE(absl::StrCat(form.pair, form.mixed ? " mixed" : "", form.means ? " calibrated" : ""));
    ModelSpec model = form.mixed ? MixedModel() : SmallModel();
    SequenceOptions options = WithPair(form.pair, form.window);
    if (form.means) {
      model = WithMeans(model);
      options.centre = Centre::kCalibrated;
    }
    CacheNode a(&remote_a_), b(&remote_b_);
    const Tokens common = SomeTokens(1, 64 * 6), first = common + SomeTokens(2, 400),
                 second = common + SomeTokens(3, 390);
    // The bits are those of the node that has computed them: it reads and attends as one that shares nothing.
    TokenClient alone(*a.cache, model, options);
    ASSERT_TRUE(alone.Append(second, false).ok());
    Leave(a, model, options, first);
    TokenClient client(*b.cache, model, options);
    const absl::StatusOr<int64_t> there = client.Begin(second);
    ASSERT_TRUE(there.ok()) << there.status();
    EXPECT_EQ(*there, 64 * 6);
    EXPECT_EQ(client.info().reused_tokens, 64 * 6);
    EXPECT_EQ(client.Read(), alone.Read());
    EXPECT_EQ(client.Attend(), alone.Attend());
    const Tokens more = SomeTokens(9, 70);
    for (TokenClient* each : {&client, &alone}) ASSERT_TRUE(each->Step(more).ok());
    EXPECT_EQ(client.Read(), alone.Read());
    EXPECT_EQ(client.Attend(), alone.Attend());
    EXPECT_GT(b.remote_stats().read_blocks, 0u);
    EXPECT_EQ(b.remote_stats().hit_blocks, 6u);
    // What it has added goes there too, and what was there is not written again.
    const uint64_t written = a.remote_stats().written_blocks;
    ASSERT_TRUE(client.Close().ok());
    b.WriteAll();
    EXPECT_LT(b.remote_stats().written_blocks, written);
    EXPECT_GE(Found(a, model, options, second + more), 64 * 9);
    ASSERT_TRUE(alone.Close().ok());
    b.cache->CheckInvariants();
  }
}

TEST_F(RemoteExchangeTest, WhatIsHereIsNotFetched) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 8);
  Leave(a, SmallModel(), options, tokens);
  Leave(b, SmallModel(), options, Tokens(tokens.begin(), tokens.begin() + 64 * 6));
  EXPECT_EQ(b.remote_stats().written_blocks, 0u) << "it was there";
  EXPECT_GT(b.remote_stats().present_blocks, 0u);
  const int64_t found = Found(b, SmallModel(), options, tokens);
  EXPECT_GT(found, 64 * 4);
  EXPECT_LE(b.remote_stats().read_blocks, 2u);
  const uint64_t read = b.remote_stats().read_blocks;
  EXPECT_EQ(Found(b, SmallModel(), options, tokens), found);
  EXPECT_EQ(b.remote_stats().read_blocks, read) << "the second lookup has it";
}

TEST_F(RemoteExchangeTest, NothingElseIsEverFound) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 6);
  const Identity acme{"acme", false}, other{"other", false};
  CallContext as_acme, as_other;
  as_acme.identity = &acme;
  as_other.identity = &other;
  Leave(a, SmallModel(), options, tokens, as_acme);
  ASSERT_GT(Found(b, SmallModel(), options, tokens, as_acme), 0);
  SequenceOptions salted = options, pair = WithPair("turbo3"), window = WithPair("turbo4", {0, 1});
  salted.salt = "salt";
  EXPECT_EQ(Found(b, SmallModel(), options, tokens, as_other), 0);
  EXPECT_EQ(Found(b, SmallModel(), options, tokens), 0);
  EXPECT_EQ(Found(b, SmallModel("another"), options, tokens, as_acme), 0);
  CacheNode c(&remote_b_);
  EXPECT_EQ(Found(c, UniformModel("small", {2, 2, 64, 32}, 4), options, tokens, as_acme), 0);
  EXPECT_EQ(Found(b, SmallModel(), salted, tokens, as_acme), 0);
  EXPECT_EQ(Found(b, SmallModel(), pair, tokens, as_acme), 0);
  EXPECT_EQ(Found(b, SmallModel(), window, tokens, as_acme), 0);
  Tokens changed = tokens;
  changed[0]++;
  EXPECT_EQ(Found(b, SmallModel(), options, changed, as_acme), 0);
}

TEST_F(RemoteExchangeTest, AStoreThatIsAwayIsAMissAndHoldsNobodyUp) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 8);
  remote_a_.Plant(Fault::kAway);
  Leave(a, SmallModel(), options, tokens);
  EXPECT_EQ(a.remote_stats().written_blocks, 0u);
  EXPECT_GT(a.remote_stats().queued_blocks, 0u) << "they wait for it";
  remote_a_.Plant(Fault::kNone);
  a.WriteAll();
  EXPECT_EQ(a.remote_stats().queued_blocks, 0u);
  remote_b_.Plant(Fault::kAway);
  EXPECT_EQ(Found(b, SmallModel(), options, tokens), 0);
  // Calls of an engine do not ask, whatever the store does.
  const int before = remote_b_.calls();
  TokenClient client(*b.cache, SmallModel(), options);
  ASSERT_TRUE(client.Append(tokens).ok());
  client.Attend();
  client.Read();
  ASSERT_TRUE(client.Step(SomeTokens(4, 70)).ok());
  EXPECT_EQ(remote_b_.calls(), before);
  ASSERT_TRUE(client.Close().ok());
}

TEST_F(RemoteExchangeTest, ValuesThatAreLostOrDamagedEndThePrefixBeforeThem) {
  for (const Fault fault : {Fault::kLosesAfterFind, Fault::kDamages}) {
    SCOPED_TRACE(static_cast<int>(fault));
    CacheNode a(&remote_a_), b(&remote_b_);
    const SequenceOptions options = WithPair("q8_0/turbo4", {1, 2});
    const Tokens tokens = SomeTokens(1, 64 * 9 + 5);
    TokenClient alone(*a.cache, SmallModel(), options);
    ASSERT_TRUE(alone.Append(tokens, false).ok());
    Leave(a, SmallModel(), options, tokens);
    remote_b_.Plant(fault);
    TokenClient client(*b.cache, SmallModel(), options);
    const absl::StatusOr<int64_t> there = client.Begin(tokens);
    ASSERT_TRUE(there.ok()) << there.status();
    EXPECT_EQ(*there, 64 * 2) << "blocks 2 and 6 are not to be had";
    EXPECT_EQ(client.Read(), alone.Read());
    EXPECT_EQ(client.Attend(), alone.Attend());
    b.cache->CheckInvariants();
    remote_b_.Plant(Fault::kNone);
    ASSERT_TRUE(client.Close().ok());
    ASSERT_TRUE(alone.Close().ok());
  }
}

TEST_F(RemoteExchangeTest, AFullStoreLosesNothingHere) {
  CacheNode a(&remote_a_);
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 8);
  remote_a_.Plant(Fault::kFull);
  Leave(a, SmallModel(), options, tokens);
  EXPECT_GT(a.remote_stats().left_out_blocks, 0u);
  EXPECT_EQ(Found(a, SmallModel(), options, tokens), 64 * 6);
}

TEST_F(RemoteExchangeTest, WhatHasNotComeInTimeDoesNotCount) {
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 24);
  CacheNode a(&remote_a_), b(&remote_b_, 64 * kBlock, 64 * kBlock, [](CacheOptions&o) {
    o.max_moves_in_flight = 4;
    o.remote_read = absl::Seconds(1);
  });
  Leave(a, SmallModel(), options, tokens);
  remote_b_.SetHook([&](const char* call) {
    if (!std::strcmp(call, "Read")) b.clock.Advance(absl::Milliseconds(300));
  });
  const int64_t found = Found(b, SmallModel(), options, tokens);
  EXPECT_GT(found, 0);
  EXPECT_LT(found, 64 * 20);
  // The next one goes on from there.
  EXPECT_GT(Found(b, SmallModel(), options, tokens), found);
  // The caller's own deadline counts as well.
  remote_b_.SetHook({});
  const int before = remote_b_.calls();
  CallContext late;
  late.deadline = b.clock.function()() + absl::Nanoseconds(1);
  TokenClient client(*b.cache, SmallModel(), options);
  b.clock.Advance(absl::Seconds(1));
  PrefixCall call;
  call.model = client.model();
  call.options = options;
  const Tokens others = SomeTokens(5, 64 * 4);
  call.token_ids = others;
  call.context = &late;
  b.cache->LookupPrefix(call).IgnoreError();
  EXPECT_EQ(remote_b_.calls(), before);
  ASSERT_TRUE(client.Close().ok());
}

TEST_F(RemoteExchangeTest, APeekDoesNotAskAndAReaderDoesNotWrite) {
  CacheNode a(&remote_a_),
      b(&remote_b_, 64 * kBlock, 64 * kBlock, [](CacheOptions&o) { o.remote_writes = RemoteWrites::kNone; });
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 6);
  Leave(a, SmallModel(), options, tokens);
  TokenClient client(*b.cache, SmallModel(), options);
  PrefixCall call;
  call.model = client.model();
  call.options = options;
  call.token_ids = tokens;
  call.peek = true;
  EXPECT_EQ(b.cache->LookupPrefix(call)->tokens, 0);
  EXPECT_EQ(remote_b_.calls(), 0);
  EXPECT_GT(Found(b, SmallModel(), options, tokens), 0);
  ASSERT_TRUE(client.Append(SomeTokens(7, 64 * 8)).ok());
  b.WriteAll();
  EXPECT_EQ(b.remote_stats().written_blocks, 0u);
  EXPECT_EQ(b.remote_stats().queued_blocks, 0u);
  ASSERT_TRUE(client.Close().ok());
}

TEST_F(RemoteExchangeTest, OnDemoteSharesWhatIsAboutToBeDroppedAndNothingElse) {
  const SequenceOptions options = WithPair("f16", {0, 0});
  CacheNode a(&remote_a_, 4 * kBlock, 20 * kBlock, [](CacheOptions& o) {
    o.remote_writes = RemoteWrites::kOnDemote;
    o.limits.low_watermark = 0.6;
  });
  CacheNode b(&remote_b_);
  const auto prompt = [](uint32_t number) { return SomeTokens(number, 64 * 4); };
  // As long as there is plenty of room nothing is written, sealed or closed.
  for (uint32_t i = 1; i <= 3; i++) Leave(a, SmallModel(), options, prompt(i));
  EXPECT_EQ(a.remote_stats().written_blocks, 0u);
  EXPECT_EQ(a.remote_stats().queued_blocks, 0u);
  // A sequence that is open is no cached block, however full the tiers are.
  TokenClient open(*a.cache, SmallModel(), options);
  ASSERT_TRUE(open.Append(SomeTokens(100, 64 * 3)).ok());
  // Many prompts come, most of which find no room in the end: what is not here any more lies there.
  for (uint32_t i = 4; i <= 30; i++) Leave(a, SmallModel(), options, prompt(i));
  EXPECT_GT(a.cache->Stats().dropped_blocks, 80u);
  EXPECT_GT(a.remote_stats().written_blocks, 80u);
  EXPECT_EQ(a.remote_stats().left_out_blocks, 0u) << "nothing was dropped that had not been offered";
  EXPECT_LT(a.remote_stats().written_blocks, 30u * 4) << "the newest are not about to go";
  for (uint32_t i = 1; i <= 25; i++) EXPECT_EQ(Found(b, SmallModel(), options, prompt(i)), 64 * 4) << i;
  EXPECT_EQ(Found(b, SmallModel(), options, SomeTokens(100, 64 * 3)), 0);
  ASSERT_TRUE(open.Close().ok());
}

TEST_F(RemoteExchangeTest, OnDemoteOffersAgainWhatAServerThatWasAwayHasNotGot) {
  const SequenceOptions options = WithPair("f16", {0, 0});
  CacheNode a(&remote_a_, 4 * kBlock, 20 * kBlock, [](CacheOptions& o) {
    o.remote_writes = RemoteWrites::kOnDemote;
    o.limits.low_watermark = 0.6;
  });
  remote_a_.Plant(Fault::kAway);
  for (uint32_t i = 1; i <= 5; i++) Leave(a, SmallModel(), options, SomeTokens(i, 64 * 4));
  EXPECT_EQ(a.remote_stats().written_blocks, 0u);
  remote_a_.Plant(Fault::kNone);
  a.clock.Advance(absl::Minutes(2));
  a.WriteAll();
  EXPECT_GT(a.remote_stats().written_blocks, 0u);
}

TEST_F(RemoteExchangeTest, AFullCacheFetchesWhatFits) {
  const SequenceOptions options = WithPair("f16");
  const Tokens tokens = SomeTokens(1, 64 * 24);
  CacheNode a(&remote_a_), b(&remote_b_, 16 * kBlock, 4 * kBlock);
  Leave(a, SmallModel(), options, tokens);
  TokenClient keeper(*b.cache, SmallModel(), options);  // what it has must not go
  ASSERT_TRUE(keeper.Append(SomeTokens(2, 64 * 10), false).ok());
  const std::vector<float> before = keeper.Read();
  const int64_t found = Found(b, SmallModel(), options, tokens);
  EXPECT_GT(found, 0);
  EXPECT_LT(found, 64 * 22);
  EXPECT_EQ(keeper.Read(), before);
  ASSERT_TRUE(keeper.Close().ok());
}

TEST_F(RemoteExchangeTest, AModelThatIsForgottenMeanwhileGetsNothing) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const SequenceOptions options = WithPair("turbo4");
  const Tokens tokens = SomeTokens(1, 64 * 6);
  Leave(a, SmallModel(), options, tokens);
  TokenClient client(*b.cache, SmallModel(), options);
  const ModelId model = client.model();
  ASSERT_TRUE(client.Close().ok());
  remote_b_.SetHook([&](const char* call) {
    if (std::strcmp(call, "Read")) return;
    EXPECT_TRUE(b.cache->UnregisterModel("small").ok());
    remote_b_.SetHook({});
  });
  PrefixCall call;
  call.model = model;
  call.options = options;
  call.token_ids = tokens;
  EXPECT_EQ(b.cache->LookupPrefix(call)->tokens, 0);
  b.cache->CheckInvariants();
  EXPECT_EQ(b.cache->Stats().prefix_blocks, 0u);
}

TEST_F(RemoteExchangeTest, BlocksThatWaitAreBounded) {
  CacheNode a(&remote_a_, 64 * kBlock, 64 * kBlock, [](CacheOptions& o) { o.max_unsent_blocks = 5; });
  remote_a_.Plant(Fault::kAway);
  Leave(a, SmallModel(), WithPair("f16", {0, 0}), SomeTokens(1, 64 * 12));
  EXPECT_EQ(a.remote_stats().queued_blocks, 5u);
  EXPECT_EQ(a.remote_stats().left_out_blocks, 7u);
}

// The block store.

class RemoteKeyedTest : public RemoteExchangeTest {
 protected:
  static std::vector<std::string> Keys(int count) {
    std::vector<std::string> keys;
    for (int i = 0; i < count; i++) keys.push_back(absl::StrCat("key ", i));
    return keys;
  }
  static NamespaceSpec Opaque(const std::string& model = "test", const std::string& tenant = "default") {
    NamespaceSpec spec;
    spec.model = model;
    spec.tenant = tenant;
    spec.block_tokens = 16;
    spec.opaque = OpaqueContent{3000, "test"};
    return spec;
  }
  static NamespaceSpec Rows() {
    NamespaceSpec spec;
    spec.model = "test";
    spec.tenant = "default";
    spec.block_tokens = 64;
    spec.tensors = TensorContent{2, 2, 64, 64, Pair("turbo4")};
    return spec;
  }
  static std::vector<std::byte> Payload(size_t blocks, size_t bytes) {
    std::mt19937 random(5);
    std::vector<std::byte> payload(blocks * bytes);
    for (std::byte& byte : payload) byte = static_cast<std::byte>(random());
    return payload;
  }
  absl::StatusOr<LookupReport> Lookup(CacheNode& node, NamespaceId space, int keys,
                                      absl::Duration lease = absl::Seconds(30)) {
    const std::vector<std::string> texts = Keys(keys);
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    LookupCall call;
    call.name_space = space;
    call.keys = views;
    call.lease = lease;
    return node.cache->LookupBlocks(call);
  }
  // Stores blocks at one node and returns their bytes as they rest.
  std::vector<std::byte> Store(CacheNode& node, const NamespaceSpec& spec, int keys, bool write = true) {
    const NamespaceInfo info = node.cache->OpenNamespace(spec, Persistence::kNone).value();
    const std::vector<std::byte> payload = Payload(static_cast<size_t>(keys), info.block_bytes);
    const std::vector<std::string> texts = Keys(keys);
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    StoreCall call;
    call.name_space = info.id;
    call.keys = views;
    call.form = BlockPayload::kBytes;
    call.payload = payload;
    EXPECT_TRUE(node.cache->StoreBlocks(call).ok());
    if (write) node.WriteAll();
    return payload;
  }
  std::vector<std::byte> Load(CacheNode& node, LeaseId lease, size_t blocks, size_t bytes) {
    std::vector<std::byte> payload(blocks * bytes);
    LoadCall call;
    call.lease = lease;
    call.blocks = blocks;
    call.form = BlockPayload::kBytes;
    call.payload = payload;
    const absl::StatusOr<LoadReport> report = node.cache->LoadBlocks(call);
    EXPECT_TRUE(report.ok()) << report.status();
    return payload;
  }
};

TEST_F(RemoteKeyedTest, AnotherCacheLoadsWhatOneHasStored) {
  for (const NamespaceSpec& spec : {Opaque(), Rows()}) {
    CacheNode a(&remote_a_), b(&remote_b_);
    const std::vector<std::byte> payload = Store(a, spec, 20);
    const NamespaceInfo info = b.cache->OpenNamespace(spec, Persistence::kNone).value();
    const LookupReport found = Lookup(b, info.id, 25).value();
    ASSERT_EQ(found.hits, 20u);
    EXPECT_EQ(Load(b, found.lease, 20, info.block_bytes), payload);
    EXPECT_TRUE(b.cache->ReleaseLease(found.lease));
    EXPECT_EQ(b.remote_stats().hit_blocks, 20u);
    EXPECT_EQ(b.remote_stats().miss_blocks, 5u);
    b.WriteAll();
    EXPECT_EQ(b.remote_stats().written_blocks, 0u);
    EXPECT_EQ(b.remote_stats().queued_blocks, 0u);
  }
}

// Others are to find what was stored, not what little room has left of it.
TEST_F(RemoteKeyedTest, BlocksOfFewerBitsAreNotSentAndWholeOnesAreKept) {
  NamespaceSpec spec = Rows();
  spec.degrade = {Pair("turbo3")};
  CacheNode a(&remote_a_), b(&remote_b_);
  LiveLimits limits = LiveLimitsOf(a.cache->options());
  limits.high_watermark = 0.0001;
  limits.low_watermark = 0;
  ASSERT_TRUE(a.cache->SetLimits(limits).ok());
  const NamespaceInfo info = b.cache->OpenNamespace(spec, Persistence::kNone).value();
  const auto recode = [&] {
    a.clock.Advance(absl::Seconds(10));
    a.WriteAll();
    return a.cache->GetNamespace(info.id)->degraded_blocks;
  };
  Store(a, spec, 3, false);
  EXPECT_EQ(recode(), 3u) << "before they were sent";
  EXPECT_EQ(a.remote_stats().written_blocks, 0u);
  EXPECT_EQ(Lookup(b, info.id, 8)->hits, 0u);
  ASSERT_TRUE(a.cache->DeleteNamespace(info.id).ok());
  const std::vector<std::byte> payload = Store(a, spec, 3);
  EXPECT_EQ(a.remote_stats().written_blocks, 3u);
  EXPECT_EQ(recode(), 3u);
  const LookupReport found = Lookup(b, info.id, 8).value();
  ASSERT_EQ(found.hits, 3u);
  EXPECT_TRUE(found.degraded.empty());
  EXPECT_EQ(Load(b, found.lease, 3, info.block_bytes), payload);
  EXPECT_TRUE(b.cache->ReleaseLease(found.lease));
}

TEST_F(RemoteKeyedTest, OtherTenantsAndNamespacesNeverMeet) {
  CacheNode a(&remote_a_), b(&remote_b_);
  Store(a, Opaque(), 8);
  for (const NamespaceSpec& spec : {Opaque("test", "acme"), Opaque("other")}) {
    const NamespaceInfo info = b.cache->OpenNamespace(spec, Persistence::kNone).value();
    EXPECT_EQ(Lookup(b, info.id, 8)->hits, 0u);
  }
}

TEST_F(RemoteKeyedTest, ADamagedBlockEndsWhatIsFound) {
  for (const Fault fault : {Fault::kAway, Fault::kDamages, Fault::kLosesAfterFind}) {
    CacheNode a(&remote_a_), b(&remote_b_);
    Store(a, Opaque(), 8);
    remote_b_.Plant(fault);
    const NamespaceInfo info = b.cache->OpenNamespace(Opaque(), Persistence::kNone).value();
    const LookupReport found = Lookup(b, info.id, 8).value();
    EXPECT_EQ(found.hits, fault == Fault::kAway ? 0u : 2u);
    EXPECT_EQ(b.cache->ReleaseLease(found.lease), fault != Fault::kAway);
    remote_b_.Plant(Fault::kNone);
  }
}

TEST_F(RemoteKeyedTest, ADeletedNamespaceWins) {
  CacheNode a(&remote_a_), b(&remote_b_), c(&remote_b_);
  Store(a, Opaque(), 8);
  const NamespaceInfo info = b.cache->OpenNamespace(Opaque(), Persistence::kNone).value();
  // Over a fetch that runs,
  remote_b_.SetHook([&](const char* call) {
    if (std::strcmp(call, "Read")) return;
    EXPECT_TRUE(b.cache->DeleteNamespace(info.id).ok());
    remote_b_.SetHook({});
  });
  EXPECT_TRUE(absl::IsNotFound(Lookup(b, info.id, 8).status()));
  b.cache->CheckInvariants();
  EXPECT_EQ(b.cache->Stats().keyed_blocks, 0u);
  // and for everybody else: nothing of it is there.
  EXPECT_TRUE(c.cache->OpenNamespace(Opaque(), Persistence::kNone).ok());
  EXPECT_EQ(Lookup(c, info.id, 8)->hits, 0u);
  // A store that is queued comes too late.
  Store(a, Opaque("second"), 0 + 1);
  const NamespaceInfo second = a.cache->OpenNamespace(Opaque("third"), Persistence::kNone).value();
  const std::vector<std::byte> payload = Payload(1, second.block_bytes);
  const std::string_view key = "key 0";
  StoreCall call;
  call.name_space = second.id;
  call.keys = {&key, 1};
  call.form = BlockPayload::kBytes;
  call.payload = payload;
  ASSERT_TRUE(a.cache->StoreBlocks(call).ok());
  ASSERT_TRUE(a.cache->DeleteNamespace(second.id).ok());
  a.WriteAll();
  EXPECT_TRUE(c.cache->OpenNamespace(Opaque("third"), Persistence::kNone).ok());
  EXPECT_EQ(Lookup(c, second.id, 1)->hits, 0u);
  // A store that does not answer: it says so, and it is gone here.
  Store(a, Opaque("fourth"), 2);
  remote_a_.Plant(Fault::kAway);
  const NamespaceId fourth = a.cache->OpenNamespace(Opaque("fourth"), Persistence::kNone)->id;
  EXPECT_TRUE(
      IsError(a.cache->DeleteNamespace(fourth).status(), absl::StatusCode::kUnavailable, "gone here"));
}

TEST_F(RemoteKeyedTest, WhatIsDeletedWhileItIsWrittenIsNotThere) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const NamespaceInfo info = a.cache->OpenNamespace(Opaque(), Persistence::kNone).value();
  Store(a, Opaque(), 1, false);
  remote_a_.SetHook([&](const char* of) {
    if (std::strcmp(of, "Write")) return;
    EXPECT_TRUE(a.cache->DeleteNamespace(info.id).ok());
    remote_a_.SetHook({});
  });
  a.WriteAll();
  EXPECT_TRUE(b.cache->OpenNamespace(Opaque(), Persistence::kNone).ok());
  EXPECT_EQ(Lookup(b, info.id, 1)->hits, 0u);
}

TEST_F(RemoteKeyedTest, WhatIsDeletedWhileItIsWrittenIsNotFoundByWhoOpensItAgain) {
  for (const bool away : {false, true}) {
    CacheNode a(&remote_a_);
    const NamespaceInfo info = a.cache->OpenNamespace(Opaque(), Persistence::kNone).value();
    Store(a, Opaque(), 2, false);
    // The deletion comes before the write reaches the store, and somebody asks again when it has been there:
    // at the next call, which erases it, and which a store that is away just now does not take.
    int erased = 0;
    remote_a_.SetHook([&](const char* of) {
      if (std::strcmp(of, "Write") == 0 && erased == 0) {
        erased = 1;
        EXPECT_TRUE(a.cache->DeleteNamespace(info.id).ok());
        EXPECT_TRUE(a.cache->OpenNamespace(Opaque(), Persistence::kNone).ok());
        EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
      } else if (std::strcmp(of, "Erase") == 0 && ++erased == 3) {
        EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
        if (away) remote_a_.Plant(Fault::kAway);
      }
    });
    a.WriteAll();
    EXPECT_GE(erased, 3);
    EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
    remote_a_.Plant(Fault::kNone);
    EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u) << "it is erased when the store is there again";
    a.WriteAll();
    EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
    EXPECT_TRUE(store_.values.empty());
    // What is stored from now on is shared as ever.
    Store(a, Opaque(), 2);
    EXPECT_EQ(store_.values.size(), 2u);
    remote_a_.SetHook({});
    ASSERT_TRUE(a.cache->DeleteNamespace(info.id).ok());
  }
}

// Who opens the name again before the store has done the deletion takes nothing of the deleted one along.
TEST_F(RemoteKeyedTest, WhatIsBeingDeletedIsNotFoundByWhoOpensItMeanwhile) {
  CacheNode a(&remote_a_), b(&remote_b_);
  const NamespaceInfo info = a.cache->OpenNamespace(Opaque(), Persistence::kNone).value();
  Store(a, Opaque(), 2);
  ASSERT_EQ(store_.values.size(), 2u);
  int asked = 0;
  remote_a_.SetHook([&](const char* of) {
    if (std::strcmp(of, "Erase") != 0) return;
    EXPECT_EQ(a.cache->OpenNamespace(Opaque(), Persistence::kNone)->id, info.id);
    EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
    asked++;
  });
  EXPECT_TRUE(a.cache->DeleteNamespace(info.id).ok());
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(Lookup(a, info.id, 2)->hits, 0u);
  // What others store is found as ever.
  remote_a_.SetHook({});
  Store(b, Opaque(), 2);
  EXPECT_EQ(Lookup(a, info.id, 2)->hits, 2u);
}

}  // namespace
}  // namespace kvtide::testing
