// Two daemons that share prefixes and blocks through a real redis-server, and what becomes of them when it
// dies, comes back, stands still, is full or refuses them: tokens are found and attention is equal to the
// bit, or nothing is found; no call fails, and attention goes on as if there were no server.
#include <algorithm>
#include <atomic>
#include <fstream>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/block_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/daemon/remote/redis_server.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using testing::Proxy;
using testing::RedisServer;

constexpr int64_t kTokens = 64 * 8 + 7;

std::vector<client::TokenId> Ids(int seed, size_t count = kTokens) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::vector<client::TokenId> ids(count);
  for (client::TokenId& id : ids) id = random() % 50'000;
  return ids;
}
client::SequenceOptions Options() {
  client::SequenceOptions options;
  options.pair = "q8_0/turbo4";
  return options;
}

struct Node {
  explicit Node(const RemoteAddress& remote, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"--remote", remote.Text()});
    if (std::find(more.begin(), more.end(), "--remote-timeout-ms") == more.end())
      more.insert(more.end(), {"--remote-timeout-ms", "5000"});
    daemon = TestDaemon::Start(more);
    client = daemon->Connect();
    EXPECT_TRUE(client->RegisterModel(SmallModel()).ok());
  }
  client::RemoteStats Stats() const { return client->GetStats()->remote.value(); }
  // A sequence with these tokens comes and goes; its rows are those of `seed`.
  void Leave(int seed) const {
    const auto id = client->CreateSequence("small", Options());
    ASSERT_TRUE(id.ok()) << id.status();
    ASSERT_TRUE(client->Append(*id, 0, Tokens(seed, 0, kTokens).layers, Ids(seed)).ok());
    ASSERT_TRUE(client->CloseSequence(*id).ok());
  }
  void WaitUntilWritten() const {
    for (int i = 0; i < 6000 && Stats().queued_blocks > 0; i++) absl::SleepFor(absl::Milliseconds(5));
    EXPECT_EQ(Stats().queued_blocks, 0);
    // The last batch is on its way when the queue is empty.
    for (int i = 0; i < 6000 && Stats().written_blocks + Stats().present_blocks < 6; i++)
      absl::SleepFor(absl::Milliseconds(5));
  }
  int64_t Found(int seed) const {
    const auto found = client->LookupPrefix("small", Options(), Ids(seed), -1);
    EXPECT_TRUE(found.ok()) << found.status();
    return found.ok() ? found->tokens : -1;
  }
  // Attention of some queries over a sequence with these tokens, which begins with what is cached.
  std::vector<float> Attention(int seed, int64_t* reused) const {
    const auto found = client->LookupPrefix("small", Options(), Ids(seed));
    EXPECT_TRUE(found.ok()) << found.status();
    *reused = found->tokens;
    const auto id = client->CreateSequence("small", Options(), found->lease);
    EXPECT_TRUE(id.ok()) << id.status();
    const auto ids = Ids(seed);
    EXPECT_TRUE(client
                    ->Append(*id, *reused, Tokens(seed, *reused, kTokens - *reused).layers,
                             std::span(ids).subspan(static_cast<size_t>(*reused)))
                    .ok());
    std::vector<float> all;
    for (int layer = 0; layer < kLayers; layer++) {
      const std::vector<float> q = Rows(77, 0, 1, kHeads);
      std::vector<float> out(kHeads * kDim), lse(kHeads);
      client::AttendItem item;
      item.sequence = *id;
      item.q = client::TensorRef::F32(q, {1, kHeads, kDim});
      item.output = out;
      item.lse = lse;
      EXPECT_TRUE(client->Attend(layer, {&item, 1}).ok());
      all.insert(all.end(), out.begin(), out.end());
      all.insert(all.end(), lse.begin(), lse.end());
    }
    EXPECT_TRUE(client->CloseSequence(*id).ok());
    return all;
  }

  std::unique_ptr<TestDaemon> daemon;
  std::unique_ptr<client::Client> client;
};

TEST(Remote, ADaemonBeginsWithWhatAnotherOneHasComputed) {
  RedisServer server;
  Node a(server.address());
  int64_t reused = 0;
  const std::vector<float> expected = a.Attention(1, &reused);
  EXPECT_EQ(reused, 0);
  a.WaitUntilWritten();
  Node b(server.address());
  EXPECT_EQ(b.Attention(1, &reused), expected);
  EXPECT_EQ(reused, 64 * 6) << "all but the exact window";
  EXPECT_EQ(b.Stats().hit_blocks, 6);
  EXPECT_EQ(b.Found(2), 0);
  // A daemon that only reads, and one of another prefix.
  Node reader(server.address(), {"--remote-write", "none"});
  EXPECT_EQ(reader.Found(1), 64 * 6);
  reader.Leave(3);
  EXPECT_EQ(reader.Stats().queued_blocks, 0);
  Node other(server.address(), {"--remote-prefix", "other"});
  EXPECT_EQ(other.Found(1), 0);
  // It outlives the daemon that has written it.
  a.daemon->Kill();
  Node c(server.address());
  EXPECT_EQ(c.Attention(1, &reused), expected);
  EXPECT_EQ(reused, 64 * 6);
}

TEST(Remote, BlocksOfEnginesAreSharedToo) {
  RedisServer server;
  Node a(server.address()), b(server.address());
  client::NamespaceSpec spec;
  spec.model = "engine";
  spec.block_tokens = 16;
  spec.content = client::OpaqueBlocks{100'000, "pages"};
  const auto at_a = client::BlockStore::Open(*a.client, spec).value(),
             at_b = client::BlockStore::Open(*b.client, spec).value();
  std::vector<std::string> texts;
  for (int i = 0; i < 10; i++) texts.push_back(absl::StrCat("key ", i));
  const std::vector<std::string_view> keys(texts.begin(), texts.end());
  std::vector<std::byte> payload(1'000'000), back(1'000'000);
  std::mt19937 random(3);
  for (std::byte& byte : payload) byte = static_cast<std::byte>(random());
  ASSERT_EQ(at_a->Store(keys, payload)->stored, 10);
  a.WaitUntilWritten();
  for (int i = 0; i < 1000 && a.Stats().written_blocks < 10; i++) absl::SleepFor(absl::Milliseconds(5));
  const auto found = at_b->Lookup(keys);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->hits, 10);
  ASSERT_TRUE(at_b->Load(found->lease, 0, 10, back).ok());
  EXPECT_EQ(back, payload);
  // Deleted by one it is gone for all who do not have it.
  ASSERT_TRUE(at_a->Delete().ok());
  Node c(server.address());
  EXPECT_EQ(client::BlockStore::Open(*c.client, spec).value()->Lookup(keys)->hits, 0);
}

TEST(Remote, OnDemoteSharesWhatADaemonHasNoRoomFor) {
  RedisServer server;
  Node a(server.address(),
         {"--remote-write", "on-demote", "--host-memory", "4MiB", "--device-memory", "1MiB"});
  Node b(server.address());
  client::NamespaceSpec spec;
  spec.model = "engine";
  spec.block_tokens = 16;
  spec.content = client::OpaqueBlocks{100'000, "pages"};
  const auto at_a = client::BlockStore::Open(*a.client, spec).value(),
             at_b = client::BlockStore::Open(*b.client, spec).value();
  std::vector<std::byte> payload(100'000), back(100'000);
  const auto store = [&](int number) {
    const std::string key = absl::StrCat("key ", number);
    const std::string_view view = key;
    std::fill(payload.begin(), payload.end(), static_cast<std::byte>(number));
    EXPECT_EQ(at_a->Store({&view, 1}, payload)->stored, 1);
  };
  for (int i = 0; i < 20; i++) store(i);  // half of the host tier
  absl::SleepFor(absl::Milliseconds(500));
  EXPECT_EQ(a.Stats().written_blocks, 0);
  // 41 fit, of which those above 80 % of the tier are written: with time for that, every one before it is
  // dropped.
  constexpr int kBlocks = 70;
  for (int i = 20; i < kBlocks; i++) {
    store(i);
    for (int wait = 0; wait < 6000 && a.Stats().written_blocks < i - 32; wait++)
      absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_LT(a.Stats().written_blocks, kBlocks);
  int gone = 0;
  for (int i = 0; i < kBlocks; i++) {
    const std::string key = absl::StrCat("key ", i);
    const std::string_view view = key;
    if (at_a->Lookup({&view, 1}, -1, true)->hits > 0) continue;
    gone++;
    const auto found = at_b->Lookup({&view, 1});
    ASSERT_TRUE(found.ok()) << found.status();
    ASSERT_EQ(found->hits, 1) << key;
    ASSERT_TRUE(at_b->Load(found->lease, 0, 1, back).ok());
    EXPECT_EQ(back[50'000], static_cast<std::byte>(i));
  }
  EXPECT_GT(gone, 20);
}

TEST(Remote, AServerThatDiesAndComesBackIsNoticedByNobodyElse) {
  RedisServer server;
  Node a(server.address()), b(server.address());
  a.Leave(1);
  a.WaitUntilWritten();
  server.Kill();
  // Every call goes on, here and there, from their own memory.
  EXPECT_EQ(b.Found(1), 0);
  EXPECT_EQ(a.Found(1), 64 * 6);
  EXPECT_NE(b.Stats().problem, "");
  b.Leave(2);
  int64_t reused = 0;
  b.Attention(2, &reused);
  EXPECT_EQ(reused, 64 * 6);
  server.Start();
  // Its memory is gone; what is computed from now on is shared again.
  for (int i = 0; i < 6000 && b.Stats().written_blocks == 0; i++) {
    b.Found(100 + i);  // asks again once the back-off has ended
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(b.Stats().problem, "");
  for (int i = 0; i < 6000 && a.Found(2) < 64 * 6; i++) absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(a.Found(2), 64 * 6);
}

TEST(Remote, AServerThatStandsStillHoldsUpNeitherAttentionNorAppends) {
  RedisServer server;
  Proxy proxy(server.path());
  Node a(proxy.address(), {"--remote-timeout-ms", "3000", "--remote-read-ms", "60000"});
  a.Leave(1);
  a.WaitUntilWritten();
  proxy.Set(Proxy::kStandStill);
  // Lookups wait for the server in the bulk threads; engines' calls are served meanwhile.
  std::vector<std::thread> lookups;
  std::vector<std::unique_ptr<client::Client>> clients;
  for (int i = 0; i < 4; i++) clients.push_back(a.daemon->Connect());
  std::atomic<int> ended = 0;
  for (int i = 0; i < 4; i++)
    lookups.emplace_back([&, i] {
      EXPECT_EQ(clients[static_cast<size_t>(i)]->LookupPrefix("small", Options(), Ids(50 + i), -1)->tokens,
                0);
      ended++;
    });
  const auto id = a.client->CreateSequence("small", Options());
  ASSERT_TRUE(id.ok());
  int calls = 0;
  for (int64_t position = 0; ended < 4 && position < 2000; position++, calls++)
    ASSERT_TRUE(a.client->Append(*id, position, Tokens(9, position, 1).layers).ok());
  for (std::thread& lookup : lookups) lookup.join();
  EXPECT_GT(calls, 0);
  const int64_t paid = a.Stats().timeouts;
  EXPECT_GE(paid, 1);
  EXPECT_LE(paid, 3) << "those paid for it that were under way, and perhaps one that tried again";
  for (int i = 0; i < 20; i++) EXPECT_EQ(a.Found(200 + i), 0);
  EXPECT_LE(a.Stats().timeouts, paid + 2) << "it is not asked again at once";
  ASSERT_TRUE(a.client->CloseSequence(*id).ok());
}

TEST(Remote, AFullServerAndAWrongPasswordAreSaid) {
  RedisServer full({"--maxmemory", "1500kb", "--maxmemory-policy", "noeviction"});
  full.Command({"CONFIG", "SET", "maxmemory", "1"});
  Node a(full.address());
  a.Leave(1);
  for (int i = 0; i < 6000 && a.Stats().write_problem.empty(); i++) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_TRUE(absl::StartsWith(a.Stats().write_problem, "OOM")) << a.Stats().write_problem;
  EXPECT_EQ(a.Stats().memory_policy, "noeviction");
  EXPECT_EQ(a.Found(1), 64 * 6) << "here nothing is lost";

  RedisServer closed({"--requirepass", "secret"});
  const std::string file = closed.folder() + "/auth";
  std::ofstream(file) << "wrong\n";
  Node b(closed.address(), {"--remote-auth-file", file});
  EXPECT_THAT(b.Stats().problem, ::testing::HasSubstr("WRONGPASS"));
  EXPECT_THAT(b.daemon->Log(), ::testing::HasSubstr("WRONGPASS"));
  b.Leave(1);
  EXPECT_EQ(b.Found(1), 64 * 6);
  std::ofstream(file) << "secret\n";
  for (int i = 0; i < 6000 && !b.Stats().problem.empty(); i++) {
    b.Found(300 + i);
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(b.Stats().problem, "") << "the file is read with each connection";
}

// Values that somebody has changed: nothing wrong is ever attended.
TEST(Remote, ChangedValuesAreMisses) {
  RedisServer server;
  Node a(server.address());
  int64_t reused = 0;
  const std::vector<float> expected = a.Attention(1, &reused);
  a.WaitUntilWritten();
  int changed = 0;
  for (const std::string& name : server.Names()) {
    const int64_t bytes = std::stoll(server.Command({"STRLEN", name}));
    if (bytes < 10'000 || changed++ % 2 == 0) continue;
    server.Command({"SETRANGE", name, absl::StrCat(bytes - 50), "changed"});
  }
  EXPECT_GE(changed, 6);
  Node b(server.address());
  EXPECT_EQ(b.Attention(1, &reused), expected);
  EXPECT_LT(reused, 64 * 6);
  EXPECT_GT(b.Stats().damaged_blocks, 0);
}

}  // namespace
}  // namespace kvtide::e2e
