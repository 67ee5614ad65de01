// Keys centred by the means that the model was registered with.
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using CalibratedTest = CacheTest;

SequenceOptions Calibrated(const std::string& pair, bool at_once) {
  SequenceOptions options = WithPair(pair);
  options.centre = Centre::kCalibrated;
  options.seal_at_once = at_once;
  return options;
}

TEST_F(CalibratedTest, AttentionIsThatOfKeysCodedAroundTheMeans) {
  Start();
  for (const bool at_once : {false, true})
    for (const char* pair : {"turbo4", "turbo3/q4_0", "planar3/turbo4", "f16/turbo4", "f16"})
      for (const ModelSpec& model : {SmallModel(), MixedModel()}) {
        SCOPED_TRACE(std::string(pair) + " " + model.name);
        Client client(*cache_, WithMeans(model), Calibrated(pair, at_once), random_);
        for (const int64_t tokens : {200, 1, 130, 64}) ASSERT_TRUE(client.Step(tokens).ok());
        client.CheckAllLayers();
        cache_->CheckInvariants();
        ASSERT_TRUE(client.Close().ok());
      }
}

TEST_F(CalibratedTest, ForksMovesAndCutsKeepTheMeans) {
  Start();
  for (const bool at_once : {false, true}) {
    Client client(*cache_, WithMeans(SmallModel()), Calibrated("turbo4", at_once), random_);
    ASSERT_TRUE(client.Step(300).ok());
    Client fork = client.Fork();
    ASSERT_TRUE(cache_->EvictAll(1).ok());
    ASSERT_TRUE(fork.Step(100).ok());
    fork.CheckAllLayers();
    // Nothing coded is left, and what is coded next is around the same means.
    ASSERT_TRUE(client.Truncate(0).ok());
    ASSERT_TRUE(client.Step(400).ok());
    client.CheckAllLayers();
    cache_->CheckInvariants();
    ASSERT_TRUE(client.Close().ok());
    ASSERT_TRUE(fork.Close().ok());
  }
}

TEST_F(CalibratedTest, SaysWhatIsMissingOrWrong) {
  Start();
  SequenceOptions options = Calibrated("turbo4", false);
  EXPECT_TRUE(IsError(cache_->CreateSequence(Register(SmallModel()), options).status(),
                      absl::StatusCode::kInvalidArgument,
                      "has no calibrated means of keys in layer group 0"));
  ModelSpec model = WithMeans(SmallModel());
  model.groups[0].key_means.pop_back();
  EXPECT_TRUE(IsError(cache_->RegisterModel(model).status(), absl::StatusCode::kInvalidArgument,
                      "255 means of keys, must be 256 or none"));
  model.groups[0].key_means.push_back(INFINITY);
  EXPECT_TRUE(
      IsError(cache_->RegisterModel(model).status(), absl::StatusCode::kInvalidArgument, "must be finite"));
  model.groups[0].key_means.back() = 1;
  Register(model);
  model.groups[0].key_means.back() = 2;
  EXPECT_TRUE(IsError(cache_->RegisterModel(model).status(), absl::StatusCode::kFailedPrecondition,
                      "registered with another geometry"));
}

}  // namespace
}  // namespace kvtide::testing
