// Keys centred by the means that the model was registered with.
#include "kernels/format/tide.h"
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

// Calibrated types use the model's transforms whatever is said about means; other types of the same model use
// its means alone.
TEST_F(CalibratedTest, TransformsCodeKeysOfCalibratedTypes) {
  Start();
  for (const bool at_once : {false, true})
    for (const char* pair : {"tide4/turbo4", "tide3/turbo3", "tide2/q8_0", "tide1/turbo2", "tide3/f16", "turbo3"})
      for (const ModelSpec& model : {SmallModel(), MixedModel()}) {
        SCOPED_TRACE(std::string(pair) + " " + model.name);
        SequenceOptions options = Calibrated(pair, at_once);
        if (Info(options.pair.k).calibrated) options.centre = Centre::kTypeDefault;
        Client client(*cache_, WithTransforms(model), options, random_);
        for (const int64_t tokens : {200, 1, 130, 64}) ASSERT_TRUE(client.Step(tokens).ok());
        client.CheckAllLayers();
        Client fork = client.Fork();
        ASSERT_TRUE(cache_->EvictAll(1).ok());
        ASSERT_TRUE(fork.Step(100).ok());
        fork.CheckAllLayers();
        if (model.groups.size() == 1) {  // a sliding window has let its first blocks go
          // Coding at once codes the rest of a cut block again, which changes calibrated keys once more.
          ASSERT_TRUE(client.Truncate(at_once ? 64 : 70).ok());
          ASSERT_TRUE(client.Step(300).ok());
          client.CheckAllLayers();
        }
        cache_->CheckInvariants();
        ASSERT_TRUE(client.Close().ok());
        ASSERT_TRUE(fork.Close().ok());
      }
}

TEST_F(CalibratedTest, SaysWhichTransformsAreMissingOrWrong) {
  Start();
  const SequenceOptions options = WithPair("tide3/turbo3");
  for (const ModelSpec& model : {SmallModel(), WithMeans(SmallModel())})
    EXPECT_TRUE(IsError(cache_->CreateSequence(Register(model), options).status(),
                        absl::StatusCode::kInvalidArgument,
                        "has no transforms of keys in layer group 0, which tide3 needs"));
  const ModelSpec good = WithTransforms(SmallModel());
  const auto refused = [&](const char* what, auto change) {
    ModelSpec model = good;
    change(model.groups[0]);
    EXPECT_TRUE(IsError(cache_->RegisterModel(model).status(), absl::StatusCode::kInvalidArgument, what));
  };
  refused("come together", [](LayerGroupSpec& g) { g.key_transforms.widths.clear(); });
  refused("come together", [](LayerGroupSpec& g) { g.key_means.clear(); });
  refused("values of transforms", [](LayerGroupSpec& g) { g.key_transforms.matrices.pop_back(); });
  refused("a width of 200", [](LayerGroupSpec& g) { g.key_transforms.widths[3] = 200; });
  refused("without an inverse",
          [](LayerGroupSpec& g) { std::fill_n(g.key_transforms.matrices.begin(), 64 * 64, 0.5f); });
  const ModelId registered = Register(good);
  EXPECT_TRUE(cache_->CreateSequence(registered, WithPair("tide1/turbo2")).ok());
  // A profile that is older than the type.
  ModelSpec old = good;
  old.name = "old";
  std::vector<uint8_t>& widths = old.groups[0].key_transforms.widths;
  widths.clear();
  for (size_t at = 0; at < good.groups[0].key_transforms.widths.size(); at++)
    if (at % (kTideTypes * 8) < kLeastTideTypes * 8) widths.push_back(good.groups[0].key_transforms.widths[at]);
  const ModelId without = Register(old);
  EXPECT_TRUE(cache_->CreateSequence(without, options).ok());
  EXPECT_TRUE(IsError(cache_->CreateSequence(without, WithPair("tide1/turbo2")).status(),
                      absl::StatusCode::kInvalidArgument, "its profile is older than tide1"));
  ModelSpec other = good;
  other.groups[0].key_transforms.matrices[5] += 0.01f;
  EXPECT_TRUE(IsError(cache_->RegisterModel(other).status(), absl::StatusCode::kFailedPrecondition,
                      "registered with another geometry"));
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
