// The remote tier over a real redis-server: what every remote tier does (remote_conformance.h), then what a
// server can do to it: die, come back, stand still, trickle, be full, refuse, lose and change values. The
// simplest of it: no call takes longer than its limit, and what comes back is what was written, or nothing.
#include "daemon/remote/redis_tier.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "daemon/remote/value_header.h"
#include "gmock/gmock.h"
#include "tests/daemon/cache/fault_remote.h"
#include "tests/daemon/remote/redis_server.h"
#include "tests/daemon/remote/remote_conformance.h"

namespace kvtide::testing {
namespace {

constexpr RemoteLimit kLimit{absl::Seconds(30), nullptr};
constexpr size_t kPiece = 4096;
const RemoteName kName{RemoteName::Kind::kBlock, {1, 2}, 0};

RedisTierOptions OptionsFor(const RemoteAddress& address) {
  RedisTierOptions options;
  options.remote.address = address;
  options.remote.timeout = absl::Seconds(20);  // timing decides no test but those of it
  options.piece_bytes = kPiece;
  return options;
}
std::unique_ptr<RedisTier> Open(const RedisTierOptions& options) {
  absl::StatusOr<std::unique_ptr<RedisTier>> tier = RedisTier::Open(options);
  EXPECT_TRUE(tier.ok()) << tier.status();
  return *std::move(tier);
}

const RemoteKind kKinds[] = {
    {"memory",
     [](std::shared_ptr<void>* store) {
       const auto made = std::make_shared<RemoteStore>();
       *store = made;
       return [made] { return std::make_unique<FaultRemote>(made.get()); };
     }},
    {"redis",
     [](std::shared_ptr<void>* store) {
       const auto made = std::make_shared<RedisServer>();
       *store = made;
       return [made] { return Open(OptionsFor(made->address())); };
     }},
};
INSTANTIATE_TEST_SUITE_P(All, RemoteConformance, ::testing::ValuesIn(kKinds),
                         [](const auto& kind) { return std::string(kind.param.name); });

BlockLabel Label(uint64_t bytes) {
  BlockLabel label;
  label.bytes = bytes;
  label.model_hash = 7;
  label.k_type = label.v_type = "f16";
  return label;
}
std::vector<std::byte> SomeBytes(size_t size, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}
absl::Status Write(RemoteTier& tier, const std::vector<std::byte>& bytes, const RemoteLimit& limit = kLimit,
                   const std::string& space = "space") {
  RemoteJob job;
  job.name = kName;
  job.label = Label(bytes.size());
  job.copy = [&](size_t at, std::span<std::byte> piece) {
    std::memcpy(piece.data(), bytes.data() + at, piece.size());
    return absl::OkStatus();
  };
  tier.Write(space, {&job, 1}, limit);
  return job.status;
}
absl::StatusOr<std::vector<std::byte>> Read(RemoteTier& tier, size_t size, const RemoteLimit& limit = kLimit,
                                            const std::string& space = "space") {
  std::vector<std::byte> bytes(size);
  RemoteJob job;
  job.name = kName;
  job.label = Label(size);
  job.copy = [&](size_t at, std::span<std::byte> piece) {
    std::memcpy(bytes.data() + at, piece.data(), piece.size());
    return absl::OkStatus();
  };
  tier.Read(space, {&job, 1}, limit);
  if (!job.status.ok()) return job.status;
  return bytes;
}
bool Found(RemoteTier& tier, const RemoteLimit& limit = kLimit) {
  return tier.Find("space", {&kName, 1}, limit)[0].has_value();
}

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  socklen_t bytes = sizeof address;
  EXPECT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&address), bytes), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes), 0);
  close(fd);
  return ntohs(address.sin_port);
}

// A clock for the back-off that a test moves.
struct Clock {
  std::atomic<int64_t> seconds{1000};
  std::function<absl::Time()> function() {
    return [this] { return absl::FromUnixSeconds(seconds.load()); };
  }
};

TEST(RedisTierTest, AServerThatDiesIsAskedOnceAndThenAfterAWhile) {
  RedisServer server;
  Clock clock;
  RedisTierOptions options = OptionsFor(server.address());
  options.clock = clock.function();
  const auto tier = Open(options);
  const std::vector<std::byte> bytes = SomeBytes(10'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  server.Kill();
  EXPECT_FALSE(Found(*tier));
  EXPECT_FALSE(tier->Writable());
  EXPECT_NE(tier->Stats().problem, "");
  const RemoteStats away = tier->Stats();
  for (int i = 0; i < 10; i++) {
    EXPECT_FALSE(Found(*tier));
    EXPECT_TRUE(absl::IsUnavailable(Read(*tier, 10'000).status()));
    EXPECT_TRUE(absl::IsUnavailable(Write(*tier, bytes)));
  }
  EXPECT_EQ(tier->Stats().errors, away.errors) << "it was asked while it is away";
  // Longer and longer, a minute at most.
  for (const int wait : {2, 3, 6, 12, 24, 48, 80, 80}) {
    clock.seconds += wait;
    const uint64_t before = tier->Stats().errors;
    EXPECT_FALSE(Found(*tier));
    EXPECT_EQ(tier->Stats().errors, before + 1) << "after " << wait << " s it is asked, once";
    EXPECT_FALSE(Found(*tier));
    EXPECT_EQ(tier->Stats().errors, before + 1);
  }
  server.Start();
  clock.seconds += 80;
  EXPECT_FALSE(Found(*tier)) << "it has forgotten everything";
  EXPECT_EQ(tier->Stats().problem, "");
  EXPECT_TRUE(Write(*tier, bytes).ok());
  EXPECT_EQ(*Read(*tier, 10'000), bytes);
}

TEST(RedisTierTest, AServerThatWasStartedAnewCostsNothing) {
  RedisServer server;
  const auto tier = Open(OptionsFor(server.address()));
  const std::vector<std::byte> bytes = SomeBytes(10'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  server.Kill();
  server.Start();
  EXPECT_TRUE(Write(*tier, bytes).ok());
  EXPECT_EQ(*Read(*tier, 10'000), bytes);
  EXPECT_EQ(tier->Stats().problem, "");
  EXPECT_EQ(tier->Stats().errors, 0u);
}

TEST(RedisTierTest, TheServerMayComeLater) {
  RedisServer server;
  server.Kill();
  Clock clock;
  RedisTierOptions options = OptionsFor(server.address());
  options.clock = clock.function();
  const auto tier = Open(options);
  EXPECT_NE(tier->Stats().problem, "");
  server.Start();
  clock.seconds += 10;
  EXPECT_TRUE(Write(*tier, SomeBytes(10)).ok());
}

TEST(RedisTierTest, AServerThatStandsStillCostsOneTimeout) {
  RedisServer server;
  Proxy proxy(server.path());
  Clock clock;
  RedisTierOptions options = OptionsFor(proxy.address());
  options.remote.timeout = absl::Seconds(3);
  options.clock = clock.function();
  const auto tier = Open(options);
  const std::vector<std::byte> bytes = SomeBytes(100'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  proxy.Set(Proxy::kStandStill);
  EXPECT_FALSE(Found(*tier));
  EXPECT_EQ(tier->Stats().timeouts, 1u);
  for (int i = 0; i < 1000; i++) EXPECT_FALSE(Found(*tier));
  EXPECT_TRUE(absl::IsUnavailable(Read(*tier, 100'000).status()));
  EXPECT_EQ(tier->Stats().timeouts, 1u);
  proxy.Set(Proxy::kPass);
  clock.seconds += 10;
  const auto back = Read(*tier, 100'000);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, bytes) << "what was late was never taken for another answer";
}

// Bytes that trickle are not silence: the limit of the call ends it.
TEST(RedisTierTest, ASlowServerCannotStretchTheLimit) {
  RedisServer server;
  Proxy proxy(server.path());
  const auto tier = Open(OptionsFor(proxy.address()));
  const std::vector<std::byte> bytes = SomeBytes(100'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  proxy.Set(Proxy::kTrickle);  // the value would take 200 s
  const absl::Time begin = absl::Now();
  const auto slow = Read(*tier, 100'000, {absl::Milliseconds(300), nullptr});
  EXPECT_FALSE(slow.ok());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
  EXPECT_EQ(tier->Stats().timeouts, 1u);
}

TEST(RedisTierTest, ACallThatNobodyWantsEnds) {
  RedisServer server;
  Proxy proxy(server.path());
  const auto tier = Open(OptionsFor(proxy.address()));
  ASSERT_TRUE(Write(*tier, SomeBytes(100'000)).ok());
  proxy.Set(Proxy::kTrickle);
  Cancellation cancellation;
  std::thread canceller([&] { cancellation.Cancel(); });
  EXPECT_FALSE(Read(*tier, 100'000, {absl::Hours(1), &cancellation}).ok());
  canceller.join();
  EXPECT_EQ(tier->Stats().timeouts, 0u);
  EXPECT_EQ(tier->Stats().problem, "") << "that is not the server's fault";
}

TEST(RedisTierTest, AFullServerStopsWritesAndNotReads) {
  RedisServer server({"--maxmemory", "4mb", "--maxmemory-policy", "noeviction"});
  Clock clock;
  RedisTierOptions options = OptionsFor(server.address());
  options.clock = clock.function();
  const auto tier = Open(options);
  EXPECT_EQ(tier->Stats().memory_limit_bytes, 4u << 20);
  EXPECT_EQ(tier->Stats().memory_policy, "noeviction");
  const std::vector<std::byte> bytes = SomeBytes(100'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  absl::Status full;
  for (int i = 0; i < 100 && full.ok(); i++)
    full = Write(*tier, SomeBytes(100'000), kLimit, absl::StrCat("fill", i));
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_FALSE(tier->Writable());
  EXPECT_TRUE(absl::StartsWith(tier->Stats().write_problem, "OOM")) << tier->Stats().write_problem;
  EXPECT_EQ(tier->Stats().problem, "");
  EXPECT_EQ(*Read(*tier, 100'000), bytes);
  server.Command({"CONFIG", "SET", "maxmemory", "100mb"});
  clock.seconds += 10;
  EXPECT_TRUE(tier->Writable());
  EXPECT_TRUE(Write(*tier, bytes).ok());
  EXPECT_EQ(tier->Stats().write_problem, "");
}

// A value whose pieces did not all find room is not found by its first one.
TEST(RedisTierTest, HalfAWriteIsNothing) {
  RedisServer server({"--maxmemory", "3mb", "--maxmemory-policy", "noeviction"});
  const auto tier = Open(OptionsFor(server.address()));
  const absl::Status status = Write(*tier, SomeBytes(8 << 20));
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_FALSE(Found(*tier));
  EXPECT_TRUE(server.Names().empty()) << "pieces that nobody finds take the room of others";
}

TEST(RedisTierTest, PasswordsAndUsers) {
  RedisServer server({"--requirepass", "secret", "--user", "kv", "on", ">pw", "~kvtide:*", "+@all"});
  const std::string file = server.folder() + "/auth";
  const auto with = [&](const std::string& line) {
    std::ofstream(file) << line;
    RedisTierOptions options = OptionsFor(server.address());
    options.remote.auth_file = file;
    return Open(options);
  };
  EXPECT_TRUE(absl::StrContains(Open(OptionsFor(server.address()))->Stats().problem, "remote_auth_file"));
  EXPECT_TRUE(absl::StartsWith(with("wrong\n")->Stats().problem, "WRONGPASS"))
      << with("wrong\n")->Stats().problem;
  EXPECT_TRUE(absl::StrContains(with("a b c\n")->Stats().problem, "one line"));
  EXPECT_TRUE(absl::StrContains(with("")->Stats().problem, "remote_auth_file"));
  EXPECT_TRUE(absl::IsUnavailable(Write(*with("wrong"), SomeBytes(10))));
  EXPECT_TRUE(Write(*with("secret\n"), SomeBytes(10)).ok());
  EXPECT_TRUE(Write(*with("kv pw\n"), SomeBytes(10)).ok());
  EXPECT_TRUE(Write(*with("kv pw"), SomeBytes(10)).ok());
  // The user of deploy/README.md may do all that is needed.
  RedisServer least({"--user", "kvtide", "on", ">pw", "~kvtide:*", "+get", "+getrange", "+set", "+pexpire",
                     "+unlink", "+scan", "+ping", "+info", "+select"});
  RedisTierOptions as_least = OptionsFor(least.address());
  std::ofstream(file) << "kvtide pw";
  as_least.remote.auth_file = file;
  const auto user = Open(as_least);
  EXPECT_TRUE(Write(*user, SomeBytes(3 * kPiece)).ok());
  EXPECT_TRUE(Found(*user));
  EXPECT_TRUE(Read(*user, 3 * kPiece).ok());
  EXPECT_TRUE(user->Erase("space", kLimit).ok());
  EXPECT_FALSE(Found(*user));
  EXPECT_EQ(user->Stats().problem, "");
  EXPECT_NE(user->Stats().memory_policy, "");
  // A user who may not write reads all the same.
  RedisServer readers({"--user", "reader", "on", ">pw", "~kvtide:*", "+@read", "+ping"});
  ASSERT_TRUE(Write(*Open(OptionsFor(readers.address())), SomeBytes(100)).ok());
  RedisTierOptions options = OptionsFor(readers.address());
  std::ofstream(file) << "reader pw";
  options.remote.auth_file = file;
  const auto reader = Open(options);
  EXPECT_FALSE(Write(*reader, SomeBytes(100)).ok());
  EXPECT_TRUE(absl::StartsWith(reader->Stats().write_problem, "NOPERM")) << reader->Stats().write_problem;
  EXPECT_TRUE(Read(*reader, 100).ok());
  // A password never stands in what is shown.
  EXPECT_FALSE(absl::StrContains(with("wrong")->Stats().problem, "wrong"));
}

TEST(RedisTierTest, ValuesEndWithTheirTimeUnlessTheyAreUsed) {
  RedisServer server;
  RedisTierOptions options = OptionsFor(server.address());
  options.remote.ttl = absl::Hours(1);
  const auto tier = Open(options);
  ASSERT_TRUE(Write(*tier, SomeBytes(3 * kPiece)).ok());
  ASSERT_EQ(server.Names().size(), 3u);
  for (const std::string& name : server.Names()) {
    const int64_t left = std::stoll(server.Command({"PTTL", name}));
    EXPECT_GT(left, 3'000'000) << name;
    EXPECT_LE(left, 3'600'000) << name;
    server.Command({"PEXPIRE", name, "1000000"});
  }
  ASSERT_TRUE(Read(*tier, 3 * kPiece).ok());
  for (const std::string& name : server.Names())
    EXPECT_GT(std::stoll(server.Command({"PTTL", name})), 3'000'000) << name;
  for (const std::string& name : server.Names()) server.Command({"PEXPIRE", name, "1"});
  while (!server.Names().empty()) std::this_thread::yield();
  EXPECT_FALSE(Found(*tier));
  EXPECT_TRUE(absl::IsNotFound(Read(*tier, 3 * kPiece).status()));
  // Without a limit.
  options.remote.ttl = absl::InfiniteDuration();
  ASSERT_TRUE(Write(*Open(options), SomeBytes(10)).ok());
  EXPECT_EQ(server.Command({"PTTL", server.Names()[0]}), "-1");
}

// Every way in which a value can be wrong is a miss, and the next write mends it.
TEST(RedisTierTest, DamagedValuesAreMissesAndMakeWay) {
  RedisServer server;
  const auto tier = Open(OptionsFor(server.address()));
  const std::vector<std::byte> bytes = SomeBytes(3 * kPiece + 100);
  const std::string first = tier->ValueName("space", kName);
  const auto pieces = [&] { return server.Names(first + ":*"); };
  const std::pair<const char*, std::function<void()>> damages[] = {
      {"a byte of the first piece",
       [&] {
         server.Command({"SETRANGE", first, "200", "x"});
       }},
      {"a byte of a later piece",
       [&] {
         server.Command({"SETRANGE", pieces()[1], "7", "x"});
       }},
      {"a piece is gone",
       [&] {
         server.Command({"DEL", pieces()[0]});
       }},
      {"a piece is short",
       [&] {
         server.Command({"SET", pieces()[1], "short"});
       }},
      {"a piece is long",
       [&] {
         server.Command({"APPEND", pieces()[1], "more"});
       }},
      {"the first one is torn",
       [&] {
         server.Command({"SET", first, server.Command({"GETRANGE", first, "0", "999"})});
       }},
      {"only the label",
       [&] {
         server.Command({"SET", first, server.Command({"GETRANGE", first, "0", "175"})});
       }},
      {"less than the label",
       [&] {
         server.Command({"SET", first, server.Command({"GETRANGE", first, "0", "99"})});
       }},
      {"a byte of the label",
       [&] {
         server.Command({"SETRANGE", first, "30", "x"});
       }},
      {"another version",
       [&] {
         server.Command({"SETRANGE", first, "8", "\x02"});
       }},
      {"something else",
       [&] {
         server.Command({"SET", first, "hello"});
       }},
      {"no text at all",
       [&] {
         server.Command({"DEL", first}), server.Command({"RPUSH", first, "a"});
       }},
      {"pieces of no size",
       [&] {
         const std::string label = server.Command({"GETRANGE", first, "0", "175"});
         ValueHeader header = DecodeValueHeader(std::as_bytes(std::span(label.data(), label.size()))).value();
         header.piece_bytes = 0;
         server.Command({"SETRANGE", first, "0", EncodeValueHeader(header)});
       }},
      {"more bytes than there are",
       [&] {
         const std::string label = server.Command({"GETRANGE", first, "0", "175"});
         ValueHeader header = DecodeValueHeader(std::as_bytes(std::span(label.data(), label.size()))).value();
         header.label.bytes = uint64_t{1} << 60;
         server.Command({"SETRANGE", first, "0", EncodeValueHeader(header)});
       }},
  };
  for (const auto& [what, damage] : damages) {
    SCOPED_TRACE(what);
    server.Command({"FLUSHALL"});
    ASSERT_TRUE(Write(*tier, bytes).ok());
    ASSERT_EQ(*Read(*tier, bytes.size()), bytes);
    damage();
    EXPECT_FALSE(Read(*tier, bytes.size()).ok());
    EXPECT_EQ(tier->Stats().problem, "") << "the server is well";
    EXPECT_FALSE(Found(*tier)) << "it keeps a good one from being written";
    ASSERT_TRUE(Write(*tier, bytes).ok());
    EXPECT_EQ(*Read(*tier, bytes.size()), bytes);
  }
  EXPECT_GT(tier->Stats().damaged_blocks, 5u);
}

// Two writers of one name at the same time: one of both, never a mixture.
TEST(RedisTierTest, WritersAtTheSameTimeNeverMix) {
  RedisServer server;
  const auto a = Open(OptionsFor(server.address())), b = Open(OptionsFor(server.address())),
             reader = Open(OptionsFor(server.address()));
  const std::vector<std::byte> ones = SomeBytes(20 * kPiece, 1), twos = SomeBytes(20 * kPiece, 2);
  ASSERT_TRUE(Write(*a, ones).ok());
  std::atomic<bool> stop = false;
  std::thread one([&] {
    while (!stop) EXPECT_TRUE(Write(*a, ones).ok());
  });
  std::thread two([&] {
    while (!stop) EXPECT_TRUE(Write(*b, twos).ok());
  });
  int good = 0;
  while (good < 50) {
    const auto bytes = Read(*reader, 20 * kPiece);
    if (!bytes.ok()) continue;  // between two of them
    EXPECT_TRUE(*bytes == ones || *bytes == twos);
    good++;
  }
  stop = true;
  one.join();
  two.join();
}

TEST(RedisTierTest, ManyThreadsShareTheConnections) {
  RedisServer server;
  const auto tier = Open(OptionsFor(server.address()));
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 12; t++)
    threads.emplace_back([&, t] {
      const std::vector<std::byte> bytes = SomeBytes(10'000, t);
      const std::string space = absl::StrCat("space", t);
      for (int i = 0; i < 20; i++) {
        EXPECT_TRUE(Write(*tier, bytes, kLimit, space).ok());
        const auto back = Read(*tier, 10'000, kLimit, space);
        ASSERT_TRUE(back.ok()) << back.status();
        EXPECT_EQ(*back, bytes);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(tier->Stats().connects, 4u);
}

TEST(RedisTierTest, PrefixesAndDatabasesSeparate) {
  RedisServer server;
  RedisTierOptions one = OptionsFor(server.address()), two = one;
  two.remote.prefix = "other";
  const auto a = Open(one), b = Open(two);
  ASSERT_TRUE(Write(*a, SomeBytes(10)).ok());
  EXPECT_FALSE(Found(*b));
  EXPECT_TRUE(absl::StartsWith(server.Names()[0], "kvtide:"));
  RedisTierOptions bad = one;
  bad.remote.prefix = "a*";
  EXPECT_TRUE(absl::IsInvalidArgument(RedisTier::Open(bad).status()));
}

// Certificates by the project's own way: openssl makes a CA and a server's key for the test.
TEST(RedisTierTest, Tls) {
  char folder[] = "/tmp/kvtide-tls-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  const std::string in = absl::StrCat("cd ", folder, " && ");
  const auto run = [&](const std::string& command) {
    return std::system((in + command + " >/dev/null 2>&1").c_str());
  };
  ASSERT_EQ(run("openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 2"),
            0);
  ASSERT_EQ(run("openssl req -newkey rsa:2048 -nodes -keyout key.pem -out csr.pem -subj /CN=localhost"), 0);
  ASSERT_EQ(run("printf 'subjectAltName=DNS:localhost,IP:127.0.0.1' > ext && openssl x509 -req -in csr.pem "
                "-CA ca.pem -CAkey ca.key "
                "-CAcreateserial -out cert.pem -days 2 -extfile ext"),
            0);
  ASSERT_EQ(
      run("openssl req -x509 -newkey rsa:2048 -nodes -keyout o.key -out other.pem -subj /CN=other -days 2"),
      0);
  const int port = FreePort();
  const std::string path = folder;
  RedisServer server({"--tls-port", absl::StrCat(port), "--bind", "127.0.0.1", "--tls-cert-file",
                      path + "/cert.pem", "--tls-key-file", path + "/key.pem", "--tls-ca-cert-file",
                      path + "/ca.pem", "--tls-auth-clients", "no"});
  RedisTierOptions options =
      OptionsFor(ParseRemoteAddress(absl::StrCat("rediss://127.0.0.1:", port)).value());
  options.remote.ca_file = path + "/ca.pem";
  const auto tier = Open(options);
  EXPECT_EQ(tier->Stats().problem, "");
  const std::vector<std::byte> bytes = SomeBytes(300'000);
  ASSERT_TRUE(Write(*tier, bytes).ok());
  EXPECT_EQ(*Read(*tier, bytes.size()), bytes);
  options.remote.ca_file = path + "/other.pem";
  EXPECT_TRUE(absl::StrContains(Open(options)->Stats().problem, "not trusted"))
      << Open(options)->Stats().problem;
  options.remote.ca_file = path + "/none.pem";
  EXPECT_TRUE(absl::StrContains(Open(options)->Stats().problem, "none.pem"));
  options.remote.ca_file = path + "/ca.pem";
  options.remote.address.tls = false;
  EXPECT_FALSE(RedisTier::Open(options).ok()) << "a CA without TLS";
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
}

}  // namespace
}  // namespace kvtide::testing
