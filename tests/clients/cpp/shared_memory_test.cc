// The shared-memory way of a real kvtided against clients that die, lie, or are not let in.
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <thread>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "daemon/ring/arena.h"
#include "daemon/ring/handshake.h"
#include "daemon/service/server.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/base/eventually.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;
using client::TensorRef;

void ExpectError(const absl::Status& status, StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << "\nexpected: " << part;
}

int64_t CountSequences(Client& watcher) {
  const auto stats = watcher.GetStats();
  EXPECT_TRUE(stats.ok()) << stats.status();
  return stats.ok() ? stats->sequences : -1;
}

// A client that speaks the protocol by hand.
class RawClient {
 public:
  explicit RawClient(const e2e::TestDaemon& daemon) {
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    const std::string path = daemon.socket_path() + ring::kSocketSuffix;
    std::memcpy(to.sun_path, path.data(), path.size());
    socket_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT_EQ(::connect(socket_, reinterpret_cast<const sockaddr*>(&to), sizeof(to)), 0);
  }
  ~RawClient() { ::close(socket_); }

  absl::Status Greet(const ring::Hello& hello) {
    EXPECT_TRUE(ring::Send(socket_, std::as_bytes(std::span(&hello, 1)), {}).ok());
    ring::Welcome welcome;
    int fd = -1;
    if (const auto status = ring::Receive(socket_, std::as_writable_bytes(std::span(&welcome, 1)),
                                          absl::Now() + absl::Seconds(30), &fd);
        !status.ok())
      return status;
    if (const auto status = ring::CheckWelcome(welcome); !status.ok()) return status;
    ring::ArenaLayout layout;
    layout.request_bytes = welcome.request_bytes;
    layout.answer_bytes = welcome.answer_bytes;
    layout.tensor_bytes = welcome.tensor_bytes;
    auto arena = ring::Arena::Map(fd, layout);
    if (!arena.ok()) return arena.status();
    arena_.emplace(*std::move(arena));
    return absl::OkStatus();
  }
  int socket() const { return socket_; }
  ring::Arena& arena() { return *arena_; }
  bool HungUp() const {
    return Eventually([this] { return ring::HungUp(socket_); });
  }

 private:
  int socket_ = -1;
  std::optional<ring::Arena> arena_;
};

ring::Hello SmallHello() {
  ring::Hello hello;
  hello.tensor_bytes = 1 << 16;
  return hello;
}

// A daemon with a GPU registers a client's tensors with its driver when the client first attends, and lets
// go of them with the client.
TEST(SharedMemory, TensorsArePinnedFromTheFirstAttentionUntilTheClientLeaves) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend({.threads = 1});
  CacheOptions options;
  options.tiers = {{"device", backend.get(), size_t{16} << 20, false, {}}};
  options.background_moves = false;
  const auto cache = KvCache::Create(options).value();
  const std::string folder = e2e::MakeFolder();
  std::atomic<int> pins{0}, held{0};
  std::atomic<uint64_t> bytes{0};
  service::ServiceOptions service;
  service.listen = {"unix:" + folder + "/kvtided.sock"};
  service.pin = [&](std::byte*, size_t size) {
    pins++;
    held++;
    bytes = size;
    return std::shared_ptr<void>(&held, [](void* count) { --*static_cast<std::atomic<int>*>(count); });
  };
  const auto server = service::Server::Start(cache.get(), service).value();
  auto pool = Pool::Connect("shm:" + service.listen[0], {}).value();
  ASSERT_TRUE(pool->RegisterModel(e2e::SmallModel()).ok());
  const client::SequenceId sequence = pool->CreateSequence("small").value();
  const e2e::Tokens tokens(1, 0, 4);
  ASSERT_TRUE(pool->Append(sequence, 0, tokens.layers).ok());
  EXPECT_EQ(pins, 0);
  const std::vector<float> q = e2e::Rows(2, 3, 1, e2e::kHeads);
  std::vector<float> out(q.size());
  for (int i = 0; i < 3; i++) {
    client::AttendItem item;
    item.sequence = sequence;
    item.q = TensorRef::F32(q, {1, e2e::kHeads, e2e::kDim});
    item.first_query_position = 3;
    item.output = out;
    ASSERT_TRUE(pool->Attend(0, std::span(&item, 1)).ok());
    EXPECT_EQ(pins, 1);
    EXPECT_EQ(held, 1);
  }
  EXPECT_GE(bytes, size_t{1} << 16);
  pool.reset();
  EXPECT_TRUE(Eventually([&] { return held == 0; }));
  EXPECT_EQ(pins, 1);
  server->Shutdown(absl::ZeroDuration(), absl::Seconds(10));
  std::filesystem::remove_all(folder);
}

TEST(SharedMemory, WhoIsNotLetInIsToldWhy) {
  const auto daemon = e2e::TestDaemon::Start({"--shared-memory", "20MiB", "--shared-memory-client", "16MiB"});
  ring::Hello hello = SmallHello();
  hello.version = 99;
  ExpectError(RawClient(*daemon).Greet(hello), StatusCode::kFailedPrecondition, "speaks version 99");
  hello = SmallHello();
  hello.magic[0] = 'P';
  ExpectError(RawClient(*daemon).Greet(hello), StatusCode::kInvalidArgument, "shared-memory protocol");
  hello = SmallHello();
  hello.generation = 12345;
  ExpectError(RawClient(*daemon).Greet(hello), StatusCode::kFailedPrecondition, "has ended");
  hello = SmallHello();
  hello.layout = 1;
  ExpectError(RawClient(*daemon).Greet(hello), StatusCode::kFailedPrecondition, "blocks of this kvtided");
  hello = SmallHello();
  hello.tensor_bytes = 20 << 20;
  ExpectError(RawClient(*daemon).Greet(hello), StatusCode::kResourceExhausted,
              "one client may have 16777216");
  hello.tensor_bytes = ~uint64_t{0};
  EXPECT_FALSE(RawClient(*daemon).Greet(hello).ok());
  // The limit of all of them.
  std::vector<std::unique_ptr<Pool>> pools;
  client::PoolOptions options;
  options.arena_bytes = 4 << 20;
  for (int i = 0; i < 2; i++) {
    auto pool = Pool::Connect("shm:" + daemon->address(), options);
    ASSERT_TRUE(pool.ok()) << pool.status();
    pools.push_back(*std::move(pool));
  }
  ExpectError(Pool::Connect("shm:" + daemon->address(), options).status(), StatusCode::kResourceExhausted,
              "all of them 20971520");
  pools.pop_back();
  EXPECT_TRUE(Eventually([&] { return Pool::Connect("shm:" + daemon->address(), options).ok(); }));
  EXPECT_TRUE(absl::StrContains(daemon->Log(), "method=Session code=FAILED_PRECONDITION")) << daemon->Log();
  pools.clear();
  EXPECT_EQ(daemon->Stop(), 0);
}

TEST(SharedMemory, AnotherUserIsNotLetIn) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs to become somebody else";
  const auto daemon = e2e::TestDaemon::Start({"--allow", "uid:4321"});
  // Reachable, so that the refusal is the daemon's.
  ASSERT_EQ(std::system(("chmod 755 " + daemon->folder() + " " + daemon->folder() + "/run && chmod 666 " +
                         daemon->socket_path() + ".ring")
                            .c_str()),
            0);
  const auto connect_as = [&](uid_t user) {
    const pid_t child = ::fork();
    if (child == 0) {
      if (::setuid(user) != 0) ::_exit(9);
      const auto status = Pool::Connect("shm:" + daemon->address()).status();
      ::_exit(status.ok() ? 0 : absl::IsPermissionDenied(status) ? 3 : 1);
    }
    return e2e::WaitForExit(child, 60);
  };
  EXPECT_EQ(connect_as(1234), 3);
  EXPECT_EQ(connect_as(4321), 0);
  EXPECT_TRUE(absl::StrContains(daemon->Log(), "user 1234 may not use this kvtided")) << daemon->Log();
}

TEST(SharedMemory, NonsenseInTheRingEndsItsClientAndNobodyElse) {
  const auto daemon = e2e::TestDaemon::Start();
  auto good = Pool::Connect("shm:" + daemon->address());
  ASSERT_TRUE(good.ok()) << good.status();
  ASSERT_TRUE((*good)->RegisterModel(e2e::SmallModel()).ok());
  std::mt19937 random(20260101);
  for (int round = 0; round < 40; round++) {
    RawClient bad(*daemon);
    ASSERT_TRUE(bad.Greet(SmallHello()).ok());
    ring::RingHead& head = *bad.arena().request_head();
    switch (round % 4) {
      case 0:
        head.written = ring::kEntries + 1 + random() % 1000;
        break;
      case 1:
        head.entries[0].offset = static_cast<uint32_t>(random());
        head.entries[0].bytes = 0xffffffff;
        head.written = 1;
        break;
      case 2:  // a message that is none; then a count that is none
        std::memset(bad.arena().requests(), static_cast<int>(random()), 4096);
        head.entries[0].bytes = 4096;
        head.written = 1;
        EXPECT_TRUE(Eventually([&] { return bad.arena().answer_head()->written == 1; }));
        head.written = 1000;
        break;
      default:  // the daemon's own counts
        bad.arena().answer_head()->read = static_cast<uint32_t>(random() | 0x100);
        head.entries[0].bytes = 2;
        head.written = 1;
        break;
    }
    ring::RingReader waker(&head, bad.arena().requests(), 4096);
    waker.Wake();
    EXPECT_TRUE(bad.HungUp()) << "round " << round;
    if (round % 8 == 0) {
      EXPECT_TRUE((*good)->GetServerInfo().ok());
    }
  }
  // More bytes after the Hello, or less than one, end a connection too.
  RawClient talks(*daemon);
  ASSERT_TRUE(talks.Greet(SmallHello()).ok());
  ASSERT_EQ(::send(talks.socket(), "x", 1, MSG_NOSIGNAL), 1);
  EXPECT_TRUE(talks.HungUp());
  RawClient silent(*daemon);
  ASSERT_EQ(::send(silent.socket(), "KVT", 3, MSG_NOSIGNAL), 3);
  EXPECT_TRUE(silent.HungUp());
  EXPECT_TRUE((*good)->GetServerInfo().ok());
  good->reset();
  EXPECT_EQ(daemon->Stop(), 0) << daemon->Log();
}

// An engine that works until it is killed.
[[noreturn]] void Work(const std::string& address, uint32_t seed) {
  auto pool = Pool::Connect("shm:" + address);
  if (!pool.ok()) ::_exit(1);
  for (; !::testing::Test::HasFailure(); seed += 1000)
    RunScript(**pool, {.seed = seed, .verbs = 200, .moves = true});
  ::_exit(1);
}

// Where in its steps an engine is killed.
enum class Point : uint8_t {
  kBegun,
  kLayerWritten,
  kAllWritten,
  kFollowed,
  kFirstEnded,
  kRolledBack,
  kPinned,
  kClosedWhilePinned,
  kBetween,
  kPoints
};

// An engine that comes to a point of its second step, says so, and waits to be killed.
[[noreturn]] void StepUntil(const std::string& address, Point point, int say) {
  const auto reached = [&] {
    const char byte = 1;
    if (::write(say, &byte, 1) != 1) ::_exit(2);
    for (;;) ::pause();
  };
  const auto good = [](const absl::Status& status) {
    if (!status.ok()) ::_exit(1);
  };
  auto pool = Pool::Connect("shm:" + address);
  good(pool.status());
  good((*pool)->RegisterModel(e2e::SmallModel()));
  const auto id = (*pool)->CreateSequence("small", {.pair = "q8_0/turbo4"});
  good(id.status());
  const e2e::Tokens rows(1, 0, 100);
  const std::vector<float> q = e2e::Rows(1, 0, 100, e2e::kHeads);
  std::vector<float> output(q.size());
  const auto write = [&](const client::Step& step, int layer) {
    client::AppendAttendItem item;
    item.sequence = *id;
    item.start_position = step.starts[0];
    item.q = TensorRef::F32(q, {100, e2e::kHeads, e2e::kDim});
    item.k = TensorRef::F32(rows.k[static_cast<size_t>(layer)], {100, e2e::kKvHeads, e2e::kDim});
    item.v = TensorRef::F32(rows.v[static_cast<size_t>(layer)], {100, e2e::kKvHeads, e2e::kDim});
    item.output = output;
    good((*pool)->AppendAttend(layer, {&item, 1}, {}, step.id));
  };
  const client::StepItem items[] = {{*id, 100}};
  for (int round = 0;; round++) {
    const bool last = round == 1;
    const auto first = (*pool)->BeginStep(items, {.tables = true});
    good(first.status());
    if (last && point == Point::kBegun) reached();
    write(*first, 0);
    if (last && point == Point::kLayerWritten) reached();
    write(*first, 1);
    if (last && point == Point::kAllWritten) reached();
    const auto second = (*pool)->BeginStep(items, {.after = first->id, .tables = true});
    good(second.status());
    write(*second, 0);
    if (last && point == Point::kFollowed) reached();
    good((*pool)->EndStep(first->id));
    if (last && point == Point::kFirstEnded) reached();
    good((*pool)->RollBackStep(second->id));
    if (last && point == Point::kRolledBack) reached();
    const auto pinned = (*pool)->PinStep({&*id, 1}, true);
    good(pinned.status());
    if (last && point == Point::kPinned) reached();
    if (last && point == Point::kClosedWhilePinned) {
      good((*pool)->CloseSequence(*id));
      reached();
    }
    good((*pool)->EndStep(pinned->id));
    if (last) reached();
  }
}

class Deaths : public ::testing::Test {
 protected:
  // In CI a slice of the hundred that KVTIDE_TEST_DEATHS=100 asks for.
  static int Rounds(int usual) {
    const char* const asked = std::getenv("KVTIDE_TEST_DEATHS");
    return asked != nullptr ? std::atoi(asked) : usual;
  }
};

TEST_F(Deaths, AKilledClientLosesItsSequencesWithinASecondAndHarmsNobody) {
  Ways ways;
  const std::string address = ways.daemon().address();
  const auto watcher = ways.daemon().Connect();
  const auto bystander = ways.Open("shared_memory");
  ASSERT_TRUE(bystander->RegisterModel(e2e::SmallModel()).ok());
  const auto kept = bystander->CreateSequence("small");
  ASSERT_TRUE(kept.ok());
  std::mt19937 random(20260101);
  const int rounds = Rounds(10);
  absl::Duration slowest;
  for (int round = 0; round < rounds; round++) {
    const pid_t child = ::fork();
    if (child == 0) Work(address, static_cast<uint32_t>(round));
    // Until it has sequences; then any time.
    ASSERT_TRUE(Eventually([&] { return CountSequences(*watcher) > 1; }));
    absl::SleepFor(absl::Microseconds(random() % 20000));
    ::kill(child, SIGKILL);
    const absl::Time killed = absl::Now();
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] { return CountSequences(*watcher) == 1; })) << "round " << round;
    slowest = std::max(slowest, absl::Now() - killed);
    const e2e::Tokens rows(1, round, 1);
    ASSERT_TRUE(bystander->Append(*kept, round, rows.layers).ok());
  }
  // A number to look at; a busy machine decides it.
  RecordProperty("slowest_release_ms", static_cast<int>(absl::ToInt64Milliseconds(slowest)));
  ASSERT_TRUE(bystander->CloseSequence(*kept).ok());
  EXPECT_TRUE(Eventually([&] {
    const auto stats = watcher->GetStats();
    return stats.ok() && stats->stored_bytes == 0 &&
           stats->tiers[0].used_bytes + stats->tiers[1].used_bytes == 0;
  })) << "bytes are left";
}

TEST_F(Deaths, AClientThatIsKilledInAStepLeavesNothingOfIt) {
  Ways ways;
  const std::string address = ways.daemon().address();
  const auto watcher = ways.daemon().Connect();
  ASSERT_TRUE(watcher->RegisterModel(e2e::SmallModel()).ok());
  const int rounds = std::max(static_cast<int>(Point::kPoints), Rounds(0));
  for (int round = 0; round < rounds; round++) {
    const auto point = static_cast<Point>(round % static_cast<int>(Point::kPoints));
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    if (child == 0) StepUntil(address, point, ends[1]);
    ::close(ends[1]);
    char byte = 0;
    EXPECT_EQ(::read(ends[0], &byte, 1), 1) << "the engine failed before point " << static_cast<int>(point);
    ::close(ends[0]);
    ::kill(child, SIGKILL);
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] {
      const auto stats = watcher->GetStats();
      return stats.ok() && stats->sequences == 0 && stats->stored_bytes == 0 &&
             stats->tiers[0].used_bytes + stats->tiers[1].used_bytes == 0;
    })) << "bytes are left after point "
        << static_cast<int>(point);
  }
}

TEST_F(Deaths, AKilledDaemonIsAnErrorAtTheNextCallAndNeverAHang) {
  std::mt19937 random(20260101);
  const int rounds = Rounds(5);
  for (int round = 0; round < rounds; round++) {
    const auto daemon = e2e::TestDaemon::Start();
    client::PoolOptions options;
    options.arena_bytes = 1 << 20;
    auto pool = Pool::Connect("shm:" + daemon->address(), options);
    ASSERT_TRUE(pool.ok()) << pool.status();
    ASSERT_TRUE((*pool)->RegisterModel(e2e::SmallModel()).ok());
    const auto id = (*pool)->CreateSequence("small");
    ASSERT_TRUE(id.ok());
    absl::Status last;
    std::thread engine([&] {
      for (int64_t at = 0; last.ok(); at++) {
        if (at == 200) {
          last = (*pool)->TruncateSequence(*id, 0);
          at = 0;
        }
        if (last.ok()) last = (*pool)->Append(*id, at, e2e::Tokens(1, at, 1).layers).status();
      }
    });
    absl::SleepFor(absl::Microseconds(random() % 20000));
    daemon->Kill();
    engine.join();  // ends, or the test hangs
    ExpectError(last, StatusCode::kUnavailable, "connection to kvtided is lost");
    ExpectError((*pool)->GetStats().status(), StatusCode::kUnavailable, "connect again");
  }
}

TEST(SharedMemory, AStoppedDaemonAnswersWhatItHasAndSaysGoodbye) {
  const auto daemon = e2e::TestDaemon::Start();
  auto pool = Pool::Connect("shm:" + daemon->address());
  ASSERT_TRUE(pool.ok()) << pool.status();
  ASSERT_TRUE((*pool)->GetStats().ok());
  EXPECT_EQ(daemon->Stop(), 0) << daemon->Log();
  EXPECT_EQ((*pool)->GetStats().status().code(), StatusCode::kUnavailable);
  EXPECT_NE(::access((daemon->socket_path() + ".ring").c_str(), F_OK), 0) << "the socket is left";
}

TEST(SharedMemory, ACallThatIsTooLargeForTheArenaSaysWhatToDo) {
  const auto daemon = e2e::TestDaemon::Start();
  client::PoolOptions options;
  options.arena_bytes = 1 << 16;
  auto pool = Pool::Connect("shm:" + daemon->address(), options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  ASSERT_TRUE((*pool)->RegisterModel(e2e::SmallModel()).ok());
  const auto id = (*pool)->CreateSequence("small");
  const e2e::Tokens many(1, 0, 1000);
  ExpectError((*pool)->Append(*id, 0, many.layers).status(), StatusCode::kResourceExhausted,
              "ask for a larger arena");
  const e2e::Tokens few(1, 0, 10);
  EXPECT_TRUE((*pool)->Append(*id, 0, few.layers).ok()) << "the connection goes on";
  ExpectError((*pool)->Allocate(1 << 17).status(), StatusCode::kResourceExhausted, "65536 bytes");
}

TEST(SharedMemory, ADeadlineEndsACallAndTheConnectionGoesOn) {
  const auto daemon = e2e::TestDaemon::Start();
  client::PoolOptions options;
  options.client.timeout = absl::Nanoseconds(1);
  auto pool = Pool::Connect("shm:" + daemon->address(), options);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_TRUE((*pool)->RegisterModel(e2e::SmallModel()).code() == StatusCode::kDeadlineExceeded ||
              (*pool)->EvictAll().status().code() == StatusCode::kDeadlineExceeded);
  EXPECT_TRUE((*pool)->GetServerInfo().ok());
}

}  // namespace
}  // namespace kvtide::testing
