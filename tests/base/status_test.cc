#include "kernels/base/status.h"

#include <gtest/gtest.h>

#include <memory>

namespace kvtide {
namespace {

absl::StatusOr<int> Half(int x) {
  if (x % 2 != 0) return absl::InvalidArgumentError(absl::StrCat(x, " is odd"));
  return x / 2;
}

absl::StatusOr<int> Quarter(int x) {
  KVTIDE_ASSIGN_OR_RETURN(const int half, Half(x));
  KVTIDE_ASSIGN_OR_RETURN(int quarter, Half(half));
  return quarter;
}

absl::Status BothEven(int a, int b, int* reached) {
  KVTIDE_RETURN_IF_ERROR(Half(a).status());
  ++*reached;
  KVTIDE_RETURN_IF_ERROR(Half(b).status());
  ++*reached;
  return absl::OkStatus();
}

TEST(Status, AssignOrReturnGivesTheValueOrTheFirstError) {
  EXPECT_EQ(Quarter(12).value(), 3);
  EXPECT_EQ(Quarter(6).status(), absl::InvalidArgumentError("3 is odd"));
  EXPECT_EQ(Quarter(7).status(), absl::InvalidArgumentError("7 is odd"));
}

TEST(Status, AssignOrReturnMovesValues) {
  const auto make = []() -> absl::StatusOr<std::unique_ptr<int>> { return std::make_unique<int>(5); };
  const auto use = [&]() -> absl::StatusOr<int> {
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<int> owned, make());
    return *owned;
  };
  EXPECT_EQ(use().value(), 5);
}

TEST(Status, ReturnIfErrorStopsAtTheFirstError) {
  int reached = 0;
  EXPECT_TRUE(BothEven(2, 4, &reached).ok());
  EXPECT_EQ(reached, 2);
  reached = 0;
  EXPECT_FALSE(BothEven(2, 3, &reached).ok());
  EXPECT_EQ(reached, 1);
}

TEST(Status, AnnotatePutsAPhraseInFrontAndKeepsTheCode) {
  const absl::Status status = Annotate(absl::NotFoundError("no such file"), "reading config.json");
  EXPECT_EQ(status, absl::NotFoundError("reading config.json: no such file"));
  EXPECT_TRUE(Annotate(absl::OkStatus(), "anything").ok());
}

}  // namespace
}  // namespace kvtide
