// `kvtide bench` over real daemons: every way and tier is measured, nothing stays behind, and what cannot be
// measured says so. How fast anything is decides nothing here.
#include "clients/cli/bench/bench_command.h"

#include <memory>
#include <string>
#include <vector>

#include "clients/cli/bench/bench_report.h"
#include "clients/cli/daemon_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/cli/run_words.h"

namespace kvtide::cli {
namespace {

using nlohmann::json;
using testing::HasSubstr;

Outcome Bench(std::vector<std::string> words) {
  words.insert(words.begin(), {"bench", "--no-progress"});
  return RunWords(std::move(words), AddBenchCommand);
}

json Row(const json& report, const std::string& subject, const std::string& call) {
  for (const json& row : report["results"])
    if (row["subject"] == subject && row["call"] == call) return row;
  return json();
}

TEST(BenchCommand, MeasuresEveryWayAndTier) {
  const Outcome outcome = Bench({"--seconds", "0.5", "--output", "json", "--device", "cpu", "--kvtided",
                                 KVTIDE_DAEMON_PROGRAM, "--pair", "turbo4/turbo4"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json report = json::parse(outcome.out);
  EXPECT_EQ(report["daemon"], "its own");
  EXPECT_EQ(report["pair"], "turbo4/turbo4");
  const std::vector<std::pair<std::string, std::string>> wanted = {
      {"memory", "copy"},
      {"memory", "copy by all threads"},
      {"memory", "read by all threads"},
      {"memory", "word"},
      {"Unix socket", "round trip"},
      {"file", "write"},
      {"file", "read"},
      {"embedded", "append + attend a token"},
      {"embedded", "write"},
      {"direct", "begin + end a step"},
      {"shared memory", "append + attend a token"},
      {"shared memory", "begin + end a step"},
      {"shared memory", "read"},
      {"gRPC, session", "begin + end a step"},
      {"gRPC", "append + attend a token"},
      {"gRPC", "write"},
      {"device", "attend"},
      {"host", "attend"},
      {"host", "move there"},
      {"host", "move back"},
      {"disk", "attend, brought in first"},
      {"disk", "move there"},
      {"disk", "move back"}};
  for (const auto& [subject, call] : wanted) {
    const json row = Row(report, subject, call);
    ASSERT_FALSE(row.is_null()) << subject << ": " << call;
    ASSERT_GT(row["samples"], 0) << row;
    EXPECT_GT(row["p50_seconds"], 0.0) << row;
    EXPECT_GE(row["p99_seconds"], row["p50_seconds"]) << row;
  }
  // What moves is the sequence: all its layers, window and tail with them.
  const json attend = Row(report, "host", "attend"), move = Row(report, "host", "move there");
  EXPECT_EQ(move["bytes"].get<int64_t>() / 8, attend["bytes"]);
  EXPECT_EQ(Row(report, "disk", "move back")["bytes"], move["bytes"]);
  EXPECT_EQ(move["roofline"], "memory: copy by all threads");
  EXPECT_GT(move["share_of_roofline"], 0.0);
}

TEST(BenchCommand, LeavesNothingBehindInARunningDaemon) {
  DaemonOptions options;
  options.program = KVTIDE_DAEMON_PROGRAM;
  options.device = "cpu";
  options.device_bytes = int64_t{320} << 20;
  options.host_bytes = int64_t{192} << 20;
  const auto daemon = DaemonProcess::Start(options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const Outcome outcome = Bench({"--seconds", "0.5", "--address", (*daemon)->address()});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr((*daemon)->address()));
  // Its pool on a CPU is not shared.
  EXPECT_THAT(outcome.out, HasSubstr("direct: not measured: "));
  EXPECT_THAT(outcome.out, HasSubstr("move there"));
  EXPECT_THAT(outcome.out, testing::Not(HasSubstr("file")));  // no disk tier, no files
  const auto client = Client::Connect((*daemon)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE((*client)->ListSequences()->empty());
  EXPECT_TRUE((*client)->GetServerInfo()->models.empty());
}

TEST(BenchCommand, SaysWhatIsWrong) {
  EXPECT_EQ(Bench({"--seconds", "0"}).exit_code, 2);
  EXPECT_EQ(Bench({"--output", "xml"}).exit_code, 2);
  EXPECT_EQ(Bench({"--address", "unix:/x", "--device", "cpu"}).exit_code, 2);
  const Outcome nobody = Bench({"--address", "unix:/nonexistent/kvtided.sock"});
  EXPECT_EQ(nobody.exit_code, 1);
  EXPECT_THAT(nobody.err, HasSubstr("there is no socket /nonexistent/kvtided.sock"));
  const Outcome folder = Bench({"--disk-folder", "/nonexistent", "--kvtided", KVTIDE_DAEMON_PROGRAM});
  EXPECT_EQ(folder.exit_code, 2);
  EXPECT_THAT(folder.err, HasSubstr("cannot make a folder in /nonexistent"));
  const Outcome pair = Bench({"--pair", "q9_0/q8_0", "--device", "cpu", "--kvtided", KVTIDE_DAEMON_PROGRAM});
  EXPECT_EQ(pair.exit_code, 2);
  EXPECT_THAT(pair.err, HasSubstr("q9_0"));
  DaemonOptions small;
  small.program = KVTIDE_DAEMON_PROGRAM;
  small.device = "cpu";
  small.device_bytes = small.host_bytes = int64_t{24} << 20;
  const auto daemon = DaemonProcess::Start(small);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const Outcome full = Bench({"--address", (*daemon)->address()});
  EXPECT_EQ(full.exit_code, 1);
  EXPECT_THAT(full.err, HasSubstr("device"));
}

TEST(BenchReport, SharesAreOfTheRoofline) {
  BenchReport report;
  const auto add = [&](BenchPart part, const char* call, int64_t bytes, double seconds,
                       const char* roofline) {
    BenchRow row;
    row.part = part;
    row.subject = "memory";
    row.call = call;
    row.bytes = bytes;
    row.samples = 1;
    row.p50_seconds = row.p99_seconds = seconds;
    row.roofline = roofline;
    report.rows.push_back(row);
    return report.rows.back();
  };
  add(BenchPart::kRoofline, "copy", 1000, 1e-6, "");
  add(BenchPart::kRoofline, "word", 0, 1e-7, "");
  const BenchRow write = add(BenchPart::kWay, "write", 4000, 8e-6, "memory: copy");
  const BenchRow talk = add(BenchPart::kWay, "talk", 0, 5e-7, "memory: word");
  const BenchRow other = add(BenchPart::kWay, "other", 0, 1, "GPU: copy");
  EXPECT_DOUBLE_EQ(report.ShareOfRoofline(write), 0.5);
  EXPECT_DOUBLE_EQ(report.ShareOfRoofline(talk), 0.2);
  EXPECT_EQ(report.ShareOfRoofline(other), 0);
  report.pair = "f16/f16";
  report.daemon = "unix:/a\x1b[1m";
  report.disk_folder = "/\xff";
  const std::string text = RenderTable(report, Terminal(false, false, 100));
  EXPECT_THAT(text, HasSubstr("50 % of memory: copy"));
  EXPECT_THAT(text, HasSubstr("5.0x the time of memory: word"));
  EXPECT_THAT(text, testing::Not(HasSubstr("\x1b")));
  EXPECT_EQ(json::parse(RenderJson(report))["results"].size(), 5u);
}

}  // namespace
}  // namespace kvtide::cli
