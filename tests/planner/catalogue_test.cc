#include "planner/model/catalogue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "planner/model/weight_size.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

TEST(Catalogue, HasAllModelsAndCards) {
  EXPECT_EQ(CatalogueModels().size(), 139u);
  EXPECT_EQ(CatalogueGpus().size(), 45u);
  for (const ModelGeometry& model : CatalogueModels()) {
    EXPECT_TRUE(ValidateGeometry(model).ok()) << model.name;
    EXPECT_TRUE(FindModel(model.name).ok());
  }
}

TEST(Catalogue, NamesForgiveCaseAndSeparators) {
  EXPECT_EQ(FindModel("gemma-4-26b-a4b")->name, "Gemma4-26B-A4B");
  EXPECT_EQ(FindModel("llama_3.1 8B")->name, "Llama3.1-8B");
  EXPECT_EQ(FindGpu("rtx5080")->name, "RTX 5080");
  EXPECT_EQ(FindGpu("4090")->name, "RTX 4090");
  EXPECT_EQ(FindGpu("h100-sxm")->name, "H100 SXM");
}

TEST(Catalogue, UnknownNamesListNearOnes) {
  EXPECT_THAT(std::string(FindModel("gemma-4-27b").status().message()), HasSubstr("Gemma4-26B-A4B"));
  EXPECT_THAT(std::string(FindGpu("RTX 5085").status().message()), HasSubstr("vram=16GiB"));
  EXPECT_THAT(std::string(FindGpu("RTX 5085").status().message()), HasSubstr("RTX 5080"));
  // A few, even when nothing is like it.
  const std::string message(FindModel("nosuch").status().message());
  EXPECT_EQ(std::count(message.begin(), message.end(), ','), 6) << message;
}

TEST(Catalogue, CardsKnowWhatTheDriverReports) {
  EXPECT_EQ(FindGpu("RTX 5080")->UsableBytes(), 16303 * kMiB);
  EXPECT_FALSE(FindGpu("RTX 5080")->driver_reserve_is_guess);
  EXPECT_TRUE(FindGpu("RTX 4090")->driver_reserve_is_guess);
}

TEST(Catalogue, WeightsArePublishedOrParametersTimesBits) {
  const auto published = EstimateWeights(*FindModel("gemma-4-26b-a4b"), "Q4_0");
  EXPECT_EQ(published->bytes, 14'400'000'000);
  EXPECT_EQ(published->provenance, Provenance::kCalibrated);
  const auto computed = EstimateWeights(*FindModel("llama-3.1-8b"), "q8_0");
  EXPECT_EQ(computed->bytes, 8'030'000'000 * 17 / 16);
  EXPECT_EQ(computed->provenance, Provenance::kFormula);
  EXPECT_THAT(std::string(EstimateWeights(*FindModel("gemma-3-4b"), "q4_0").status().message()),
              HasSubstr("unknown"));
  EXPECT_THAT(std::string(EstimateWeights(*FindModel("llama-3.1-8b"), "q9").status().message()),
              HasSubstr("q4_k_m"));
}

TEST(Catalogue, RecurrentStatesSumToTheTable) {
  int64_t state = 0;
  const auto model = FindModel("qwen3.5-27b");
  for (const LayerGeometry& layer : model->layers) state += layer.state_bytes;
  EXPECT_EQ(state, 156893184);
}

TEST(Catalogue, LowConfidenceIsSaid) {
  EXPECT_THAT(FindModel("gemma-4-e2b")->assumptions, ::testing::Contains(HasSubstr("confidence medium")));
  EXPECT_TRUE(FindModel("llama-3.1-8b")->assumptions.empty());
}

}  // namespace
}  // namespace kvtide::planner
