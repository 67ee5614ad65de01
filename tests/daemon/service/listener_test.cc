#include "daemon/service/listener.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <numeric>
#include <thread>
#include <utility>

#include "daemon/service/address.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/base/eventually.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

// A listener on a Unix socket that keeps what it is handed.
class ListenerTest : public ::testing::Test {
 protected:
  ListenerTest()
      : folder_(mkdtemp(name_)), claim_(AddressClaim::Take(ParseAddress(Text()).value()).value()) {}
  ~ListenerTest() override {
    listener_.reset();
    for (const int fd : clients_) ::close(fd);
    std::filesystem::remove_all(folder_);
  }
  std::string Text() const { return "unix:" + folder_ + "/run/s.sock"; }
  void Start(size_t most,
             std::function<std::chrono::steady_clock::time_point()> now = std::chrono::steady_clock::now) {
    Listener::Options options;
    options.sockets = claim_->sockets();
    options.max_connections = most;
    options.serve = [this](int fd, bool) {
      const MutexLock lock(mutex_);
      served_.push_back(fd);
    };
    options.tick = [this](const RefusedConnections& refused) {
      refused_ = std::accumulate(refused.begin(), refused.end(), uint64_t{0});
    };
    options.now = std::move(now);
    listener_ = std::make_unique<Listener>(&connections_, std::move(options));
  }
  int Connect() {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::strcpy(name.sun_path, Text().c_str() + 5);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
    clients_.push_back(fd);
    return fd;
  }
  size_t served() {
    const MutexLock lock(mutex_);
    return served_.size();
  }
  // Ends a connection at both sides, as gRPC does at its own.
  void End(size_t i) {
    const MutexLock lock(mutex_);
    ::close(served_[i]);
  }

  char name_[32] = "/tmp/kvtide-listener-XXXXXX";
  const std::string folder_;
  std::unique_ptr<AddressClaim> claim_;
  Connections connections_;
  Mutex mutex_;
  std::vector<int> served_, clients_;
  std::atomic<uint64_t> refused_{0};
  std::unique_ptr<Listener> listener_;
};

TEST_F(ListenerTest, KnowsWhoIsThere) {
  Start(10);
  Connect();
  Connect();
  ASSERT_TRUE(Eventually([this] { return served() == 2; }));
  const auto first = connections_.Find("fd:" + std::to_string(served_[0]));
  const auto second = connections_.Find("fd:" + std::to_string(served_[1]));
  EXPECT_EQ(first->number, 1u);
  EXPECT_EQ(second->number, 2u);
  EXPECT_EQ(first->name, "unix:uid=" + std::to_string(::getuid()) + ",pid=" + std::to_string(::getpid()));
  EXPECT_EQ(connections_.Find("ipv4:127.0.0.1:1")->number, 0u);
  EXPECT_EQ(connections_.Find("fd:9999")->number, 0u);
  EXPECT_EQ(connections_.Find("unknown")->name, "a closed connection");
}

TEST_F(ListenerTest, ThoseBeyondTheLimitAreToldAndThereIsRoomAgainWhenOneLeaves) {
  Start(2);
  Connect();
  Connect();
  ASSERT_TRUE(Eventually([this] { return served() == 2; }));
  const int third = Connect();
  std::string words(512, 0);
  size_t size = 0;
  for (ssize_t n; (n = ::recv(third, words.data() + size, words.size() - size, 0)) > 0;)
    size += static_cast<size_t>(n);
  words.resize(size);
  EXPECT_THAT(words, HasSubstr("max_connections"));
  EXPECT_EQ(words.substr(0, 9), std::string("\0\0\0\4\0\0\0\0\0", 9)) << "no HTTP/2 SETTINGS";
  EXPECT_EQ(words[12], 7) << "no GOAWAY";
  EXPECT_EQ(static_cast<size_t>(static_cast<unsigned char>(words[10])) * 256 +
                static_cast<unsigned char>(words[11]) + 18,
            words.size());
  EXPECT_EQ(served(), 2u);
  EXPECT_TRUE(Eventually([this] { return refused_ == 1; }));
  End(0);
  Connect();
  EXPECT_TRUE(Eventually([this] { return served() == 3; }));
  EXPECT_EQ(connections_.size(), 2u);
}

// A flood that comes and goes: beyond those that may come at once, one that has closed before its wait is
// over is never handed over, and one that stays is.
TEST_F(ListenerTest, ThoseThatComeAndGoManyATimeAreNotHandedOver) {
  std::atomic<int64_t> milliseconds{1};
  Start(1000, [&] {
    return std::chrono::steady_clock::time_point() + std::chrono::hours(1) +
           std::chrono::milliseconds(milliseconds);
  });
  constexpr size_t kAtOnce = 64, kGone = 200, kStay = 20;
  for (size_t i = 0; i < kAtOnce; i++) Connect();
  ASSERT_TRUE(Eventually([this] { return served() == kAtOnce; }));
  for (size_t i = 0; i < kGone; i++) {
    ::close(Connect());
    clients_.pop_back();
    if (i % (kGone / kStay) == 0) Connect();
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(served(), kAtOnce) << "handed over before its time";
  milliseconds += 2;
  EXPECT_TRUE(Eventually([this] { return served() == kAtOnce + kStay; }));
  // After a second a hundred may have come, of which 64 at once.
  milliseconds += 1000;
  for (size_t i = 0; i < kAtOnce; i++) Connect();
  EXPECT_TRUE(Eventually([this] { return served() == 2 * kAtOnce + kStay; }));
  EXPECT_EQ(connections_.size(), 2 * kAtOnce + kStay);
}

// TCP with TLS: who speaks is handed over, and counted where that is no handshake; who does not is let go.
TEST(TlsListener, WaitsForTheFirstByte) {
  const auto claim = AddressClaim::Take(ParseAddress("127.0.0.1:0").value()).value();
  Connections connections;
  std::atomic<int64_t> seconds{1};
  Mutex mutex;
  std::vector<int> served;
  RefusedConnections refused{};
  Listener::Options options;
  options.sockets = claim->sockets();
  options.max_connections = 10;
  options.tls = true;
  options.serve = [&](int fd, bool tcp) {
    EXPECT_TRUE(tcp);
    const MutexLock lock(mutex);
    served.push_back(fd);
  };
  options.tick = [&](const RefusedConnections& now) {
    const MutexLock lock(mutex);
    refused = now;
  };
  options.now = [&] {
    return std::chrono::steady_clock::time_point() + std::chrono::hours(1) + std::chrono::seconds(seconds);
  };
  Listener listener(&connections, std::move(options));
  sockaddr_in name{};
  socklen_t size = sizeof(name);
  ASSERT_EQ(::getsockname(claim->sockets()[0], reinterpret_cast<sockaddr*>(&name), &size), 0);
  const auto connect = [&] {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), size), 0);
    return fd;
  };
  const auto count = [&] {
    const MutexLock lock(mutex);
    return served.size();
  };
  const auto refused_as = [&](ConnectionRefusal why) {
    const MutexLock lock(mutex);
    return refused[static_cast<size_t>(why)];
  };
  const int shakes = connect(), plain = connect(), silent = connect(), gone = connect();
  ASSERT_TRUE(Eventually([&] { return connections.size() == 4; }));
  EXPECT_EQ(count(), 0u);
  ASSERT_EQ(::send(shakes, "\x16\x03\x01", 3, 0), 3);
  ASSERT_TRUE(Eventually([&] { return count() == 1; }));
  ASSERT_EQ(::send(plain, "PRI * HTTP/2.0", 14, 0), 14);
  ASSERT_TRUE(Eventually([&] { return count() == 2; })) << "gRPC ends it with an alert";
  ::close(gone);
  ASSERT_TRUE(Eventually([&] { return connections.size() == 3; }));
  seconds += 9;
  ASSERT_TRUE(Eventually([&] { return refused_as(ConnectionRefusal::kPlaintext) == 1; }));
  EXPECT_EQ(refused_as(ConnectionRefusal::kSilent), 0u);
  seconds += 2;
  char byte = 0;
  EXPECT_EQ(::recv(silent, &byte, 1, 0), 0) << "it was let go";
  seconds += 2;
  ASSERT_TRUE(Eventually([&] { return refused_as(ConnectionRefusal::kSilent) == 1; }));
  EXPECT_EQ(connections.size(), 2u);
  EXPECT_EQ(count(), 2u);
  for (const int fd : {shakes, plain, silent}) ::close(fd);
  for (const int fd : served) ::close(fd);
}

TEST_F(ListenerTest, AcceptsAgainAfterTheDescriptorTableWasFull) {
  Start(1000);
  // The client's side of a connection is there before the table is filled.
  const int waiting = Connect();
  ASSERT_TRUE(Eventually([this] { return served() == 1; }));
  const int late = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  std::vector<int> filler;
  for (int fd; (fd = ::dup(waiting)) >= 0;) filler.push_back(fd);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::strcpy(name.sun_path, Text().c_str() + 5);
  ASSERT_EQ(::connect(late, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  std::string words(512, 0);
  const ssize_t n = ::recv(late, words.data(), words.size(), 0);
  EXPECT_GT(n, 0);
  EXPECT_THAT(words, HasSubstr("no file descriptor left"));
  for (const int fd : filler) ::close(fd);
  ::close(late);
  Connect();
  EXPECT_TRUE(Eventually([this] { return served() == 2; }));
}

}  // namespace
}  // namespace kvtide::service
