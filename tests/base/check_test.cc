#include "kernels/base/check.h"

#include <gtest/gtest.h>

namespace kvtide {
namespace {

TEST(CheckDeathTest, NamesTheConditionThePlaceAndTheValues) {
  const int tokens = 65;
  EXPECT_DEATH(KVTIDE_CHECK(tokens <= 64, "tokens ", tokens),
               "tokens <= 64 at .*check_test.cc:[0-9]+ tokens 65");
  EXPECT_DEATH(KVTIDE_CHECK(tokens == 0), "check failed: tokens == 0");
}

TEST(Check, EvaluatesOnceAndItsMessageOnlyOnFailure) {
  int evaluations = 0, messages = 0;
  const auto message = [&] {
    messages++;
    return "never";
  };
  KVTIDE_CHECK(++evaluations == 1, message());
  EXPECT_EQ(evaluations, 1);
  EXPECT_EQ(messages, 0);
}

}  // namespace
}  // namespace kvtide
