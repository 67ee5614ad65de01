// What is recorded stands in the file, hashed and in order, within its size; what comes too fast is counted.
#include "daemon/trace/trace_recorder.h"

#include <sys/stat.h>

#include <map>
#include <set>

#include "gmock/gmock.h"
#include "tests/daemon/trace/temp_file.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

const absl::Time kStart = absl::FromUnixSeconds(1'800'000'000);

std::vector<RecordedEvent> ReadAll(const std::string& path) {
  absl::StatusOr<std::unique_ptr<TraceReader>> reader = TraceReader::Open(path);
  EXPECT_TRUE(reader.ok()) << reader.status();
  std::vector<RecordedEvent> events;
  RecordedEvent event;
  while ((*reader)->Next(&event).value()) events.push_back(event);
  EXPECT_FALSE((*reader)->cut_off());
  return events;
}

TraceEvent Event(int number, std::span<const BlockKey> keys) {
  TraceEvent event;
  event.time = kStart + absl::Milliseconds(number);
  event.verb = TraceVerb::kLookup;
  event.name_space = 0xfeedfacecafebeef;
  event.block_tokens = 16;
  event.block_bytes = 3000;
  event.there = keys.size() / 2;
  event.keys = keys;
  return event;
}

std::string Bytes(uint64_t number) { return {reinterpret_cast<const char*>(&number), sizeof number}; }

TEST(TraceRecorder, KeysAreHashedAndEqualWithinAFileOnly) {
  std::vector<std::vector<RecordedEvent>> files;
  for (int run = 0; run < 2; run++) {
    const TempFile file("recorder");
    const std::vector<BlockKey> keys = {{0x1111111111111111, 0x2222222222222222}, {3, 4}, {3, 5}, {3, 4}};
    {
      const auto recorder = TraceRecorder::Open(file.path(), kLeastTraceBytes, kStart).value();
      for (int i = 0; i < 3; i++) recorder->Record(Event(i, keys));
      recorder->Flush();
      EXPECT_EQ(recorder->Stats().events, 3u);
      EXPECT_EQ(recorder->Stats().bytes, file.Read().size());
      recorder->Record(Event(3, {}));
    }
    const std::string bytes = file.Read();
    for (const uint64_t secret : {0x1111111111111111u, 0x2222222222222222u, 0xfeedfacecafebeefu})
      EXPECT_EQ(bytes.find(Bytes(secret)), std::string::npos);
    struct stat there {};
    ASSERT_EQ(stat(file.path().c_str(), &there), 0);
    EXPECT_EQ(there.st_mode & 0777, 0600u);
    const std::vector<RecordedEvent> events = ReadAll(file.path());
    ASSERT_EQ(events.size(), 4u);
    for (int i = 0; i < 3; i++) {
      const RecordedEvent& event = events[static_cast<size_t>(i)];
      EXPECT_EQ(event.nanos, i * 1'000'000);
      EXPECT_TRUE(event.Is(TraceVerb::kLookup));
      EXPECT_EQ(event.block_tokens, 16u);
      EXPECT_EQ(event.block_bytes, 3000u);
      EXPECT_EQ(event.count, 2u);
      EXPECT_EQ(event.name_space, events[0].name_space);
      ASSERT_EQ(event.keys.size(), keys.size());
      EXPECT_EQ(event.keys[1], event.keys[3]);
      EXPECT_EQ(std::set<uint64_t>(event.keys.begin(), event.keys.end()).size(), 3u);
    }
    EXPECT_TRUE(events[3].keys.empty());
    files.push_back(events);
  }
  EXPECT_NE(files[0][0].keys, files[1][0].keys) << "another recording, another key";
  EXPECT_NE(files[0][0].name_space, files[1][0].name_space);
}

TEST(TraceRecorder, TheFileEndsWithItsSize) {
  const TempFile file("recorder_full");
  const std::vector<BlockKey> keys(100);
  const auto recorder = TraceRecorder::Open(file.path(), kLeastTraceBytes, kStart).value();
  for (int i = 0; i < 300; i++) {
    recorder->Record(Event(i, keys));
    recorder->Flush();
  }
  const TraceRecorderStats stats = recorder->Stats();
  EXPECT_TRUE(stats.full);
  EXPECT_EQ(stats.events, (kLeastTraceBytes - kTraceHeaderBytes) / TraceEventBytes(keys.size()));
  EXPECT_EQ(file.Read().size(), stats.bytes);
  EXPECT_LE(stats.bytes, kLeastTraceBytes);
  EXPECT_EQ(ReadAll(file.path()).size(), stats.events);
}

TEST(TraceRecorder, WhatIsTooMuchForTheQueueIsCounted) {
  const TempFile file("recorder_gap");
  const std::vector<BlockKey> keys(1 << 20);  // more than waits at a time
  {
    const auto recorder = TraceRecorder::Open(file.path(), uint64_t{64} << 20, kStart).value();
    recorder->Record(Event(0, std::span(keys).first(5)));
    recorder->Record(Event(1, keys));
    recorder->Flush();
    recorder->Record(Event(2, std::span(keys).first(7)));
    recorder->Flush();
    EXPECT_EQ(recorder->Stats().left_out, 1u);
  }
  const std::vector<RecordedEvent> events = ReadAll(file.path());
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].keys.size(), 5u);
  EXPECT_EQ(events[1].verb, kTraceGap);
  EXPECT_EQ(events[1].count, 1u);
  EXPECT_EQ(events[2].keys.size(), 7u);
}

TEST(TraceRecorder, ALongCallIsRecordedInParts) {
  const TempFile file("recorder_parts");
  std::vector<BlockKey> keys(kMostTraceKeys + 3);
  for (size_t i = 0; i < keys.size(); i++) keys[i] = {i, i};
  TraceEvent event = Event(0, keys);
  event.there = kMostTraceKeys + 1;
  TraceRecorder::Open(file.path(), uint64_t{64} << 20, kStart).value()->Record(event);
  const std::vector<RecordedEvent> events = ReadAll(file.path());
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].keys.size(), kMostTraceKeys);
  EXPECT_EQ(events[0].count, kMostTraceKeys);
  EXPECT_EQ(events[1].keys.size(), 3u);
  EXPECT_EQ(events[1].count, 1u);
}

TEST(TraceRecorder, WhatLiesThereIsNotLost) {
  const TempFile file("recorder_there");
  file.Write("somebody's notes");
  const absl::Status refused = TraceRecorder::Open(file.path(), kLeastTraceBytes, kStart).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("name another file"));
  EXPECT_EQ(file.Read(), "somebody's notes");
  std::remove(file.path().c_str());
  TraceRecorder::Open(file.path(), kLeastTraceBytes, kStart).value()->Record(Event(0, {}));
  const std::string first = file.Read();
  ASSERT_TRUE(TraceRecorder::Open(file.path(), kLeastTraceBytes, kStart).ok());
  std::ifstream old(absl::StrCat(file.path(), ".old"), std::ios::binary);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(old), {}), first);
  EXPECT_TRUE(ReadAll(file.path()).empty());
  const absl::Status missing = TraceRecorder::Open("/nowhere/a/trace", kLeastTraceBytes, kStart).status();
  EXPECT_THAT(std::string(missing.message()), HasSubstr("No such file or directory"));
}

}  // namespace
}  // namespace kvtide::testing
