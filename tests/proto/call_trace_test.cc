#include "proto/call_trace.h"

#include <string>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(CallTrace, RequestIdsAreWhatOneLineOfALogCanHold) {
  for (const std::string id : {"a", "chat-17/3", "req_1.2:3+4=", "cmpl-0af7651916cd43dd8448eb211c80319c-0"})
    EXPECT_TRUE(IsRequestId(id)) << id;
  EXPECT_TRUE(IsRequestId(std::string(128, 'x')));
  EXPECT_FALSE(IsRequestId(std::string(129, 'x')));
  for (const std::string id :
       {"", "two words", "line\nbreak", "\x1b[31m", "quote\"", "\xc3\xa4", "back\\slash"})
    EXPECT_FALSE(IsRequestId(id)) << id;
  EXPECT_FALSE(IsRequestId(std::string_view("nul\0", 4)));
}

// https://www.w3.org/TR/trace-context/#traceparent-header
TEST(CallTrace, TraceIdsAsTheStandardWritesThem) {
  const std::string trace = "0af7651916cd43dd8448eb211c80319c", good = "00-" + trace + "-b7ad6b7169203331-01";
  EXPECT_EQ(TraceIdOf(good), trace);
  // Later versions may say more, behind a dash.
  EXPECT_EQ(TraceIdOf("cc" + good.substr(2)), trace);
  EXPECT_EQ(TraceIdOf("cc" + good.substr(2) + "-what-the-future-brings"), trace);
  EXPECT_EQ(TraceIdOf("cc" + good.substr(2) + ".what"), "");
  EXPECT_EQ(TraceIdOf(good + "-what"), "");
  EXPECT_EQ(TraceIdOf("ff" + good.substr(2)), "");
  EXPECT_EQ(TraceIdOf("00-00000000000000000000000000000000-b7ad6b7169203331-01"), "");
  EXPECT_EQ(TraceIdOf("00-" + trace + "-0000000000000000-01"), "");
  EXPECT_EQ(TraceIdOf("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"), "");
  EXPECT_EQ(TraceIdOf(""), "");
  // Any one character that is another one: as the standard writes it, or none.
  for (size_t i = 0; i < good.size(); i++) {
    for (const char c : {'\n', '\x1b', 'g', ' ', 'A', '-'}) {
      std::string bad = good;
      if (bad[i] == c) continue;
      bad[i] = c;
      EXPECT_EQ(TraceIdOf(bad), "") << bad;
    }
    EXPECT_EQ(TraceIdOf(good.substr(0, i)), "");
  }
}

}  // namespace
}  // namespace kvtide
