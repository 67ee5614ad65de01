// What belongs to one tenant is not there for another, through any verb; admins see all.
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
    AppendCall call{sequence, start, tokens, layers, &context};
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
    ASSERT_TRUE(cache_->Append({after, 0, tokens, layers, &as_other_}).ok());
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

}  // namespace
}  // namespace kvtide::testing
