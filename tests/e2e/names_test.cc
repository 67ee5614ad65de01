// Names that others chose, on a terminal: whatever stands in the name of a model or of a tenant, in a path or
// in an option, no command shows a control character of it, or a line that looks like one of its own. JSON
// keeps the name, and one thing has one name in the JSON of all commands.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "clients/cpp/calibration.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

// Clears the screen, rings, deletes, begins a sequence of C1, goes back in its line and forges one.
constexpr char kEvil[] =
    "evil\x1b[2J\x07\x7f\xc2\x9b"
    "31m\rX\nforged";

using Words = std::vector<std::string>;

struct Shown {
  int exit_code = -1;
  std::string out, all;  // standard output; with standard error before it
};

// As a shell runs it, so that the two are told apart.
Shown Kvtide(const Words& words) {
  const std::string folder = MakeFolder();
  Words command = {"/bin/sh", "-c", "exec \"$@\" > " + folder + "/out", "sh", Program("kvtide")};
  command.insert(command.end(), words.begin(), words.end());
  Shown shown;
  shown.exit_code = WaitForExit(StartProgram(command, folder + "/err"), 120);
  shown.out = ReadWhole(folder + "/out");
  shown.all = ReadWhole(folder + "/err") + shown.out;
  std::filesystem::remove_all(folder);
  return shown;
}

// Of a text: its first control character but line ends and tabs, and what stands around it.
std::string FirstControl(const std::string& text) {
  for (size_t i = 0; i < text.size(); i++) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool c1 = byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0;
    if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f || c1)
      return "byte " + std::to_string(byte) +
             " after: " + text.substr(i < 200 ? 0 : i - 200, std::min<size_t>(i, 200));
  }
  return "";
}

// The commands that the program has, as its help lists them.
std::set<std::string> Commands() {
  const std::string help = Kvtide({"--help"}).out;
  std::istringstream lines(help.substr(help.find("\nSubcommands:\n") + 14));
  std::set<std::string> names;
  for (std::string line; std::getline(lines, line) && line.size() > 2 && line[2] != ' ';)
    names.insert(line.substr(2, line.find(' ', 2) - 2));
  return names;
}

class NamesTest : public testing::Test {
 protected:
  void SetUp() override {
    daemon_ = TestDaemon::Start({"--metrics-address", "127.0.0.1:0"});
    client_ = daemon_->Connect();
    ASSERT_TRUE(client_->RegisterModel(SmallModel(kEvil)).ok());
    for (const char* tenant : {"", kEvil}) {
      const auto sequence = client_->CreateSequence(kEvil, {.pair = "q8_0/turbo4", .tenant = tenant});
      ASSERT_TRUE(sequence.ok()) << sequence.status();
      ASSERT_TRUE(client_->Append(*sequence, 0, Tokens(1, 0, 100).layers).ok());
      id_ = std::to_string(*sequence);
    }
    ASSERT_TRUE(client::Calibrations(*client_).Start(kEvil, {}).ok());
    folder_ = MakeFolder();
  }
  ~NamesTest() override { std::filesystem::remove_all(folder_); }

  Words Ask(Words words) const {
    words.insert(words.end(), {"--address", daemon_->address()});
    return words;
  }
  json Json(const Words& words) const {
    const Shown shown = Kvtide(words);
    EXPECT_EQ(shown.exit_code, 0) << shown.all;
    const json parsed = json::parse(shown.out, nullptr, false);
    EXPECT_FALSE(parsed.is_discarded()) << shown.out;
    return parsed;
  }

  std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<Client> client_;
  std::string id_, folder_;
};

TEST_F(NamesTest, NoCommandShowsAControlCharacterOfOne) {
  const std::string evil = kEvil, from = daemon_->address(), evil_file = folder_ + "/" + evil;
  std::ofstream(evil_file) << "{}";
  const std::string metrics = "http://" + daemon_->metrics_address() + "/metrics";
  const Words small = {"--device", "vram=4GiB,bandwidth=100GB/s", "--context", "1000"};
  const auto with = [](Words words, const Words& more) {
    words.insert(words.end(), more.begin(), more.end());
    return words;
  };
  // What each of them is asked: of the daemon with such names, or with such words.
  const std::map<std::string, std::vector<Words>> asked = {
      {"status",
       {Ask({"status"}), Ask({"status", "--output", "json"}), {"status", "--address", "unix:" + evil_file}}},
      {"top", {Ask({"top", "--count", "1", "--interval", "0.1"})}},
      {"seq",
       {Ask({"seq", "list"}), Ask({"seq", "list", "--output", "json"}), Ask({"seq", "show", id_}),
        Ask({"seq", "show", id_, "--output", "json"}), Ask({"seq", "list", "--model", evil}),
        Ask({"seq", "read", id_, "--out", evil_file + ".safetensors"}),
        Ask({"seq", "read", id_, "--out", evil_file}), Ask({"seq", "evict", id_, "--tier", evil})}},
      {"persist", {Ask({"persist", id_}), Ask({"persist", evil})}},
      {"doctor",
       {Ask({"doctor"}), Ask({"doctor", "--output", "json"}), {"doctor", "--address", "unix:" + evil_file}}},
      {"health", {Ask({"health"}), {"health", "--address", "unix:" + evil_file}}},
      {"config",
       {Ask({"config", "show", "--running"}),
        Ask({"config", "show", "--running", "--output", "json"}),
        {"config", "check", "--config", evil_file},
        {"config", "check", "--config", evil_file, "--output", "json"},
        {"config", "check", "--config", evil_file + "x"},
        {"config", "show", "--config", evil_file},
        {"config", "check", "--", "--default-pair", evil},
        Ask({"config", "reload"})}},
      {"calibrate",
       {{"calibrate", "--from-daemon", from},
        {"calibrate", "--from-daemon", from, "--output", "json"},
        {"calibrate", "--from-daemon", from, "--model", evil, "--out", evil_file},
        {"calibrate", "--from-daemon", from, "--model", evil, "--install"},
        {"calibrate", "--from-daemon", from, "--model", evil, "--stop"},
        {"calibrate", "--from-daemon", from, "--model", evil + "x", "--wait"},
        {"calibrate", "--model", evil_file, "--text", evil_file, "--out", folder_ + "/profile"}}},
      {"bench",
       {{"bench", "--address", "unix:" + evil_file, "--seconds", "0.5", "--no-progress"},
        Ask({"bench", "--pair", evil, "--seconds", "0.5", "--no-progress"})}},
      {"plan",
       {with({"plan", "--model", evil}, small), with({"plan", "--model", evil_file}, small),
        with({"plan", "verify", "--metrics", metrics, "--model", "SmolLM2-135M", "--engine", "kvtide",
              "--pairs", "q8_0/turbo4"},
             small),
        with({"plan", "--model", "SmolLM2-135M", "--output", evil}, small)}},
      {"fleet",
       {with({"fleet", "--model", "SmolLM2-135M", "--mix", evil_file},
             {"--device", "vram=4GiB,bandwidth=100GB/s"}),
        {"fleet", "replay", "--trace", evil_file},
        {"fleet", "replay", "--workload", evil}}},
      {"connect",
       {{"connect", "vllm", "--model", evil},
        {"connect", evil, "--model", "SmolLM2-135M"},
        {"connect", "vllm", "--model", "SmolLM2-135M", "--address", "unix:" + evil_file}}},
      {"eval",
       {{"eval", "--model", evil_file, "--text", evil_file, "--pairs", "f16/f16"},
        {"eval", "--captured", evil_file, "--pairs", "f16/f16"}}},
      {"capture",
       {{"capture", "--model", evil_file, "--text", evil_file, "--output", folder_ + "/captured"}}},
      {"demo",
       {{"demo", "--model", evil_file, "--no-progress"}, {"demo", "--kvtided", evil_file, "--no-progress"}}},
      {"completion", {{"completion", evil}}},
      {"manual", {{"manual", evil}}},
  };
  std::set<std::string> names;
  for (const auto& [name, calls] : asked) {
    names.insert(name);
    for (const Words& words : calls) {
      std::string line;
      for (const std::string& word : words) line += word + " ";
      const Shown shown = Kvtide(words);
      EXPECT_LT(shown.exit_code, 128) << line;
      EXPECT_EQ(FirstControl(shown.all), "") << line;
      EXPECT_EQ(("\n" + shown.all).find("\nforged"), std::string::npos) << line << shown.all;
    }
  }
  EXPECT_EQ(names, Commands()) << "a command that is not asked here";
  EXPECT_THAT(Kvtide(Ask({"seq", "list"})).out, HasSubstr("evil\\x1b[2J\\x07\\x7f\\x9b31m\\x0dX\\nforged"));
}

TEST_F(NamesTest, JsonKeepsThem) {
  EXPECT_EQ(Json(Ask({"status", "--output", "json"}))["models"][0], kEvil);
  EXPECT_EQ(Json(Ask({"seq", "show", id_, "--output", "json"}))[0]["tenant"], kEvil);
  EXPECT_EQ(Json({"calibrate", "--from-daemon", daemon_->address(), "--output",
                  "json"})["calibrations"][0]["model"],
            kEvil);
}

// Every field of the second that the first has too, has the same value; and the first has no others.
void ExpectPartOf(const json& part, const json& whole) {
  for (const auto& [name, value] : part.items()) {
    ASSERT_TRUE(whole.contains(name)) << name << " of " << part << " is called otherwise in " << whole;
    EXPECT_EQ(whole[name], value) << name;
  }
}

TEST_F(NamesTest, OneThingHasOneNameInTheJsonOfAllCommands) {
  const json status = Json(Ask({"status", "--output", "json"}));
  const json calibrate = Json({"calibrate", "--from-daemon", daemon_->address(), "--output", "json"});
  ASSERT_EQ(status["calibrations"].size(), 1u);
  ExpectPartOf(status["calibrations"][0], calibrate["calibrations"][0]);
  const json shown = Json(Ask({"seq", "show", id_, "--output", "json"}))[0];
  for (const json& sequence : status["sequence_list"]) {
    EXPECT_EQ(sequence.size(), shown.size());
    for (const auto& [name, value] : shown.items()) EXPECT_TRUE(sequence.contains(name)) << name;
  }
  // The demo tells of its daemon what status tells of any, and sizes of tiers as the configuration names
  // them.
  const json demo =
      Json({"demo", "--context", "300", "--generate", "4", "--no-reference", "--no-prefix", "--no-progress",
            "--output", "json", "--kvtided", Program("kvtided"), "--threads", "2"});
  for (const auto& [name, value] : demo["tiers"][0].items())
    EXPECT_TRUE(status["tiers"][0].contains(name)) << name;
  for (const char* counter : {"moves", "moved_bytes"}) {
    EXPECT_TRUE(demo.contains(counter)) << counter;
    EXPECT_TRUE(status["counters"].contains(counter)) << counter;
  }
  EXPECT_TRUE(demo.contains("device_tier_bytes") && demo.contains("host_tier_bytes")) << demo;
}

}  // namespace
}  // namespace kvtide::e2e
