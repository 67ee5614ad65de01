// A daemon that is stopped or killed and comes again: sequences that were acknowledged as durable read back
// bit for bit and are attended as before, whenever the kill came; what was closed stays away.
// More often than the few times of every run:
//     KVTIDE_KILL_ROUNDS=200 kvtide_test_e2e --gtest_filter='*AnyMoment*'
#include <signal.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "clients/cpp/block_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

client::SequenceOptions WithPair(const std::string& pair) {
  client::SequenceOptions options;
  options.pair = pair;
  return options;
}

// All stored values of a sequence, as one number.
absl::StatusOr<uint64_t> HashOf(client::Client& client, client::SequenceId id, int64_t tokens) {
  const auto layers = client.ReadTokens(id, {}, 0, tokens);
  if (!layers.ok()) return layers.status();
  uint64_t hash = static_cast<uint64_t>(tokens);
  for (const client::LayerRows& layer : *layers)
    for (const auto* bytes : {&layer.k, &layer.v})
      hash = XXH3_64bits_withSeed(bytes->data(), bytes->size(), hash);
  return hash;
}

// 32 bytes as hexadecimal digits, in a file that only its owner may read.
std::string WriteKey(const std::string& folder, char digit = 'c') {
  const std::string path = folder + "/key-" + digit;
  std::ofstream(path) << "0123456789abcdef" << std::string(48, digit) << "\n";
  EXPECT_EQ(chmod(path.c_str(), 0400), 0);
  return path;
}

// The parameter: how the disk is read and written, or "encrypted".
class RestartTest : public ::testing::TestWithParam<const char*> {
 protected:
  RestartTest() : folder_(MakeFolder()) {
    if (std::string(GetParam()) == "encrypted") key_file_ = WriteKey(folder_);
  }
  ~RestartTest() override { std::filesystem::remove_all(folder_); }
  void Start(std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"--device-memory", "2MiB",
                                          "--host-memory",   "2MiB",
                                          "--disk",          folder_ + "/tier:64MiB",
                                          "--disk-io",       key_file_.empty() ? GetParam() : "auto"};
    if (!key_file_.empty()) arguments.insert(arguments.end(), {"--disk-key-file", key_file_});
    arguments.insert(arguments.end(), more.begin(), more.end());
    daemon_ = TestDaemon::Start(arguments);
    ASSERT_NE(daemon_, nullptr);
    client_ = daemon_->Connect();
    ASSERT_TRUE(client_->RegisterModel(SmallModel()).ok());
  }
  void Restart(bool kill) {
    client_.reset();
    if (kill) {
      daemon_->Kill();
    } else {
      EXPECT_EQ(daemon_->Stop(), 0);
    }
    Start();
  }

  const std::string folder_;
  std::string key_file_;  // empty: not encrypted
  std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<client::Client> client_;
};

TEST_P(RestartTest, PrefixesOfClosedSequencesAreFoundAfterAStopAndAfterAKill) {
  Start();
  std::vector<client::TokenId> ids(64 * 6);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<client::TokenId>(i * i % 997);
  const client::SequenceOptions options = WithPair("q8_0/turbo4");
  const auto id = client_->CreateSequence("small", options);
  ASSERT_TRUE(id.ok()) << id.status();
  ASSERT_TRUE(client_->Append(*id, 0, Tokens(3, 0, 384).layers, ids).ok());
  const uint64_t hash = HashOf(*client_, *id, 256).value();
  ASSERT_TRUE(client_->PersistSequences(std::span(&*id, 1)).ok());
  ASSERT_TRUE(client_->CloseSequence(*id).ok());
  for (const bool kill : {false, true}) {
    Restart(kill);
    EXPECT_TRUE(client_->ListSequences()->empty());
    const auto found = client_->LookupPrefix("small", options, ids);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->tokens, 64 * 4);  // the last two blocks were exact
    ASSERT_EQ(found->tiers.size(), 1u);
    EXPECT_EQ(found->tiers[0].first, "disk");
    const auto begun = client_->CreateSequence("small", options, found->lease);
    ASSERT_TRUE(begun.ok()) << begun.status();
    EXPECT_EQ(HashOf(*client_, *begun, 256).value(), hash);
    ASSERT_TRUE(client_->CloseSequence(*begun).ok());
  }
}

TEST_P(RestartTest, DurableSequencesAreThereAfterAStopAndAfterAKill) {
  Start();
  std::map<client::SequenceId, std::pair<int64_t, uint64_t>> expected;
  for (const char* pair : {"f16/f16", "q8_0/turbo4", "turbo3/turbo3"}) {
    const auto id = client_->CreateSequence("small", WithPair(pair));
    ASSERT_TRUE(id.ok()) << id.status();
    const int64_t tokens = 300 + 17 * static_cast<int64_t>(expected.size());
    ASSERT_TRUE(client_->Append(*id, 0, Tokens(3, 0, tokens).layers).ok());
    expected[*id] = {tokens, HashOf(*client_, *id, tokens).value()};
  }
  const auto lost = client_->CreateSequence("small", WithPair("f16/f16")).value();
  ASSERT_TRUE(client_->Append(lost, 0, Tokens(4, 0, 100).layers).ok());
  for (const auto& [id, state] : expected) {
    const auto result = client_->PersistSequences(std::span(&id, 1));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->tokens, state.first);
  }
  for (const bool kill : {true, false, true}) {
    Restart(kill);
    const auto list = client_->ListSequences().value();
    EXPECT_EQ(list.size(), expected.size());
    for (const client::SequenceInfo& info : list) {
      ASSERT_EQ(expected.count(info.id), 1u);
      EXPECT_TRUE(info.durable);
      EXPECT_EQ(info.tokens, expected[info.id].first);
      EXPECT_EQ(HashOf(*client_, info.id, info.tokens).value(), expected[info.id].second);
    }
    EXPECT_FALSE(client_->Append(lost, 100, Tokens(4, 100, 1).layers).ok());
    EXPECT_THAT(daemon_->Log(), HasSubstr("restored sequences=3"));
    EXPECT_THAT(daemon_->Log(), Not(HasSubstr("not restored")));
  }
  // They go on.
  for (auto& [id, state] : expected) {
    ASSERT_TRUE(client_->Append(id, state.first, Tokens(3, state.first, 200).layers).ok());
    EXPECT_EQ(client_->ListSequences().value().at(0).durable, true);
    ASSERT_TRUE(client_->CloseSequence(id).ok());
  }
  Restart(true);
  EXPECT_TRUE(client_->ListSequences()->empty());
}

TEST_P(RestartTest, TheTailOfARestoredSequenceIsAttendedAsBefore) {
  Start();
  const auto id = client_->CreateSequence("small", WithPair("q8_0/q8_0")).value();
  constexpr int64_t kTokens = 400;
  const Tokens tokens(5, 0, kTokens);
  ASSERT_TRUE(client_->Append(id, 0, tokens.layers).ok());
  const std::vector<float> q = Rows(7, 0, 3, kHeads);
  const auto attend = [&] {
    std::vector<float> output(q.size());
    client::AttendItem item;
    item.sequence = id;
    item.q = client::TensorRef::F32(q, {3, kHeads, kDim});
    item.output = output;
    EXPECT_TRUE(client_->Attend(0, std::span(&item, 1)).ok());
    return output;
  };
  const std::vector<float> before = attend();
  ASSERT_TRUE(client_->PersistSequences(std::span(&id, 1)).ok());
  Restart(true);
  EXPECT_LT(LargestDifference(attend(), before), 1e-5);
}

TEST_P(RestartTest, ASessionThatEndsLeavesItsDurableSequences) {
  Start({"--persist", "on-park"});
  client::ClientOptions options;
  options.session = true;
  auto session = daemon_->Connect(options);
  const auto kept = session->CreateSequence("small", WithPair("f16/f16")).value();
  const auto gone = session->CreateSequence("small", WithPair("f16/f16")).value();
  ASSERT_TRUE(session->Append(kept, 0, Tokens(1, 0, 70).layers).ok());
  ASSERT_TRUE(session->Append(gone, 0, Tokens(2, 0, 70).layers).ok());
  ASSERT_TRUE(session->EvictSequences(std::span(&kept, 1)).ok());
  session.reset();
  std::vector<client::SequenceInfo> list;
  for (int i = 0; i < 500 && list.size() != 1; i++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    list = client_->ListSequences().value();
  }
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0].id, kept);
}

// One client that works until the daemon dies under it.
class Worker {
 public:
  struct State {
    int64_t tokens = 0;
    uint64_t hash = 0;
    bool operator==(const State&) const = default;
  };
  // What was acknowledged; what was asked for and not answered; what is closed, or may be.
  std::map<client::SequenceId, State> durable, in_doubt;
  std::map<client::SequenceId, bool> closing;

  void Run(client::Client* client, int seed) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    const char* pairs[] = {"f16/f16", "q8_0/turbo4"};
    while (true) {
      client::SequenceId id = 0;
      int64_t length = 0;
      if (durable.size() < 4 || random() % 3 == 0) {
        const auto made = client->CreateSequence("small", WithPair(pairs[random() % 2]));
        if (!made.ok()) return;
        id = *made;
      } else {
        const auto it = std::next(durable.begin(), static_cast<int64_t>(random() % durable.size()));
        id = it->first;
        length = it->second.tokens;
        if (random() % 4 == 0 || length > 500) {
          closing[id] = true;
          if (!client->CloseSequence(id).ok()) return;
          closing.erase(id);
          durable.erase(id);
          continue;
        }
      }
      const int64_t more = 1 + static_cast<int64_t>(random() % 150);
      if (!client->Append(id, length, Tokens(static_cast<int>(id % 1000), length, more).layers).ok()) return;
      const auto hash = HashOf(*client, id, length + more);
      if (!hash.ok()) return;
      in_doubt[id] = {length + more, *hash};
      if (!client->PersistSequences(std::span(&id, 1)).ok()) return;
      durable[id] = in_doubt[id];
      in_doubt.erase(id);
    }
  }
};

TEST_P(RestartTest, KillsAtAnyMomentLoseNothingThatWasAcknowledged) {
  const char* asked = std::getenv("KVTIDE_KILL_ROUNDS");
  const int rounds = asked != nullptr ? std::atoi(asked) : 4;
  std::mt19937 random(17);
  Worker worker;
  Start();
  for (int round = 0; round < rounds; round++) {
    std::thread thread([&, client = client_.get()] { worker.Run(client, round); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + random() % 600));
    daemon_->Kill();
    thread.join();
    client_.reset();
    Start();
    // One that was being closed may be half gone.
    if (worker.closing.empty()) {
      EXPECT_THAT(daemon_->Log(), Not(HasSubstr("not restored"))) << "round " << round;
    }
    std::map<client::SequenceId, Worker::State> found;
    const std::vector<client::SequenceInfo> list = client_->ListSequences().value();
    for (const client::SequenceInfo& info : list) {
      const auto hash = HashOf(*client_, info.id, info.tokens);
      ASSERT_TRUE(hash.ok()) << "round " << round << ": " << hash.status();
      found[info.id] = {info.tokens, *hash};
    }
    for (const auto& [id, state] : worker.durable) {
      if (found.count(id) == 0) {
        ASSERT_EQ(worker.closing.count(id), 1u) << "round " << round << ": sequence " << id << " is gone";
        continue;
      }
      ASSERT_TRUE(found[id] == state || (worker.in_doubt.count(id) != 0 && found[id] == worker.in_doubt[id]))
          << "round " << round << ": sequence " << id << " has " << found[id].tokens << " tokens, not "
          << state.tokens;
    }
    for (const auto& [id, state] : found)
      ASSERT_TRUE(worker.durable.count(id) != 0 ||
                  (worker.in_doubt.count(id) != 0 && worker.in_doubt[id] == state))
          << "round " << round << ": sequence " << id << " was closed or never durable";
    worker.durable = found;
    worker.in_doubt.clear();
    worker.closing.clear();
  }
}

// One that leaves what others are to find, until the daemon dies under it: blocks by key, prefixes of closed
// sequences, and forks, which share blocks with what goes on and is closed.
class Leaver {
 public:
  static constexpr int64_t kTokens = 64 * 5;  // of a prompt; the last two full blocks are not shared
  struct Prefix {
    std::vector<client::TokenId> ids;
    std::map<int64_t, uint64_t> hashes;  // of what is stored of so many tokens
  };
  // Acknowledged as durable in this life of the daemon.
  std::vector<std::string> keys;
  std::vector<Prefix> prefixes;
  std::map<client::SequenceId, Worker::State> forks;
  int number = 0;  // goes on over the lives

  static std::vector<std::byte> BytesOf(const std::string& key) {
    std::mt19937 random(static_cast<uint32_t>(XXH3_64bits(key.data(), key.size())));
    std::vector<std::byte> bytes(20'000);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
  }
  static std::unique_ptr<client::BlockStore> Open(client::Client& client) {
    client::NamespaceSpec spec;
    spec.model = "pages";
    spec.block_tokens = 16;
    spec.content = client::OpaqueBlocks{20'000, "bytes"};
    auto store = client::BlockStore::Open(client, spec);
    return store.ok() ? *std::move(store) : nullptr;
  }

  void Run(client::Client* client) {
    const std::unique_ptr<client::BlockStore> store = Open(*client);
    if (store == nullptr) return;
    while (LeaveKeys(*store) && LeavePrefix(*client)) {
    }
  }

 private:
  bool LeaveKeys(client::BlockStore& store) {
    std::vector<std::string> texts;
    std::vector<std::byte> payload;
    for (int i = 0; i < 3; i++) {
      texts.push_back("key " + std::to_string(number++));
      const std::vector<std::byte> bytes = BytesOf(texts.back());
      payload.insert(payload.end(), bytes.begin(), bytes.end());
    }
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    if (!store.Store(views, payload).ok() || !store.Persist().ok()) return false;
    keys.insert(keys.end(), texts.begin(), texts.end());
    return true;
  }
  bool LeavePrefix(client::Client& client) {
    Prefix prefix;
    const int seed = number++;
    for (int64_t i = 0; i < kTokens; i++)
      prefix.ids.push_back(static_cast<client::TokenId>(i == 0 ? 1'000'000 + seed : i * i % 997));
    const auto id = client.CreateSequence("small", WithPair("q8_0/turbo4"));
    if (!id.ok() || !client.Append(*id, 0, Tokens(seed % 1000, 0, kTokens).layers, prefix.ids).ok())
      return false;
    for (int64_t tokens = 64; tokens <= kTokens; tokens += 64) {
      const auto hash = HashOf(client, *id, tokens);
      if (!hash.ok()) return false;
      prefix.hashes[tokens] = *hash;
    }
    const auto fork = client.ForkSequence(*id);
    if (!fork.ok() || !client.Append(*fork, kTokens, Tokens(7, kTokens, 40).layers).ok()) return false;
    const auto hash = HashOf(client, *fork, kTokens + 40);
    if (!hash.ok()) return false;
    const client::SequenceId both[] = {*id, *fork};
    if (!client.PersistSequences(both).ok()) return false;
    forks[*fork] = {kTokens + 40, *hash};
    if (!client.CloseSequence(*id).ok()) return false;
    prefixes.push_back(std::move(prefix));
    if (forks.size() <= 3) return true;
    // An answer that does not come leaves it open whether it is closed.
    const client::SequenceId oldest = forks.begin()->first;
    forks.erase(oldest);
    return client.CloseSequence(oldest).ok();
  }
};

TEST_P(RestartTest, WhatIsFoundAfterKillsAtAnyMomentIsWhatWasLeft) {
  const char* asked = std::getenv("KVTIDE_KILL_ROUNDS");
  const int rounds = asked != nullptr ? std::atoi(asked) : 3;
  std::mt19937 random(18);
  Leaver leaver;
  const client::SequenceOptions options = WithPair("q8_0/turbo4");
  Start();
  for (int round = 0; round < rounds; round++) {
    SCOPED_TRACE(round);
    std::thread thread([&, client = client_.get()] { leaver.Run(client); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + random() % 600));
    daemon_->Kill();
    thread.join();
    client_.reset();
    Start();
    const auto store = Leaver::Open(*client_);
    ASSERT_NE(store, nullptr);
    // What was stored lately, in earlier lives too: what is found has its bytes, and what this life
    // acknowledged is found.
    for (int i = std::max(0, leaver.number - 300); i < leaver.number; i++) {
      const std::string key = "key " + std::to_string(i);
      const std::string_view view = key;
      const auto found = store->Lookup({&view, 1});
      ASSERT_TRUE(found.ok()) << found.status();
      const bool acknowledged = std::find(leaver.keys.begin(), leaver.keys.end(), key) != leaver.keys.end();
      ASSERT_TRUE(found->hits == 1 || !acknowledged) << key;
      if (found->hits == 0) continue;
      std::vector<std::byte> bytes(20'000);
      const absl::Status loaded = store->Load(found->lease, 0, 1, bytes);
      ASSERT_TRUE(loaded.ok()) << key << ": " << loaded;
      ASSERT_EQ(bytes, Leaver::BytesOf(key)) << key;
      ASSERT_TRUE(store->Release(found->lease).ok());
    }
    for (const Leaver::Prefix& prefix : leaver.prefixes) {
      const auto found = client_->LookupPrefix("small", options, prefix.ids);
      ASSERT_TRUE(found.ok()) << found.status();
      ASSERT_EQ(found->tokens, Leaver::kTokens - 128);
      const auto begun = client_->CreateSequence("small", options, found->lease);
      ASSERT_TRUE(begun.ok()) << begun.status();
      ASSERT_EQ(HashOf(*client_, *begun, found->tokens).value(), prefix.hashes.at(found->tokens));
      ASSERT_TRUE(client_->CloseSequence(*begun).ok());
    }
    for (const auto& [id, state] : leaver.forks) {
      const auto hash = HashOf(*client_, id, state.tokens);
      ASSERT_TRUE(hash.ok()) << "sequence " << id << ": " << hash.status();
      ASSERT_EQ(*hash, state.hash) << id;
    }
    const std::vector<client::SequenceInfo> list = client_->ListSequences().value();
    for (const client::SequenceInfo& info : list) {
      const absl::Status closed = client_->CloseSequence(info.id);
      ASSERT_TRUE(closed.ok()) << "sequence " << info.id << ": " << closed;
    }
    leaver.keys.clear();
    leaver.prefixes.clear();
    leaver.forks.clear();
  }
}

// A size that was mistyped once must not cost what is durable.
TEST(Disk, ASmallerTierIsRefusedWhileItHoldsDurableSequences) {
  const std::string folder = MakeFolder();
  client::SequenceId id = 0;
  uint64_t hash = 0;
  {
    const auto daemon = TestDaemon::Start({"--disk", folder + "/tier:32MiB"});
    ASSERT_NE(daemon, nullptr);
    const auto client = daemon->Connect();
    ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
    id = client->CreateSequence("small", WithPair("f16/f16")).value();
    ASSERT_TRUE(client->Append(id, 0, Tokens(3, 0, 300).layers).ok());
    ASSERT_TRUE(client->PersistSequences(std::span(&id, 1)).ok());
    hash = HashOf(*client, id, 300).value();
    daemon->Kill();
  }
  const TestDaemon::Result smaller = TestDaemon::RunToEnd(
      {"--listen", "unix:" + folder + "/a.sock", "--device", "cpu", "--device-memory", "1MiB",
       "--host-memory", "0", "--metrics-address", "off", "--disk", folder + "/tier:4MiB"});
  EXPECT_EQ(smaller.exit_code, 1);
  EXPECT_THAT(smaller.output, HasSubstr("1 sequences and lists of blocks that are durable there"));
  EXPECT_THAT(smaller.output, HasSubstr("give it 33554432 bytes"));
  const auto daemon = TestDaemon::Start({"--disk", folder + "/tier:32MiB"});
  ASSERT_NE(daemon, nullptr);
  const auto client = daemon->Connect();
  EXPECT_EQ(HashOf(*client, id, 300).value(), hash);
  std::filesystem::remove_all(folder);
}

TEST(Disk, ASecondDaemonOnTheFolderIsRefused) {
  const std::string folder = MakeFolder();
  const std::string disk = folder + "/tier:8MiB";
  const auto first = TestDaemon::Start({"--disk", disk});
  ASSERT_NE(first, nullptr);
  const TestDaemon::Result second = TestDaemon::RunToEnd(
      {"--listen", "unix:" + folder + "/other.sock", "--device", "cpu", "--device-memory", "1MiB",
       "--host-memory", "0", "--metrics-address", "off", "--disk", disk});
  EXPECT_FALSE(second.started);
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_THAT(second.output, HasSubstr("belongs to another running daemon"));
  std::filesystem::remove_all(folder);
}

TEST(Disk, AMistypedPathMakesNoFolders) {
  const std::string folder = MakeFolder();
  const TestDaemon::Result result = TestDaemon::RunToEnd(
      {"--listen", "unix:" + folder + "/a.sock", "--device", "cpu", "--device-memory", "1MiB",
       "--host-memory", "0", "--metrics-address", "off", "--disk", folder + "/no/such/tier:8MiB"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, HasSubstr("there is no folder to make " + folder + "/no/such/tier in"));
  EXPECT_FALSE(std::filesystem::exists(folder + "/no"));
  std::filesystem::remove_all(folder);
}

TEST(Disk, BadSettingsAreNamed) {
  for (const auto& [arguments, text] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"--disk", "/tmp/x"}, "give a folder and a size"},
           {{"--disk", "/tmp/x:1KiB"}, "at least 1MiB"},
           {{"--disk-io", "aio"}, "use auto, io_uring or threads"},
           {{"--persist", "always"}, "use none, on-park or all"},
           {{"--disk-key-file", "/tmp/x"}, "needs a disk tier"},
           {{"--rekey-disk", "/tmp/x"}, "--disk-key-file"},
           {{"--persist", "all"}, "needs a disk tier"}}) {
    const TestDaemon::Result result = TestDaemon::RunToEnd(arguments);
    EXPECT_EQ(result.exit_code, 2) << text;
    EXPECT_THAT(result.output, HasSubstr(text));
  }
}

// All bytes of the files in a folder.
std::string AllBytes(const std::string& folder) {
  std::string all;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) all += ReadWhole(entry.path());
  return all;
}

// What a client gives is looked for in the files of a daemon's disk tier: in clear all of it is there, so
// that the search is known to find; encrypted none of it. The key is nowhere else either.
TEST(EncryptedDisk, NothingOfASequenceIsInItsFiles) {
  for (const bool encrypted : {false, true}) {
    SCOPED_TRACE(encrypted ? "encrypted" : "in clear");
    const std::string folder = MakeFolder();
    std::vector<std::string> arguments = {"--device-memory", "2MiB", "--disk", folder + "/tier:8MiB"};
    if (encrypted) arguments.insert(arguments.end(), {"--disk-key-file", WriteKey(folder)});
    const auto daemon = TestDaemon::Start(arguments);
    ASSERT_NE(daemon, nullptr);
    const auto client = daemon->Connect();
    ASSERT_TRUE(client->RegisterModel(SmallModel("a-secret-model")).ok());
    client::SequenceOptions options = WithPair("f16/f16");
    options.tenant = "a-secret-tenant";
    const auto id = client->CreateSequence("a-secret-model", options);
    ASSERT_TRUE(id.ok()) << id.status();
    constexpr int64_t kTokens = 200;
    std::vector<client::TokenId> ids(kTokens);  // those behind the last full block are kept as they are
    for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<client::TokenId>(70'001 + 977 * i);
    // 12.5 in f16 is 40 4a; one element in 16 differs, so that rows are no single byte pattern.
    std::vector<float> rows(kTokens * kKvHeads * kDim, 12.5f);
    for (size_t i = 0; i < rows.size(); i += 16) rows[i] = static_cast<float>(i % 997);
    std::vector<client::LayerTokens> layers;
    for (int layer = 0; layer < kLayers; layer++)
      layers.push_back({layer, client::TensorRef::F32(rows, {kTokens, kKvHeads, kDim}),
                        client::TensorRef::F32(rows, {kTokens, kKvHeads, kDim})});
    ASSERT_TRUE(client->Append(*id, 0, layers, ids).ok());
    ASSERT_TRUE(client->PersistSequences(std::span(&*id, 1)).ok());
    const auto stats = client->GetStats().value();
    EXPECT_EQ(stats.tiers.back().encrypted, encrypted);
    EXPECT_THAT(daemon->Log(), HasSubstr(encrypted ? "encrypted=yes" : "encrypted=no"));
    EXPECT_THAT(daemon->Log(), Not(HasSubstr("cccccccc")));
    const std::string all = AllBytes(folder + "/tier");
    std::string values;
    for (int i = 0; i < 10; i++) values += "\x40\x4a";
    const uint64_t number = *id;
    for (const std::string& wanted :
         {std::string("a-secret-model"), std::string("a-secret-tenant"), values,
          std::string(reinterpret_cast<const char*>(&number), sizeof number),
          std::string(reinterpret_cast<const char*>(&ids[192]), 8 * sizeof ids[0])})
      EXPECT_EQ(all.find(wanted) == std::string::npos, encrypted) << wanted;
    std::filesystem::remove_all(folder);
  }
}

// Every mismatch of key and folder ends the start with words, and the right key finds all afterwards.
TEST(EncryptedDisk, AnotherKeyIsRefusedAndAChangedOneOpens) {
  const std::string folder = MakeFolder(), disk = folder + "/tier:8MiB";
  const std::string key = WriteKey(folder), other = WriteKey(folder, 'd'), open = WriteKey(folder, 'e');
  ASSERT_EQ(chmod(open.c_str(), 0644), 0);
  client::SequenceId id = 0;
  uint64_t hash = 0;
  const auto durable = [&](const std::string& with) {
    const auto daemon =
        TestDaemon::Start({"--device-memory", "2MiB", "--disk", disk, "--disk-key-file", with});
    ASSERT_NE(daemon, nullptr);
    const auto client = daemon->Connect();
    if (id == 0) {
      ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
      id = client->CreateSequence("small", WithPair("q8_0/turbo4")).value();
      ASSERT_TRUE(client->Append(id, 0, Tokens(3, 0, 300).layers).ok());
      ASSERT_TRUE(client->PersistSequences(std::span(&id, 1)).ok());
      hash = HashOf(*client, id, 300).value();
    }
    EXPECT_EQ(HashOf(*client, id, 300).value(), hash);
  };
  const auto run = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {
        "--listen", "unix:" + folder + "/a.sock", "--device", "cpu",    "--device-memory",
        "2MiB",     "--metrics-address",          "off",      "--disk", disk};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return TestDaemon::RunToEnd(arguments);
  };
  durable(key);
  for (const auto& [more, words] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{}, "is encrypted: give the file with its key"},
           {{"--disk-key-file", other}, "another key"},
           {{"--disk-key-file", open}, "lets others in; chmod 0400"},
           {{"--disk-key-file", folder + "/none"}, "No such file"},
           {{"--disk-key-file", other, "--rekey-disk", key}, "another key"}}) {
    const TestDaemon::Result result = run(more);
    EXPECT_EQ(result.exit_code, 1) << words;
    EXPECT_THAT(result.output, HasSubstr(words));
  }
  durable(key);
  const TestDaemon::Result changed = run({"--disk-key-file", key, "--rekey-disk", other});
  EXPECT_EQ(changed.exit_code, 0) << changed.output;
  EXPECT_EQ(run({"--disk-key-file", key}).exit_code, 1);
  durable(other);
  std::filesystem::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(Io, RestartTest, ::testing::Values("auto", "threads", "encrypted"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace kvtide::e2e
