// Replays count what a cache of that size would have found, in blocks that a hand can follow, and agree with
// themselves.
#include "daemon/trace/replay.h"

#include <set>

#include "daemon/trace/trace_recorder.h"
#include "daemon/trace/workload.h"
#include "gmock/gmock.h"
#include "tests/daemon/trace/temp_file.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBlock = 1 << 20;

RecordedEvent Ask(int second, std::vector<uint64_t> keys, TraceVerb verb = TraceVerb::kLookup) {
  RecordedEvent event;
  event.nanos = second * int64_t{1'000'000'000};
  event.verb = static_cast<uint8_t>(verb);
  event.block_tokens = 64;
  event.block_bytes = kBlock;
  event.name_space = 1;
  event.keys = std::move(keys);
  return event;
}

ReplayResult Play(const std::vector<RecordedEvent>& events, uint64_t host, uint64_t disk = 0,
                  EvictionKind eviction = EvictionKind::kLru) {
  ReplayOptions options;
  options.eviction = eviction;
  options.host_bytes = host;
  options.disk_bytes = disk;
  const absl::StatusOr<ReplayResult> result = Replay(events, options);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.value_or(ReplayResult());
}

TEST(Replay, FindsWhatWasAskedBefore) {
  const std::vector<RecordedEvent> events = {Ask(1, {1, 2, 3}), Ask(2, {1, 2, 4}), Ask(3, {1, 2, 3, 5}),
                                             Ask(4, {9})};
  const ReplayResult result = Play(events, 100 * kBlock);
  EXPECT_EQ(result.lookups, 4u);
  EXPECT_EQ(result.asked_blocks, 11u);
  EXPECT_EQ(result.hit_blocks, 5u);
  EXPECT_EQ(result.hit_tokens, 5u * 64);
  EXPECT_EQ(result.stored_blocks, 6u);
  EXPECT_EQ(result.stored_bytes, 6 * kBlock);
  EXPECT_EQ(result.dropped_blocks, 0u);
  EXPECT_DOUBLE_EQ(result.TokenHitRatio(), 5.0 / 11);
  EXPECT_EQ(DistinctBytes(events), 6 * kBlock);
}

TEST(Replay, WhatHasNoRoomIsComputedAgain) {
  // Four blocks fit: the second prompt drives out the end of the first one, then its beginning.
  const std::vector<RecordedEvent> events = {Ask(1, {1, 2, 3}), Ask(2, {4, 5}), Ask(3, {1, 2, 3})};
  const ReplayResult small = Play(events, 4 * kBlock);
  EXPECT_EQ(small.hit_blocks, 2u);
  EXPECT_GT(small.dropped_blocks, 0u);
  const ReplayResult disk = Play(events, 4 * kBlock, 100 * kBlock);
  EXPECT_EQ(disk.hit_blocks, 3u);
  EXPECT_EQ(disk.dropped_blocks, 0u);
  EXPECT_GT(disk.down_bytes, 0u);
  EXPECT_GT(disk.up_bytes, 0u) << "what is found on the disk is loaded";
  EXPECT_EQ(disk.host_hit_blocks + disk.disk_hit_blocks, disk.hit_blocks);
  EXPECT_GT(disk.disk_hit_blocks, 0u);
}

TEST(Replay, StoresAndSealsAddWhatTheyName) {
  const ReplayResult result = Play(
      {Ask(1, {1}), Ask(2, {2, 3}, TraceVerb::kStore), Ask(3, {4}, TraceVerb::kSeal), Ask(4, {1, 2, 3, 4}),
       Ask(5, {7, 8}, TraceVerb::kBegin), Ask(6, {7}, TraceVerb::kLoad), Ask(7, {7})},
      100 * kBlock);
  EXPECT_EQ(result.hit_blocks, 4u);
  EXPECT_EQ(result.lookups, 3u) << "what a recording loaded and began with is what its lookups found";
}

TEST(Replay, NamespacesAndSizesStandForThemselves) {
  RecordedEvent other = Ask(2, {1, 2});
  other.name_space = 2;
  RecordedEvent larger = Ask(3, {1, 2});
  larger.block_bytes = 3 * kBlock;
  const ReplayResult result = Play({Ask(1, {1, 2}), other, larger, Ask(4, {1, 2})}, 100 * kBlock);
  EXPECT_EQ(result.hit_blocks, 2u);
  EXPECT_EQ(result.stored_bytes, 10 * kBlock);
}

TEST(Replay, MoreMemoryFindsMoreAndAnEndlessOneAll) {
  WorkloadOptions options;
  options.scale = 0.05;
  const std::vector<RecordedEvent> events = MakeWorkload(FindWorkloadShape("conversation").value(), options);
  std::set<uint64_t> seen;
  uint64_t all = 0;
  for (const RecordedEvent& event : events) {
    size_t there = 0;
    while (there < event.keys.size() && seen.contains(event.keys[there])) there++;
    all += there;
    seen.insert(event.keys.begin(), event.keys.end());
  }
  const uint64_t bytes = DistinctBytes(events);
  EXPECT_EQ(bytes, seen.size() * events[0].block_bytes);
  for (const EvictionKind kind : AllEvictionKinds()) {
    SCOPED_TRACE(NameOf(kind));
    EXPECT_EQ(Play(events, bytes + bytes / 8, 0, kind).hit_blocks, all);
    uint64_t before = 0;
    for (const uint64_t part : {20, 8, 4, 2}) {
      const ReplayResult result = Play(events, bytes / part, 0, kind);
      EXPECT_GE(result.hit_blocks + all / 50, before) << part;
      EXPECT_LE(result.hit_blocks, all);
      before = result.hit_blocks;
      const ReplayResult again = Play(events, bytes / part, 0, kind);
      EXPECT_EQ(again.hit_blocks, result.hit_blocks) << "the same twice";
      EXPECT_EQ(again.dropped_blocks, result.dropped_blocks);
    }
    EXPECT_EQ(Play(events, bytes / 8, 2 * bytes, kind).hit_blocks, all) << "the disk has the rest";
  }
}

TEST(Replay, WhatDoesNotFitIsSaid) {
  ReplayOptions options;
  options.host_bytes = kBlock / 2;
  const std::vector<RecordedEvent> events = {Ask(1, {1})};
  EXPECT_THAT(std::string(Replay(events, options).status().message()), HasSubstr("smaller than one block"));
  options.host_bytes = 8 * kBlock;
  RecordedEvent odd = Ask(1, {1});
  odd.block_tokens = 0;
  EXPECT_THAT(std::string(Replay({&odd, 1}, options).status().message()), HasSubstr("event 0: "));
  options.progress = [](uint64_t) { return false; };
  const std::vector<RecordedEvent> many(100, Ask(1, {1}));
  EXPECT_TRUE(absl::IsCancelled(Replay(many, options).status()));
}

TEST(Replay, ReadsWhatWasRecorded) {
  const TempFile file("replay");
  const std::vector<BlockKey> keys = {{1, 1}, {2, 2}, {3, 3}};
  {
    const auto recorder = TraceRecorder::Open(file.path(), kLeastTraceBytes, absl::UnixEpoch()).value();
    for (int i = 0; i < 3; i++) {
      TraceEvent event;
      event.time = absl::UnixEpoch() + absl::Seconds(i);
      event.verb = i == 1 ? TraceVerb::kStore : TraceVerb::kLookup;
      event.block_tokens = 16;
      event.block_bytes = kBlock;
      event.keys = keys;
      recorder->Record(event);
    }
  }
  const absl::StatusOr<Recording> recording = ReadRecording(file.path(), {});
  ASSERT_TRUE(recording.ok()) << recording.status();
  EXPECT_EQ(recording->events.size(), 3u);
  EXPECT_EQ(recording->missing, 0u);
  EXPECT_FALSE(recording->cut_off);
  EXPECT_EQ(Play(recording->events, 8 * kBlock).hit_blocks, 3u);
  const std::string bytes = file.Read();
  file.Write(bytes.substr(0, bytes.size() - 3));
  EXPECT_TRUE(ReadRecording(file.path(), {})->cut_off);
  std::string damaged = bytes;
  damaged[bytes.size() - 3] ^= 1;
  file.Write(damaged);
  EXPECT_TRUE(absl::IsDataLoss(ReadRecording(file.path(), {}).status()));
}

}  // namespace
}  // namespace kvtide::testing
