// Calls that meet: two writers, readers during writes, closing and moving what is in use; and many clients at
// once whose every answer must equal the shadow's. Gates in the backend make the meetings certain; the last
// test is for ThreadSanitizer.
#include <atomic>
#include <thread>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using ConcurrencyTest = CacheTest;
constexpr size_t kBlock = 65536;

TEST_F(ConcurrencyTest, TheSecondWriterIsAbortedAtOnceAndReadersSeeOnlyWhatIsCommitted) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(100).ok());
  const ShadowSequence before = client.shadow();
  device_->Close(FaultyBackend::kAppend);
  std::thread writer([&] { EXPECT_TRUE(client.Append(50).ok()); });
  device_->WaitForEntry(FaultyBackend::kAppend);

  std::vector<float> rows(2 * 128), q(4 * 64, 0.2f), out(4 * 64), lse(4);
  const LayerKv kv{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
  AppendCall call;
  call.sequence = client.id();
  call.start_position = 100;
  call.tokens = 2;
  call.layers = {&kv, 1};
  EXPECT_TRUE(IsError(cache_->Append(call), absl::StatusCode::kAborted, "one writer at a time"));
  EXPECT_TRUE(
      IsError(cache_->ForkSequence(client.id()).status(), absl::StatusCode::kAborted, "is being written"));
  EXPECT_TRUE(
      IsError(cache_->TruncateSequence(client.id(), 5), absl::StatusCode::kAborted, "one writer at a time"));
  EXPECT_EQ(*cache_->LayerLength(client.id(), 0), 100);
  AttendRequest item;
  item.sequence = client.id();
  item.q = {q.data(), DataType::kF32};
  item.queries = 1;
  item.first_query_position = 1000;
  item.out = out.data();
  item.lse = lse.data();
  AttendCall attend;
  attend.items = {&item, 1};
  ASSERT_TRUE(cache_->Attend(attend).ok());
  ExpectClose(before.Attend(0, q, 1, 1000), out, lse, "during an append");

  device_->Open(FaultyBackend::kAppend);
  writer.join();
  EXPECT_EQ(client.info().tokens, 150);
  client.CheckAllLayers();
}

TEST_F(ConcurrencyTest, ASequenceThatIsClosedDuringAnAppendIsFreedWhenTheCallEnds) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  for (const auto gate : {FaultyBackend::kAppend, FaultyBackend::kAttend}) {
    Client fork = client.Fork();
    device_->Close(gate);
    std::thread writer(
        [&] { EXPECT_TRUE(IsError(fork.Step(70), absl::StatusCode::kAborted, "was closed")); });
    device_->WaitForEntry(gate);
    EXPECT_TRUE(fork.Close().ok());
    EXPECT_TRUE(IsError(fork.Close(), absl::StatusCode::kNotFound, "was closed"));
    EXPECT_GT(UsedBytes(cache_->Stats()), 2 * kBlock);
    device_->Open(gate);
    writer.join();
    EXPECT_EQ(UsedBytes(cache_->Stats()), 2 * kBlock);
    cache_->CheckInvariants();
  }
  client.CheckAllLayers();
}

TEST_F(ConcurrencyTest, BytesUnderARunningAttendStayThroughMovesAndClose) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(200).ok());
  device_->Close(FaultyBackend::kAttend);
  std::thread reader([&] { EXPECT_TRUE(client.CheckAttention(1).ok()); });
  device_->WaitForEntry(FaultyBackend::kAttend);
  EXPECT_EQ(cache_->Stats().tiers[0].pinned_blocks, 4u);
  EXPECT_EQ(cache_->Evict({{client.id()}}, 1)->moved_blocks, 4u);
  EXPECT_EQ(cache_->Stats().tiers[0].used_bytes, 4 * kBlock) << "the reader still needs them";
  EXPECT_EQ(cache_->Stats().tiers[1].used_bytes, 4 * kBlock);
  ASSERT_TRUE(cache_->CloseSequence(client.id()).ok());
  EXPECT_EQ(cache_->Stats().tiers[1].used_bytes, 0u);
  // New blocks must not take the pinned memory.
  Client other(*cache_, SmallModel(), WithPair("f16"), random_);
  std::mt19937 random(3);
  ASSERT_TRUE(other.Append(300).ok());
  device_->Open(FaultyBackend::kAttend);
  reader.join();
  EXPECT_EQ(cache_->Stats().tiers[0].used_bytes, 5 * kBlock);
  EXPECT_EQ(cache_->Stats().tiers[0].pinned_blocks, 0u);
  other.CheckAllLayers();
}

TEST_F(ConcurrencyTest, ASequenceThatIsClosedWhileItsBlocksMoveIsFreed) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(200).ok());
  device_->Close(FaultyBackend::kPoll);
  std::thread mover([&] { EXPECT_TRUE(cache_->Evict({{client.id()}}, 1).ok()); });
  device_->WaitForEntry(FaultyBackend::kPoll);
  ASSERT_TRUE(client.Close().ok());
  device_->Open(FaultyBackend::kPoll);
  mover.join();
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
  cache_->CheckInvariants();
}

TEST_F(ConcurrencyTest, AnAppendWaitsForItsTailToArriveInTheOtherTier) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(100).ok());
  device_->Close(FaultyBackend::kPoll);
  std::thread mover([&] { EXPECT_EQ(cache_->Evict({{client.id()}}, 1)->moved_blocks, 2u); });
  device_->WaitForEntry(FaultyBackend::kPoll);
  std::atomic<bool> appended{false};
  std::thread writer([&] {
    EXPECT_TRUE(client.Append(10).ok());
    appended = true;
  });
  EXPECT_EQ(host_->calls(FaultyBackend::kAppend), 0);
  EXPECT_FALSE(appended);
  device_->Open(FaultyBackend::kPoll);
  mover.join();
  writer.join();
  EXPECT_EQ(host_->calls(FaultyBackend::kAppend), 1);
  client.CheckAllLayers();
}

// A cut followed by an append must not write over rows that a running attend still reads.
TEST_F(ConcurrencyTest, RowsUnderAReaderAreNotOverwrittenAfterACut) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(60).ok());
  Client reader_view = client;  // shares the sequence, keeps its own shadow
  device_->Close(FaultyBackend::kAttend);
  std::mt19937 random(8);
  std::thread reader([&] { EXPECT_TRUE(reader_view.CheckAttention(0).ok()); });
  device_->WaitForEntry(FaultyBackend::kAttend);
  ASSERT_TRUE(client.Truncate(10).ok());
  ASSERT_TRUE(client.Append(40).ok());
  EXPECT_EQ(cache_->Stats().copied_on_write_blocks, 1u);
  device_->Open(FaultyBackend::kAttend);
  reader.join();
  client.CheckAllLayers();
}

TEST_F(ConcurrencyTest, AnAppendWaitsForRoomThatARunningAttendHolds) {
  options_.clock = absl::Now;
  options_.room_wait = absl::Seconds(20);
  Start(3 * kBlock, 0);
  Client a(*cache_, SmallModel(), WithPair("f16"), random_),
      b(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(a.Append(150).ok());
  device_->Close(FaultyBackend::kAttend);
  std::thread reader([&] { EXPECT_TRUE(a.CheckAttention(0).ok()); });
  device_->WaitForEntry(FaultyBackend::kAttend);
  ASSERT_TRUE(a.Close().ok());
  std::mt19937 random(9);
  Client c(*cache_, SmallModel(), WithPair("f16"), random);
  std::thread writer([&] { EXPECT_TRUE(c.Append(10).ok()); });
  device_->Open(FaultyBackend::kAttend);
  reader.join();
  writer.join();
  c.CheckAllLayers();
}

TEST_F(ConcurrencyTest, ManyClientsUnderPressureGetTheirOwnTokensBack) {
  options_.background_moves = true;
  options_.move_interval = absl::Milliseconds(1);
  options_.clock = absl::Now;
  options_.limits.idle = absl::ZeroDuration();
  options_.limits.high_watermark = 0.7;
  options_.limits.low_watermark = 0.5;
  options_.room_wait = absl::Seconds(30);
  Start(24 * kBlock, 200 * kBlock);
  constexpr int kThreads = 4;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> aborted{0};
  std::thread meddler([&] {
    std::mt19937 random(99);
    while (!stop) {
      for (const SequenceInfo& info : cache_->ListSequences()) {
        if (stop) break;
        const SequenceId id = info.id;
        switch (random() % 4) {
          case 0:
            (void)cache_->Evict({&id, 1}, 1);
            break;
          case 1:
            (void)cache_->Prefetch({&id, 1});
            break;
          case 2: {
            const absl::StatusOr<SequenceId> fork = cache_->ForkSequence(id);
            if (fork.ok()) {
              EXPECT_TRUE(cache_->CloseSequence(*fork).ok());
            } else {
              aborted++;
            }
            break;
          }
          default:
            (void)cache_->Stats();
        }
      }
    }
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++)
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<uint32_t>(t) + 1);
      const ModelSpec model = t % 2 == 0 ? SmallModel() : MixedModel();
      Client client(*cache_, model, WithPair(t < 2 ? "turbo4" : "f16", {1, 1}), random);
      for (int step = 0; step < 10; step++) {
        const absl::Status status = client.Step(1 + static_cast<int64_t>(random() % 60));
        ASSERT_TRUE(status.ok()) << status;
        client.CheckAllLayers();
        if (step % 4 == 3) {
          Client fork = client.Fork();
          const absl::Status forked = fork.Step(20);
          EXPECT_TRUE(forked.ok()) << forked;
          fork.CheckAllLayers();
          EXPECT_TRUE(fork.Close().ok());
        }
      }
      EXPECT_TRUE(client.Close().ok());
    });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  meddler.join();
  EXPECT_GT(cache_->Stats().moves, 0u);
}

}  // namespace
}  // namespace kvtide::testing
