// The life of sequences in a real daemon: what is appended is attended, wherever it lies.
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "clients/cpp/pool.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using client::TensorRef;
using ::testing::HasSubstr;

client::SequenceOptions Exact() {
  client::SequenceOptions options;
  options.pair = "f16/f16";
  return options;
}

// Attention of `queries` queries over the last positions of a sequence, layer 0.
absl::StatusOr<std::vector<float>> AttendLast(Client* client, client::SequenceId sequence,
                                              const std::vector<float>& q) {
  const int64_t queries = static_cast<int64_t>(q.size()) / (kHeads * kDim);
  std::vector<float> output(q.size()), lse(static_cast<size_t>(queries * kHeads));
  client::AttendItem item;
  item.sequence = sequence;
  item.q = TensorRef::F32(q, {queries, kHeads, kDim});
  item.output = output;
  item.lse = lse;
  const absl::Status status = client->Attend(0, std::span(&item, 1));
  if (!status.ok()) return status;
  return output;
}

TEST(Life, AttendsWhatWasAppendedAlsoAfterEvictionAndPrefetch) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", Exact());
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  constexpr int64_t kTokens = 300;
  const Tokens tokens(1, 0, kTokens);
  EXPECT_EQ(client->Append(*sequence, 0, tokens.layers).value(), kTokens);

  const std::vector<float> q = Rows(7, 0, 3, kHeads);
  const std::vector<float> expected = ReferenceAttention(q, tokens.k[0], tokens.v[0], kTokens, 3);
  const auto on_device = AttendLast(client.get(), *sequence, q);
  ASSERT_TRUE(on_device.ok()) << on_device.status();
  EXPECT_LT(LargestDifference(*on_device, expected), 2e-3);

  const auto evicted = client->EvictSequences(std::span(&*sequence, 1));
  ASSERT_TRUE(evicted.ok()) << evicted.status();
  EXPECT_EQ(evicted->blocks, 5);
  EXPECT_EQ(client->ListSequences().value().at(0).tiers.at(1).blocks, 5);
  const auto on_host = AttendLast(client.get(), *sequence, q);
  ASSERT_TRUE(on_host.ok()) << on_host.status();
  EXPECT_LT(LargestDifference(*on_host, expected), 2e-3);

  // Blocks that are on their way already, since attention has asked for them, are told as left.
  client::MoveResult moved;
  do {
    const auto prefetched = client->PrefetchSequences(std::span(&*sequence, 1));
    ASSERT_TRUE(prefetched.ok()) << prefetched.status();
    moved = *prefetched;
  } while (moved.blocks_left > 0);
  EXPECT_EQ(client->ListSequences().value().at(0).tiers.at(0).blocks, 5);
  const auto back = AttendLast(client.get(), *sequence, q);
  ASSERT_TRUE(back.ok());
  EXPECT_LT(LargestDifference(*back, expected), 2e-3);
}

TEST(Life, AppendAttendSeesTheNewTokensAndItsResultsComeInTheAskedType) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", Exact());
  ASSERT_TRUE(sequence.ok());
  std::vector<float> k, v;
  // Pieces of several lengths, over block borders; layer 1 keeps up, so that blocks seal.
  for (const int64_t tokens : {int64_t{1}, int64_t{63}, int64_t{64}, int64_t{70}}) {
    const int64_t first = static_cast<int64_t>(k.size()) / (kKvHeads * kDim);
    const Tokens piece(2, first, tokens);
    const std::vector<float> q = Rows(8, first, tokens, kHeads);
    std::vector<float> output(q.size());
    k.insert(k.end(), piece.k[0].begin(), piece.k[0].end());
    v.insert(v.end(), piece.v[0].begin(), piece.v[0].end());
    for (int layer = 0; layer < kLayers; layer++) {
      client::AppendAttendItem item;
      item.sequence = *sequence;
      item.start_position = first;
      item.q = TensorRef::F32(q, {tokens, kHeads, kDim});
      item.k = piece.layers[static_cast<size_t>(layer)].k;
      item.v = piece.layers[static_cast<size_t>(layer)].v;
      std::vector<float> other(q.size());
      item.output = layer == 0 ? std::span<float>(output) : std::span<float>(other);
      const absl::Status status = client->AppendAttend(layer, std::span(&item, 1));
      ASSERT_TRUE(status.ok()) << status;
    }
    const std::vector<float> expected = ReferenceAttention(q, k, v, first + tokens, tokens);
    EXPECT_LT(LargestDifference(output, expected), 2e-3) << "after " << first + tokens << " tokens";
  }
  EXPECT_EQ(client->ListSequences().value().at(0).tokens, 198);
}

// Rows of one tensor of a read, widened.
std::vector<float> Widened(const std::vector<std::byte>& bytes, DataType type) {
  const TensorView view{bytes.data(), type};
  std::vector<float> values(bytes.size() / DataTypeBytes(type));
  for (size_t i = 0; i < values.size(); i++) values[i] = view.At(i);
  return values;
}

TEST(Life, ReadsBackWhatWasAppendedInEveryTypeAlsoInPiecesAndOnASession) {
  // Messages of 64 KiB: 300 tokens of both layers take five of them in f32.
  const auto daemon = TestDaemon::Start({"--max-message-bytes", "65536"});
  for (const bool session : {false, true}) {
    client::ClientOptions options;
    options.session = session;
    const auto client = daemon->Connect(options);
    ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
    const auto sequence = client->CreateSequence("small", Exact());
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    constexpr int64_t kTokens = 300, kPiece = 10;
    const Tokens all(1, 0, kTokens);
    for (int64_t at = 0; at < kTokens; at += kPiece)
      ASSERT_TRUE(client->Append(*sequence, at, Tokens(1, at, kPiece).layers).ok());
    ASSERT_TRUE(client->EvictSequences(std::span(&*sequence, 1)).ok());  // wherever they lie
    for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16}) {
      const auto rows = client->ReadTokens(*sequence, {}, 0, kTokens, type);
      ASSERT_TRUE(rows.ok()) << rows.status();
      ASSERT_EQ(rows->size(), static_cast<size_t>(kLayers));
      const double most = type == DataType::kBf16 ? 4e-3 : 5e-4;  // rows between -1 and 1, kept in f16
      for (size_t layer = 0; layer < rows->size(); layer++) {
        EXPECT_EQ((*rows)[layer].layer, static_cast<int>(layer));
        EXPECT_LE(LargestDifference(Widened((*rows)[layer].k, type), all.k[layer]), most);
        EXPECT_LE(LargestDifference(Widened((*rows)[layer].v, type), all.v[layer]), most);
      }
    }
    const int layer = 1;
    const auto some = client->ReadTokens(*sequence, std::span(&layer, 1), 63, 3, DataType::kF32);
    ASSERT_TRUE(some.ok()) << some.status();
    const std::vector<float> expected(all.v[1].begin() + 63 * kKvHeads * kDim,
                                      all.v[1].begin() + 66 * kKvHeads * kDim);
    ASSERT_EQ(some->size(), 1u);
    EXPECT_LE(LargestDifference(Widened((*some)[0].v, DataType::kF32), expected), 5e-4);
    // Ranges and layers that are not there.
    EXPECT_EQ(client->ReadTokens(*sequence, {}, 299, 2).status().code(), absl::StatusCode::kOutOfRange);
    EXPECT_EQ(client->ReadTokens(*sequence, {}, 300, 1).status().code(), absl::StatusCode::kOutOfRange);
    EXPECT_EQ(client->ReadTokens(*sequence, {}, -1, 2).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(client->ReadTokens(*sequence, {}, 0, 0).status().code(), absl::StatusCode::kInvalidArgument);
    const int none = 2;
    EXPECT_EQ(client->ReadTokens(*sequence, std::span(&none, 1), 0, 1).status().code(),
              absl::StatusCode::kInvalidArgument);
    ASSERT_TRUE(client->CloseSequence(*sequence).ok());
  }
}

TEST(Life, ForkSharesTruncateCutsCloseFrees) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto first = client->CreateSequence("small", Exact());
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(client->Append(*first, 0, Tokens(3, 0, 100).layers).ok());
  const int64_t used = client->GetStats().value().tiers.at(0).used_bytes;
  const auto fork = client->ForkSequence(*first);
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(client->GetStats().value().tiers.at(0).used_bytes, used);

  // The branches go apart: the fork's new tokens are its own.
  ASSERT_TRUE(client->Append(*fork, 100, Tokens(4, 100, 10).layers).ok());
  EXPECT_GT(client->GetStats().value().tiers.at(0).used_bytes, used);

  // Parking one branch leaves what the other uses, and says so; both together go.
  const auto one = client->EvictSequences(std::span(&*fork, 1));
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(one->blocks, 1);
  EXPECT_EQ(one->shared_blocks, 1);
  EXPECT_EQ(one->blocks_left, 0);
  const client::SequenceId both[] = {*first, *fork};
  const auto rest = client->EvictSequences(both);
  ASSERT_TRUE(rest.ok()) << rest.status();
  EXPECT_EQ(rest->blocks, 2);
  EXPECT_EQ(rest->shared_blocks, 0);
  ASSERT_TRUE(client->PrefetchSequences(both).ok());
  const std::vector<float> q = Rows(9, 0, 1, kHeads);
  const Tokens all(3, 0, 100);
  EXPECT_LT(LargestDifference(AttendLast(client.get(), *first, q).value(),
                              ReferenceAttention(q, all.k[0], all.v[0], 100, 1)),
            2e-3);
  ASSERT_TRUE(client->TruncateSequence(*fork, 70).ok());
  const Tokens cut(3, 0, 70);
  EXPECT_LT(LargestDifference(AttendLast(client.get(), *fork, q).value(),
                              ReferenceAttention(q, cut.k[0], cut.v[0], 70, 1)),
            2e-3);
  ASSERT_TRUE(client->CloseSequence(*first).ok());
  ASSERT_TRUE(client->CloseSequence(*fork).ok());
  const auto stats = client->GetStats();
  EXPECT_EQ(stats->tiers.at(0).used_bytes, 0);
  EXPECT_EQ(stats->sequences, 0);
}

TEST(Life, ASessionThatBreaksReleasesItsSequences) {
  const auto daemon = TestDaemon::Start();
  const auto watcher = daemon->Connect();
  ASSERT_TRUE(watcher->RegisterModel(SmallModel()).ok());
  const auto kept = watcher->CreateSequence("small", Exact());
  ASSERT_TRUE(kept.ok());
  {
    client::ClientOptions options;
    options.session = true;
    const auto session = daemon->Connect(options);
    const auto sequence = session->CreateSequence("small", Exact());
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    ASSERT_TRUE(session->Append(*sequence, 0, Tokens(5, 0, 130).layers).ok());
    ASSERT_TRUE(session->ForkSequence(*sequence).ok());
    // An error is an answer like any other; the session goes on.
    EXPECT_EQ(session->TruncateSequence(*sequence, 131).code(), absl::StatusCode::kOutOfRange);
    EXPECT_EQ(session->GetStats().value().sequences, 3);
  }
  int64_t sequences = 3;
  for (int i = 0; i < 2000 && sequences > 1; i++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    sequences = watcher->GetStats().value().sequences;
  }
  EXPECT_EQ(sequences, 1);
  EXPECT_EQ(watcher->GetStats()->tiers.at(0).used_bytes, 0);
  EXPECT_EQ(watcher->ListSequences().value().at(0).id, *kept);
}

TEST(Life, AClientKilledWhileItAppendsLeavesWholeTokensBehind) {
  const auto daemon = TestDaemon::Start({"--device-memory", "16MiB"});
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  for (const bool session : {false, true}) {
    std::vector<std::string> command = {Program("kvtide_e2e_appender"), daemon->address()};
    if (session) command.push_back("session");
    const pid_t appender = StartProgram(command, daemon->folder() + "/appender.log");
    ASSERT_GT(appender, 0);
    int64_t tokens = 0;
    for (int i = 0; i < 10000 && tokens < 200; i++) {
      const std::vector<client::SequenceInfo> all = client->ListSequences().value();
      for (const client::SequenceInfo& info : all) tokens = std::max(tokens, info.tokens);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_GE(tokens, 200) << ReadWhole(daemon->folder() + "/appender.log");
    kill(appender, SIGKILL);
    WaitForExit(appender, 10);
    ASSERT_TRUE(daemon->Alive());
    if (session) {
      int64_t left = 1;
      for (int i = 0; i < 2000 && left > 0; i++) {
        left = client->GetStats().value().sequences;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      EXPECT_EQ(left, 0) << "the session's sequence was not released";
      continue;
    }
    // An append that had arrived may still be under way: it ends, and the length settles.
    client::SequenceInfo info = client->ListSequences().value().at(0);
    for (int i = 0; i < 2000 && info.tokens != info.max_layer_tokens; i++) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      info = client->ListSequences().value().at(0);
    }
    EXPECT_EQ(info.tokens, info.max_layer_tokens) << "half an append is visible";
    absl::StatusOr<int64_t> length = absl::AbortedError("");
    for (int i = 0; i < 2000 && absl::IsAborted(length.status()); i++) {
      info = client->ListSequences().value().at(0);
      length = client->Append(info.id, info.tokens, Tokens(6, info.tokens, 5).layers);
    }
    EXPECT_TRUE(length.ok()) << length.status();
    ASSERT_TRUE(client->CloseSequence(info.id).ok());
  }
}

TEST(Life, TwoWritersOfOneSequenceNeverMix) {
  const auto daemon = TestDaemon::Start({"--device-memory", "16MiB"});
  const auto owner = daemon->Connect();
  ASSERT_TRUE(owner->RegisterModel(SmallModel()).ok());
  const auto sequence = owner->CreateSequence("small", Exact());
  ASSERT_TRUE(sequence.ok());
  // Each writes pieces of its own size at the length that it sees; the other one may be faster.
  constexpr int kPieces = 40;
  int64_t written[2] = {0, 0};
  const auto write = [&](int writer, int64_t size) {
    const auto client = daemon->Connect();
    for (int done = 0; done < kPieces;) {
      const int64_t start = client->ListSequences().value().at(0).max_layer_tokens;
      const auto length = client->Append(*sequence, start, Tokens(10 + writer, start, size).layers);
      if (length.ok()) {
        written[writer] += size;
        done++;
      } else {
        ASSERT_TRUE(length.status().code() == absl::StatusCode::kAborted ||
                    length.status().code() == absl::StatusCode::kOutOfRange)
            << length.status();
      }
    }
  };
  std::thread other(write, 1, 5);
  write(0, 3);
  other.join();
  EXPECT_EQ(owner->ListSequences().value().at(0).tokens, written[0] + written[1]);
  EXPECT_EQ(written[0] + written[1], kPieces * 8);
}

// One thread, a queue of one: eight clients at once cannot all be served, and those that are not hear it at
// once.
TEST(Life, CallsBeyondTheQueueAreRefused) {
  const std::string config = MakeFolder() + "/config.json";
  std::ofstream(config) << "{\"service_threads\": 1, \"max_queued_calls\": 1}";
  const auto daemon = TestDaemon::Start({"--config", config, "--device-memory", "64MiB"});
  const auto owner = daemon->Connect();
  ASSERT_TRUE(owner->RegisterModel(SmallModel()).ok());
  std::atomic<int> refused{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; i++) {
    clients.emplace_back([&] {
      const auto client = daemon->Connect();
      auto sequence = client->CreateSequence("small", {.pair = "f16/f16"});
      while (absl::IsResourceExhausted(sequence.status())) {
        sequence = client->CreateSequence("small", {.pair = "f16/f16"});
      }
      ASSERT_TRUE(sequence.ok()) << sequence.status();
      int64_t length = 0;
      for (int call = 0; call < 40; call++) {
        const auto appended = client->Append(*sequence, length, Tokens(20, length, 32).layers);
        if (appended.ok()) {
          length += 32;
          EXPECT_EQ(*appended, length);
        } else {
          EXPECT_EQ(appended.status().code(), absl::StatusCode::kResourceExhausted) << appended.status();
          EXPECT_THAT(std::string(appended.status().message()), HasSubstr("all threads are busy"));
          refused++;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_GT(refused, 0);
  EXPECT_TRUE(daemon->Alive());
  std::filesystem::remove_all(std::filesystem::path(config).parent_path());
}

// Deadlines that pass anywhere within a call: each ends with DEADLINE_EXCEEDED or done, and no layer runs
// ahead.
TEST(Life, ADeadlineNeverLeavesHalfAnAppend) {
  const auto daemon = TestDaemon::Start({"--device-memory", "64MiB"});
  const auto owner = daemon->Connect();
  ASSERT_TRUE(owner->RegisterModel(SmallModel()).ok());
  const auto sequence = owner->CreateSequence("small", {.pair = "turbo4/turbo4"});
  ASSERT_TRUE(sequence.ok());
  int passed = 0;
  for (int i = 0; i < 30; i++) {
    client::ClientOptions options;
    options.timeout = absl::Milliseconds(1 + i % 10);
    const auto client = daemon->Connect(options);
    client::SequenceInfo info = owner->ListSequences().value().at(0);
    const int64_t start = info.max_layer_tokens;
    const absl::Status status = client->Append(*sequence, start, Tokens(21, start, 2048).layers).status();
    EXPECT_TRUE(status.ok() || absl::IsDeadlineExceeded(status) || absl::IsAborted(status) ||
                absl::IsOutOfRange(status))
        << status;
    if (absl::IsDeadlineExceeded(status)) passed++;
  }
  EXPECT_GT(passed, 0);
  client::SequenceInfo info = owner->ListSequences().value().at(0);
  absl::StatusOr<int64_t> length = absl::AbortedError("");
  for (int i = 0; i < 2000 && !length.ok(); i++) {  // the last of them may still be writing
    info = owner->ListSequences().value().at(0);
    length = owner->Append(*sequence, info.tokens, Tokens(21, info.tokens, 1).layers);
  }
  ASSERT_TRUE(length.ok()) << length.status();
  EXPECT_EQ(*length % 2048, 1);
}

TEST(Life, ShutdownIsGracefulAndClosesTheSocket) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  EXPECT_TRUE(client->CheckHealth().ok()) << client->CheckHealth();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  client::ClientOptions options;
  options.session = true;
  const auto session = daemon->Connect(options);  // idle: must not hold the shutdown up
  ASSERT_TRUE(session->CreateSequence("small", Exact()).ok());
  EXPECT_EQ(daemon->Stop(), 0) << daemon->Log();
  EXPECT_THAT(daemon->Log(), HasSubstr("stopping signal=SIGTERM"));
  EXPECT_NE(::access(daemon->socket_path().c_str(), F_OK), 0) << "the socket is still there";
  EXPECT_EQ(client->GetStats().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(session->GetStats().status().code(), absl::StatusCode::kUnavailable);
}

// The kernel keeps 128 connections for a daemon that has no time to accept and turns away the next one; who
// does not want to wait for a daemon waits for one that is there.
TEST(Life, AFullQueueOfConnectionsIsNoMissingDaemon) {
  const auto daemon = TestDaemon::Start();
  ASSERT_EQ(::kill(daemon->pid(), SIGSTOP), 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::snprintf(name.sun_path, sizeof(name.sun_path), "%s", daemon->socket_path().c_str());
  std::vector<int> waiting;
  for (int error = 0; error == 0;) {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    error = ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0 ? 0 : errno;
    waiting.push_back(fd);
    ASSERT_LT(waiting.size(), 10000u);
  }
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    for (const int fd : waiting) ::close(fd);
    ::kill(daemon->pid(), SIGCONT);
  });
  client::ClientOptions options;
  options.wait_for_daemon = false;
  options.connect_timeout = absl::Seconds(60);
  const auto client = Client::Connect(daemon->address(), options);
  later.join();
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE((*client)->GetServerInfo().ok());
}

// Scripts wait for the socket's file; what lies behind it is ready then, shared memory too.
TEST(Life, TheFileOfItsSocketMeansThatItAnswers) {
  for (int i = 0; i < 5; i++) {
    const std::string folder = MakeFolder(), path = folder + "/s.sock";
    const pid_t pid =
        StartProgram({Program("kvtided"), "--listen", "unix:" + path, "--device", "cpu", "--device-memory",
                      "16MiB", "--host-memory", "0", "--metrics-address", "off"},
                     folder + "/log");
    ASSERT_GT(pid, 0);
    while (::access(path.c_str(), F_OK) != 0 && ::kill(pid, 0) == 0) {
    }
    client::PoolOptions options;
    options.client.wait_for_daemon = false;
    const auto shared = Pool::Connect("shm:unix:" + path, options);
    EXPECT_TRUE(shared.ok()) << shared.status();
    const auto client = Client::Connect("unix:" + path, options.client);
    EXPECT_TRUE(client.ok()) << client.status();
    EXPECT_TRUE(client.ok() && (*client)->ReloadConfig().ok());
    ::kill(pid, SIGTERM);
    EXPECT_EQ(WaitForExit(pid, 60), 0) << ReadWhole(folder + "/log");
    std::filesystem::remove_all(folder);
  }
}

// A daemon in a PID namespace of its own does not see this process, so it would not notice when that has
// ended: blocks could be used again under its last kernels.
TEST(Life, WhoCannotBeSeenMayNotMapThePool) {
  const std::string folder = MakeFolder(), path = folder + "/s.sock";
  const pid_t pid = StartProgram({"/usr/bin/unshare", "--pid", "--fork", "--kill-child", Program("kvtided"),
                                  "--listen", "unix:" + path, "--device", "cpu", "--device-memory", "16MiB",
                                  "--host-memory", "0", "--metrics-address", "off", "--share-pool"},
                                 folder + "/log");
  ASSERT_GT(pid, 0);
  while (::access(path.c_str(), F_OK) != 0) {
    if (::waitpid(pid, nullptr, WNOHANG) == pid)
      GTEST_SKIP() << "no PID namespaces here: " << ReadWhole(folder + "/log");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  client::PoolOptions options;
  options.direct_device = "cpu";
  const absl::Status mapped = Pool::Connect("direct:unix:" + path, options).status();
  EXPECT_EQ(mapped.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(mapped.message()), HasSubstr("shareProcessNamespace"));
  const auto best = Pool::Connect("auto:unix:" + path, options);
  ASSERT_TRUE(best.ok()) << best.status();
  EXPECT_EQ((*best)->way(), client::Way::kSharedMemory) << (*best)->why();
  ::kill(pid, SIGKILL);  // unshare ignores others, and takes the daemon with it
  WaitForExit(pid, 60);
  std::filesystem::remove_all(folder);
}

// What systemd hears (Type=notify, WatchdogSec, ExecReload): ready, every second that it is not stuck, a
// reload, the end.
TEST(Life, TellsTheServiceManagerHowItIs) {
  const std::string folder = MakeFolder();
  const int socket = ::socket(AF_UNIX, SOCK_DGRAM, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::snprintf(name.sun_path, sizeof(name.sun_path), "%s/notify", folder.c_str());
  ASSERT_EQ(::bind(socket, reinterpret_cast<const sockaddr*>(&name), sizeof(name)), 0);
  const timeval patience = {60, 0};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  setenv("NOTIFY_SOCKET", name.sun_path, 1);
  setenv("WATCHDOG_USEC", "30000000", 1);
  const auto daemon = TestDaemon::Start();
  unsetenv("NOTIFY_SOCKET");
  unsetenv("WATCHDOG_USEC");
  const auto hear = [&](const std::string& wanted) {
    char text[256];
    for (ssize_t size; (size = ::recv(socket, text, sizeof(text), 0)) > 0;)
      if (std::string(text, static_cast<size_t>(size)) == wanted) return true;
    return false;
  };
  EXPECT_TRUE(hear("READY=1"));
  EXPECT_TRUE(hear("WATCHDOG=1"));
  EXPECT_TRUE(hear("WATCHDOG=1"));
  kill(daemon->pid(), SIGHUP);
  EXPECT_TRUE(hear("RELOADING=1"));
  EXPECT_TRUE(hear("READY=1"));
  EXPECT_EQ(daemon->Stop(), 0);
  EXPECT_TRUE(hear("STOPPING=1"));
  ::close(socket);
  std::filesystem::remove_all(folder);
}

TEST(Life, PlansForItsOwnTiers) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  client::PlanQuestion question;
  question.model = "small";
  question.contexts = {1024, 1 << 20};
  question.pairs = {"f16/f16", "turbo4/turbo4"};
  const auto answer = client->Plan(question);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->device_budget_bytes, 4 << 20);
  ASSERT_EQ(answer->contexts.size(), 2u);
  EXPECT_EQ(answer->contexts[0].verdict, client::PlanVerdict::kFits);
  // 16 blocks of 64 KiB.
  EXPECT_EQ(answer->contexts[0].candidates.at(0).kv_bytes, 16 * 65536);
  EXPECT_EQ(answer->contexts[1].verdict, client::PlanVerdict::kDoesNotFit);
  // What the plan says is what the pool takes.
  const auto sequence = client->CreateSequence("small", Exact());
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(12, 0, 1024).layers).ok());
  EXPECT_EQ(client->GetStats().value().tiers.at(0).used_bytes, answer->contexts[0].candidates.at(0).kv_bytes);
  question.model = "unknown";
  EXPECT_EQ(client->Plan(question).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvtide::e2e
