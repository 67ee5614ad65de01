#include "planner/csv.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

TEST(Csv, ReadsQuotesCommentsAndEmptyCells) {
  const auto rows =
      ParseCsv("# a comment\nname,size,note\nx,3,\"a, \"\"b\"\"\"\n\ny,,\n", "t.csv", {"name", "size"});
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ((*rows)[0].Text("note"), "a, \"b\"");
  EXPECT_EQ(*(*rows)[0].Integer("size"), 3);
  EXPECT_EQ(*(*rows)[1].Integer("size", 7), 7);
  EXPECT_EQ((*rows)[1].place(), "t.csv line 5");
}

TEST(Csv, ErrorsNameFileLineAndColumn) {
  EXPECT_THAT(std::string(ParseCsv("a,b\n1\n", "t.csv", {}).status().message()),
              HasSubstr("t.csv line 2: 1 fields"));
  EXPECT_THAT(std::string(ParseCsv("a\n", "t.csv", {"b"}).status().message()),
              HasSubstr("column 'b' is missing"));
  EXPECT_THAT(std::string(ParseCsv("a\n\"x\n", "t.csv", {}).status().message()),
              HasSubstr("quote is not closed"));
  EXPECT_THAT(std::string(ParseCsv("", "t.csv", {}).status().message()), HasSubstr("no header"));
  const auto rows = ParseCsv("a\nten\n", "t.csv", {"a"});
  EXPECT_THAT(std::string((*rows)[0].Integer("a").status().message()), HasSubstr("t.csv line 2: a is 'ten'"));
  EXPECT_THAT(std::string((*rows)[0].Number("a").status().message()), HasSubstr("expected a number"));
}

TEST(Csv, WritesWhatItReads) {
  const std::string field = "a,\"b\"";
  const auto rows = ParseCsv("h\n" + CsvField(field) + "\n", "t.csv", {});
  ASSERT_TRUE(rows.ok());
  EXPECT_EQ((*rows)[0].Text("h"), field);
}

}  // namespace
}  // namespace kvtide::planner
