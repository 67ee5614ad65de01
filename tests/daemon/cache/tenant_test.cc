// What belongs to one tenant is not there for another, through any verb; admins see all.
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/stepper.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;

class TenantTest : public CacheTest {
 protected:
  static CallContext As(const Identity& identity) {
    CallContext context;
    context.identity = &identity;
    return context;
  }
  static TensorView F32(const std::vector<float>& rows) { return {rows.data(), DataType::kF32}; }
  absl::StatusOr<SequenceId> Create(const std::string& tenant, const CallContext& context) {
    SequenceOptions options = WithPair("q8_0/turbo4");
    options.name_space = tenant;
    return cache_->CreateSequence(*cache_->FindModel("small", context), options, context);
  }
  // Appends random rows to all layers; what they were.
  absl::Status Append(SequenceId sequence, int64_t start, int64_t tokens, const CallContext& context) {
    const std::vector<float> rows = RandomRows(random_, static_cast<size_t>(tokens) * 2 * 64);
    std::vector<LayerKv> layers;
    for (int layer = 0; layer < 2; layer++) layers.push_back({layer, F32(rows), F32(rows)});
    AppendCall call{sequence, start, tokens, layers, {}, &context};
    return cache_->Append(call);
  }
  absl::Status Read(SequenceId sequence, int64_t first, int64_t tokens, const CallContext& context) {
    std::vector<float> k(static_cast<size_t>(tokens) * 2 * 64), v(k.size());
    const LayerRead layers[] = {{0, k.data(), v.data()}};
    return cache_->ReadTokens({sequence, first, tokens, layers, &context});
  }
  absl::Status Attend(SequenceId sequence, int64_t new_tokens, const CallContext& context) {
    const std::vector<float> rows = RandomRows(random_, 4 * 64);
    std::vector<float> out(4 * 64);
    AttendRequest item;
    item.sequence = sequence;
    item.q = F32(rows);
    item.queries = 1;
    item.first_query_position = item.start_position = 0;
    item.out = out.data();
    item.new_tokens = new_tokens;
    item.k = item.v = F32(rows);
    AttendCall call;
    call.items = {&item, 1};
    call.context = &context;
    return new_tokens > 0 ? cache_->AppendAttend(call) : cache_->Attend(call);
  }

  const Identity acme_{"acme", false}, other_{"other", false}, ops_{"ops", true};
  const CallContext as_acme_ = As(acme_), as_other_ = As(other_), as_ops_ = As(ops_);
};

TEST_F(TenantTest, NoVerbReachesWhatIsAnothers) {
  StartWithDisk(8 * kMiB, 8 * kMiB, 8 * kMiB);
  ASSERT_TRUE(cache_->RegisterModel(SmallModel(), as_acme_).ok());
  const SequenceId mine = Create("", as_acme_).value();
  ASSERT_TRUE(Append(mine, 0, 70, as_acme_).ok());
  const auto hidden = [&](const absl::Status& status) {
    EXPECT_TRUE(IsError(status, StatusCode::kNotFound, absl::StrCat("sequence ", mine, " does not exist")));
  };
  hidden(Append(mine, 70, 1, as_other_));
  hidden(Attend(mine, 0, as_other_));
  hidden(Attend(mine, 1, as_other_));
  hidden(Read(mine, 0, 1, as_other_));
  hidden(cache_->TruncateSequence(mine, 0, as_other_));
  hidden(cache_->ForkSequence(mine, as_other_).status());
  hidden(cache_->CloseSequence(mine, as_other_));
  hidden(cache_->Evict({{mine}}, 1, as_other_).status());
  hidden(cache_->Prefetch({{mine}}, as_other_).status());
  hidden(cache_->Persist({{mine}}, as_other_).status());
  hidden(cache_->GetSequence(mine, as_other_).status());
  hidden(cache_->ModelOf(mine, as_other_).status());
  hidden(cache_->Length(mine, as_other_).status());
  hidden(cache_->LayerLength(mine, 0, as_other_).status());
  const StepItem item{mine, 1};
  hidden(cache_->BeginStep({{&item, 1}, &as_other_}).status());
  EXPECT_TRUE(cache_->ListSequences({}, as_other_).empty());
  EXPECT_EQ(cache_->EvictAll(1, as_other_)->moved_blocks, 0u);
  // Nothing of it has happened, and its owner and an admin see it.
  for (const CallContext* context : {&as_acme_, &as_ops_}) {
    EXPECT_EQ(cache_->Length(mine, *context).value(), 70);
    EXPECT_TRUE(Read(mine, 0, 70, *context).ok());
    EXPECT_TRUE(Attend(mine, 0, *context).ok());
    EXPECT_EQ(cache_->ListSequences({}, *context).size(), 1u);
  }
  EXPECT_GT(cache_->EvictAll(1, as_acme_)->moved_blocks, 0u);
}

TEST_F(TenantTest, ForksStayWithTheirTenantAndOnlyAdminsCreateForOthers) {
  Start();
  for (const CallContext* context : {&as_acme_, &as_ops_})
    ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  EXPECT_TRUE(IsError(Create("other", as_acme_).status(), StatusCode::kPermissionDenied, "of tenant 'acme'"));
  const SequenceId given = Create("acme", as_ops_).value();
  EXPECT_EQ(cache_->GetSequence(given, as_acme_)->options.name_space, "acme");
  const SequenceId fork = cache_->ForkSequence(given, as_ops_).value();
  EXPECT_TRUE(cache_->GetSequence(fork, as_acme_).ok());
  EXPECT_FALSE(cache_->GetSequence(fork, as_other_).ok());
  // A process that names nobody is the default tenant's admin.
  ASSERT_TRUE(cache_->RegisterModel(SmallModel()).ok());
  const SequenceId own = Create("", {}).value();
  EXPECT_EQ(cache_->GetSequence(own)->options.name_space, kDefaultTenant);
  EXPECT_FALSE(cache_->GetSequence(own, as_acme_).ok());
  EXPECT_EQ(cache_->ListSequences().size(), 3u);
}

TEST_F(TenantTest, ModelsAreTheTenantsOwn) {
  Start();
  ASSERT_TRUE(cache_->RegisterModel(SmallModel("m"), as_acme_).ok());
  EXPECT_TRUE(IsError(cache_->FindModel("m", as_other_).status(), StatusCode::kNotFound, "not registered"));
  EXPECT_TRUE(cache_->ModelNames(as_other_).empty());
  // Another geometry under the same name is another tenant's business.
  ASSERT_TRUE(cache_->RegisterModel(UniformModel("m", {3, 1, 64, 64}, 2), as_other_).ok());
  EXPECT_NE(*cache_->FindModel("m", as_acme_), *cache_->FindModel("m", as_other_));
  EXPECT_EQ(cache_->GetModel(*cache_->FindModel("m", as_acme_))->layers.size(), 2u);
  EXPECT_EQ(cache_->ModelNames(as_ops_), std::vector<std::string>{"m"});
}

TEST_F(TenantTest, AModelThatNobodyUsesMayGo) {
  options_.max_models = 2;
  Start();
  const ModelId first = cache_->RegisterModel(SmallModel("m"), as_acme_).value();
  ASSERT_TRUE(cache_->RegisterModel(SmallModel(), as_acme_).ok());
  EXPECT_TRUE(
      IsError(cache_->UnregisterModel("m", as_other_).status(), StatusCode::kNotFound, "not registered"));
  EXPECT_FALSE(cache_->RegisterModel(SmallModel("third"), as_acme_).ok());
  const SequenceId sequence = cache_->CreateSequence(first, WithPair("f16"), as_acme_).value();
  EXPECT_TRUE(IsError(cache_->UnregisterModel("m", as_acme_).status(), StatusCode::kFailedPrecondition,
                      "has 1 open sequences"));
  ASSERT_TRUE(cache_->CloseSequence(sequence, as_acme_).ok());
  EXPECT_EQ(cache_->UnregisterModel("m", as_acme_).value(), first);
  EXPECT_EQ(cache_->GetModel(first).status().code(), StatusCode::kNotFound);
  // The name is free, for another geometry too, and the id is not used again.
  EXPECT_NE(cache_->RegisterModel(UniformModel("m", {3, 1, 64, 64}, 2), as_acme_).value(), first);
  for (int i = 0; i < 100; i++) {
    ASSERT_TRUE(cache_->UnregisterModel("m", as_acme_).ok());
    ASSERT_TRUE(cache_->RegisterModel(SmallModel("m"), as_acme_).ok());
  }
}

// Without a quota too, the last places are for those that have few.
TEST_F(TenantTest, NobodyTakesAllSequencesOrModels) {
  options_.max_sequences = 64;
  options_.max_models = 32;
  Start();
  size_t models = 0, sequences = 0;
  absl::Status full;
  for (; full.ok(); models += full.ok() ? 1 : 0)
    full = cache_->RegisterModel(SmallModel(models == 0 ? "small" : "m" + std::to_string(models)), as_acme_)
               .status();
  EXPECT_TRUE(IsError(full, StatusCode::kResourceExhausted, "max_models = 32"));
  EXPECT_EQ(models, 30u);
  for (full = absl::OkStatus(); full.ok(); sequences += full.ok() ? 1 : 0)
    full = Create("", as_acme_).status();
  EXPECT_TRUE(IsError(full, StatusCode::kResourceExhausted, "for tenants that have few"));
  EXPECT_EQ(RefusalOf(full), Refusal::kLimit);
  EXPECT_EQ(sequences, 60u);
  EXPECT_FALSE(cache_->ForkSequence(cache_->ListSequences({}, as_acme_).front().id, as_acme_).ok());
  // Another one gets its own, as many as are left.
  ASSERT_TRUE(cache_->RegisterModel(SmallModel(), as_other_).ok());
  for (int i = 0; i < 4; i++) EXPECT_TRUE(Create("", as_other_).ok()) << i;
  EXPECT_TRUE(IsError(Create("", as_other_).status(), StatusCode::kResourceExhausted, "max_sequences"));
  EXPECT_FALSE(Create("", as_acme_).ok());
}

TEST_F(TenantTest, ARestartKeepsWhoOwnsWhat) {
  StartWithDisk(8 * kMiB, 8 * kMiB, 8 * kMiB);
  ASSERT_TRUE(cache_->RegisterModel(SmallModel(), as_acme_).ok());
  const SequenceId mine = Create("", as_acme_).value();
  ASSERT_TRUE(Append(mine, 0, 70, as_acme_).ok());
  ASSERT_TRUE(cache_->Persist({{mine}}, as_acme_).ok());
  Restart(true);
  EXPECT_TRUE(Read(mine, 0, 70, as_acme_).ok());
  EXPECT_TRUE(cache_->FindModel("small", as_acme_).ok());
  EXPECT_FALSE(cache_->FindModel("small", as_other_).ok());
  EXPECT_FALSE(cache_->GetSequence(mine, as_other_).ok());
}

// The place of a freed block goes to another tenant with the old bytes in it. They are behind what its
// sequence has, and that is refused in every type and at every length.
TEST_F(TenantTest, AReusedPlaceGivesNothingOfItsFormerTenant) {
  Start(256 << 10, 0);
  for (const CallContext* context : {&as_acme_, &as_other_})
    ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  for (int round = 0; round < 20; round++) {
    const SequenceId before = Create("", as_acme_).value();
    ASSERT_TRUE(Append(before, 0, 64, as_acme_).ok());
    ASSERT_TRUE(cache_->CloseSequence(before, as_acme_).ok());
    const SequenceId after = Create("", as_other_).value();
    const int64_t tokens = 1 + static_cast<int64_t>(random_() % 63);
    const std::vector<float> ones(static_cast<size_t>(tokens) * 2 * 64, 1.0f);
    const LayerKv layers[] = {{0, F32(ones), F32(ones)}, {1, F32(ones), F32(ones)}};
    ASSERT_TRUE(cache_->Append({after, 0, tokens, layers, {}, &as_other_}).ok());
    EXPECT_TRUE(IsError(Read(after, 0, tokens + 1, as_other_), StatusCode::kOutOfRange, "tokens"));
    EXPECT_TRUE(IsError(Read(after, tokens, 1, as_other_), StatusCode::kOutOfRange, "tokens"));
    // Queries beyond the end see the ones and nothing else: any other row would change the mean.
    const std::vector<float> queries = RandomRows(random_, 2 * 4 * 64);
    std::vector<float> out(queries.size());
    AttendRequest item;
    item.sequence = after;
    item.q = F32(queries);
    item.queries = 2;
    item.first_query_position = tokens - 1;
    item.out = out.data();
    AttendCall call;
    call.items = {&item, 1};
    call.causal = false;
    call.context = &as_other_;
    if (cache_->Attend(call).ok()) {
      for (const float value : out) ASSERT_NEAR(value, 1.0f, 1e-3f);
    }
    ASSERT_TRUE(cache_->CloseSequence(after, as_other_).ok());
  }
}

class QuotaTest : public TenantTest {
 protected:
  void Limit(const std::vector<std::string>& texts) {
    options_.quotas = TenantQuotas::Parse(texts, std::vector<std::string>{"device", "host", "disk"}).value();
  }
  const TenantStats& Of(const std::string& tenant) {
    stats_ = cache_->Stats();
    for (const TenantStats& one : stats_.tenants)
      if (one.tenant == tenant) return one;
    static const TenantStats kNothing;
    return kNothing;
  }
  CacheStats stats_;
};

TEST_F(QuotaTest, SequencesAndModelsAreCountedByTenant) {
  Limit({"acme:sequences=2,models=1", "*:sequences=3"});
  Start();
  for (const CallContext* context : {&as_acme_, &as_other_})
    ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  EXPECT_TRUE(cache_->RegisterModel(SmallModel(), as_acme_).ok()) << "again: the same one";
  EXPECT_TRUE(IsError(cache_->RegisterModel(SmallModel("m"), as_acme_).status(),
                      StatusCode::kResourceExhausted, "tenant 'acme' has 1 models, and its quota is 1"));
  EXPECT_TRUE(cache_->RegisterModel(SmallModel("m"), as_other_).ok());
  const SequenceId first = Create("", as_acme_).value();
  const SequenceId second = cache_->ForkSequence(first, as_acme_).value();
  EXPECT_TRUE(IsError(Create("", as_acme_).status(), StatusCode::kResourceExhausted,
                      "tenant 'acme' has 2 sequences, and its quota is 2; close some"));
  EXPECT_TRUE(
      IsError(cache_->ForkSequence(first, as_acme_).status(), StatusCode::kResourceExhausted, "quota"));
  for (int i = 0; i < 3; i++) EXPECT_TRUE(Create("", as_other_).ok());
  EXPECT_FALSE(Create("", as_other_).ok());
  ASSERT_TRUE(cache_->CloseSequence(second, as_acme_).ok());
  EXPECT_TRUE(Create("", as_acme_).ok());
  EXPECT_EQ(Of("acme").sequences, 2u);
  EXPECT_EQ(Of("other").models, 2u);
}

TEST_F(QuotaTest, PinsAreCountedByTenantAndQuotasMayChange) {
  Limit({"acme:pins=1,sequences=3"});
  Start();
  for (const CallContext* context : {&as_acme_, &as_other_})
    ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  const SequenceId first = Create("", as_acme_).value(), second = Create("", as_acme_).value();
  const SequenceId foreign = Create("", as_other_).value();
  EXPECT_TRUE(IsError(cache_->Pin({{first, second}}, absl::Minutes(1), as_acme_),
                      StatusCode::kResourceExhausted,
                      "tenant 'acme' has 0 pinned sequences, and its quota is 1"));
  EXPECT_TRUE(cache_->Pin({{first}}, absl::Minutes(1), as_acme_).ok());
  EXPECT_TRUE(cache_->Pin({{first}}, absl::Minutes(2), as_acme_).ok()) << "the same one again";
  EXPECT_FALSE(cache_->Pin({{second}}, absl::Minutes(1), as_acme_).ok());
  EXPECT_TRUE(IsError(cache_->Pin({{foreign}}, absl::Minutes(1), as_acme_), StatusCode::kNotFound, ""));
  EXPECT_TRUE(cache_->Pin({{foreign}}, absl::Minutes(1), as_other_).ok());
  ASSERT_TRUE(cache_->CloseSequence(first, as_acme_).ok());
  EXPECT_TRUE(cache_->Pin({{second}}, absl::Minutes(1), as_acme_).ok()) << "a closed one counts no more";
  // Other quotas count from the next call on; who has more keeps it.
  LiveLimits limits = cache_->limits();
  limits.quotas =
      TenantQuotas::Parse(std::vector<std::string>{"acme:sequences=0"}, std::vector<std::string>{"device"})
          .value();
  ASSERT_TRUE(cache_->SetLimits(limits).ok());
  EXPECT_TRUE(IsError(Create("", as_acme_).status(), StatusCode::kResourceExhausted, "its quota is 0"));
  EXPECT_TRUE(cache_->GetSequence(second, as_acme_).ok());
  EXPECT_TRUE(Create("", as_other_).ok());
}

TEST_F(QuotaTest, BytesOfATierAreOneTenantsOwn) {
  // An f16 block has 64 KiB: two of them on the device, one on the host.
  Limit({"acme:device=128KiB,host=64KiB"});
  Start();
  for (const CallContext* context : {&as_acme_, &as_other_})
    ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  const auto create = [&](const CallContext& context) {
    return cache_->CreateSequence(*cache_->FindModel("small", context), WithPair("f16"), context).value();
  };
  const SequenceId mine = create(as_acme_);
  ASSERT_TRUE(Append(mine, 0, 128, as_acme_).ok());
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{128 << 10, 0}));
  // What has no room in the first tier goes to the next one where it may.
  ASSERT_TRUE(Append(mine, 128, 64, as_acme_).ok());
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{128 << 10, 64 << 10}));
  const absl::Status full = Append(mine, 192, 1, as_acme_);
  EXPECT_TRUE(IsError(
      full, StatusCode::kResourceExhausted,
      "within the quota of tenant 'acme': 131072 of 131072 bytes taken in tier 'device'; 65536 of 65536"));
  EXPECT_TRUE(Read(mine, 0, 192, as_acme_).ok()) << "nothing is lost";
  // Nobody else is held up, and an eviction that would exceed the quota below leaves its blocks.
  const SequenceId others = create(as_other_);
  ASSERT_TRUE(Append(others, 0, 640, as_other_).ok());
  EXPECT_EQ(cache_->Evict({{mine}}, 1, as_acme_)->moved_blocks, 0u);
  EXPECT_EQ(cache_->Evict({{others}}, 1, as_other_)->moved_blocks, 10u);
  // What is given back may be taken again.
  ASSERT_TRUE(cache_->TruncateSequence(mine, 64, as_acme_).ok());
  EXPECT_TRUE(Append(mine, 64, 128, as_acme_).ok());
  ASSERT_TRUE(cache_->CloseSequence(mine, as_acme_).ok());
  EXPECT_EQ(Of("acme").sequences, 0u);
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{0, 0}));
}

// The block store's blocks count as those of sequences do: its own cached ones make way, and nobody else's.
TEST_F(QuotaTest, BlocksThatAreFoundByKeyCountForTheirTenant) {
  constexpr size_t kBytes = 64 << 10;
  Limit({"acme:device=0,host=256KiB,disk=300KiB"});
  StartWithDisk(8 * kMiB, 8 * kMiB, 8 * kMiB);
  const auto open = [&](const std::string& tenant) {
    NamespaceSpec spec;
    spec.model = "pages";
    spec.tenant = tenant;
    spec.block_tokens = 16;
    spec.opaque.emplace();
    spec.opaque->block_bytes = kBytes;
    spec.opaque->encoding = "test";
    return cache_->OpenNamespace(spec, Persistence::kNone).value().id;
  };
  const NamespaceId mine = open("acme"), others = open("other");
  const std::vector<std::byte> payload(6 * kBytes, std::byte{7});
  const auto store = [&](NamespaceId space, const CallContext& context, char first, size_t count) {
    std::vector<std::string> names;
    for (size_t i = 0; i < count; i++) names.push_back(absl::StrCat(std::string(1, first), i));
    const std::vector<std::string_view> keys(names.begin(), names.end());
    StoreCall call;
    call.name_space = space;
    call.keys = keys;
    call.form = BlockPayload::kBytes;
    call.payload = std::span(payload).first(count * kBytes);
    call.context = &context;
    return cache_->StoreBlocks(call);
  };
  const absl::StatusOr<StoreReport> first = store(mine, as_acme_, 'a', 6);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->stored, 4u) << "what the call has stored does not make way for the rest of it";
  EXPECT_EQ(first->left_out, 2u);
  EXPECT_TRUE(absl::StrContains(first->problem, "within the quota of tenant 'acme'")) << first->problem;
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{0, 4 * kBytes, 0}));
  ASSERT_EQ(store(others, as_other_, 'a', 6)->stored, 6u);
  // New blocks take the place of the tenant's older ones.
  clock_.Advance(absl::Minutes(1));
  ASSERT_EQ(store(mine, as_acme_, 'b', 3)->stored, 3u);
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{0, 4 * kBytes, 0}));
  EXPECT_EQ(cache_->GetNamespace(mine, as_acme_)->blocks, 4u);
  EXPECT_EQ(cache_->GetNamespace(others, as_other_)->blocks, 6u);
  EXPECT_EQ(Of("other").tier_bytes[1], 6 * kBytes);
  cache_->CheckInvariants();
  // Copies on the disk count too, and what was there before a restart is counted again.
  ASSERT_TRUE(cache_->PersistNamespace(mine, as_acme_).ok());
  EXPECT_GE(Of("acme").tier_bytes[2], 4 * kBytes);
  const uint64_t on_disk = Of("acme").tier_bytes[2];
  Restart(true);
  EXPECT_EQ(Of("acme").tier_bytes, (std::vector<uint64_t>{0, 0, on_disk}));
  EXPECT_EQ(cache_->DeleteNamespace(mine, as_acme_).value(), 4u);
  EXPECT_EQ(Of("acme").tier_bytes, std::vector<uint64_t>{});
}

TEST_F(QuotaTest, WhatWasThereBeforeStaysUnderASmallerQuota) {
  StartWithDisk(8 * kMiB, 8 * kMiB, 8 * kMiB);
  ASSERT_TRUE(cache_->RegisterModel(SmallModel(), as_acme_).ok());
  for (int i = 0; i < 2; i++) {
    const SequenceId one = Create("", as_acme_).value();
    ASSERT_TRUE(Append(one, 0, 70, as_acme_).ok());
    ASSERT_TRUE(cache_->Persist({{one}}, as_acme_).ok());
  }
  Limit({"acme:sequences=1,models=0,disk=1"});
  Restart(false);
  EXPECT_EQ(cache_->ListSequences({}, as_acme_).size(), 2u);
  EXPECT_GT(Of("acme").tier_bytes.back(), 1u);
  EXPECT_FALSE(Create("", as_acme_).ok());
}

TEST(TenantQuotas, TextsThatAreNoneAreNamed) {
  const std::vector<std::string> tiers = {"device", "host"};
  const auto parse = [&](const std::vector<std::string>& texts) { return TenantQuotas::Parse(texts, tiers); };
  for (const char* text :
       {"", "acme", ":sequences=1", "acme:", "acme:sequences", "acme:sequences=x", "acme:disk=1GiB",
        "acme:sequences=1,sequences=2", "acme:device=1GB", "acme:device=99999999999TiB"}) {
    const auto status = parse({text}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat("quota \"", text, "\""))) << status;
  }
  EXPECT_FALSE(parse({"a:calls=1", "a:models=1"}).ok());
  const TenantQuotas quotas = parse({"acme:calls=3,device=2GiB", "*:connections=4"}).value();
  EXPECT_EQ(quotas.Of("acme").calls, 3u);
  EXPECT_EQ(quotas.Of("acme").connections, TenantLimits::kNone);
  EXPECT_EQ(quotas.Of("acme").OfTier("device"), uint64_t{2} << 30);
  EXPECT_EQ(quotas.Of("acme").OfTier("host"), TenantLimits::kNone);
  EXPECT_EQ(quotas.Of("anybody").connections, 4u);
}

}  // namespace
}  // namespace kvtide::testing
