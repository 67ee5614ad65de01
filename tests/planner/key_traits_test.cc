#include "planner/model/key_traits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/config_json.h"
#include "planner/model/load_model.h"

namespace kvtide::planner {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(KeyTraits, TheLongestBeginningOfANameCounts) {
  EXPECT_EQ(KeyTraitsOfFamily("Qwen3-32B").norm, Answer::kYes);
  EXPECT_EQ(KeyTraitsOfFamily("qwen3moe").norm, Answer::kYes);
  EXPECT_EQ(KeyTraitsOfFamily("Qwen2.5-7B").bias, Answer::kYes);
  EXPECT_EQ(KeyTraitsOfFamily("GLM-4.5-Air").norm, Answer::kNo);
  EXPECT_EQ(KeyTraitsOfFamily("GLM-4.5").norm, Answer::kYes);
  EXPECT_EQ(KeyTraitsOfFamily("Llama4-Scout").norm, Answer::kUnknown);
  EXPECT_EQ(KeyTraitsOfFamily("nobody-7b").bias, Answer::kUnknown);
}

TEST(KeyTraits, AConfigSaysMoreThanItsFamily) {
  const char* config = R"({"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": true})";
  const auto model = GeometryFromConfigJson(config, "m", {});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->key_traits.bias, Answer::kYes);
  EXPECT_EQ(model->key_traits.norm, Answer::kNo);
}

TEST(KeyTraits, ModelsResembleEachOtherByHeadsNormAndBiases) {
  const auto shape = [](const char* name) { return KeyShapeOf(*FindModel(name)); };
  EXPECT_THAT(Differences(shape("llama-3.1-8b"), shape("smollm2-135m")), IsEmpty());
  EXPECT_THAT(Differences(shape("qwen3-8b"), shape("gemma3-270m")), IsEmpty());
  EXPECT_THAT(Differences(shape("qwen2.5-7b"), shape("smollm2-135m")), ElementsAre("keys with biases"));
  EXPECT_THAT(Differences(shape("gemma3-270m"), shape("smollm2-135m")),
              ElementsAre(HasSubstr("head dim 256, not 64"), "keys with a norm"));
  EXPECT_THAT(Differences(shape("llama-3.1-8b"), KeyShape{}), IsEmpty());  // nothing known, nothing said
  EXPECT_EQ(KeyShapeOf(*FindModel("deepseek-v3")).head_dim, 0);            // a latent is no head
}

}  // namespace
}  // namespace kvtide::planner
