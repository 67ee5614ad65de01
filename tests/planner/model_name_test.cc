#include "planner/model/model_name.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/load_model.h"

namespace kvtide::planner {
namespace {

struct Typed {
  const char* text;
  const char* model;
  const char* weights;
};

TEST(ModelName, WhatPeopleTypeIsFound) {
  const Typed table[] = {
      {"Qwen/Qwen3-32B", "Qwen3-32B", ""},
      {"Qwen/Qwen3-32B-AWQ", "Qwen3-32B", "awq"},
      {"https://huggingface.co/Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-2507", ""},
      {"Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B", ""},
      {"Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen3-30B-A3B-2507", ""},
      {"meta-llama/Llama-3.1-8B-Instruct", "Llama3.1-8B", ""},
      {"meta-llama/Meta-Llama-3.1-70B-Instruct", "Llama3.1-70B", ""},
      {"meta-llama/Llama-3.3-70B-Instruct", "Llama3.3-70B", ""},
      {"meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama4-Scout", ""},
      {"unsloth/Qwen3-32B-GGUF:Q4_K_M", "Qwen3-32B", "q4_k_m"},
      {"unsloth/gemma-3-27b-it-GGUF:UD-Q4_K_XL", "Gemma3-27B", "q4_k_m"},
      {"qwen3:32b", "Qwen3-32B", ""},
      {"qwen3:32b-q4_K_M", "Qwen3-32B", "q4_k_m"},
      {"llama3.1:8b-instruct-q8_0", "Llama3.1-8B", "q8_0"},
      {"gemma3:27b-it-qat", "Gemma3-27B", ""},
      {"gpt-oss:20b", "gpt-oss-20b", ""},
      {"openai/gpt-oss-120b", "gpt-oss-120b", ""},
      {"google/gemma-4-26B-A4B-it", "Gemma4-26B-A4B", ""},
      {"deepseek-ai/DeepSeek-R1", "DeepSeek-V3", ""},
      {"deepseek-ai/DeepSeek-V3.2-Exp", "DeepSeek-V3.2", ""},
      {"deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Llama3.3-70B", ""},
      {"moonshotai/Kimi-K2-Instruct-0905", "Kimi-K2", ""},
      {"moonshotai/Kimi-K2-Thinking", "Kimi-K2-Thinking", ""},
      {"zai-org/GLM-4.6-FP8", "GLM-4.6", "fp8"},
      {"zai-org/GLM-4.5-Air", "GLM-4.5-Air", ""},
      {"MiniMaxAI/MiniMax-M2", "MiniMax-M2", ""},
      {"nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Nemotron-3-Nano-30B-A3B", "bf16"},
      {"nvidia/Llama-3_3-Nemotron-Super-49B-v1", "Llama-3.3-Nemotron-Super-49B", ""},
      {"CohereLabs/c4ai-command-a-03-2025", "Command-A", ""},
      {"mistralai/Mistral-Small-3.2-24B-Instruct-2506", "Mistral-Small-3.2-24B", ""},
      {"mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3", ""},
      {"mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B", ""},
      {"microsoft/phi-4", "Phi-4-14B", ""},
      {"nvidia/Qwen3.6-27B-NVFP4", "Qwen3.6-27B", "nvfp4"},
      {"Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B", ""},
      {"Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL-8B", ""},
  };
  for (const Typed& typed : table) {
    const auto model = FindModel(typed.text);
    ASSERT_TRUE(model.ok()) << typed.text << ": " << model.status();
    EXPECT_EQ(model->name, typed.model) << typed.text;
    EXPECT_EQ(ReadModelName(typed.text).weights, typed.weights) << typed.text;
  }
}

TEST(ModelName, EveryNameAndAliasIsFoundAndNoneTwice) {
  for (const ModelGeometry& model : CatalogueModels()) EXPECT_EQ(FindModel(model.name)->name, model.name);
}

TEST(ModelName, FamiliesListTheirSizesInOrder) {
  const std::string message(FindModel("qwen3").status().message());
  EXPECT_THAT(message, ::testing::HasSubstr("family"));
  const size_t small = message.find("Qwen3-0.6B"), middle = message.find("Qwen3-8B"),
               large = message.find("Qwen3-235B");
  EXPECT_LT(small, middle);
  EXPECT_LT(middle, large);
  EXPECT_NE(large, std::string::npos);
}

TEST(ModelName, ModelsWithoutPublicGeometryAreRefusedWithTheReasonAndTheNearest) {
  const auto refused = FindModel("zai-org/GLM-4.7");
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("not found in public"));
  EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("GLM-4.6"));
  EXPECT_FALSE(FindModel("acme/Nothing-13B").ok());
}

TEST(ModelName, AliasesAreSaid) {
  EXPECT_THAT(FindModel("deepseek-ai/DeepSeek-R1")->assumptions,
              ::testing::Contains(::testing::HasSubstr("shape of DeepSeek-V3")));
  EXPECT_TRUE(FindModel("Qwen/Qwen3-32B")->assumptions.empty());
}

TEST(ModelName, WeightsOfANameAreLoaded) {
  const auto model = LoadModel("Qwen/Qwen3-32B-AWQ");
  ASSERT_TRUE(model.ok() && model->weights.has_value());
  EXPECT_THAT(model->weights->source, ::testing::HasSubstr("embedding and head"));
  EXPECT_FALSE(LoadModel("Qwen/Qwen3-32B")->weights.has_value());
}

}  // namespace
}  // namespace kvtide::planner
