// What a call is told that found no room: which tiers are full, what pins hold and whose they are, and what
// would free it. Other tenants have no names in it.
#include "daemon/cache/move/room_text.h"

#include "absl/strings/str_cat.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// Blocks of 64 KiB: four of them on the device, two in the host tier.
class RoomTextTest : public CacheTest {
 protected:
  static CallContext As(const Identity& identity) {
    CallContext context;
    context.identity = &identity;
    return context;
  }
  void StartSmall(const std::vector<std::string>& quotas = {}) {
    options_.quotas = TenantQuotas::Parse(quotas, std::vector<std::string>{"device", "host"}).value();
    Start(4 * 65536, 2 * 65536);
    for (const CallContext* context : {&as_acme_, &as_other_})
      ASSERT_TRUE(cache_->RegisterModel(SmallModel(), *context).ok());
  }
  SequenceId Create(const CallContext& context) {
    return cache_->CreateSequence(*cache_->FindModel("small", context), WithPair("f16"), context).value();
  }
  absl::Status Append(SequenceId sequence, int64_t tokens, const CallContext& context) {
    const int64_t start = cache_->Length(sequence, context).value();
    const std::vector<float> rows = RandomRows(random_, static_cast<size_t>(tokens) * 2 * 64);
    std::vector<LayerKv> layers;
    for (int layer = 0; layer < 2; layer++)
      layers.push_back({layer, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}});
    AppendCall call{sequence, start, tokens, layers, {}, &context};
    return cache_->Append(call);
  }
  std::string Told(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    return std::string(status.message());
  }

  const Identity acme_{"acme", false}, other_{"other", false};
  const CallContext as_acme_ = As(acme_), as_other_ = As(other_);
};

TEST_F(RoomTextTest, SaysWhatIsPinnedByWhomAndWhichSequenceMightGo) {
  StartSmall();
  const SequenceId pinned = Create(as_acme_), cold = Create(as_acme_), foreign = Create(as_other_);
  ASSERT_TRUE(Append(pinned, 128, as_acme_).ok());
  ASSERT_TRUE(cache_->Pin({{pinned}}, absl::Minutes(5), as_acme_).ok());
  ASSERT_TRUE(Append(foreign, 64, as_other_).ok());
  ASSERT_TRUE(cache_->Pin({{foreign}}, absl::Minutes(9), as_other_).ok());
  ASSERT_TRUE(Append(cold, 192, as_acme_).ok());
  clock_.Advance(absl::Minutes(1));
  const SequenceId last = Create(as_acme_);
  const std::string told = Told(Append(last, 1, as_acme_));
  EXPECT_THAT(
      told, AllOf(HasSubstr("no room for 65536 bytes: tier 'device' has 0 of 262144 bytes free, the largest "
                            "extent is 0, 131072 are pinned by tenant 'acme', 65536 are pinned by others; "
                            "tier 'host' has 0 of 131072"),
                  HasSubstr("ending pins (1 sequences of tenant 'acme', the last pin ends in 4m)"),
                  HasSubstr("the end of others' pins (1 sequences)"),
                  HasSubstr(absl::StrCat("closing or truncating sequences: ", cold,
                                         " of tenant 'acme' was not used for 1m and has ")),
                  HasSubstr("more memory for a tier"), Not(HasSubstr("'other'")),
                  Not(HasSubstr(absl::StrCat(foreign)))));
  // It is true: what is said to free room does.
  ASSERT_TRUE(cache_->Pin({{pinned}}, absl::ZeroDuration(), as_acme_).ok());
  EXPECT_THAT(Told(Append(last, 1, as_acme_)),
              AllOf(Not(HasSubstr("by tenant 'acme'")), HasSubstr("others")));
  ASSERT_TRUE(cache_->CloseSequence(cold, as_acme_).ok());
  EXPECT_TRUE(Append(last, 1, as_acme_).ok());
}

TEST_F(RoomTextTest, AQuotaIsToldWithTheTenantsOwnPinsAlone) {
  StartSmall({"acme:device=128KiB,host=0"});
  const SequenceId mine = Create(as_acme_), foreign = Create(as_other_);
  ASSERT_TRUE(Append(mine, 128, as_acme_).ok());
  ASSERT_TRUE(Append(foreign, 64, as_other_).ok());
  ASSERT_TRUE(cache_->Pin({{foreign}}, absl::Minutes(9), as_other_).ok());
  EXPECT_THAT(Told(Append(mine, 1, as_acme_)),
              AllOf(HasSubstr("131072 of 131072 bytes taken in tier 'device'; 0 of 0 bytes"),
                    Not(HasSubstr("pin")), HasSubstr("a larger quota"),
                    HasSubstr(absl::StrCat("closing or truncating sequences: ", mine, " of"))));
  ASSERT_TRUE(cache_->Pin({{mine}}, absl::Seconds(30), as_acme_).ok());
  EXPECT_THAT(Told(Append(mine, 1, as_acme_)),
              HasSubstr("tier 'device', 131072 of them pinned; 0 of 0 bytes"));
}

}  // namespace
}  // namespace kvtide::testing
