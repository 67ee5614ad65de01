#include "kernels/cpu/attend_cut.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <tuple>
#include <vector>

namespace kvtide {
namespace {

// Items over runs whose blocks are never touched.
struct Items {
  std::vector<BlockLayout> layouts;
  std::vector<std::byte*> blocks = std::vector<std::byte*>(4096);
  std::vector<std::vector<BlockRun>> runs;
  std::vector<PlanItem> items;

  explicit Items(const GroupShape& shape)
      : layouts{{shape, ExactPair()}, {shape, *ParseCachePair("turbo4")}, {shape, *ParseCachePair("q8_0")}} {}
  void Add(const std::vector<std::pair<size_t, int64_t>>& layout_and_tokens, int queries) {
    int64_t position = 0;
    std::vector<BlockRun>& mine = runs.emplace_back();
    for (const auto& [layout, tokens] : layout_and_tokens) {
      BlockRun run;
      run.layout = &layouts[layout];
      run.blocks = std::span(blocks).first(static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens));
      run.first_position = position;
      run.tokens = tokens;
      position += tokens;
      mine.push_back(run);
    }
    items.push_back({{}, queries, std::max<int64_t>(0, position - queries)});
  }
  AttendPlanArgs Args(int heads, int64_t window = 0) {
    for (size_t i = 0; i < items.size(); i++) items[i].runs = runs[i];
    return {heads, true, window, items};
  }
};

AttendCut MakeCut(const AttendPlanArgs& args) {
  AttendCut cut;
  cut.Make(args, *CheckAttendPlan(args), true);
  return cut;
}

TEST(AttendCut, CoversEveryVisibleTokenOfEveryRowOnce) {
  std::mt19937 random(1);
  for (int round = 0; round < 40; round++) {
    Items items({1, 2, 64, 64});
    const int count = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < count; i++)
      items.Add({{0, 64}, {1 + random() % 2, static_cast<int64_t>(random() % 40) * 64}, {0, random() % 200}},
                1 + static_cast<int>(random() % (round % 4 == 0 ? 1200 : 60)));
    const int64_t window = random() % 2 == 0 ? 0 : 1 + static_cast<int64_t>(random() % 1500);
    const AttendPlanArgs args = items.Args(6, window);
    const AttendCut cut = MakeCut(args);
    std::vector<size_t> once(cut.chunks().size());
    for (const size_t c : cut.alone()) once[c]++;
    for (const size_t c : cut.light_chunks()) once[c]++;
    EXPECT_EQ(std::ranges::count(once, 1u), static_cast<int64_t>(once.size()));
    std::map<std::tuple<int, int, int>, int64_t> rows;  // item, KV head, row -> visible tokens in its tasks
    for (const RowChunk& chunk : cut.chunks())
      for (int r = 0; r < chunk.rows; r++) {
        int64_t& tokens = rows[{chunk.item, chunk.kv_head, chunk.first_row + r}];
        ASSERT_EQ(tokens, 0);
        const PositionRange seen = cut.Visible(chunk.item, chunk.first_row + r);
        for (size_t t = chunk.first_task; t < chunk.end_task; t++) {
          const AttendTask& task = cut.tasks()[t];
          const BlockRun& run = cut.runs()[task.run];
          ASSERT_EQ(cut.frames()[task.frame].item, chunk.item);
          const int64_t begin = run.first_position + task.first_block * kBlockTokens;
          const int64_t end = run.first_position + std::min(run.tokens, task.end_block * kBlockTokens);
          tokens += std::max<int64_t>(0, std::min(end, seen.end) - std::max(begin, seen.begin));
        }
      }
    for (size_t i = 0; i < items.items.size(); i++)
      for (int head = 0; head < 2; head++)
        for (int row = 0; row < items.items[i].queries * 3; row++) {
          const int64_t position = items.items[i].first_query_position + row / 3;
          int64_t length = 0;
          for (const BlockRun& run : items.runs[i]) length += run.tokens;
          const int64_t seen = std::min(position + 1, length) -
                               (window == 0 ? 0 : std::max<int64_t>(0, position - window + 1));
          ASSERT_EQ((rows[{static_cast<int>(i), head, row}]), std::max<int64_t>(0, seen)) << i << " " << row;
        }
  }
}

// What a cancellation waits for, and what memory a plan takes, does not grow with the work.
TEST(AttendCut, BoundsPiecesAndBuffers) {
  for (const int dim : {64, 128, 512}) {
    Items items({1, 8, dim, dim});
    items.Add({{0, 64}, {1, 131072 - 128}, {0, 64}}, 16384);
    const AttendCut cut = MakeCut(items.Args(32));
    EXPECT_EQ(cut.alone().size(), 8u * 16384 * 4 / kChunkRows);
    EXPECT_TRUE(cut.out.empty());
    EXPECT_TRUE(cut.q.empty());
    for (const RowChunk& chunk : cut.chunks())
      ASSERT_LE(cut.BlocksPerPiece(chunk.rows) * kBlockTokens * chunk.rows * 2 * dim, int64_t{1} << 28);
    // The longest ones come first, so that no thread is left with one at the end.
    EXPECT_EQ(cut.chunks()[cut.alone().front()].first_row, 16384 * 4 - kChunkRows);
  }
  for (const int queries : {1, 16, 17, 100, 127}) {
    Items items({1, 8, 128, 128});
    items.Add({{1, 131072}}, queries);
    const AttendCut cut = MakeCut(items.Args(32));
    EXPECT_TRUE(cut.alone().empty());
    for (const AttendTask& task : cut.tasks())
      ASSERT_LE((task.end_block - task.first_block) * kBlockTokens * cut.chunks()[task.chunk].rows * 256,
                int64_t{1} << 28);
    EXPECT_LE(cut.out.size() * sizeof(float), size_t{128} << 20) << queries;
    EXPECT_GE(cut.tasks().size(), 64u);  // enough for any number of threads
  }
}

TEST(AttendCut, DoesNotDependOnTheRestOfTheBatch) {
  Items alone({1, 2, 128, 128}), both({1, 2, 128, 128});
  alone.Add({{0, 64}, {1, 6400}, {0, 30}}, 5);
  both.Add({{2, 500}}, 900);
  both.Add({{0, 64}, {1, 6400}, {0, 30}}, 5);
  const AttendCut a = MakeCut(alone.Args(4)), b = MakeCut(both.Args(4));
  std::vector<std::pair<int64_t, int64_t>> of_a, of_b;
  for (const AttendTask& task : a.tasks()) of_a.emplace_back(task.first_block, task.end_block);
  for (const AttendTask& task : b.tasks())
    if (b.chunks()[task.chunk].item == 1) of_b.emplace_back(task.first_block, task.end_block);
  EXPECT_EQ(of_a, of_b);
}

TEST(AttendCut, KnowsAnEqualPlan) {
  Items items({1, 2, 64, 64});
  items.Add({{0, 64}, {1, 640}, {0, 30}}, 2);
  items.Add({{2, 200}}, 1);
  const AttendPlanArgs args = items.Args(4, 100);
  const AttendCut cut = MakeCut(args);
  EXPECT_TRUE(cut.Equals(args));
  const auto differs = [&](auto change) {
    Items other = items;
    AttendPlanArgs changed = other.Args(4, 100);
    // The copy's layouts are others; keep those of the first.
    for (size_t i = 0; i < other.runs.size(); i++)
      for (size_t r = 0; r < other.runs[i].size(); r++) other.runs[i][r].layout = items.runs[i][r].layout;
    EXPECT_TRUE(cut.Equals(changed));
    change(other, changed);
    return !cut.Equals(changed);
  };
  std::byte block{};
  std::vector<std::byte*> blocks(11, &block);
  EXPECT_TRUE(differs([](Items&, AttendPlanArgs& a) { a.heads = 8; }));
  EXPECT_TRUE(differs([](Items&, AttendPlanArgs& a) { a.window = 99; }));
  EXPECT_TRUE(differs([](Items&, AttendPlanArgs& a) { a.causal = false; }));
  EXPECT_TRUE(differs([](Items&, AttendPlanArgs& a) { a.items = a.items.first(1); }));
  EXPECT_TRUE(differs([](Items& i, AttendPlanArgs&) { i.items[1].queries = 2; }));
  EXPECT_TRUE(differs([](Items& i, AttendPlanArgs&) { i.items[0].first_query_position++; }));
  EXPECT_TRUE(differs([](Items& i, AttendPlanArgs&) { i.runs[0][2].tokens++; }));
  EXPECT_TRUE(differs([](Items& i, AttendPlanArgs&) { i.runs[1][0].first_position = 64; }));
  EXPECT_TRUE(differs([](Items& i, AttendPlanArgs&) { i.runs[1][0].layout = &i.layouts[2]; }));
  EXPECT_TRUE(differs([&](Items& i, AttendPlanArgs&) { i.runs[0][1].blocks = std::span(blocks).first(10); }));
}

}  // namespace
}  // namespace kvtide
