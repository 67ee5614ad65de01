#include "clients/cli/terminal/terminal.h"

#include "absl/status/status.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/file_checks.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cli/terminal/table.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

TEST(TerminalTest, PaintsOnlyWithColours) {
  EXPECT_EQ(Terminal(true, false, 80).Painted("x", Paint::kRed), "x");
  EXPECT_EQ(Terminal(true, true, 80).Painted("x", Paint::kRed), "\x1b[31mx\x1b[0m");
  EXPECT_EQ(DisplayWidth("\x1b[31mh\u00e9\x1b[0m"), 2);
}

TEST(TerminalTest, ControlCharactersAreEscaped) {
  const std::string evil = "a\x1b[2J\x07\x7f\xc2\x9b\tb\nc\u00e9";
  EXPECT_EQ(Printable(evil), "a\\x1b[2J\\x07\\x7f\\x9b\\x09b\\nc\u00e9");
  EXPECT_EQ(PrintableLines(evil), "a\\x1b[2J\\x07\\x7f\\x9b\tb\nc\u00e9");
  const std::string painted = Terminal(true, true, 80).Painted("x", Paint::kRed);
  EXPECT_EQ(PrintableLines(painted), painted) << "colours stay";
  EXPECT_EQ(PrintableLines("\x1b[31"), "\\x1b[31") << "one that does not end";
  EXPECT_EQ(JsonText({{"name", evil}}, -1),
            "{\"name\":\"a\\u001b[2J\\u0007\\u007f\\u009b\\tb\\nc\u00e9\"}\n");
  EXPECT_EQ(nlohmann::json::parse(JsonText({{"name", evil}}))["name"], evil);
  EXPECT_EQ(JsonText({{"name", "\xff"}}, -1), "{\"name\":\"\xef\xbf\xbd\"}\n");
}

TEST(TerminalTest, FailuresAreOneMessageEach) {
  testing::internal::CaptureStderr();
  SayFailed("kvtide x", absl::OkStatus());
  SayFailed("kvtide x", absl::NotFoundError("no 'a\x1b[31m\nkvtide x: forged'\n"));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "kvtide x: no 'a\\x1b[31m\n  kvtide x: forged'\n");
}

TEST(TerminalTest, NumbersReadWell) {
  EXPECT_EQ(CountText(950), "950");
  EXPECT_EQ(CountText(12345), "12.3k");
  EXPECT_EQ(CountText(4.1e6), "4.1M");
  EXPECT_EQ(DurationText(8.2), "8 s");
  EXPECT_EQ(DurationText(125), "2:05");
  EXPECT_EQ(DurationText(3725), "1:02:05");
}

TEST(FileChecksTest, AFileThatCannotBeWrittenIsRefusedBeforeTheWork) {
  const std::string folder = testing::TempDir();
  const auto check = [](std::string path) { return WritableFile()(path); };
  EXPECT_EQ(check(""), "");
  EXPECT_EQ(check("file_in_this_folder"), "");
  EXPECT_EQ(check(folder + "/new"), "");
  EXPECT_THAT(check(folder), testing::HasSubstr("is a folder"));
  EXPECT_THAT(check(folder + "/none/new"), testing::HasSubstr("there is no folder " + folder));
}

TEST(TableTest, AlignsTextsLeftAndNumbersRight) {
  Table table({{"pair", Align::kLeft}, {"bits"}});
  table.AddRow({"q8_0/q8_0", "8.5"});
  table.AddRow({"\u00e9", "16"}, Paint::kGreen);
  EXPECT_EQ(table.Render(Terminal(false, false, 80)),
            "pair       bits\nq8_0/q8_0   8.5\n\u00e9            16\n");
}

TEST(ProgressTest, SaysSpeedAndTimeLeftWithinTheWidth) {
  const ProgressState state{"eval", "tokens", 25000, 100000, 10};
  const std::string line = RenderProgress(state, 100);
  EXPECT_THAT(line, testing::HasSubstr(" 25 %"));
  EXPECT_THAT(line, testing::HasSubstr("25.0k/100.0k tokens"));
  EXPECT_THAT(line, testing::HasSubstr("2.5k/s"));
  EXPECT_THAT(line, testing::HasSubstr("30 s left"));
  EXPECT_LE(DisplayWidth(line), 100);
  EXPECT_THAT(RenderProgress(state, 30), testing::Not(testing::HasSubstr("[")));
  EXPECT_THAT(RenderProgress({"x", "y", 0, 0, 0}, 80), testing::HasSubstr("100 %"));
}

}  // namespace
}  // namespace kvtide::cli
