// Profiles that are installed while a model is used: new sequences have them, others keep theirs, all serve
// calls together, and what is durable comes back with its own.
#include "daemon/cache/stepper.h"
#include "kernels/format/tide_maker.h"
#include "tests/daemon/cache/cache_fixture.h"
#include "tests/format/test_tide.h"

namespace kvtide::testing {
namespace {

// Another profile for each seed.
ModelSpec WithProfile(ModelSpec model, uint64_t seed) {
  const std::string name = model.name;
  model = WithMeans(std::move(model));
  model.name = name;
  for (LayerGroupSpec& group : model.groups)
    group.key_transforms = TransformsOf(test::TideProfile(group.shape, seed));
  return model;
}

class InstalledProfileTest : public CacheTest {
 protected:
  uint64_t Install(ModelId model, const ModelSpec& spec) {
    const absl::StatusOr<uint64_t> revision = cache_->InstallProfile(model, spec);
    EXPECT_TRUE(revision.ok()) << revision.status();
    return revision.value_or(0);
  }
};

TEST_F(InstalledProfileTest, NewSequencesOfCalibratedTypesHaveItAndOthersKeepTheirs) {
  Start(32 * kMiB);
  for (const ModelSpec& model : {SmallModel(), MixedModel()}) {
    SCOPED_TRACE(model.name);
    const ModelId id = Register(model);
    EXPECT_TRUE(IsError(cache_->CreateSequence(id, WithPair("tide3/turbo3")).status(),
                        absl::StatusCode::kInvalidArgument, "has no transforms of keys"));
    const ModelSpec first = WithProfile(model, 31), second = WithProfile(model, 47);
    EXPECT_EQ(Install(id, first), 1u);
    Client one(*cache_, id, first, WithPair("tide3/turbo3"), random_);
    ASSERT_TRUE(one.Step(300).ok());
    EXPECT_EQ(Install(id, second), 2u);
    EXPECT_EQ(Install(id, second), 2u);  // it is there
    Client two(*cache_, id, second, WithPair("tide3/turbo3"), random_);
    // Types without calibration have what the model was registered with.
    Client plain(*cache_, id, model, WithPair("q8_0/turbo4"), random_);
    for (Client* const client : {&one, &two, &plain}) {
      ASSERT_TRUE(client->Step(200).ok());
      client->CheckAllLayers();
      Client fork = client->Fork();
      ASSERT_TRUE(fork.Step(100).ok());
      fork.CheckAllLayers();
      ASSERT_TRUE(fork.Close().ok());
    }
    cache_->CheckInvariants();
    EXPECT_EQ(cache_->GetModel(one.info().model).value(), first);
    EXPECT_EQ(cache_->GetModel(two.info().model).value(), second);
    EXPECT_EQ(cache_->GetModel(plain.info().model).value(), model);
    // It is one model still, whoever asks.
    EXPECT_EQ(cache_->ModelNames().size(), static_cast<size_t>(model.name == "small" ? 1 : 2));
    EXPECT_EQ(cache_->RegisterModel(model).value(), id);
    EXPECT_EQ(cache_->FindModel(model.name).value(), id);
    for (Client* const client : {&one, &two, &plain})
      EXPECT_EQ(cache_->FamilyOf(client->info().model).value(), id);
    for (Client* const client : {&one, &two, &plain}) ASSERT_TRUE(client->Close().ok());
  }
}

TEST_F(InstalledProfileTest, SequencesOfSeveralProfilesServeOneCall) {
  Start();
  const ModelSpec model = SmallModel(), first = WithProfile(model, 31), second = WithProfile(model, 47);
  const ModelId id = Register(model);
  Install(id, first);
  Client one(*cache_, id, first, WithPair("tide3/turbo3"), random_);
  Install(id, second);
  Client two(*cache_, id, second, WithPair("tide3/turbo3"), random_),
      plain(*cache_, id, model, WithPair("turbo4"), random_);
  std::vector<AttendRequest> items;
  std::vector<std::vector<float>> alone(3, std::vector<float>(4 * 64)), together = alone;
  const std::vector<float> q = RandomRows(random_, 4 * 64);
  size_t i = 0;
  for (Client* const client : {&one, &two, &plain}) {
    ASSERT_TRUE(client->Step(300).ok());
    AttendRequest item;
    item.sequence = client->id();
    item.q = {q.data(), DataType::kF32};
    item.queries = 1;
    item.first_query_position = 299;
    item.out = alone[i].data();
    ASSERT_TRUE(cache_->Attend({.layer = 1, .items = {&item, 1}}).ok());
    item.out = together[i++].data();
    items.push_back(item);
  }
  ASSERT_TRUE(cache_->Attend({.layer = 1, .items = items}).ok());
  for (size_t s = 0; s < 3; s++)
    for (size_t c = 0; c < alone[s].size(); c++) EXPECT_NEAR(together[s][c], alone[s][c], 1e-5);
  // A step takes them all as well.
  const StepItem step[] = {{one.id(), 1, {}}, {two.id(), 1, {}}, {plain.id(), 1, {}}};
  EXPECT_TRUE(cache_->BeginStep({.items = step}).ok());
}

TEST_F(InstalledProfileTest, WhatDoesNotFitIsRefused) {
  Start();
  const ModelSpec model = SmallModel();
  const ModelId id = Register(model);
  ModelSpec means = WithProfile(model, 31);
  means.groups[0].key_transforms = {};
  EXPECT_TRUE(IsError(cache_->InstallProfile(id, means).status(), absl::StatusCode::kInvalidArgument,
                      "means alone are not installed"));
  EXPECT_TRUE(IsError(cache_->InstallProfile(id, WithProfile(MixedModel(), 31)).status(),
                      absl::StatusCode::kInvalidArgument, "of a model with other layers"));
  ModelSpec broken = WithProfile(model, 31);
  broken.groups[0].key_transforms.widths[3] = 200;
  EXPECT_TRUE(IsError(cache_->InstallProfile(id, broken).status(), absl::StatusCode::kInvalidArgument,
                      "a width of 200"));
  EXPECT_TRUE(IsError(cache_->InstallProfile(99, WithProfile(model, 31)).status(),
                      absl::StatusCode::kNotFound, "not registered"));
  // Nothing of that counts.
  EXPECT_EQ(Install(id, WithProfile(model, 31)), 1u);
}

TEST_F(InstalledProfileTest, ProfilesThatNobodyUsesAreForgottenAndThoseInUseAreFew) {
  Start();
  const ModelSpec model = SmallModel();
  const ModelId id = Register(model);
  for (uint64_t n = 1; n <= 40; n++) EXPECT_EQ(Install(id, WithProfile(model, 100 + n)), n);
  std::vector<SequenceId> open;
  absl::Status refused;
  for (uint64_t n = 0; n < 40 && refused.ok(); n++) {
    open.push_back(cache_->CreateSequence(id, WithPair("tide4/turbo4")).value());
    refused = cache_->InstallProfile(id, WithProfile(model, 200 + n)).status();
  }
  EXPECT_TRUE(IsError(refused, absl::StatusCode::kResourceExhausted, "close older ones"));
  EXPECT_GE(open.size(), 8u);
  EXPECT_EQ(cache_->Stats().models, 1u);
  EXPECT_TRUE(IsError(cache_->UnregisterModel(model.name).status(), absl::StatusCode::kFailedPrecondition,
                      "open sequences"));
  for (const SequenceId sequence : open) ASSERT_TRUE(cache_->CloseSequence(sequence).ok());
  EXPECT_TRUE(cache_->InstallProfile(id, WithProfile(model, 300)).ok());
  EXPECT_TRUE(cache_->UnregisterModel(model.name).ok());
  EXPECT_EQ(cache_->Stats().models, 0u);
  EXPECT_TRUE(cache_->ModelNames().empty());
}

TEST_F(InstalledProfileTest, DurableSequencesComeBackWithTheirsAndNewOnesHaveTheLast) {
  StartWithDisk(4 * kMiB, 4 * kMiB, 64 * kMiB);
  const ModelSpec model = SmallModel(), first = WithProfile(model, 31), second = WithProfile(model, 47);
  const ModelId id = Register(model);
  Install(id, first);
  Client one(*cache_, id, first, WithPair("tide3/turbo3", {0, 1}), random_);
  ASSERT_TRUE(one.Append(300).ok());
  Install(id, second);
  Client two(*cache_, id, second, WithPair("tide3/turbo3", {0, 1}), random_);
  ASSERT_TRUE(two.Append(300).ok());
  const absl::StatusOr<PersistReport> persisted = cache_->Persist({{one.id(), two.id()}});
  ASSERT_TRUE(persisted.ok()) << persisted.status();
  Restart(true);
  ASSERT_EQ(cache_->restored().sequences, 2u);
  EXPECT_TRUE(cache_->restored().lost.empty());
  for (Client* const client : {&one, &two}) {
    client->Move(*cache_);
    client->CheckAllLayers();
    ASSERT_TRUE(client->Step(200).ok());
    client->CheckAllLayers();
  }
  EXPECT_EQ(cache_->Stats().models, 1u);
  // As found by name, and as its clients register it again.
  for (const ModelId again : {cache_->FindModel(model.name).value(), Register(model)}) {
    Client fresh(*cache_, again, second, WithPair("tide3/turbo3"), random_);
    ASSERT_TRUE(fresh.Step(300).ok());
    fresh.CheckAllLayers();
    ASSERT_TRUE(fresh.Close().ok());
  }
  EXPECT_EQ(cache_->Stats().models, 1u);
  Client plain(*cache_, Register(model), model, WithPair("turbo4"), random_);
  ASSERT_TRUE(plain.Step(300).ok());
  plain.CheckAllLayers();
  // The count goes on.
  EXPECT_EQ(Install(Register(model), WithProfile(model, 53)), 3u);
  ModelSpec other = model;
  other.groups[0].softcap = 30;
  EXPECT_TRUE(IsError(cache_->RegisterModel(other).status(), absl::StatusCode::kFailedPrecondition,
                      "registered with another geometry"));
  cache_->CheckInvariants();
  for (Client* const client : {&one, &two, &plain}) ASSERT_TRUE(client->Close().ok());
}

}  // namespace
}  // namespace kvtide::testing
