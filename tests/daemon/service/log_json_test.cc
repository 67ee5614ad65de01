#include "daemon/log_json.h"

#include <nlohmann/json.hpp>
#include <random>

#include "daemon/failure_log.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(LogJson, PairsBecomeFieldsAndWordsTheMessage) {
  EXPECT_EQ(
      LogLineAsJson(
          absl::FromUnixMillis(1'700'000'000'123), "warning",
          "call failed method=Append us=12 request=007 caller=unix:uid=0,pid=7 message=\"no \\\"room\\\"\""),
      "{\"time\":\"2023-11-14T22:13:20.123Z\",\"level\":\"warning\",\"message\":\"call failed\",\"method\":"
      "\"Append\",\"us\":12,\"request\":\"007\",\"caller\":\"unix:uid=0,pid=7\",\"text\":\"no "
      "\\\"room\\\"\"}");
  EXPECT_EQ(LogLineAsJson(absl::UnixEpoch(), "info", ""),
            "{\"time\":\"1970-01-01T00:00:00.000Z\",\"level\":\"info\",\"message\":\"\"}");
}

// One field has one type, or a store of logs refuses lines; and an id is the one that other tools print.
TEST(LogJson, IdsAreTextsHoweverLargeTheyAre) {
  for (const std::string id : {"7", "816478152102552936", "18446744073709551615"}) {
    const auto json = nlohmann::json::parse(
        LogLineAsJson(absl::UnixEpoch(), "info", "x sequence=" + id + " request=" + id + " us=" + "12"));
    EXPECT_EQ(json["sequence"], id);
    EXPECT_EQ(json["request"], id);
    EXPECT_EQ(json["us"], 12);
  }
}

// Whatever clients put into a text: it is one line of JSON, and the text comes back as it was.
TEST(LogJson, AnyTextStaysOneLineAndComesBack) {
  std::mt19937 random(7);
  for (int round = 0; round < 2000; round++) {
    std::string text(random() % 40, 0);
    for (char& c : text) c = static_cast<char>("\"\\\n\x1b =ax\x7f{}\t"[random() % 12]);
    const std::string line =
        LogLineAsJson(absl::UnixEpoch(), "info", "x message=\"" + Escaped(text) + "\" tail=1");
    EXPECT_EQ(line.find('\n'), std::string::npos);
    const auto json = nlohmann::json::parse(line);
    EXPECT_EQ(json["text"], text);
    EXPECT_EQ(json["tail"], 1);
    EXPECT_EQ(json["message"], "x");
  }
  EXPECT_TRUE(
      nlohmann::json::accept(LogLineAsJson(absl::UnixEpoch(), "info", "\xff\xfe a=\xff b=\"open \\x")));
}

}  // namespace
}  // namespace kvtide
