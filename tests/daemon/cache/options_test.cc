// Options, model geometries and sequence options are checked before anything is built on them.
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using OptionsTest = CacheTest;

TEST_F(OptionsTest, BadCacheOptionsSayWhatIsWrong) {
  const auto create = [&](auto change, const std::string& part) {
    CacheOptions options = options_;
    options.tiers.push_back({"device", device_.get(), kMiB, false});
    change(options);
    return IsError(KvCache::Create(options).status(), absl::StatusCode::kInvalidArgument, part);
  };
  EXPECT_TRUE(create([](CacheOptions& o) { o.tiers.clear(); }, "0 tiers"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.tiers[0].backend = nullptr; }, "no backend"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.tiers[0].capacity_bytes = 100; }, "100 bytes"));
  EXPECT_TRUE(
      create([](CacheOptions& o) { o.tiers.push_back(o.tiers[0]); }, "two tiers are called 'device'"));
  EXPECT_TRUE(create(
      [&](CacheOptions& o) {
        o.tiers.push_back({"host", host_.get(), kMiB, false});
        o.tiers.push_back({"device", host_.get(), kMiB, false});
      },
      "only the first tier may lie on several devices"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.limits.low_watermark = 0.99; }, "watermarks"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.max_sequences = 0; }, "every limit"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.move_piece_bytes = 1; }, "move_piece_bytes"));
  EXPECT_TRUE(create([](CacheOptions& o) { o.clock = nullptr; }, "clock"));
}

TEST_F(OptionsTest, ASlabThatCannotBeHadNamesItsTier) {
  device_->Fail(FaultyBackend::kAllocateSlab);
  options_.tiers.push_back({"device", device_.get(), kMiB, false});
  EXPECT_TRUE(IsError(KvCache::Create(options_).status(), absl::StatusCode::kInternal,
                      "tier 'device' of 1048576 bytes"));
}

TEST_F(OptionsTest, ModelsAreRegisteredOnceAndNeverChange) {
  options_.max_models = 2;
  Start();
  const ModelId id = Register(SmallModel("a"));
  EXPECT_EQ(Register(SmallModel("a")), id);
  ModelSpec other = SmallModel("a");
  other.groups[0].heads = 8;
  EXPECT_TRUE(IsError(cache_->RegisterModel(other).status(), absl::StatusCode::kFailedPrecondition,
                      "another geometry"));
  EXPECT_EQ(*cache_->FindModel("a"), id);
  EXPECT_EQ(*cache_->GetModel(id), SmallModel("a"));
  EXPECT_EQ(cache_->FindModel("b").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(cache_->GetModel(9).status().code(), absl::StatusCode::kNotFound);
  Register(SmallModel("b"));
  EXPECT_TRUE(IsError(cache_->RegisterModel(SmallModel("c")).status(), absl::StatusCode::kResourceExhausted,
                      "max_models"));
}

TEST_F(OptionsTest, BadGeometriesSayWhatIsWrong) {
  Start();
  const auto reject = [&](auto change, const std::string& part) {
    ModelSpec spec = MixedModel();
    change(spec);
    return IsError(cache_->RegisterModel(spec).status(), absl::StatusCode::kInvalidArgument, part);
  };
  EXPECT_TRUE(reject([](ModelSpec& s) { s.name = ""; }, "name"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups.clear(); }, "0 layer groups"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups[0].heads = 0; }, "layer group 0: 0 query heads"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups[1].heads = 3; }, "multiple of the 2 KV heads"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups[1].window = -1; }, "window -1"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups[1].shape.head_dim_k = 24; }, "head dims K 24"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.layers.pop_back(); }, "2 layers, but its groups have 3"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.layers[2] = s.layers[0]; }, "layer 2 is in group 1 at 0"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.layers[2].group = 7; }, "does not exist"));
  EXPECT_TRUE(reject([](ModelSpec& s) { s.groups[0].softcap = -1; }, "softcap"));
}

TEST_F(OptionsTest, SequencesHaveALimitAndTheirIdsAreNotUsedAgain) {
  options_.max_sequences = 2;
  Start();
  const ModelId model = Register(SmallModel());
  const SequenceId a = *cache_->CreateSequence(model, {}), b = *cache_->CreateSequence(model, {});
  EXPECT_NE(a, b);
  EXPECT_TRUE(IsError(cache_->CreateSequence(model, {}).status(), absl::StatusCode::kResourceExhausted,
                      "max_sequences"));
  EXPECT_TRUE(
      IsError(cache_->ForkSequence(a).status(), absl::StatusCode::kResourceExhausted, "max_sequences"));
  ASSERT_TRUE(cache_->CloseSequence(a).ok());
  EXPECT_TRUE(IsError(cache_->CloseSequence(a), absl::StatusCode::kNotFound, "was closed"));
  EXPECT_TRUE(
      IsError(cache_->CloseSequence(12345), absl::StatusCode::kNotFound, "sequence 12345 does not exist"));
  EXPECT_TRUE(IsError(cache_->CreateSequence(77, {}).status(), absl::StatusCode::kNotFound, "model 77"));
  SequenceOptions options;
  options.exact_window.last_blocks = -1;
  EXPECT_TRUE(IsError(cache_->CreateSequence(model, options).status(), absl::StatusCode::kInvalidArgument,
                      "-1 last blocks"));
  EXPECT_NE(*cache_->CreateSequence(model, {}), a);
}

TEST_F(OptionsTest, PredictedBytesAreTheBytesAllocated) {
  Start(32 * kMiB);
  for (const ModelSpec& model : {SmallModel(), MixedModel()})
    for (const char* pair : {"f16", "turbo4", "q8_0/turbo3"})
      for (const ExactWindow window :
           {ExactWindow{1, 2}, ExactWindow{0, 0}, ExactWindow{2, 0}, ExactWindow{0, 3}})
        for (const bool at_once : {false, true}) {
          SequenceOptions options = WithPair(pair, window);
          options.seal_at_once = at_once;
          const SequenceId id = *cache_->CreateSequence(Register(model), options);
          int64_t length = 0;
          for (const int64_t tokens : {1, 63, 64, 65, 100, 7, 200, 64}) {
            std::vector<float> rows(static_cast<size_t>(tokens) * 128, 0.5f);
            std::vector<LayerKv> layers;
            for (size_t l = 0; l < model.layers.size(); l++)
              layers.push_back(
                  {static_cast<int>(l), {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0});
            AppendCall call;
            call.sequence = id;
            call.start_position = length;
            call.tokens = tokens;
            call.layers = layers;
            ASSERT_TRUE(cache_->Append(call).ok());
            length += tokens;
            const PredictedBytes predicted = *KvCache::Predict(model, options, length);
            const SequenceInfo info = *cache_->GetSequence(id);
            ASSERT_EQ(TotalBytes(info), predicted.bytes) << model.name << " " << pair << " " << length;
            ASSERT_EQ(info.blocks_by_tier[0], predicted.exact_blocks + predicted.coded_blocks);
            ASSERT_EQ(UsedBytes(cache_->Stats()), predicted.bytes);
            ASSERT_EQ(cache_->MemoryOfSequences().predicted_bytes, predicted.bytes);
            ASSERT_EQ(cache_->MemoryOfSequences().held_bytes, predicted.bytes);
          }
          ASSERT_TRUE(cache_->CloseSequence(id).ok());
        }
}

}  // namespace
}  // namespace kvtide::testing
