#include "planner/near_names.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtide::planner {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const std::vector<std::string> kNames = {"Llama3.1-8B", "Llama3.1-70B", "Qwen3-8B", "Gemma4-26B-A4B",
                                         "RTX 4090",    "RTX 4080",     "H100 SXM"};

TEST(NearNames, CaseAndSeparatorsDoNotCount) {
  EXPECT_EQ(NormalName("Llama_3.1 8B"), NormalName("llama3.1-8b"));
  EXPECT_EQ(NearNames("LLAMA-3.1-8b", kNames, 1).at(0), "Llama3.1-8B");
}

TEST(NearNames, SharedWordsAndFewChangedLettersAreNear) {
  EXPECT_THAT(NearNames("llama-3.1-9b", kNames, 2), ElementsAre("Llama3.1-8B", "Llama3.1-70B"));
  EXPECT_THAT(NearNames("lama3.1-8b", kNames, 1), ElementsAre("Llama3.1-8B"));
  EXPECT_THAT(NearNames("gemma-4-27b", kNames, 1), ElementsAre("Gemma4-26B-A4B"));
  EXPECT_THAT(NearNames("4091", kNames, 1), ElementsAre("RTX 4090"));
  EXPECT_THAT(NearNames("meta-llama/Llama-3.1-8B-Instruct", kNames, 1), ElementsAre("Llama3.1-8B"));
}

TEST(NearNames, NeverMoreThanAskedFor) {
  EXPECT_THAT(NearNames("nosuch", kNames, 3), SizeIs(3));
  EXPECT_THAT(NearNames("", kNames, 100), SizeIs(kNames.size()));
  EXPECT_THAT(NearNames("x", {}, 5), IsEmpty());
}

TEST(NearNames, UnknownArgumentsAreNamedWithWhatWasMeant) {
  const std::vector<std::string> known = {"--pairs", "--metrics-address", "--help", "eval", "plan"};
  EXPECT_EQ(UnknownArguments({"--pair", "a/b"}, known), "no option --pair; did you mean --pairs?");
  EXPECT_EQ(UnknownArguments({"--metrics-listen=127.0.0.1:1"}, known),
            "no option --metrics-listen; did you mean --metrics-address?");
  EXPECT_EQ(UnknownArguments({"--nothing-like-it"}, known), "no option --nothing-like-it");
  EXPECT_EQ(UnknownArguments({"pln"}, known), "'pln' was not expected; did you mean plan?");
  EXPECT_EQ(UnknownArguments({"x"}, {}), "'x' was not expected");
}

}  // namespace
}  // namespace kvtide::planner
