// The verbs of calibrations from traffic: whose they are, what they take, and what they answer.
#include <memory>
#include <string>

#include "daemon/calibrate/calibrator.h"
#include "daemon/service/convert.h"
#include "daemon/service/handlers.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/daemon/calibrate/traffic_rows.h"
#include "tests/format/test_tide.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

v1::Model Model(bool rope) {
  v1::Model model;
  const std::vector<Rope> ropes(rope ? 2 : 0, testing::TrafficRope());
  ToProto(testing::TrafficModel(), ropes, &model);
  return model;
}

class CalibrateHandlersTest : public ::testing::Test {
 protected:
  void Start(CalibratorOptions calibrate = {}) {
    calibrator_ = std::make_unique<Calibrator>(calibrate);
    CpuBackendOptions cpu;
    cpu.threads = 1;
    cpu.huge_pages = false;
    backend_ = MakeCpuBackend(cpu);
    CacheOptions options;
    options.tiers = {{"device", backend_.get(), size_t{8} << 20}};
    options.traffic = calibrator_.get();
    cache_ = KvCache::Create(options).value();
    ServiceOptions service;
    service.calibrator = calibrator_.get();
    handlers_ = std::make_unique<Handlers>(cache_.get(), service);
  }
  static Call As(const Identity& identity) {
    Call call;
    call.context.identity = &identity;
    return call;
  }
  absl::Status Register(const v1::Model& model, const Call& call) {
    v1::RegisterModelRequest request;
    *request.mutable_model() = model;
    v1::RegisterModelResponse response;
    return handlers_->RegisterModel(request, &response, call);
  }
  absl::Status StartOf(const std::string& tenant, const Call& call, double share = 0) {
    v1::StartCalibrationRequest request;
    request.set_model("traffic");
    request.set_tenant(tenant);
    request.set_tokens(400);
    request.set_share(share);
    v1::StartCalibrationResponse response;
    const absl::Status status = handlers_->StartCalibration(request, &response, call);
    started_ = response.calibration();
    return status;
  }
  int Listed(const Call& call) {
    v1::ListCalibrationsResponse response;
    EXPECT_TRUE(handlers_->ListCalibrations({}, &response, call).ok());
    return response.calibrations_size();
  }

  const Identity acme_{"acme", false}, shop_{"shop", false}, admin_{"default", true};
  std::unique_ptr<Calibrator> calibrator_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Handlers> handlers_;
  v1::Calibration started_;
};

TEST_F(CalibrateHandlersTest, CalibrationsAreTheTenantsOwnAndTheAdmins) {
  Start();
  ASSERT_TRUE(Register(Model(true), As(acme_)).ok());
  ASSERT_TRUE(StartOf("", As(acme_)).ok());
  EXPECT_EQ(started_.tenant(), "acme");
  EXPECT_EQ(started_.state(), v1::CALIBRATION_STATE_GATHERING);
  EXPECT_FALSE(started_.after_rope());
  EXPECT_EQ(started_.wanted_held_back_tokens(), 50);
  EXPECT_EQ(started_.share(), 0.01);
  // Another tenant: there is no such model, and none of its business.
  EXPECT_EQ(StartOf("", As(shop_)).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Listed(As(acme_)), 1);
  EXPECT_EQ(Listed(As(shop_)), 0);
  EXPECT_EQ(Listed(As(admin_)), 1);
  v1::ExportProfileRequest of_acme;
  of_acme.set_model("traffic");
  of_acme.set_tenant("acme");
  v1::ExportProfileResponse exported;
  v1::InstallProfileRequest install;
  install.set_model("traffic");
  install.set_tenant("acme");
  v1::InstallProfileResponse installed;
  v1::StopCalibrationRequest stop;
  stop.set_model("traffic");
  stop.set_tenant("acme");
  v1::StopCalibrationResponse stopped;
  for (const absl::Status& status :
       {StartOf("acme", As(shop_)), handlers_->ExportProfile(of_acme, &exported, As(shop_)),
        handlers_->InstallProfile(install, &installed, As(shop_)),
        handlers_->StopCalibration(stop, &stopped, As(shop_))}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("tenant 'shop'"));
  }
  // More time than a hundredth is others'.
  EXPECT_THAT(std::string(StartOf("", As(acme_), 0.5).message()), HasSubstr("for admins"));
  EXPECT_TRUE(StartOf("", As(acme_), 0.005).ok());
  EXPECT_TRUE(StartOf("acme", As(admin_), 0.5).ok());
  EXPECT_EQ(handlers_->ExportProfile(of_acme, &exported, As(admin_)).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(handlers_->StopCalibration(stop, &stopped, As(admin_)).ok());
  EXPECT_EQ(Listed(As(admin_)), 0);
}

TEST_F(CalibrateHandlersTest, AllModelsAreCalibratedWhereTheSettingSaysSo) {
  CalibratorOptions options;
  options.models = CalibratorOptions::Models::kAll;
  options.memory_bytes = int64_t{36} << 20;  // of two
  Start(options);
  ASSERT_TRUE(Register(Model(false), As(acme_)).ok());
  ASSERT_TRUE(Register(Model(true), As(shop_)).ok());
  ASSERT_TRUE(Register(Model(true), As(admin_)).ok());  // without room it is served all the same
  EXPECT_EQ(Listed(As(acme_)), 1);
  EXPECT_EQ(Listed(As(admin_)), 2);
  // What is registered again goes on; what is gone is forgotten.
  ASSERT_TRUE(Register(Model(true), As(shop_)).ok());
  EXPECT_EQ(Listed(As(admin_)), 2);
  v1::UnregisterModelRequest gone;
  gone.set_model("traffic");
  v1::UnregisterModelResponse response;
  ASSERT_TRUE(handlers_->UnregisterModel(gone, &response, As(shop_)).ok());
  EXPECT_EQ(Listed(As(admin_)), 1);
}

TEST_F(CalibrateHandlersTest, NoneIsWhereTheSettingSaysSo) {
  CalibratorOptions options;
  options.models = CalibratorOptions::Models::kNever;
  Start(options);
  ASSERT_TRUE(Register(Model(true), As(acme_)).ok());
  EXPECT_EQ(StartOf("", As(acme_)).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Listed(As(admin_)), 0);
}

TEST_F(CalibrateHandlersTest, AProfileIsInstalledFromLayers) {
  Start();
  ASSERT_TRUE(Register(Model(true), As(acme_)).ok());
  ModelSpec with = testing::TrafficModel();
  with.groups[0].key_means.assign(2 * 2 * 32, 1.0f);
  with.groups[0].key_transforms = TransformsOf(test::TideProfile(with.groups[0].shape, 31));
  v1::Model proto;
  ToProto(with, {}, &proto);
  v1::InstallProfileRequest request;
  request.set_model("traffic");
  *request.mutable_layers() = proto.layers();
  v1::InstallProfileResponse response;
  ASSERT_TRUE(handlers_->InstallProfile(request, &response, As(acme_)).ok());
  EXPECT_EQ(response.revision(), 1);
  v1::CreateSequenceRequest create;
  create.set_model("traffic");
  create.set_pair("tide3/turbo3");
  v1::CreateSequenceResponse created;
  const absl::Status status = handlers_->CreateSequence(create, &created, As(acme_));
  EXPECT_TRUE(status.ok()) << status;
  v1::ListCalibrationsResponse listed;
  ASSERT_TRUE(handlers_->ListCalibrations({}, &listed, As(acme_)).ok());
  ASSERT_EQ(listed.installed_size(), 1);
  EXPECT_EQ(listed.installed(0).model(), "traffic");
  EXPECT_EQ(listed.installed(0).tenant(), "acme");
  EXPECT_EQ(listed.installed(0).revision(), 1);
  EXPECT_EQ(listed.installed(0).sequences(), 1);
  EXPECT_FALSE(listed.installed(0).after_rope());
  listed.Clear();
  ASSERT_TRUE(handlers_->ListCalibrations({}, &listed, As(shop_)).ok());
  EXPECT_EQ(listed.installed_size(), 0);
  v1::ListCalibrationsRequest of_other;
  of_other.set_model("other");
  ASSERT_TRUE(handlers_->ListCalibrations(of_other, &listed, As(admin_)).ok());
  EXPECT_EQ(listed.installed_size(), 0);
  request.mutable_layers()->RemoveLast();
  EXPECT_THAT(std::string(handlers_->InstallProfile(request, &response, As(acme_)).message()),
              HasSubstr("layers has 1 entries"));
  request.mutable_layers()->Clear();
  EXPECT_EQ(handlers_->InstallProfile(request, &response, As(acme_)).code(), absl::StatusCode::kNotFound);
}

// The planner knows the profile that sequences would have: the installed one, for the types that need one.
TEST_F(CalibrateHandlersTest, PlansUseTheInstalledProfile) {
  Start();
  ASSERT_TRUE(Register(Model(true), As(acme_)).ok());
  v1::PlanRequest plan;
  plan.set_model_name("traffic");
  plan.add_contexts(1024);
  plan.add_pairs("tide3/turbo3");
  plan.add_pairs("turbo3/turbo3");
  plan.set_key_centring(v1::KEY_CENTRING_CALIBRATED);
  v1::PlanResponse answer;
  const absl::Status without = handlers_->Plan(plan, &answer, As(acme_));
  EXPECT_EQ(without.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(without.message()), HasSubstr("install a profile"));

  const auto calibrated = [&](const std::string& pair) {
    answer.Clear();
    const absl::Status status = handlers_->Plan(plan, &answer, As(acme_));
    EXPECT_TRUE(status.ok()) << status;
    for (const v1::PlanCandidate& one : answer.contexts(0).candidates())
      if (one.pair() == pair) return one.calibrated();
    ADD_FAILURE() << pair << " is no candidate";
    return false;
  };
  const auto install = [&](bool after_rope) {
    ModelSpec with = testing::TrafficModel();
    with.groups[0].key_means.assign(2 * 2 * 32, 1.0f);
    with.groups[0].key_transforms = TransformsOf(test::TideProfile(with.groups[0].shape, 31));
    if (after_rope) with.groups[0].key_transforms.frequencies.clear();
    v1::Model proto;
    ToProto(with, {}, &proto);
    v1::InstallProfileRequest request;
    request.set_model("traffic");
    *request.mutable_layers() = proto.layers();
    v1::InstallProfileResponse response;
    const absl::Status status = handlers_->InstallProfile(request, &response, As(acme_));
    EXPECT_TRUE(status.ok()) << status;
  };
  install(false);
  EXPECT_TRUE(calibrated("tide3/turbo3"));
  // Sequences of types that need no profile have none, as the model is registered without means.
  EXPECT_FALSE(calibrated("turbo3/turbo3"));
  EXPECT_THAT(answer.assumptions(), ::testing::Contains(HasSubstr("before RoPE; it serves them alone")));
  install(true);
  EXPECT_TRUE(calibrated("tide3/turbo3"));
  EXPECT_THAT(answer.assumptions(), ::testing::Contains(HasSubstr("code them after RoPE")));
}

TEST(CalibrateConvertTest, ModelsWithProfilesAndRopeComeBack) {
  ModelSpec model = testing::TrafficModel();
  LayerGroupSpec sliding = model.groups[0];
  sliding.shape.layers = 1;
  sliding.window = 100;
  model.groups.push_back(sliding);
  model.layers = {{0, 0}, {1, 0}, {0, 1}};
  for (LayerGroupSpec& group : model.groups) {
    for (int i = 0; i < group.shape.layers * 64; i++) group.key_means.push_back(static_cast<float>(i));
    group.key_transforms = TransformsOf(test::TideProfile(group.shape, 31));
  }
  const std::vector<Rope> ropes(3, testing::TrafficRope());
  v1::Model proto;
  ToProto(model, ropes, &proto);
  EXPECT_EQ(FromProto(proto).value(), model);
  EXPECT_EQ(RopesFrom(proto).value(), ropes);
  EXPECT_EQ(RopesOf(model).size(), 3u);
  EXPECT_TRUE(RopesOf(testing::TrafficModel()).empty());
  proto.mutable_layers(1)->clear_rope();
  EXPECT_THAT(std::string(RopesFrom(proto).status().message()), HasSubstr("layers[1].rope"));
  for (const float frequency : {-1.0f, 3.5f, std::numeric_limits<float>::quiet_NaN()}) {
    v1::Model bad = Model(true);
    bad.mutable_layers(1)->mutable_rope()->set_frequencies(&frequency, sizeof frequency);
    EXPECT_THAT(std::string(RopesFrom(bad).status().message()), HasSubstr("radians a position"));
  }
  v1::Model bad = Model(true);
  bad.mutable_layers(0)->mutable_rope()->set_frequencies(std::string(4 * 17, '\0'));
  EXPECT_THAT(std::string(RopesFrom(bad).status().message()), HasSubstr("at most 16 pairs"));
}

}  // namespace
}  // namespace kvtide::service
