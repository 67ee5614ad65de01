#include "clients/cli/daemon_process.h"

#include <signal.h>

#include <chrono>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using std::chrono::milliseconds;

DaemonOptions SmallDaemon() {
  DaemonOptions options;
  options.program = KVTIDE_DAEMON_PROGRAM;
  options.host_bytes = 16 << 20;
  options.device = "cpu";
  return options;
}

// Who hears of a death by a closed connection asks before the process has gone; the answer must not be that
// it lives.
TEST(DaemonProcessTest, ADeathThatIsUnderWayIsWaitedFor) {
  const auto daemon = DaemonProcess::Start(SmallDaemon());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  EXPECT_FALSE((*daemon)->EndsWithin(milliseconds(0)));
  EXPECT_FALSE((*daemon)->EndsWithin(milliseconds(20)));
  std::thread killer([pid = (*daemon)->pid()] {
    std::this_thread::sleep_for(milliseconds(100));
    kill(pid, SIGKILL);
  });
  EXPECT_TRUE((*daemon)->EndsWithin(std::chrono::seconds(60)));
  killer.join();
  EXPECT_FALSE((*daemon)->running());
  EXPECT_TRUE((*daemon)->EndsWithin(milliseconds(0)));
}

TEST(DaemonProcessTest, GivesTheDaemonsLastWordsWhenItCannotStart) {
  DaemonOptions options = SmallDaemon();
  options.device = "no-such-device";
  const auto daemon = DaemonProcess::Start(options);
  ASSERT_FALSE(daemon.ok());
  EXPECT_THAT(
      std::string(daemon.status().message()),
      testing::AllOf(testing::HasSubstr("stopped while starting"), testing::HasSubstr("no-such-device")));
  options.program = "/bin/false";
  EXPECT_THAT(std::string(DaemonProcess::Start(options).status().message()),
              testing::HasSubstr("stopped while starting"));
}

}  // namespace
}  // namespace kvtide::cli
