// Crowds and idlers: many connections, connections that say little or nothing, messages of any announced
// size. Each meets the right end, and somebody else is served meanwhile: all of its calls are answered, and
// how long they took is recorded (the properties of the test; `--gtest_output=json:FILE` writes them). Time
// decides nothing but what is a hundred times too long.
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"
#include "tests/wire/http2_client.h"

namespace kvtide::e2e {
namespace {

using ::testing::HasSubstr;

// How an HTTP/2 client begins: the preface and empty SETTINGS.
const std::string kHello("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33);

// A socket and nothing above it: 10,000 of them cost the test little.
class RawConnection {
 public:
  explicit RawConnection(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::strncpy(name.sun_path, path.c_str(), sizeof(name.sun_path) - 1);
    open_ = fd_ >= 0 && ::connect(fd_, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0;
  }
  ~RawConnection() {
    if (fd_ >= 0) ::close(fd_);
  }
  RawConnection(RawConnection&& other) noexcept : fd_(std::exchange(other.fd_, -1)), open_(other.open_) {}
  bool Send(const std::string& bytes) {
    open_ =
        open_ && ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
    return open_;
  }
  // Whether the daemon has not closed it; what it said is read away.
  bool Open() {
    char bytes[4096];
    for (ssize_t size; open_ && (size = ::recv(fd_, bytes, sizeof(bytes), MSG_DONTWAIT)) <= 0;) {
      if (size < 0 && (errno == EAGAIN || errno == EINTR)) return true;
      open_ = false;
    }
    return open_;
  }

 private:
  int fd_;
  bool open_ = false;
};

class Crowd : public ::testing::Test {
 protected:
  void Start(const std::vector<std::string>& arguments) {
    daemon_ = TestDaemon::Start(arguments);
    client_ = daemon_->Connect();
    ASSERT_TRUE(client_->RegisterModel(SmallModel()).ok());
    sequence_ = client_->CreateSequence("small", {.pair = "f16/f16"}).value();
    ASSERT_TRUE(client_->Append(sequence_, 0, Tokens(1, 0, 64).layers).ok());
    quiet_ = P99("quiet");
  }
  // Of small attentions of somebody who was there before.
  double P99(const std::string& when) {
    constexpr int kCalls = 400;
    const std::vector<float> q = Rows(3, 63, 1, kHeads);
    std::vector<float> output(q.size()), lse(kHeads);
    const client::AttendItem item{sequence_, 63, client::TensorRef::F32(q, {1, kHeads, kDim}), output, lse};
    std::vector<double> seconds;
    for (int i = 0; i < kCalls; i++) {
      const absl::Time start = absl::Now();
      const absl::Status answer = client_->Attend(0, {&item, 1});
      EXPECT_TRUE(answer.ok()) << when << ": " << answer;
      seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
    }
    std::sort(seconds.begin(), seconds.end());
    const double p99 = seconds[kCalls * 99 / 100];
    RecordProperty(when + "_p50_us", std::to_string(seconds[kCalls / 2] * 1e6));
    RecordProperty(when + "_p99_us", std::to_string(p99 * 1e6));
    std::printf("%s: p50 %.0f us, p99 %.0f us\n", when.c_str(), seconds[kCalls / 2] * 1e6, p99 * 1e6);
    return p99;
  }
  void ExpectServed(const std::string& when) { EXPECT_LT(P99(when), std::max(100 * quiet_, 2.0)); }

  std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<Client> client_;
  client::SequenceId sequence_ = 0;
  double quiet_ = 0;
};

TEST_F(Crowd, TenThousandConnections) {
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  limit.rlim_cur = limit.rlim_max;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  const auto count =
      static_cast<size_t>(std::min<rlim_t>(10000, limit.rlim_max > 1000 ? limit.rlim_max - 600 : 100));
  RecordProperty("connections", std::to_string(count));
  Start({"--max-connections", std::to_string(count + 50)});
  std::vector<RawConnection> crowd;
  for (size_t i = 0; i < count; i++) {
    crowd.emplace_back(daemon_->socket_path());
    ASSERT_TRUE(crowd.back().Send(kHello)) << i;
  }
  ExpectServed("crowd");
  const auto newcomer = daemon_->Connect();
  ASSERT_NE(newcomer, nullptr);
  EXPECT_TRUE(newcomer->GetStats().ok());
  size_t open = 0;
  for (RawConnection& one : crowd) open += one.Open() ? 1 : 0;
  EXPECT_EQ(open, count);
  std::printf("%zu connections\n", count);
  crowd.clear();
  ExpectServed("after");
  EXPECT_TRUE(daemon_->Alive());
}

// Who connects and says nothing, or its first words a byte at a time, is let go.
TEST_F(Crowd, SlowClientsAreLetGo) {
  Start({"--idle-seconds", "2"});
  std::vector<RawConnection> silent, slow;
  for (int i = 0; i < 100; i++) {
    silent.emplace_back(daemon_->socket_path());
    slow.emplace_back(daemon_->socket_path());
    ASSERT_TRUE(slow.back().Send(kHello));
  }
  // A HEADERS frame of 16,000 bytes that never ends.
  std::string frame("\0\x3e\x80\1\4\0\0\0\1", 9);
  for (RawConnection& one : slow) one.Send(frame);
  const auto any = [](std::vector<RawConnection>& all) {
    return std::any_of(all.begin(), all.end(), [](RawConnection& one) { return one.Open(); });
  };
  ExpectServed("slow");
  for (int i = 0; i < 600 && (any(silent) || any(slow)); i++) {
    for (RawConnection& one : slow) one.Send("\0");
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  EXPECT_FALSE(any(silent)) << "they never said a word";
  EXPECT_FALSE(any(slow)) << "they never asked for anything";
  EXPECT_TRUE(client_->GetStats().ok() || daemon_->Connect()->GetStats().ok());
}

// gRPC looks at the size of a message when all of it is there, so one that announces 4 GiB (the most that the
// framing can say) and stops after a kilobyte is let go as a stalled call.
TEST_F(Crowd, AMessageThatNeverComesIsLetGo) {
  Start({});
  const auto wire = wire::Http2Client::Connect(daemon_->socket_path());
  ASSERT_NE(wire, nullptr);
  std::vector<int32_t> calls;
  for (const char* method : {"Append", "Attend", "StoreBlocks"})
    calls.push_back(wire->Call(std::string("/kvtide.v1.KvCacheService/") + method,
                               {.bytes = std::string(1000, 'x'), .missing = (int64_t{1} << 32) - 1001}));
  ExpectServed("meanwhile");
  for (const int32_t call : calls) {
    ASSERT_TRUE(wire->Until([&] { return wire->answer(call).ended; }, 120)) << call;
    EXPECT_EQ(wire->answer(call).code, 1) << call << ": " << wire->answer(call).text;
  }
  ExpectServed("after");
}

}  // namespace
}  // namespace kvtide::e2e
