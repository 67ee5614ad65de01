// Recordings come back as they were written; a damaged one gives what is right and says what is not.
#include "daemon/trace/trace_file.h"

#include <random>

#include "gmock/gmock.h"
#include "tests/daemon/trace/temp_file.h"

namespace kvtide::testing {
namespace {

using ::testing::HasSubstr;

std::vector<RecordedEvent> SomeEvents(uint32_t seed, size_t count) {
  std::mt19937_64 random(seed);
  std::vector<RecordedEvent> events(count);
  for (RecordedEvent& event : events) {
    event.nanos = static_cast<int64_t>(random() % 1'000'000'000'000);
    event.verb = static_cast<uint8_t>(1 + random() % 5);
    event.block_tokens = static_cast<uint32_t>(random() % 512);
    event.name_space = random();
    event.block_bytes = random() % (1 << 24);
    event.keys.resize(random() % 20);
    for (uint64_t& key : event.keys) key = random();
    event.count = event.keys.empty() ? 0 : random() % event.keys.size();
  }
  return events;
}

std::string Encode(const std::vector<RecordedEvent>& events) {
  std::string bytes = EncodeTraceHeader(absl::FromUnixSeconds(1'800'000'000));
  for (const RecordedEvent& event : events) EncodeTraceEvent(event, &bytes);
  return bytes;
}

struct Outcome {
  absl::Status status;  // of the record that could not be read, or of the file
  std::vector<RecordedEvent> events;
  bool cut_off = false;
};
Outcome ReadAll(const std::string& path) {
  Outcome outcome;
  absl::StatusOr<std::unique_ptr<TraceReader>> reader = TraceReader::Open(path);
  if (!reader.ok()) return {reader.status(), {}, false};
  EXPECT_EQ((*reader)->start(), absl::FromUnixSeconds(1'800'000'000));
  while (true) {
    RecordedEvent event;
    const absl::StatusOr<bool> next = (*reader)->Next(&event);
    outcome.status = next.status();
    if (!next.ok() || !*next) break;
    outcome.events.push_back(event);
  }
  outcome.cut_off = (*reader)->cut_off();
  return outcome;
}

TEST(TraceFile, EventsComeBack) {
  const TempFile file("trace");
  for (uint32_t seed = 1; seed <= 20; seed++) {
    const std::vector<RecordedEvent> events = SomeEvents(seed, seed * 3);
    const std::string bytes = Encode(events);
    size_t size = kTraceHeaderBytes;
    for (const RecordedEvent& event : events) size += TraceEventBytes(event.keys.size());
    EXPECT_EQ(bytes.size(), size);
    file.Write(bytes);
    EXPECT_TRUE(IsTrace(file.path()));
    const Outcome outcome = ReadAll(file.path());
    EXPECT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_EQ(outcome.events, events);
    EXPECT_FALSE(outcome.cut_off);
  }
}

// Frozen: recordings outlive the programs that made them.
TEST(TraceFile, TheBytesAreTheseOnes) {
  RecordedEvent event;
  event.nanos = 0x0102030405060708;
  event.verb = static_cast<uint8_t>(TraceVerb::kLookup);
  event.block_tokens = 64;
  event.name_space = 0x1112131415161718;
  event.block_bytes = 4096;
  event.count = 1;
  event.keys = {0x2122232425262728};
  std::string bytes = EncodeTraceHeader(absl::FromUnixNanos(5));
  EncodeTraceEvent(event, &bytes);
  const std::string header("KVTRACE\n\1\0\0\0\x20\0\0\0\5\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 32);
  const std::string body(
      "\x08\x07\x06\x05\x04\x03\x02\x01\x02\0\0\0\x40\0\0\0"
      "\x18\x17\x16\x15\x14\x13\x12\x11\0\x10\0\0\0\0\0\0\1\0\0\0\0\0\0\0\x28\x27\x26\x25\x24\x23\x22\x21",
      48);
  EXPECT_EQ(bytes.substr(0, 32), header);
  EXPECT_EQ(bytes.substr(32, 4), std::string("\x30\0\0\0", 4));
  EXPECT_EQ(bytes.substr(40), body);
}

TEST(TraceFile, AFileThatEndsAnywhereGivesWhatIsWhole) {
  const TempFile file("trace_cut");
  const std::vector<RecordedEvent> events = SomeEvents(7, 6);
  const std::string bytes = Encode(events);
  size_t whole = 0, next = kTraceHeaderBytes;
  for (size_t end = 0; end < bytes.size(); end++) {
    while (whole < events.size() && next + TraceEventBytes(events[whole].keys.size()) <= end)
      next += TraceEventBytes(events[whole++].keys.size());
    file.Write(bytes.substr(0, end));
    const Outcome outcome = ReadAll(file.path());
    if (end < kTraceHeaderBytes) {
      EXPECT_EQ(outcome.status.code(), absl::StatusCode::kFailedPrecondition) << end;
      continue;
    }
    EXPECT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_EQ(outcome.cut_off, end != next) << end;
    EXPECT_EQ(outcome.events,
              std::vector<RecordedEvent>(events.begin(), events.begin() + static_cast<ptrdiff_t>(whole)));
  }
}

TEST(TraceFile, AFlippedBitIsNeverAnotherEvent) {
  const TempFile file("trace_bits");
  const std::vector<RecordedEvent> events = SomeEvents(8, 5);
  const std::string bytes = Encode(events);
  size_t damaged = 0;
  for (size_t at = kTraceHeaderBytes; at < bytes.size(); at++) {
    std::string other = bytes;
    other[at] = static_cast<char>(other[at] ^ (1 << (at % 8)));
    file.Write(other);
    const Outcome outcome = ReadAll(file.path());
    // A size that reaches beyond the end looks like a file that was cut off.
    EXPECT_TRUE(outcome.cut_off || absl::IsDataLoss(outcome.status)) << at << ": " << outcome.status;
    damaged += absl::IsDataLoss(outcome.status);
    ASSERT_LT(outcome.events.size(), events.size()) << at;
    for (size_t i = 0; i < outcome.events.size(); i++) EXPECT_EQ(outcome.events[i], events[i]) << at;
  }
  EXPECT_GT(damaged, bytes.size() / 2);
}

TEST(TraceFile, WhatIsNoRecordingIsToldApart) {
  const TempFile file("trace_other");
  EXPECT_EQ(TraceReader::Open(file.path()).status().code(), absl::StatusCode::kNotFound);
  file.Write("a text that is longer than a header has to be\n");
  EXPECT_FALSE(IsTrace(file.path()));
  EXPECT_THAT(std::string(TraceReader::Open(file.path()).status().message()), HasSubstr("no recording"));
  std::string newer = Encode({});
  newer[8] = 2;
  file.Write(newer);
  EXPECT_THAT(std::string(TraceReader::Open(file.path()).status().message()), HasSubstr("version 2"));
}

TEST(TraceFile, RandomBytesBehindAHeaderAreDamage) {
  const TempFile file("trace_random");
  for (uint32_t seed = 0; seed < 200; seed++) {
    std::mt19937 random(seed);
    std::string bytes = Encode({});
    const size_t size = 1 + random() % 300;
    for (size_t i = 0; i < size; i++) bytes.push_back(static_cast<char>(random()));
    file.Write(bytes);
    const Outcome outcome = ReadAll(file.path());
    EXPECT_TRUE(outcome.events.empty());
    EXPECT_TRUE(outcome.cut_off || absl::IsDataLoss(outcome.status));
  }
}

}  // namespace
}  // namespace kvtide::testing
