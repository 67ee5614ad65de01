#include "planner/model/config_object.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(ConfigObject, FieldsHaveTheirKindOrAnError) {
  const auto config = ConfigObject::Parse(
      R"({"layers": 3, "zero": 0, "none": null, "half": 0.5, "less": -1, "huge": 1e300, "on": true,
          "name": "x", "inner": {"layers": 4}})");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(*config->Whole("layers", 7), 3);
  EXPECT_EQ(*config->Whole("missing", 7), 7);
  EXPECT_EQ(*config->Whole("none", 7), 7) << "null stands for the default";
  EXPECT_EQ(*config->Required("layers"), 3);
  EXPECT_EQ(*config->Positive("half", 1), 0.5);
  EXPECT_EQ(*config->Positive("none", 1), 1);
  EXPECT_TRUE(*config->Flag("on", false));
  EXPECT_TRUE(*config->Flag("missing", true));
  EXPECT_EQ(*config->Text("name", ""), "x");
  EXPECT_EQ(*config->Object("inner")->Whole("layers", 0), 4);
  EXPECT_FALSE(config->Object("missing")->Has("layers"));
  for (const char* field : {"half", "less", "huge", "on", "name", "inner"})
    EXPECT_THAT(Message(config->Whole(field, 0).status()),
                HasSubstr(std::string("field '") + field + "' is "));
  for (const char* field : {"zero", "none", "missing"})
    EXPECT_THAT(Message(config->Required(field).status()),
                HasSubstr(std::string("'") + field + "' is missing or 0"));
  for (const char* field : {"zero", "less", "on", "name"})
    EXPECT_THAT(Message(config->Positive(field, 1).status()), HasSubstr("a positive number"));
  EXPECT_THAT(Message(config->Flag("zero", false).status()), HasSubstr("true or false"));
  EXPECT_THAT(Message(config->Text("on", "").status()), HasSubstr("a text"));
  EXPECT_THAT(Message(config->Object("name").status()), HasSubstr("an object"));
}

TEST(ConfigObject, ReadsThePartAboutTextAndPythonsNumbers) {
  const auto config = ConfigObject::Parse(
      R"({"tie_word_embeddings": true, "text_config": {"hidden_size": 8, "time": [0, Infinity], "odd": NaN,
          "note": "NaN is \"Infinity\""}})");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(*config->Whole("hidden_size", 0), 8);
  EXPECT_TRUE(*config->Flag("tie_word_embeddings", false));
  EXPECT_FALSE(config->Has("odd"));
  EXPECT_EQ(*config->Text("note", ""), "NaN is \"Infinity\"");
  for (const char* bad : {"", "{", "[]", "7"}) EXPECT_FALSE(ConfigObject::Parse(bad).ok()) << bad;
}

TEST(ConfigObject, TheFamilyIsSaidOrFollowsFromTheArchitecture) {
  const auto family = [](const char* text) { return ConfigObject::Parse(text)->Family(); };
  EXPECT_EQ(family(R"({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]})"),
            "gemma3_text");
  EXPECT_EQ(family(R"({"architectures": ["Qwen2ForCausalLM"]})"), "qwen2");
  EXPECT_EQ(family(R"({"architectures": "Qwen2ForCausalLM"})"), "");
  EXPECT_EQ(family("{}"), "");
}

}  // namespace
}  // namespace kvtide::planner
