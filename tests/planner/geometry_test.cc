#include "planner/model/geometry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

ModelGeometry Model(std::vector<LayerGeometry> layers) {
  ModelGeometry model;
  model.name = "test";
  model.layers = std::move(layers);
  return model;
}

LayerGeometry Shared(int with) {
  LayerGeometry layer;
  layer.kind = LayerKind::kShared;
  layer.shared_with = with;
  return layer;
}

const LayerGeometry kFullLayer{LayerKind::kFull, 2, 64, 64};

std::string Error(const ModelGeometry& model) { return std::string(ValidateGeometry(model).message()); }

TEST(Geometry, NamesTheLayerAndFieldThatMakesNoSense) {
  EXPECT_THAT(Error(Model({})), HasSubstr("no layers"));
  EXPECT_THAT(Error(Model({kFullLayer, {LayerKind::kFull, 0, 64, 64}})),
              HasSubstr("layer 1: n_kv_heads is 0"));
  EXPECT_THAT(Error(Model({{LayerKind::kFull, 1, -64, 64}})), HasSubstr("head_dim_k is -64"));
  EXPECT_THAT(Error(Model({{LayerKind::kSliding, 1, 64, 64, 0}})), HasSubstr("window is 0"));
  EXPECT_THAT(Error(Model({{LayerKind::kMla, 1, 576, 64}})), HasSubstr("expected 0 for a latent layer"));
}

TEST(Geometry, SharingMustPointToAnEarlierOwner) {
  EXPECT_EQ(Error(Model({kFullLayer, Shared(0)})), "");
  EXPECT_THAT(Error(Model({Shared(1), Shared(0)})), HasSubstr("cyclic"));
  EXPECT_THAT(Error(Model({Shared(0)})), HasSubstr("cyclic"));
  EXPECT_THAT(Error(Model({kFullLayer, Shared(7)})), HasSubstr("does not exist"));
  EXPECT_THAT(Error(Model({kFullLayer, Shared(0), Shared(1)})), HasSubstr("owns none"));
}

TEST(Geometry, GroupsLayersByShape) {
  const auto model = FindModel("gemma-4-26b-a4b");
  ASSERT_TRUE(model.ok());
  const std::vector<LayerGroup> groups = GroupLayers(*model);
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].kind, LayerKind::kSliding);
  EXPECT_EQ(groups[0].layers.size(), 25u);
  EXPECT_EQ(groups[1].layers, (std::vector<int>{5, 11, 17, 23, 29}));
  EXPECT_EQ(groups[1].head_dim_k, 512);
}

TEST(Geometry, SharedLayersAreInNoGroup) {
  const auto model = FindModel("gemma-4-e2b");
  ASSERT_TRUE(model.ok());
  size_t layers = 0;
  for (const LayerGroup& group : GroupLayers(*model)) layers += group.layers.size();
  EXPECT_EQ(layers, 15u);
}

TEST(Geometry, TensorParallelDividesHeadsAndReplicatesBelowOne) {
  const auto gemma = FindModel("gemma-4-31b");  // 16 sliding, 4 full KV heads
  const ModelGeometry four = ShardHeads(*gemma, 4), eight = ShardHeads(*gemma, 8);
  EXPECT_EQ(four.layers[0].n_kv_heads, 4);
  EXPECT_EQ(four.layers[5].n_kv_heads, 1);
  EXPECT_EQ(eight.layers[5].n_kv_heads, 1);
  const auto deepseek = FindModel("deepseek-v3");
  EXPECT_EQ(ShardHeads(*deepseek, 8).layers, deepseek->layers);  // the latent is replicated
}

TEST(Geometry, LayerSlicesCoverTheFullestDevice) {
  const auto llama = FindModel("llama-3.1-8b");
  EXPECT_EQ(FullestLayerSlice(*llama, 3).layers.size(), 11u);
  const auto e2b = FindModel("gemma-4-e2b");
  const ModelGeometry slice = FullestLayerSlice(*e2b, 2);
  EXPECT_TRUE(ValidateGeometry(slice).ok());
  EXPECT_LT(slice.layers.size(), e2b->layers.size());
}

TEST(Geometry, GroupedQueryRatioIsOfTheFirstOwner) {
  EXPECT_EQ(GroupedQueryRatio(*FindModel("qwen2.5-3b")), 8);
  EXPECT_EQ(GroupedQueryRatio(*FindModel("gemma-4-26b-a4b")), 2);
}

}  // namespace
}  // namespace kvtide::planner
