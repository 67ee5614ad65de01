#include "planner/model/weight_size.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/load_model.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

TEST(WeightSize, NamesAsPeopleWriteThem) {
  const std::pair<const char*, const char*> table[] = {{"Q4_K_M", "q4_k_m"},
                                                       {"UD-Q4_K_XL", "q4_k_m"},
                                                       {"IQ3_XXS", "iq3_xxs"},
                                                       {"Q8", "q8_0"},
                                                       {"int4", "w4a16"},
                                                       {"w4a16", "w4a16"},
                                                       {"awq", "awq"},
                                                       {"GPTQ", "gptq"},
                                                       {"fp8", "fp8"},
                                                       {"nvfp4", "nvfp4"},
                                                       {"mxfp4", "mxfp4"},
                                                       {"FP16", "f16"},
                                                       {"BF16", "bf16"},
                                                       {"4-bit", ""},
                                                       {"4bit", "w4a16"},
                                                       {"Q4", "q4_k_m"},
                                                       {"bnb-4bit", "nf4"},
                                                       {"fp8_dynamic", "fp8"},
                                                       {"q9", ""},
                                                       {"", ""}};
  for (const auto& [text, name] : table) EXPECT_EQ(WeightName(text), name) << text;
  for (const std::string& name : WeightNames()) EXPECT_EQ(WeightName(name), name);
}

// Safetensors checkpoints keep embedding and head in 16 bits. Published folders of an 8B Llama: AWQ 5.4 GiB,
// FP8 8.5, NVFP4 5.6; of gpt-oss-20b (experts alone in MXFP4) 13.8 GB.
TEST(WeightSize, QuantisedSafetensorsKeepEmbeddingAndHead) {
  const ModelGeometry llama = *FindModel("llama-3.1-8b");
  const auto gib = [&](const char* name) {
    return static_cast<double>(EstimateWeights(llama, name)->bytes) / kGiB;
  };
  EXPECT_NEAR(gib("awq"), 5.4, 0.1);
  EXPECT_NEAR(gib("gptq"), 5.4, 0.1);
  EXPECT_NEAR(gib("fp8"), 8.5, 0.1);
  EXPECT_NEAR(gib("nvfp4"), 5.6, 0.1);
  EXPECT_NEAR(gib("bf16"), 14.96, 0.01);
  ModelGeometry oss = *FindModel("gpt-oss-20b");
  oss.name = "another";  // no published file
  EXPECT_NEAR(static_cast<double>(EstimateWeights(oss, "mxfp4")->bytes), 13.8e9, 0.2e9);
}

TEST(WeightSize, BareNumbersAreRefusedWithASuggestion) {
  const ModelGeometry llama = *FindModel("llama-3.1-8b");
  for (const char* text : {"16", "4.5", "8"}) {
    const auto weights = LoadWeights(text, llama);
    ASSERT_FALSE(weights.ok()) << text;
    EXPECT_THAT(std::string(weights.status().message()), ::testing::HasSubstr(std::string(text) + "GB"))
        << text;
  }
  EXPECT_EQ(LoadWeights("16GB", llama)->bytes, 16'000'000'000);
  EXPECT_EQ(LoadWeights("4661211808", llama)->bytes, 4661211808);
}

TEST(WeightSize, ExpertsAreTheirShare) {
  const ModelGeometry moe = *FindModel("qwen3-30b-a3b");
  EXPECT_NEAR(static_cast<double>(ExpertBytes(moe, 10'000'000)) / 1e7, 28.99 / 30.5, 0.01);
  EXPECT_EQ(ExpertBytes(*FindModel("llama-3.1-8b"), 10'000'000), 0);
}

// llama.cpp's start-up log of Llama-3.1-8B in Q4_K_M: "CPU_Mapped model buffer size = 281.81 MiB".
TEST(WeightSize, LlamaCppLeavesTheTokenEmbeddingOnTheHost) {
  Weights weights = *EstimateWeights(*FindModel("llama-3.1-8b"), "q4_k_m");
  EXPECT_NEAR(static_cast<double>(weights.embedding_bytes) / kMiB, 281.81, 0.01);
  const int64_t file = weights.bytes;
  LeaveEmbeddingOnHost(&weights);
  EXPECT_NEAR(static_cast<double>(file - weights.bytes) / kMiB, 281.81, 0.01);
  EXPECT_THAT(weights.source, ::testing::HasSubstr("stays on the CPU"));
  // Doubles as head, or is not a GGUF file.
  EXPECT_EQ(EstimateWeights(*FindModel("gemma3-27b"), "q4_k_m")->embedding_bytes, 0);
  EXPECT_EQ(EstimateWeights(*FindModel("llama-3.1-8b"), "awq")->embedding_bytes, 0);
}

// vLLM's start-up logs say 64.4 to 66 GiB of gpt-oss-120b and about 13.7 GiB of gpt-oss-20b: the checkpoint's
// experts padded from 2880 to 3072 x 2944 for its kernels, the rest in 16 bits. Files of llama.cpp are
// smaller.
TEST(WeightSize, ServersLoadTheCheckpointNotTheGguf) {
  const auto gib = [](const char* model, WeightFiles files) {
    return static_cast<double>(EstimateWeights(*FindModel(model), "mxfp4", files)->bytes) / kGiB;
  };
  EXPECT_NEAR(gib("gpt-oss-120b", WeightFiles::kSafetensors), 65.8, 0.3);
  EXPECT_NEAR(gib("gpt-oss-20b", WeightFiles::kSafetensors), 13.7, 0.2);
  EXPECT_NEAR(gib("gpt-oss-120b", WeightFiles::kGguf), 59.0, 0.1);
}

// Vocabulary x width in 16 bits; the sources are those of models.csv.
TEST(WeightSize, EmbeddingAndHeadOfModelsWithoutPublishedFolders) {
  const std::pair<const char*, int64_t> table[] = {{"command-a", int64_t{256000} * 12288},
                                                   {"command-a-plus", int64_t{256000} * 4096},
                                                   {"mistral-small-3.1-24b", 2 * 131072 * 5120},
                                                   {"mistral-small-3.2-24b", 2 * 131072 * 5120},
                                                   {"exaone-4.0-32b", 2 * 102400 * 5120},
                                                   {"hy3-295b-a21b", 2 * 120832 * 4096},
                                                   {"seed-oss-36b", 2 * 155136 * 5120},
                                                   {"muse-glimmer-30b", int64_t{2} * 202048 * 6656},
                                                   {"llama3-70b", int64_t{2} * 128256 * 8192},
                                                   {"granite-4.1-30b", 2 * 100352 * 4096},
                                                   {"hunyuan-7b", 2 * 128167 * 4096},
                                                   {"hunyuan-a13b", 2 * 128167 * 4096},
                                                   {"ernie-4.5-300b-a47b", int64_t{2} * 103424 * 8192}};
  for (const auto& [name, half] : table) {
    const ModelGeometry model = *FindModel(name);
    EXPECT_NEAR(static_cast<double>(EstimateWeights(model, "fp8", WeightFiles::kSafetensors)->bytes),
                static_cast<double>(model.params_total + half), 16)
        << name;
  }
  // Where neither is published the bound is large, and said to be one.
  const auto bound = EstimateWeights(*FindModel("exaone-4.5-33b"), "awq", WeightFiles::kSafetensors);
  EXPECT_NEAR(static_cast<double>(bound->bytes) / 1e9, 23.4, 0.3);
  EXPECT_THAT(bound->source, ::testing::HasSubstr("was not found"));
}

// Experts of GLM-4.5-Air are 1408 wide, no multiple of 256: llama.cpp falls back to larger types for a third
// of them, and the Q4_K_M files that people load are of about 73 GB, not 65.
TEST(WeightSize, RowsThatKQuantsDoNotTakeAreLarger) {
  const double gb = static_cast<double>(EstimateWeights(*FindModel("glm-4.5-air"), "q4_k_m")->bytes) / 1e9;
  EXPECT_GT(gb, 70);
  EXPECT_LT(gb, 74);
  EXPECT_NEAR(static_cast<double>(EstimateWeights(*FindModel("qwen3-30b-a3b"), "q4_k_m")->bytes) / 1e9, 18.5,
              0.2);
}

// "expert_dtype": "fp4" in the config.json of DeepSeek-V4, the rest in FP8 with blocks.
TEST(WeightSize, ExpertsInFp4BesideFp8) {
  const auto weights =
      EstimateWeights(*FindModel("deepseek-v4-flash"), "mxfp4-fp8", WeightFiles::kSafetensors);
  EXPECT_NEAR(static_cast<double>(weights->bytes) / 1e9, 155.5, 1);
}

}  // namespace
}  // namespace kvtide::planner
