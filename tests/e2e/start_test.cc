// Starting kvtided: what can be wrong has an answer and an exit code (2 bad input, 1 cannot start), and
// nothing else breaks.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Start : public ::testing::Test {
 protected:
  Start() : folder_(MakeFolder()) {}
  ~Start() override { std::filesystem::remove_all(folder_); }

  TestDaemon::Result RunWithConfig(const std::string& json) {
    std::ofstream(folder_ + "/config.json") << json;
    return TestDaemon::RunToEnd({"--config", folder_ + "/config.json"});
  }
  std::vector<std::string> Arguments(const std::string& address) const {
    return {"--listen",      address, "--device",          "cpu", "--device-memory", "1MiB",
            "--host-memory", "0",     "--metrics-address", "off"};
  }

  const std::string folder_;
};

TEST_F(Start, BadConfigFilesAreExplained) {
  const struct {
    const char* json;
    const char* message;
  } kCases[] = {
      {"{\"device_mem\": \"1GiB\"}", "device_mem"},
      {"{\"device_memory\": ", "config.json"},
      {"[]", "config.json"},
      {"{\"device_memory\": \"lots\"}", "device_memory"},
      {"{\"device_memory\": \"-1GiB\"}", "device_memory"},
      {"{\"device\": \"tpu\"}", "use cpu, cuda:0, a list"},
      {"{\"default_pair\": \"q9\"}", "turbo4"},
      {"{\"log_level\": \"loud\"}", "use trace, debug, info, warning, error"},
      {"{\"listen\": [\"nowhere\"]}", "unix:/path/to/socket or host:port"},
      {"{\"max_message_bytes\": 5}", "allowed are 4096"},
      {"{\"exact_window\": {\"first_blocks\": -1}}", "exact_window"},
      {"{\"device\": \"cpu\", \"device_memory\": \"900TiB\"}", "lower --device-memory"},
  };
  for (const auto& c : kCases) {
    const TestDaemon::Result result = RunWithConfig(c.json);
    EXPECT_FALSE(result.started) << c.json;
    EXPECT_TRUE(result.exit_code == 2 || result.exit_code == 1) << c.json << " gave " << result.exit_code;
    EXPECT_THAT(result.output, HasSubstr(c.message)) << c.json;
  }
  EXPECT_THAT(RunWithConfig("{\"device_mem\": 1}").output,
              HasSubstr("known fields: listen, device, device_memory"));
  EXPECT_EQ(TestDaemon::RunToEnd({"--config", folder_ + "/none.json"}).exit_code, 2);
  EXPECT_EQ(TestDaemon::RunToEnd({"--no-such-flag"}).exit_code, 2);
}

TEST_F(Start, ConfigFilesFlagsAndVersion) {
  std::ofstream(folder_ + "/good.json")
      << "{\"device\": \"cpu\", \"device_tier_bytes\": 2097152, \"host_memory\": \"0\", "
         "\"metrics_address\": \"off\", \"default_pair\": \"turbo4/turbo4\"}";
  const auto daemon =
      TestDaemon::Start({"--config", folder_ + "/good.json", "--host-memory", "1MiB", "--device-memory", ""});
  const auto info = daemon->Connect()->GetServerInfo();
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->default_pair, "turbo4/turbo4");
  ASSERT_EQ(info->tiers.size(), 2u);
  EXPECT_EQ(info->tiers[0].capacity_bytes, 2 << 20);
  EXPECT_EQ(info->tiers[1].capacity_bytes, 1 << 20);  // the flag won
  EXPECT_EQ(info->process_id, daemon->pid());
  const TestDaemon::Result version = TestDaemon::RunToEnd({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.output, HasSubstr("kvtided " + info->version));
  EXPECT_THAT(TestDaemon::RunToEnd({"--config", folder_ + "/good.json", "--print-config"}).output,
              HasSubstr("\"default_pair\": \"turbo4/turbo4\""));
  EXPECT_EQ(TestDaemon::RunToEnd({"--help"}).exit_code, 0);
}

TEST_F(Start, APortInUse) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(name);
  ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&name), size), 0);
  ASSERT_EQ(::listen(fd, 1), 0);
  ASSERT_EQ(::getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size), 0);
  const std::string address = "127.0.0.1:" + std::to_string(ntohs(name.sin_port));
  TestDaemon::Result result = TestDaemon::RunToEnd(Arguments(address));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, AllOf(HasSubstr("address in use"), HasSubstr(address), HasSubstr("--listen")));
  // The metrics port too.
  std::vector<std::string> arguments = Arguments("unix:" + folder_ + "/s");
  arguments.back() = address;
  result = TestDaemon::RunToEnd(arguments);
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, AllOf(HasSubstr(address), HasSubstr("--metrics-address")));
  ::close(fd);
}

TEST_F(Start, TcpWithAnyPortAnswers) {
  const auto daemon = TestDaemon::Start({"--listen", "127.0.0.1:0"});
  const size_t begin = daemon->ready_line().find("127.0.0.1:");
  ASSERT_NE(begin, std::string::npos) << daemon->ready_line();
  const std::string address =
      daemon->ready_line().substr(begin, daemon->ready_line().find_first_of(" ,", begin) - begin);
  const auto client = Client::Connect(address);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE((*client)->CheckHealth().ok());
  // A second daemon on the same port is refused, not joined.
  EXPECT_THAT(TestDaemon::RunToEnd(Arguments(address)).output, HasSubstr("address in use"));
}

TEST_F(Start, ASocketHasOneDaemonAndAStaleOneIsReplaced) {
  const auto daemon = TestDaemon::Start();
  const TestDaemon::Result second = TestDaemon::RunToEnd(Arguments(daemon->address()));
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_THAT(second.output,
              AllOf(HasSubstr("address in use"), HasSubstr("another kvtided"), HasSubstr("--listen")));
  EXPECT_TRUE(daemon->Connect()->GetStats().ok()) << "the second daemon has hurt the first";

  const std::string path = daemon->socket_path();
  daemon->Kill();
  ASSERT_TRUE(std::filesystem::exists(path)) << "SIGKILL leaves the socket";
  const auto next = TestDaemon::Start({"--listen", daemon->address()});
  EXPECT_TRUE(Client::Connect(daemon->address()).ok());
}

TEST_F(Start, PlacesWhereNoSocketCanBe) {
  std::ofstream(folder_ + "/file") << "precious";
  EXPECT_THAT(TestDaemon::RunToEnd(Arguments("unix:" + folder_ + "/file")).output,
              HasSubstr("is not a socket"));
  EXPECT_EQ(ReadWhole(folder_ + "/file"), "precious");
  EXPECT_THAT(TestDaemon::RunToEnd(Arguments("unix:/" + std::string(200, 'x'))).output,
              HasSubstr("at most 107 bytes"));
  EXPECT_THAT(TestDaemon::RunToEnd(Arguments("unix:/proc/nowhere/s")).output, HasSubstr("/proc/nowhere"));
}

TEST_F(Start, AGpuThatIsNotThere) {
  std::vector<std::string> arguments = Arguments("unix:" + folder_ + "/s");
  arguments[3] = "cuda:77";
  const TestDaemon::Result result = TestDaemon::RunToEnd(arguments);
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, AllOf(HasSubstr("cuda:77"), HasSubstr("device cpu works everywhere")));
}

// Without --device a GPU is used when there is one, and the log says why there is none. A GPU that CUDA is
// told not to show is one that is not there.
TEST_F(Start, WithoutAGpuTheCpuServesAndTheLogSaysWhy) {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);
  const auto daemon = TestDaemon::Start({"--device", "auto"});
  unsetenv("CUDA_VISIBLE_DEVICES");
  EXPECT_THAT(daemon->ready_line(), HasSubstr("device tier 4.0 MiB on cpu"));
  EXPECT_THAT(daemon->Log(), HasSubstr("no GPU is used: "));
}

TEST_F(Start, AClientWithoutADaemonSaysWhatToCheck) {
  client::ClientOptions options;
  options.connect_timeout = absl::Milliseconds(50);
  const absl::Status status = Client::Connect("unix:" + folder_ + "/nobody.sock", options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("nobody.sock"), HasSubstr("is kvtided running?")));
}

}  // namespace
}  // namespace kvtide::e2e
