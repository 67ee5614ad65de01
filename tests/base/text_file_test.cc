#include "kernels/base/text_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace kvtide {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(TextFile, GivesTheBytesAsTheyAre) {
  const std::string path = testing::TempDir() + "/kvtide_text_file";
  std::ofstream(path) << "one\r\ntwo";
  const auto text = ReadTextFile("text", path);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(*text, "one\r\ntwo");
}

TEST(TextFile, SaysWhatWhereAndWhyNot) {
  const auto reason = [](const std::string& path) {
    const auto text = ReadTextFile("certificate", path);
    EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(text.status().message());
  };
  EXPECT_THAT(reason("/nonexistent/x.pem"),
              AllOf(HasSubstr("the certificate /nonexistent/x.pem"), HasSubstr("No such file or directory")));
  const std::string path = testing::TempDir() + "/kvtide_text_file_empty";
  std::ofstream{path};
  EXPECT_THAT(reason(path), HasSubstr("it is empty or no file"));
}

}  // namespace
}  // namespace kvtide
