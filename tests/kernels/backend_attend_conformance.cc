// Conformance of Attend: every type, head dim, mask and shape of the work, against float64 on the stored
// bytes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>

#include "kernels/attend_args.h"
#include "kernels/attention_state.h"
#include "kernels/format/catalogue.h"
#include "tests/kernels/attend_check.h"
#include "tests/kernels/backend_conformance.h"

namespace kvtide::testing {
namespace {

constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512};

// `runs`, `q` and `result` must outlive the item.
AttendItem ItemOf(const std::vector<BlockRun>& runs, const std::vector<float>& q, int queries,
                  int64_t first_query_position, AttendResult* result) {
  AttendItem item;
  item.runs = runs;
  item.q = q.data();
  item.queries = queries;
  item.first_query_position = first_query_position;
  item.out = result->out.data();
  item.lse = result->lse.data();
  return item;
}

// One of each storage, width and group size.
std::vector<std::string> SomePairs() {
  return {"f16", "bf16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2", "wht4"};
}

TEST_P(BackendConformance, AttendsEveryTypeAtEveryHeadDim) {
  for (CacheType type : AllCacheTypes())
    for (int dim : kHeadDims) {
      SCOPED_TRACE(std::string(Name(type)) + " d " + std::to_string(dim));
      TestSequence sequence(backend(), {1, 1, dim, dim});
      sequence.AddRun(Name(type), 130, GaussianRows(3));
      for (int group : {1, 4, 6}) {
        AttendCase c;
        c.group = group;
        c.queries = 2;
        CheckAttend(backend(), sequence, c);
      }
    }
}

TEST_P(BackendConformance, AttendsManyQueriesOfEveryType) {
  for (CacheType type : AllCacheTypes())
    for (int dim : {80, 128, 192}) {
      SCOPED_TRACE(std::string(Name(type)) + " d " + std::to_string(dim));
      TestSequence sequence(backend(), {1, 2, dim, dim});
      sequence.AddRun(Name(type), 150, GaussianRows(5));
      AttendCase c;
      c.group = 3;
      c.queries = 40;
      CheckAttend(backend(), sequence, c);
    }
}

TEST_P(BackendConformance, AttendsPairsOfUnequalTypesAndWidths) {
  for (const char* pair : {"q8_0/turbo4", "turbo3/f16", "f16/turbo3", "turbo4/q4_0", "q5_0/turbo2",
                           "bf16/q8_0", "wht4/turbo4"}) {
    SCOPED_TRACE(pair);
    TestSequence sequence(backend(), {2, 2, 192, 128});
    sequence.AddRun(pair, 200, GaussianRows(7));
    AttendCase c;
    c.layer = 1;
    CheckAttend(backend(), sequence, c);
    c.queries = 30;
    CheckAttend(backend(), sequence, c);
  }
}

TEST_P(BackendConformance, AttendsAnyNumberOfHeadsAndQueries) {
  for (const std::string& pair : SomePairs()) {
    TestSequence sequence(backend(), {1, 1, 64, 64});
    sequence.AddRun(pair, 200, GaussianRows(11));
    for (int group = 1; group <= 16; group++)
      for (int queries : {1, 2, 7}) {
        SCOPED_TRACE(pair + " group " + std::to_string(group) + " queries " + std::to_string(queries));
        AttendCase c;
        c.group = group;
        c.queries = queries;
        CheckAttend(backend(), sequence, c);
      }
  }
}

TEST_P(BackendConformance, AttendsEveryLengthWithQueriesAtTheEnd) {
  for (const std::string& pair : SomePairs())
    for (int64_t tokens : {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 3000}) {
      SCOPED_TRACE(pair + " tokens " + std::to_string(tokens));
      TestSequence sequence(backend(), {1, 1, 96, 96});
      sequence.AddRun(pair, tokens, GaussianRows(13));
      AttendCase c;
      c.group = 2;
      c.first_query_position = std::max<int64_t>(0, tokens - 1);
      CheckAttend(backend(), sequence, c);
    }
}

TEST_P(BackendConformance, MasksByCausalityAndWindow) {
  for (const std::string& pair : SomePairs()) {
    TestSequence sequence(backend(), {1, 2, 64, 64});
    sequence.AddRun("f16", 64, GaussianRows(17));
    sequence.AddRun(pair, 256, GaussianRows(18));
    sequence.AddRun("f16", 70, GaussianRows(19));
    for (int64_t window : {0, 1, 5, 64, 100, 1000})
      for (int queries : {1, 3, 70})
        for (int64_t position : {int64_t{0}, int64_t{63}, int64_t{150}, int64_t{320}, int64_t{500}}) {
          SCOPED_TRACE(pair + " window " + std::to_string(window) + " queries " + std::to_string(queries) +
                       " at " + std::to_string(position));
          AttendCase c;
          c.group = 2;
          c.queries = queries;
          c.first_query_position = position;
          c.window = window;
          c.causal = true;
          CheckAttend(backend(), sequence, c);
          c.causal = false;
          CheckAttend(backend(), sequence, c);
        }
  }
}

TEST_P(BackendConformance, CapsLogitsAndCountsSinks) {
  for (const std::string& pair : SomePairs()) {
    SCOPED_TRACE(pair);
    TestSequence sequence(backend(), {1, 2, 128, 128});
    sequence.AddRun(pair, 180, GaussianRows(23));
    AttendCase c;
    c.group = 2;
    c.query_size = 8;
    c.softcap = 5;
    CheckAttend(backend(), sequence, c);
    c.queries = 50;
    CheckAttend(backend(), sequence, c);
    c.query_size = 1;
    c.softcap = 0;
    c.sinks = {3.0f, -2.0f, 40.0f, 0.5f};
    CheckAttend(backend(), sequence, c);
  }
}

TEST_P(BackendConformance, SeesNothingBeforeTheFirstToken) {
  TestSequence sequence(backend(), {1, 1, 64, 64});
  sequence.AddRun("turbo3", 0, GaussianRows(29));
  AttendCase c;
  c.first_query_position = 0;
  const std::vector<float> q = MakeQueries(sequence, c);
  AttendResult result = AttendOn(backend(), sequence, sequence.device_runs(), c, q);
  for (float x : result.lse) EXPECT_EQ(x, -INFINITY);
  for (float x : result.out) EXPECT_EQ(x, 0.0f);
  c.sinks = {1.5f, 1.5f, 1.5f, 1.5f};
  result = AttendOn(backend(), sequence, sequence.device_runs(), c, q);
  for (float x : result.lse) EXPECT_EQ(x, 1.5f);
  for (float x : result.out) EXPECT_EQ(x, 0.0f);
}

TEST_P(BackendConformance, AddsTheMeanAndGainOfAProfile) {
  for (const std::string& pair : SomePairs())
    for (int dim : {80, 128}) {
      SCOPED_TRACE(pair + " d " + std::to_string(dim));
      const GroupShape shape{2, 2, dim, dim};
      const Profile profile = RandomProfile(shape, 31);
      TestSequence sequence(backend(), shape);
      sequence.AddRun("f16", 64, GaussianRows(32));
      sequence.AddRun(pair, 192, GaussianRows(33), &profile);
      sequence.AddRun("f16", 20, GaussianRows(34));
      AttendCase c;
      c.layer = 1;
      CheckAttend(backend(), sequence, c);
      c.softcap = 4;
      CheckAttend(backend(), sequence, c);
      c.queries = 33;
      CheckAttend(backend(), sequence, c);
    }
}

TEST_P(BackendConformance, GivesTheMeanOfVWhenAllLogitsAreEqual) {
  for (const std::string& pair : SomePairs()) {
    SCOPED_TRACE(pair);
    TestSequence sequence(backend(), {1, 1, 128, 128});
    sequence.AddRun(pair, 300, GaussianRows(37));
    AttendCase c;
    c.query_size = 0;
    CheckAttend(backend(), sequence, c);
    const AttendResult result =
        AttendOn(backend(), sequence, sequence.device_runs(), c, MakeQueries(sequence, c));
    for (float x : result.lse) EXPECT_NEAR(x, std::log(300.0f), 1e-4f);
  }
}

// Without care, 16-bit weights wrap here: the best weight of a page is rounded up past its range. Equal V
// norms show it.
TEST_P(BackendConformance, StandsLogitsOfTenThousandWithEqualVNorms) {
  for (const std::string& pair : SomePairs())
    for (float size : {200.0f, 1000.0f, 4000.0f, -4000.0f})
      for (uint32_t seed = 1; seed <= 3; seed++) {
        SCOPED_TRACE(pair + " size " + std::to_string(size));
        TestSequence sequence(backend(), {1, 1, 64, 64});
        // K: one direction for all tokens, in steps; logits reach +-1e4 and are several units apart.
        sequence.AddRun(pair, 200, [&](Side side, int64_t token, int, std::vector<float>& row) {
          std::mt19937 random(static_cast<uint32_t>(token) * 7 + seed);
          for (float& x : row) x = random() % 2 == 0 ? 1.0f : -1.0f;
          if (side == Side::kKey)
            for (float& x : row) x = static_cast<float>(token * 37 % 200 - 100) / 100.0f;
        });
        AttendCase c;
        c.queries = 1;
        c.group = 1;
        std::vector<float> q(64, size * 8 / 64);  // logit = token step * size
        ExpectClose(AttendOn(backend(), sequence, sequence.device_runs(), c, q),
                    AttendByReference(sequence, c, q), 64, 1e-3);
        c.queries = 40;
        q.assign(64 * 40, size * 8 / 64);
        ExpectClose(AttendOn(backend(), sequence, sequence.device_runs(), c, q),
                    AttendByReference(sequence, c, q), 64, 1e-3);
      }
}

TEST_P(BackendConformance, FollowsADominantTokenAnywhere) {
  for (const std::string& pair : SomePairs())
    for (int64_t sink : {0, 1, 63, 64, 100, 199}) {
      SCOPED_TRACE(pair + " sink " + std::to_string(sink));
      TestSequence sequence(backend(), {1, 1, 64, 64});
      const RowFill gaussian = GaussianRows(41);
      sequence.AddRun(pair, 200, [&](Side side, int64_t token, int head, std::vector<float>& row) {
        gaussian(side, token, head, row);
        if (token == sink)
          for (float& x : row) x = side == Side::kKey ? 12.0f : 0.01f * x;
      });
      AttendCase c;
      c.group = 1;
      const std::vector<float> q(64, 1.0f);
      ExpectClose(AttendOn(backend(), sequence, sequence.device_runs(), c, q),
                  AttendByReference(sequence, c, q), 64, 1e-3);
    }
}

TEST_P(BackendConformance, StandsZeroVectorsAndExtremeSizes) {
  for (const std::string& pair : SomePairs())
    for (float size : {0.0f, 1e-7f, 1e-3f, 3000.0f}) {
      SCOPED_TRACE(pair + " size " + std::to_string(size));
      TestSequence sequence(backend(), {1, 1, 128, 128});
      const RowFill gaussian = GaussianRows(43);
      sequence.AddRun(pair, 100, [&](Side side, int64_t token, int head, std::vector<float>& row) {
        gaussian(side, token, head, row);
        for (float& x : row) x *= token % 3 == 0 ? 0.0f : size;
      });
      AttendCase c;
      c.query_size = size > 1 ? 0.001f : 1.0f;
      CheckAttend(backend(), sequence, c);
      c.queries = 20;
      CheckAttend(backend(), sequence, c);
    }
}

TEST_P(BackendConformance, PartsMergeToTheWhole) {
  std::mt19937 random(47);
  for (const std::string& pair : SomePairs()) {
    TestSequence sequence(backend(), {1, 1, 128, 128});
    sequence.AddRun(pair, 64 * 11 + 17, GaussianRows(48));
    for (int round = 0; round < 3; round++) {
      AttendCase c;
      c.queries = 1 + static_cast<int>(random() % 20);
      const std::vector<float> q = MakeQueries(sequence, c);
      const BlockRun whole_run = sequence.device_runs()[0];
      const AttendResult whole = AttendOn(backend(), sequence, {whole_run}, c, q);
      AttendResult merged{std::vector<float>(whole.out.size(), 0.0f),
                          std::vector<float>(whole.lse.size(), -INFINITY)};
      std::vector<BlockRun> cut;
      for (size_t first = 0; first < whole_run.blocks.size();) {
        const size_t count = std::min<size_t>(1 + random() % 5, whole_run.blocks.size() - first);
        BlockRun part = whole_run;
        part.blocks = whole_run.blocks.subspan(first, count);
        part.first_position += static_cast<int64_t>(first) * kBlockTokens;
        part.tokens = std::min<int64_t>(static_cast<int64_t>(count) * kBlockTokens,
                                        whole_run.tokens - static_cast<int64_t>(first) * kBlockTokens);
        cut.push_back(part);
        const AttendResult state = AttendOn(backend(), sequence, {part}, c, q);
        for (size_t row = 0; row < state.lse.size(); row++)
          MergeAttentionState(merged.out.data() + row * 128, &merged.lse[row], state.out.data() + row * 128,
                              state.lse[row], 128);
        first += count;
      }
      SCOPED_TRACE(pair + " parts " + std::to_string(cut.size()));
      const double tolerance = c.queries * c.group > kFewRows ? 2e-3 : 2e-4;
      ExpectClose(merged, whole, 128, tolerance);
      ExpectClose(AttendOn(backend(), sequence, cut, c, q), whole, 128, tolerance);
    }
  }
}

TEST_P(BackendConformance, DoesNotDependOnTheRestOfTheBatch) {
  TestSequence a(backend(), {1, 2, 128, 128}), b(backend(), {1, 2, 128, 128});
  a.AddRun("turbo4", 1000, GaussianRows(53));
  b.AddRun("q8_0", 300, GaussianRows(54));
  AttendCase c;
  const std::vector<float> qa = MakeQueries(a, c), qb = MakeQueries(b, c);
  const AttendResult alone = AttendOn(backend(), a, a.device_runs(), c, qa);
  AttendResult both[2] = {alone, alone};
  const std::vector<BlockRun> runs[2] = {a.device_runs(), b.device_runs()};
  AttendItem items[] = {ItemOf(runs[0], qa, 1, a.tokens() - 1, &both[0]),
                        ItemOf(runs[1], qb, 1, b.tokens() - 1, &both[1])};
  std::fill(both[0].out.begin(), both[0].out.end(), NAN);
  AttendArgs args;
  args.heads = 8;
  args.scale = 1.0f / std::sqrt(128.0f);
  args.items = items;
  ASSERT_TRUE(backend().Attend(args).ok());
  EXPECT_EQ(both[0].out, alone.out);
  EXPECT_EQ(both[0].lse, alone.lse);
  EXPECT_EQ(both[1].out, AttendOn(backend(), b, b.device_runs(), c, qb).out);
}

// What every sequence of the default window looks like: coded blocks between f16 ones.
TEST_P(BackendConformance, AttendsCodedRunsBetweenExactOnes) {
  for (int dim : {64, 128, 256})
    for (const char* pair : {"q8_0", "q8_0/turbo4", "q8_0/turbo3", "turbo4", "turbo4/turbo3", "turbo3",
                             "turbo2", "planar4/iso3", "q5_0/turbo2", "wht4", "turbo4/wht4", "q8_0/wht4"}) {
      SCOPED_TRACE(std::string(pair) + " d " + std::to_string(dim));
      const GroupShape shape{1, 2, dim, dim};
      const Profile profile = RandomProfile(shape, 81);
      TestSequence sequence(backend(), shape);
      sequence.AddRun("f16", 64, GaussianRows(82));
      sequence.AddRun(pair, 320, GaussianRows(83), &profile);
      sequence.AddRun("f16", 100, GaussianRows(84));
      AttendCase c;
      for (int group : {4, 12}) {
        c.group = group;
        CheckAttend(backend(), sequence, c);
      }
      c.group = 3;
      c.queries = 2;
      c.window = 200;
      c.softcap = 30;
      CheckAttend(backend(), sequence, c);
    }
}

// So many of them that a worker of a GPU reads pages of several; lengths differ, some have no coded page,
// some nothing but one f16 page.
TEST_P(BackendConformance, AttendsABatchOfCodedRunsBetweenExactOnes) {
  const GroupShape shape{1, 2, 128, 128};
  TestSequence sequence(backend(), shape);
  sequence.AddRun("f16", 64, GaussianRows(85));
  sequence.AddRun("turbo4/turbo3", 256, GaussianRows(86));
  sequence.AddRun("f16", 150, GaussianRows(87));
  constexpr size_t kItems = 500;
  AttendCase c;
  std::vector<std::vector<float>> queries(kItems);
  std::vector<AttendResult> results(kItems);
  const std::vector<BlockRun> runs = sequence.device_runs();
  std::vector<AttendItem> items(kItems);
  const auto case_of = [&c](size_t i) {
    AttendCase mine = c;
    mine.seed = static_cast<uint32_t>(i);
    mine.first_query_position = i % 7 == 0 ? 50 : 90 + static_cast<int64_t>(i * 37 % 380);
    return mine;
  };
  for (size_t i = 0; i < kItems; i++) {
    queries[i] = MakeQueries(sequence, case_of(i));
    results[i] = {std::vector<float>(8 * 128, NAN), std::vector<float>(8, NAN)};
    items[i] = ItemOf(runs, queries[i], 1, case_of(i).first_query_position, &results[i]);
  }
  AttendArgs args;
  args.heads = 8;
  args.scale = 1.0f / std::sqrt(128.0f);
  args.items = items;
  ASSERT_TRUE(backend().Attend(args).ok());
  const std::vector<AttendResult> once = results;
  ASSERT_TRUE(backend().Attend(args).ok());
  for (size_t i = 0; i < kItems; i++) {
    SCOPED_TRACE(i);
    ASSERT_EQ(results[i].out, once[i].out);  // the same call, the same bits
    ASSERT_EQ(results[i].lse, once[i].lse);
    if (i % 5 == 0) ExpectClose(results[i], AttendByReference(sequence, case_of(i), queries[i]), 128, 1e-3);
  }
}

// Many queries over a context of several kinds of runs, with a gap in the positions.
TEST_P(BackendConformance, AttendsLongPrefillOverMixedRuns) {
  for (int dim : {64, 96, 128, 192, 256}) {
    SCOPED_TRACE(dim);
    const GroupShape shape{1, 2, dim, dim};
    const Profile profile = RandomProfile(shape, 61);
    TestSequence sequence(backend(), shape);
    sequence.AddRun("f16", 64, GaussianRows(62));
    sequence.AddRun("turbo4/turbo3", 640, GaussianRows(63), &profile);
    sequence.AddRun("q5_0/turbo2", 64, GaussianRows(64));
    sequence.AddRun("bf16", 30, GaussianRows(65));
    sequence.AddRun("f16", 200, GaussianRows(66));
    AttendCase c;
    c.group = 4;
    c.queries = 150;
    for (int64_t window : {0, 300})
      for (int64_t position : {int64_t{-1}, int64_t{0}, int64_t{500}}) {
        if (position >= 0 && (dim == 96 || dim == 192)) continue;  // the time of the reference
        SCOPED_TRACE("window " + std::to_string(window) + " position " + std::to_string(position));
        c.window = window;
        c.first_query_position = position;
        c.sinks = window > 0 ? std::vector<float>{1, 2, 3, 4, -1, -2, 0, 5} : std::vector<float>{};
        CheckAttend(backend(), sequence, c);
      }
    c.softcap = 6;
    c.query_size = 4;
    CheckAttend(backend(), sequence, c);
  }
}

// A batch of one long prefill, one short one and single tokens: each as if alone.
TEST_P(BackendConformance, AttendsPrefillAndDecodeInOneCall) {
  const GroupShape shape{1, 2, 128, 128};
  std::vector<std::unique_ptr<TestSequence>> sequences;
  std::vector<AttendCase> cases(4);
  std::vector<std::vector<float>> queries;
  std::vector<AttendResult> results;
  std::vector<std::vector<BlockRun>> runs;
  const char* pairs[] = {"turbo4", "q8_0", "turbo3", "f16"};
  const int counts[] = {200, 1, 40, 2};
  for (size_t i = 0; i < 4; i++) {
    sequences.push_back(std::make_unique<TestSequence>(backend(), shape));
    sequences[i]->AddRun(pairs[i], 300 + 70 * static_cast<int64_t>(i),
                         GaussianRows(70 + static_cast<uint32_t>(i)));
    cases[i].queries = counts[i];
    cases[i].group = 3;
    queries.push_back(MakeQueries(*sequences[i], cases[i]));
    results.push_back({std::vector<float>(static_cast<size_t>(counts[i] * 6 * 128), NAN),
                       std::vector<float>(static_cast<size_t>(counts[i] * 6), NAN)});
    runs.push_back(sequences[i]->device_runs());
  }
  std::vector<AttendItem> items(4);
  for (size_t i = 0; i < 4; i++) {
    items[i] = ItemOf(runs[i], queries[i], counts[i], sequences[i]->tokens() - counts[i], &results[i]);
  }
  AttendArgs args;
  args.heads = 6;
  args.scale = 1.0f / std::sqrt(128.0f);
  args.items = items;
  ASSERT_TRUE(backend().Attend(args).ok());
  for (size_t i = 0; i < 4; i++) {
    SCOPED_TRACE(pairs[i]);
    ExpectClose(results[i], AttendByReference(*sequences[i], cases[i], queries[i]), 128, 3e-3);
  }
}

// Positions and windows at the end of their range: the sums of both stay inside 64 bits.
TEST_P(BackendConformance, StandsTheLargestWindowsAndPositions) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const char* pair : {"f16", "turbo4"})
    for (const int queries : {1, 70}) {
      SCOPED_TRACE(std::string(pair) + " queries " + std::to_string(queries));
      TestSequence sequence(backend(), {1, 1, 64, 64});
      sequence.AddRun(pair, 200, GaussianRows(91));
      AttendCase c;
      c.queries = queries;
      for (const int64_t window : {kMostPosition, kMost - 1, kMost})
        for (const bool causal : {true, false}) {
          c.window = window;
          c.causal = causal;
          CheckAttend(backend(), sequence, c);
        }
      // The same far out.
      c.causal = true;
      c.window = 150;
      const AttendResult near =
          AttendOn(backend(), sequence, sequence.device_runs(), c, MakeQueries(sequence, c));
      std::vector<BlockRun> far = sequence.device_runs();
      far[0].first_position = kMostPosition - 256;
      c.first_query_position = kMostPosition - 256 + 200 - queries;
      const AttendResult there = AttendOn(backend(), sequence, far, c, MakeQueries(sequence, c));
      EXPECT_EQ(there.out, near.out);
      EXPECT_EQ(there.lse, near.lse);
    }
}

TEST_P(BackendConformance, RefusesArgumentsThatDoNotFit) {
  TestSequence sequence(backend(), {2, 2, 64, 64});
  sequence.AddRun("q8_0", 64, GaussianRows(59));
  std::vector<BlockRun> runs = sequence.device_runs();
  std::vector<float> q(4 * 64), out(4 * 64), lse(4);
  AttendItem item;
  item.runs = runs;
  item.q = q.data();
  item.queries = 1;
  item.first_query_position = 63;
  item.out = out.data();
  item.lse = lse.data();
  AttendArgs args;
  args.heads = 4;
  args.scale = 1;
  args.items = {&item, 1};
  EXPECT_TRUE(backend().Attend(args).ok());
  args.heads = 3;
  EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
  args.heads = 4;
  args.layer = 2;
  EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
  args.layer = 0;
  runs[0].tokens = 65;
  EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
  runs[0].tokens = 64;
  for (const int64_t position : {int64_t{-1}, kMostPosition, std::numeric_limits<int64_t>::max()}) {
    item.first_query_position = position;
    EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
    item.first_query_position = 63;
    runs[0].first_position = position;
    EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
    runs[0].first_position = 0;
  }
  args.window = -1;
  EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
  args.window = 0;
  args.softcap = 3e38f;
  EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::testing
