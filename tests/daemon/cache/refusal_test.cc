// What a status is refused for: by what it knows of itself, else by its code.
#include "daemon/cache/call/refusal.h"

#include <set>
#include <string>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(Refusal, EveryReasonHasANameOfItsOwn) {
  const std::set<std::string> names(kRefusalNames.begin(), kRefusalNames.end());
  EXPECT_EQ(names.size(), kRefusals);
  EXPECT_EQ(names.count(""), 0u);
  EXPECT_STREQ(NameOf(Refusal::kUnauthenticated), "unauthenticated");
  EXPECT_STREQ(NameOf(Refusal::kCallMemory), "call_memory");
  EXPECT_STREQ(NameOf(Refusal::kDeadline), "deadline");
  EXPECT_STREQ(NameOf(Refusal::kUnimplemented), "unimplemented");
  static_assert(static_cast<size_t>(Refusal::kUnimplemented) + 1 == kRefusals);
}

TEST(Refusal, IsWhatTheStatusKnowsElseItsCode) {
  EXPECT_EQ(RefusalOf(absl::ResourceExhaustedError("full")), Refusal::kNoRoom);
  for (size_t i = 0; i < kRefusals; i++) {
    const auto why = static_cast<Refusal>(i);
    const absl::Status status = Refused(why, absl::ResourceExhaustedError("no"));
    EXPECT_EQ(RefusalOf(status), why) << NameOf(why);
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(status.message(), "no");
    EXPECT_EQ(RefusalOf(AnnotateRefused(status, "items[3]")), why);
    EXPECT_EQ(AnnotateRefused(status, "items[3]").message(), "items[3]: no");
  }
  EXPECT_EQ(RefusalOf(absl::NotFoundError("")), Refusal::kNotFound);
  EXPECT_EQ(RefusalOf(absl::OutOfRangeError("")), Refusal::kInvalidArgument);
  EXPECT_EQ(RefusalOf(absl::AbortedError("")), Refusal::kConflict);
  EXPECT_EQ(RefusalOf(AnnotateRefused(absl::AbortedError(""), "x")), Refusal::kConflict);
}

TEST(Refusal, WhatFailsOrIsGivenUpIsNone) {
  EXPECT_FALSE(RefusalOf(absl::OkStatus()).has_value());
  for (const absl::StatusCode code : {absl::StatusCode::kCancelled, absl::StatusCode::kUnknown,
                                      absl::StatusCode::kInternal, absl::StatusCode::kDataLoss})
    EXPECT_FALSE(RefusalOf(absl::Status(code, "")).has_value());
}

}  // namespace
}  // namespace kvtide
