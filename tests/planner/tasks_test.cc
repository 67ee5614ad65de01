// Tasks as buyers, operators and users of other programs type them (tests/golden/planner/tasks.tsv): the
// verdict, and words of the answer, are those of what is publicly known.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

namespace kvtide {
namespace {

std::vector<std::string> Split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

TEST(PlanTasks, AnswersAreWhatIsPubliclyKnown) {
  std::ifstream file(KVTIDE_SOURCE_DIR "/tests/golden/planner/tasks.tsv");
  int tasks = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#' || line.rfind("exit\t", 0) == 0) continue;
    const std::vector<std::string> fields = Split(line, '\t');
    ASSERT_EQ(fields.size(), 4u) << line;
    SCOPED_TRACE(fields[2] + "   (" + fields[3] + ")");
    FILE* pipe = popen((std::string(KVTIDE_PLAN_CLI) + " " + fields[2] + " 2>&1 < /dev/null").c_str(), "r");
    ASSERT_NE(pipe, nullptr);
    std::string out;
    char piece[4096];
    while (const size_t n = fread(piece, 1, sizeof(piece), pipe)) out.append(piece, n);
    const int status = pclose(pipe);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), std::stoi(fields[0])) << out;
    for (const std::string& words : Split(fields[1], '|')) EXPECT_THAT(out, testing::HasSubstr(words));
    ++tasks;
  }
  EXPECT_GE(tasks, 50);
}

}  // namespace
}  // namespace kvtide
