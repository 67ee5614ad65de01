#include "daemon/ring/ring.h"

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/daemon/ring/hostile_ring.h"

namespace kvtide::ring {
namespace {

constexpr size_t kArea = 4096;

// A ring in memory of this process, with both ends.
struct Pair {
  RingHead head;
  alignas(64) std::byte area[kArea] = {};
  RingWriter writer{&head, area, kArea};
  RingReader reader{&head, area, kArea};

  absl::Status Write(uint64_t id, const std::string& text) {
    const auto to = writer.Reserve(text.size());
    if (!to.ok()) return to.status();
    std::memcpy(*to, text.data(), text.size());
    writer.Publish(id, absl::Seconds(id));
    return absl::OkStatus();
  }
};

TEST(Ring, MessagesArriveInOrderWithTheirTimes) {
  Pair pair;
  RingMessage message;
  EXPECT_FALSE(*pair.reader.Read(&message));
  for (uint64_t round = 1; round < 200; round++) {
    ASSERT_TRUE(pair.Write(2 * round, std::string(round, 'a')).ok());
    ASSERT_TRUE(pair.Write(2 * round + 1, "").ok());
    ASSERT_TRUE(*pair.reader.Read(&message));
    EXPECT_EQ(message.id, 2 * round);
    EXPECT_EQ(message.bytes, std::string(round, 'a'));
    EXPECT_EQ(message.timeout, absl::Seconds(2 * round));
    ASSERT_TRUE(*pair.reader.Read(&message));
    EXPECT_EQ(message.bytes, "");
    EXPECT_FALSE(*pair.reader.Read(&message));
  }
}

TEST(Ring, AFullOneSaysSoAndEmptiesAgain) {
  Pair pair;
  RingMessage message;
  EXPECT_EQ(pair.Write(1, std::string(kArea + 1, 'a')).code(), absl::StatusCode::kResourceExhausted);
  for (int round = 0; round < 3; round++) {
    ASSERT_TRUE(pair.Write(1, std::string(kArea, 'a')).ok());
    EXPECT_EQ(pair.Write(2, "b").code(), absl::StatusCode::kResourceExhausted);
    ASSERT_TRUE(*pair.reader.Read(&message));
    EXPECT_EQ(message.bytes.size(), kArea);
    for (uint32_t i = 0; i < kEntries; i++) ASSERT_TRUE(pair.Write(i, "c").ok()) << i;
    EXPECT_EQ(pair.Write(2, "b").code(), absl::StatusCode::kResourceExhausted);
    for (uint32_t i = 0; i < kEntries; i++) ASSERT_TRUE(*pair.reader.Read(&message));
    EXPECT_FALSE(*pair.reader.Read(&message));
  }
}

TEST(Ring, AReaderThatSleepsIsWoken) {
  Pair pair;
  constexpr uint64_t kMessages = 2000;
  std::thread reader([&pair] {
    RingMessage message;
    for (uint64_t next = 0; next < kMessages;) {
      if (*pair.reader.Read(&message)) {
        ASSERT_EQ(message.id, next);
        ASSERT_EQ(message.bytes, std::to_string(next));
        next++;
      } else {
        // Without polling: every wait is a sleep, and one that is missed hangs the test.
        pair.reader.Wait(absl::ZeroDuration(), absl::Hours(1));
      }
    }
  });
  for (uint64_t i = 0; i < kMessages;) {
    if (pair.Write(i, std::to_string(i)).ok()) {
      i++;
    } else {
      std::this_thread::yield();
    }
  }
  reader.join();
}

TEST(Ring, AReaderCanBeWokenWithoutAMessage) {
  Pair pair;
  std::atomic<bool> done{false};
  std::thread reader([&] {
    pair.reader.Wait(absl::ZeroDuration(), absl::Hours(1));
    done = true;
  });
  while (!done) pair.reader.Wake();
  reader.join();
}

// What a hostile writer may do to the reader: all counts and entries, at the borders of what is allowed.
TEST(Ring, TornCountsAndPlacesOutsideAreErrorsAndNothingElse) {
  RingMessage message;
  for (const uint32_t written : {kEntries + 1, 0x80000000u, 0xffffffffu}) {
    Pair pair;
    pair.head.written = written;
    EXPECT_EQ(pair.reader.Read(&message).status().code(), absl::StatusCode::kInternal);
  }
  struct Place {
    uint32_t offset, bytes;
  };
  for (const Place place :
       {Place{kArea + 1, 0}, Place{kArea, 1}, Place{0, kArea + 1}, Place{1, kArea}, Place{0xffffffff, 1},
        Place{0xffffffff, 0xffffffff}, Place{64, 0xffffffff - 63}}) {
    Pair pair;
    pair.head.entries[0].offset = place.offset;
    pair.head.entries[0].bytes = place.bytes;
    pair.head.written = 1;
    EXPECT_EQ(pair.reader.Read(&message).status().code(), absl::StatusCode::kInternal)
        << place.offset << " " << place.bytes;
  }
  Pair pair;
  pair.head.entries[0].offset = kArea;
  pair.head.entries[0].timeout_ns = -5;
  pair.head.written = 1;
  ASSERT_TRUE(*pair.reader.Read(&message)) << "nothing, at the end";
  EXPECT_EQ(message.timeout, absl::InfiniteDuration());
}

TEST(Ring, AReaderThatHasReadTheFutureIsAnError) {
  Pair pair;
  pair.head.read = 1;
  EXPECT_EQ(pair.writer.Reserve(1).status().code(), absl::StatusCode::kInternal);
  pair.head.read = 0xffffffff - kEntries;
  EXPECT_EQ(pair.writer.Reserve(1).status().code(), absl::StatusCode::kInternal);
}

// The same as the fuzzer does, for some random inputs.
TEST(Ring, RandomHostility) {
  std::mt19937 random(20260101);
  for (int i = 0; i < 3000; i++) {
    std::vector<uint8_t> bytes(random() % 400);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    PlayHostileRing(bytes);
  }
}

}  // namespace
}  // namespace kvtide::ring
