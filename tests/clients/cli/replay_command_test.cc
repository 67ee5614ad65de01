// `kvtide fleet replay` as main.cc runs it: what it prints, what it refuses and why, beside `kvtide fleet`.
#include "clients/cli/plan/replay_command.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "clients/cli/plan/fleet_command.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli/run_words.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;
using testing::Not;

Outcome Fleet(std::vector<std::string> words) {
  words.insert(words.begin(), "fleet");
  return RunWords(std::move(words), [](CLI::App& app, int* exit_code) {
    AddFleetCommand(app, exit_code);
    AddReplayCommand(*app.get_subcommand("fleet"), exit_code);
  });
}

// 1,200 lookups.
const std::vector<std::string> kSmall = {"replay", "--workload", "conversation", "--scale", "0.02"};
std::vector<std::string> With(std::vector<std::string> words) {
  words.insert(words.begin(), kSmall.begin(), kSmall.end());
  return words;
}

TEST(ReplayCommand, ComparesPoliciesAndSizes) {
  const Outcome outcome = Fleet(With({"--host-memory", "16GiB,64GiB"}));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* part : {"conversation (generated, seed 1)", "tokens found", "16.0 GiB", "64.0 GiB", "lru",
                           "s3-fifo", "not the trace itself"})
    EXPECT_THAT(outcome.out, HasSubstr(part));
  EXPECT_THAT(outcome.out, Not(HasSubstr("from disk")));
  EXPECT_THAT(outcome.out, Not(HasSubstr("\x1b["))) << "no colours where nobody looks";
}

TEST(ReplayCommand, JsonHasEveryNumber) {
  const Outcome outcome = Fleet(With({"--host-memory", "16GiB", "--disk", "1TiB", "--output", "json"}));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const nlohmann::json json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["schema"], "kvtide.replay/1");
  EXPECT_EQ(json["requests"], 241);
  ASSERT_EQ(json["results"].size(), AllEvictionKinds().size());
  for (const nlohmann::json& row : json["results"]) {
    EXPECT_EQ(row["host_bytes"], int64_t{16} << 30);
    EXPECT_EQ(row["disk_bytes"], int64_t{1} << 40);
    EXPECT_GT(row["token_hit_ratio"], 0);
    EXPECT_LT(row["token_hit_ratio"], 1);
    EXPECT_EQ(row["hit_tokens"].get<int64_t>(), 512 * row["hit_blocks"].get<int64_t>());
    EXPECT_GT(row["host_to_disk_bytes"], 0);
    EXPECT_EQ(row["host_hit_blocks"].get<int64_t>() + row["disk_hit_blocks"].get<int64_t>(),
              row["hit_blocks"].get<int64_t>());
  }
}

TEST(ReplayCommand, TheSameTwiceAndChosenPolicies) {
  const Outcome first = Fleet(With({"--eviction", "lru"})), again = Fleet(With({"--eviction", "lru"}));
  EXPECT_EQ(first.exit_code, 0);
  EXPECT_EQ(first.out, again.out);
  EXPECT_THAT(first.out, Not(HasSubstr("s3-fifo")));
  EXPECT_NE(Fleet(With({"--eviction", "lru", "--seed", "2"})).out, first.out);
}

TEST(ReplayCommand, PlaysAFileOfMooncakes) {
  const std::string path = testing::TempDir() + "/kvtide_" + std::to_string(getpid()) + ".jsonl";
  std::ofstream(path) << R"({"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
{"timestamp": 5, "input_length": 1536, "output_length": 1, "hash_ids": [1, 2, 3]}
)";
  const Outcome outcome = Fleet({"replay", "--trace", path, "--output", "json", "--host-memory", "1GiB"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(nlohmann::json::parse(outcome.out)["results"][0]["hit_blocks"], 2);
  std::ofstream(path) << "no json\n";
  const Outcome bad = Fleet({"replay", "--trace", path});
  EXPECT_EQ(bad.exit_code, 2);
  EXPECT_THAT(bad.err, HasSubstr("line 1: no JSON object"));
  std::remove(path.c_str());
}

TEST(ReplayCommand, SaysWhatIsWrong) {
  const auto wrong = [](const std::vector<std::string>& words, const char* part) {
    const Outcome outcome = Fleet(words);
    EXPECT_EQ(outcome.exit_code, 2) << part;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, HasSubstr(part));
  };
  wrong({"replay"}, "say what to replay");
  wrong({"replay", "--workload", "conversation", "--trace", "x"}, "say what to replay");
  wrong({"replay", "--workload", "chat"}, "known: conversation, tool-agent, synthetic");
  wrong({"replay", "--trace", "/no/such/file"}, "No such file or directory");
  wrong(With({"--eviction", "arc"}), "use lru or s3-fifo");
  wrong(With({"--host-memory", "much"}), "--host-memory");
  wrong(With({"--host-memory", "0"}), "no size above 0");
  wrong(With({"--host-memory", "1MiB"}), "smaller than one block");
  wrong(With({"--output", "xml"}), "known: table, json");
  EXPECT_EQ(Fleet(With({"--scale", "-1"})).exit_code, 2);
  // The fleet's own job still wants a mix.
  EXPECT_EQ(Fleet({"--model", "llama-3.1-8b"}).exit_code, 2);
}

}  // namespace
}  // namespace kvtide::cli
