// By which way clients come to a real daemon, as `kvtide status` and the metrics tell it.
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>

#include "clients/cpp/pool.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using nlohmann::json;

json StatusOf(const TestDaemon& daemon) {
  const std::string log = MakeFolder() + "/status";
  const pid_t pid = StartProgram(
      {Program("kvtide"), "status", "--address", daemon.address(), "--output", "json", "--timeout", "60"},
      log);
  EXPECT_EQ(WaitForExit(pid, 120), 0) << ReadWhole(log);
  json status = json::parse(ReadWhole(log), nullptr, false);
  std::filesystem::remove_all(std::filesystem::path(log).parent_path());
  return status;
}

TEST(Ways, StatusTellsByWhichWayClientsCome) {
  if (TestDevice() != "cpu") GTEST_SKIP() << "maps the CPU's pool";
  const auto daemon = TestDaemon::Start({"--share-pool"});
  const auto over_grpc = daemon->Connect();
  ASSERT_TRUE(over_grpc->RegisterModel(SmallModel()).ok());
  auto shared = Pool::Connect("shm:" + daemon->address());
  ASSERT_TRUE(shared.ok()) << shared.status();
  client::PoolOptions options;
  options.direct_device = "cpu";
  const auto direct = Pool::Connect("direct:" + daemon->address(), options);
  ASSERT_TRUE(direct.ok()) << direct.status();
  const auto sequence = (*shared)->CreateSequence("small", {.pair = "f16/f16"});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  for (int i = 0; i < 20; i++) ASSERT_TRUE((*shared)->GetServerInfo().ok());
  ASSERT_TRUE((*direct)->GetServerInfo().ok());

  const json status = StatusOf(*daemon);
  ASSERT_EQ(status["ways"].size(), 3u) << status.dump(2);
  const json &grpc = status["ways"][0], &memory = status["ways"][1], &mapped = status["ways"][2];
  EXPECT_EQ(grpc["way"], "grpc");
  EXPECT_GE(grpc["clients"], 2) << "the one above and `kvtide status`";
  EXPECT_GE(grpc["calls"], 2);
  EXPECT_GT(grpc["received_bytes"], 0);
  EXPECT_EQ(memory["way"], "shared_memory");
  EXPECT_EQ(memory["clients"], 1);
  EXPECT_GE(memory["calls"], 21);
  EXPECT_GT(memory["sent_bytes"], 0);
  EXPECT_EQ(mapped["way"], "direct");
  EXPECT_EQ(mapped["clients"], 1);
  EXPECT_GE(mapped["calls"], 1);
  const std::string pid = "pid=" + std::to_string(::getpid());
  bool found = false;
  for (const json& one : status["clients"])
    if (one["way"] == "shared_memory") {
      found = true;
      EXPECT_THAT(one["name"].get<std::string>(), testing::HasSubstr(pid));
      EXPECT_EQ(one["tenant"], "default");
      EXPECT_EQ(one["calls"], memory["calls"]) << "it is the only one";
    }
  EXPECT_TRUE(found) << status["clients"].dump(2);

  // Who has gone does not count, what it did stays.
  shared->reset();
  json later;
  for (int i = 0; i < 100; i++) {
    later = StatusOf(*daemon);
    if (later["ways"][1]["clients"] == 0) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  EXPECT_EQ(later["ways"][1]["clients"], 0);
  EXPECT_GE(later["ways"][1]["calls"], memory["calls"]);
}

}  // namespace
}  // namespace kvtide::e2e
