// The tier of host memory of a kvtided, mapped by its clients (--host-sharing): who may, what they see, and
// that what they hold is room again when they are done, have gone or were killed.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "clients/cpp/block_store.h"
#include "clients/cpp/pool.h"
#include "clients/cpp/ring_carrier.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::testing {
namespace {

using client::BlocksInPlace;
using client::BlockStore;

constexpr size_t kBytes = size_t{64} << 10;
constexpr int kHost = 64, kRoom = 80;  // blocks in the host tier, and with the device tier

std::unique_ptr<e2e::TestDaemon> Daemon(std::vector<std::string> more = {"--host-sharing"}) {
  std::vector<std::string> arguments = {"--device", "cpu",           "--device-memory",
                                        "1MiB",     "--host-memory", "4MiB"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return e2e::TestDaemon::Start(arguments);
}

std::unique_ptr<Pool> Connect(const e2e::TestDaemon& daemon, bool host_tier = true) {
  client::PoolOptions options;
  options.host_tier = host_tier;
  options.arena_bytes = int64_t{16} << 20;
  auto pool = Pool::Connect("shm:" + daemon.address(), options);
  EXPECT_TRUE(pool.ok()) << pool.status();
  return pool.ok() ? *std::move(pool) : nullptr;
}

std::unique_ptr<BlockStore> Open(Pool& pool, const std::string& name) {
  client::NamespaceSpec spec;
  spec.model = name;
  spec.block_tokens = 16;
  spec.content = client::OpaqueBlocks{kBytes, "test"};
  return *BlockStore::Open(pool, spec);
}

// Blocks that are all of one byte, `first` and those that follow.
int64_t Fill(BlockStore& store, int first, int count) {
  std::vector<std::string> names;
  std::vector<std::byte> payload(static_cast<size_t>(count) * kBytes);
  for (int i = 0; i < count; i++) {
    names.push_back(absl::StrCat("block ", first + i));
    std::memset(payload.data() + static_cast<size_t>(i) * kBytes, first + i, kBytes);
  }
  const std::vector<std::string_view> keys(names.begin(), names.end());
  const auto stored = store.Store(keys, payload);
  EXPECT_TRUE(stored.ok()) << stored.status();
  return stored.ok() ? stored->stored : 0;
}

client::LeaseId Lease(BlockStore& store, int first, int count) {
  std::vector<std::string> names;
  for (int i = 0; i < count; i++) names.push_back(absl::StrCat("block ", first + i));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  const auto found = store.Lookup(keys);
  EXPECT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->hits, count);
  return found->lease;
}

void ExpectFilled(const BlocksInPlace& loaded, int first) {
  for (size_t i = 0; i < loaded.blocks.size(); i++) {
    ASSERT_NE(loaded.blocks[i], nullptr) << i;
    for (const size_t at : {size_t{0}, kBytes / 2, kBytes - 1})
      ASSERT_EQ(loaded.blocks[i][at], static_cast<std::byte>(first + static_cast<int>(i))) << i;
  }
}

// Blocks that a namespace of its own finds room for, beside what is held.
int64_t Room(Pool& pool) {
  const auto store = Open(pool, "room");
  std::vector<std::string> names;
  for (int i = 0; i < kRoom; i++) names.push_back(absl::StrCat("room ", i));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  const std::vector<std::byte> payload(kRoom * kBytes);
  const auto result = store->Store(keys, payload);  // a call never makes way for itself
  EXPECT_TRUE(store->Delete().ok());
  return result.ok() ? result->stored : 0;
}

TEST(HostSharing, BlocksAreReadWhereTheyLie) {
  const auto daemon = Daemon();
  const auto pool = Connect(*daemon), other = Connect(*daemon);
  EXPECT_EQ(pool->host_tier().bytes.size(), kHost * kBytes);
  const auto store = Open(*pool, "mine"), others = Open(*other, "mine");
  ASSERT_EQ(Fill(*store, 1, 10), 10);
  const client::LeaseId lease = Lease(*store, 1, 10);
  const auto loaded = store->LoadInPlace(lease, 2, 8);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_TRUE(loaded->lost.empty());
  ExpectFilled(*loaded, 3);
  EXPECT_TRUE(*store->Release(lease));
  ASSERT_TRUE(store->Delete().ok());
  EXPECT_EQ(Room(*other), kRoom - 8) << "what is held takes room";
  ExpectFilled(*loaded, 3);
  // Nobody gives back what is another's.
  ASSERT_TRUE(others->GiveBack(std::vector<uint64_t>{loaded->places, 7}).ok());
  EXPECT_EQ(Room(*other), kRoom - 8);
  ASSERT_TRUE(store->GiveBack(std::vector<uint64_t>{loaded->places}).ok());
  EXPECT_EQ(Room(*other), kRoom);
}

TEST(HostSharing, WithoutItBlocksComeThroughTheArena) {
  const auto plain = Daemon({});
  const auto sharing = Daemon();
  for (const auto& pool : {Connect(*plain), Connect(*sharing, false)}) {
    EXPECT_TRUE(pool->host_tier().empty());
    const auto store = Open(*pool, "mine");
    ASSERT_EQ(Fill(*store, 1, 2), 2);
    const client::LeaseId lease = Lease(*store, 1, 2);
    EXPECT_TRUE(absl::IsFailedPrecondition(store->LoadInPlace(lease, 0, 2).status()));
    std::vector<std::byte> payload(2 * kBytes);
    ASSERT_TRUE(store->Load(lease, 0, 2, payload).ok());
    EXPECT_EQ(payload[kBytes], std::byte{2});
  }
}

// What a client that says otherwise is told.
TEST(HostSharing, MessagesThatMakeNoSenseAreRefused) {
  const auto daemon = Daemon();
  const auto pool = Connect(*daemon);
  const auto store = Open(*pool, "mine");
  ASSERT_EQ(Fill(*store, 1, 2), 2);
  const auto ask = [&](bool maps, const auto& change) {
    client::RingOptions options;
    options.host_tier = maps;
    const auto carrier = client::RingCarrier::Connect(daemon->socket_path(), options);
    EXPECT_TRUE(carrier.ok()) << carrier.status();
    v1::SessionRequest message;
    v1::SessionResponse answer;
    v1::LoadBlocksRequest& request = *message.mutable_load_blocks();
    request.set_lease_id(Lease(*store, 1, 2));
    request.set_blocks(2);
    request.set_in_place(true);
    change(request);
    return (*carrier)->Call(&message, &answer);
  };
  EXPECT_TRUE(ask(true, [](v1::LoadBlocksRequest&) {}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(ask(false, [](v1::LoadBlocksRequest&) {})));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ask(true, [](v1::LoadBlocksRequest& request) { request.mutable_place()->set_bytes(kBytes); })));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ask(true, [](v1::LoadBlocksRequest& request) { request.mutable_layout()->set_block_stride(1); })));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ask(true, [](v1::LoadBlocksRequest& request) { request.set_form(v1::BLOCK_FORM_TENSORS); })));
  EXPECT_TRUE(absl::IsOutOfRange(ask(true, [](v1::LoadBlocksRequest& request) { request.set_blocks(3); })));
}

TEST(HostSharing, OnlyAnAdminMapsIt) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs to become somebody else";
  const auto daemon = Daemon({"--host-sharing", "--allow", "uid:4321"});
  EXPECT_EQ(
      e2e::AnswerAs(4321, *daemon,
                    [&] {
                      const auto pool = Connect(*daemon);
                      return pool != nullptr && pool->host_tier().empty() && pool->Allocate(64).ok() ? 3 : 1;
                    }),
      3);
}

TEST(HostSharing, WhoGoesGivesEverythingBack) {
  const auto daemon = Daemon();
  const auto watching = Connect(*daemon, false);
  for (const bool killed : {false, true}) {
    int ready[2], leave[2];
    ASSERT_EQ(::pipe(ready), 0);
    ASSERT_EQ(::pipe(leave), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
      {
        const auto pool = Connect(*daemon);
        const auto store = Open(*pool, "mine");
        if (Fill(*store, 1, 20) != 20) ::_exit(1);
        const auto loaded = store->LoadInPlace(Lease(*store, 1, 20), 0, 20);
        if (!loaded.ok() || loaded->places == 0 || !store->Delete().ok()) ::_exit(2);
        if (::write(ready[1], "r", 1) != 1) ::_exit(3);
        char byte = 0;
        if (::read(leave[0], &byte, 1) != 1) ::_exit(4);  // a child that is to be killed waits for ever
      }
      ::_exit(0);
    }
    char byte = 0;
    ::close(ready[1]);
    ASSERT_EQ(::read(ready[0], &byte, 1), 1);
    ::close(ready[0]);
    EXPECT_EQ(Room(*watching), kRoom - 20);
    if (killed) {
      ASSERT_EQ(::kill(child, SIGKILL), 0);
    } else {
      ASSERT_EQ(::write(leave[1], "l", 1), 1);
    }
    EXPECT_EQ(e2e::WaitForExit(child, 60), killed ? 128 + SIGKILL : 0);
    int64_t room = 0;
    for (const absl::Time end = absl::Now() + absl::Seconds(20); room < kRoom && absl::Now() < end;) {
      room = Room(*watching);
      if (room < kRoom) absl::SleepFor(absl::Milliseconds(5));
    }
    EXPECT_EQ(room, kRoom);
    ::close(leave[0]);
    ::close(leave[1]);
  }
}

TEST(HostSharing, ADaemonThatDiesIsSeenAndItsMemoryLetGo) {
  const auto daemon = Daemon();
  const auto pool = Connect(*daemon);
  const auto store = Open(*pool, "mine");
  ASSERT_EQ(Fill(*store, 1, 4), 4);
  auto loaded = store->LoadInPlace(Lease(*store, 1, 4), 0, 4);
  ASSERT_TRUE(loaded.ok());
  EXPECT_TRUE(pool->connected());
  daemon->Kill();
  for (const absl::Time end = absl::Now() + absl::Seconds(20); pool->connected() && absl::Now() < end;)
    absl::SleepFor(absl::Milliseconds(1));
  EXPECT_FALSE(pool->connected());
  ExpectFilled(*loaded, 1);  // who copies goes on
  pool->DropHostTier();
  EXPECT_TRUE(pool->host_tier().empty());
  ExpectFilled(*loaded, 1);
  EXPECT_TRUE(absl::IsUnavailable(store->GiveBack(std::vector<uint64_t>{loaded->places})));
  loaded = BlocksInPlace();
}

}  // namespace
}  // namespace kvtide::testing
