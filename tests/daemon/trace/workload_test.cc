// Generated workloads have the numbers that they state, again and again; files in Mooncake's format are read
// line by line.
#include "daemon/trace/workload.h"

#include <set>

#include "gmock/gmock.h"
#include "tests/daemon/trace/temp_file.h"

namespace kvtide::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Numbers {
  double mean_tokens = 0, found = 0;
};
Numbers NumbersOf(const std::vector<RecordedEvent>& events) {
  std::set<uint64_t> seen;
  double blocks = 0, found = 0;
  for (const RecordedEvent& event : events) {
    size_t there = 0;
    while (there < event.keys.size() && seen.contains(event.keys[there])) there++;
    found += static_cast<double>(there);
    blocks += static_cast<double>(event.keys.size());
    seen.insert(event.keys.begin(), event.keys.end());
  }
  return {blocks * 512 / static_cast<double>(events.size()) + 256, found / blocks};
}

TEST(Workload, HasTheNumbersOfItsTrace) {
  struct Trace {
    const char* name;
    size_t requests;
    double tokens, found;
  };
  for (const Trace& trace : {Trace{"conversation", 12031, 12035, 0.40},
                             Trace{"tool-agent", 23608, 8596, 0.59}, Trace{"synthetic", 3993, 15325, 0.66}}) {
    SCOPED_TRACE(trace.name);
    for (const uint64_t seed : {1, 2}) {
      const WorkloadShape shape = FindWorkloadShape(trace.name).value();
      WorkloadOptions options;
      options.seed = seed;
      const std::vector<RecordedEvent> events = MakeWorkload(shape, options);
      EXPECT_EQ(events.size(), trace.requests);
      const Numbers numbers = NumbersOf(events);
      EXPECT_NEAR(numbers.mean_tokens, trace.tokens, 0.12 * trace.tokens);
      EXPECT_NEAR(numbers.found, trace.found, 0.06);
      EXPECT_LT(static_cast<double>(events.back().nanos) * 1e-9, shape.seconds);
      EXPECT_TRUE(std::is_sorted(events.begin(), events.end(),
                                 [](const auto& a, const auto& b) { return a.nanos < b.nanos; }));
    }
  }
}

TEST(Workload, IsTheSameForTheSameSeed) {
  const WorkloadShape shape = FindWorkloadShape("conversation").value();
  WorkloadOptions options;
  options.scale = 0.02;
  const std::vector<RecordedEvent> first = MakeWorkload(shape, options);
  EXPECT_EQ(first.size(), 241u);
  EXPECT_EQ(MakeWorkload(shape, options), first);
  options.seed = 2;
  EXPECT_NE(MakeWorkload(shape, options), first);
  // The same prompts, in smaller blocks.
  options.seed = 1;
  options.block_tokens = 64;
  const std::vector<RecordedEvent> small = MakeWorkload(shape, options);
  ASSERT_EQ(small.size(), first.size());
  for (size_t i = 0; i < small.size(); i++) EXPECT_EQ(small[i].keys.size() / 8, first[i].keys.size());
}

TEST(Workload, UnknownNamesAreToldTheKnown) {
  EXPECT_THAT(std::string(FindWorkloadShape("chat").status().message()),
              AllOf(HasSubstr("'chat'"), HasSubstr("conversation, tool-agent, synthetic")));
}

TEST(Workload, ReadsMooncakesFormat) {
  const TempFile file("mooncake");
  file.Write(
      "{\"timestamp\": 27, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [0, 7, 8]}\n"
      "\n"
      "{\"timestamp\": 3, \"input_length\": 512, \"output_length\": 5, \"hash_ids\": [0]}\n");
  const auto events = ReadMooncakeTrace(file.path(), 10, {});
  ASSERT_TRUE(events.ok()) << events.status();
  ASSERT_EQ(events->size(), 2u);
  EXPECT_EQ((*events)[0].nanos, 3'000'000);
  EXPECT_THAT((*events)[0].keys, ElementsAre(0u));
  EXPECT_THAT((*events)[1].keys, ElementsAre(0u, 7u)) << "the last block is not full";
  EXPECT_EQ((*events)[1].block_bytes, 5120u);
  EXPECT_EQ((*events)[1].block_tokens, 512u);
}

TEST(Workload, SaysWhichLineIsWrong) {
  const TempFile file("mooncake_bad");
  const std::string good = "{\"timestamp\": 27, \"input_length\": 1100, \"hash_ids\": [0, 7, 8]}\n";
  for (const char* bad :
       {"{", "[]", "7", "{\"timestamp\": -1, \"input_length\": 1, \"hash_ids\": []}",
        "{\"timestamp\": \"a\", \"input_length\": 1, \"hash_ids\": []}",
        "{\"timestamp\": 1e300, \"input_length\": 1, \"hash_ids\": []}",
        "{\"timestamp\": 1, \"input_length\": -1, \"hash_ids\": []}",
        "{\"timestamp\": 1, \"input_length\": 1.5, \"hash_ids\": []}",
        "{\"timestamp\": 1, \"input_length\": 600, \"hash_ids\": 3}",
        "{\"timestamp\": 1, \"input_length\": 600, \"hash_ids\": [\"x\"]}", "{\"input_length\": 600}"}) {
    file.Write(good + bad + "\n");
    const absl::Status status = ReadMooncakeTrace(file.path(), 10, {}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr("line 2")) << bad;
  }
  file.Write("\n");
  EXPECT_THAT(std::string(ReadMooncakeTrace(file.path(), 10, {}).status().message()),
              HasSubstr("no request"));
  EXPECT_EQ(ReadMooncakeTrace("/no/such", 10, {}).status().code(), absl::StatusCode::kNotFound);
  file.Write(good);
  EXPECT_TRUE(ReadMooncakeTrace(file.path(), 10, {}).ok());
}

}  // namespace
}  // namespace kvtide::testing
