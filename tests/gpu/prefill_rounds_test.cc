// What a prefill plans, over blocks that do not exist: each group of rows meets each page that it sees once,
// within scratch memory, and writes or merges its output in the right order.
#include "kernels/cuda/prefill/prefill_rounds.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace kvtide::cuda {
namespace {

constexpr int kHeads = 8, kKvHeads = 2, kDim = 128;
constexpr int64_t kPageBytes = 4 * kBlockTokens * kDim;

// Items whose blocks lie at addresses of their own.
class Call {
 public:
  explicit Call(bool warpgroups) {
    kernel_.dim = kDim;
    kernel_.warpgroups = warpgroups;
    kernel_.rows = 128;
    kernel_.tile_pages = 2;
    environment_.processors = 132;
    environment_.warpgroups = warpgroups;
    args_.heads = kHeads;
  }
  void AddItem(int queries, int64_t first_query_position) {
    Item& item = items_.emplace_back();
    item.args.queries = queries;
    item.args.first_query_position = first_query_position;
  }
  // `step`: bytes from one block to the next.
  void AddRun(const char* pair, int64_t tokens, uint64_t address, uint64_t step) {
    Item& item = items_.back();
    const BlockLayout& layout = layouts_.emplace_back(shape_, *ParseCachePair(pair));
    BlockRun& run = item.runs.emplace_back();
    run.layout = &layout;
    run.tokens = tokens;
    run.first_position = item.tokens;
    std::vector<std::byte*>& blocks = blocks_.emplace_back();
    for (int64_t b = 0; b * kBlockTokens < tokens; b++) {
      blocks.push_back(reinterpret_cast<std::byte*>(address + static_cast<uint64_t>(b) * step));
      for (int head = 0; head < kKvHeads; head++)
        known_[blocks.back() + layout.RecordOffset(0, head)] = {items_.size() - 1, head,
                                                                item.tokens / kBlockTokens + b};
    }
    run.blocks = blocks;
    item.tokens += tokens;
  }

  // Plans and checks; returns how many pages are read in place.
  size_t Check(size_t scratch_bytes, bool causal, int64_t window) {
    environment_.scratch_bytes = scratch_bytes;
    args_.causal = causal;
    args_.window = window;
    std::vector<PlanItem> items;
    for (Item& item : items_) {
      item.args.runs = item.runs;
      items.push_back(item.args);
    }
    args_.items = items;
    PrefillRounds plan(args_, shape_, environment_, kernel_);
    const auto slot_bytes = static_cast<size_t>(kernel_.rows) * (kDim * sizeof(float) + sizeof(float2));
    size_t in_place = 0;
    std::set<std::pair<uint64_t, int>> begun;                  // groups: output, first row
    std::map<std::tuple<size_t, int, int, int64_t>, int> met;  // item, head, first row, page
    for (const PrefillRound& round : plan.rounds()) {
      EXPECT_LE(round.scratch_pages * kPageBytes + round.parts.size() * slot_bytes,
                std::max<size_t>(scratch_bytes, kPageBytes + slot_bytes));
      std::map<int64_t, const std::byte*> decoded;  // K records by page of scratch memory
      for (const PrefillRound::Conversion& c : round.conversions)
        for (const PrefillJob& job : c.jobs)
          if (c.side == Side::kKey) decoded[static_cast<int64_t>(job.target) / kPageBytes] = job.source;
      EXPECT_EQ(decoded.size(), round.scratch_pages);
      for (const PrefillPartPlan& part : round.parts)
        for (int i = 0; i < part.part.page_count; i++) {
          const std::byte* record = nullptr;
          if (!kernel_.warpgroups) {
            record = decoded.at(static_cast<int64_t>(part.tiles) / kPageBytes + i);
          } else if (const PagePlace place = round.places[part.pages + static_cast<size_t>(i)];
                     (place & kScratchPlace) != 0) {
            record = decoded.at((place & ~kScratchPlace) / kRowsOfPage);
          } else {
            record = plan.blocks(0) + static_cast<int64_t>(place) * 2 * kDim;
            in_place++;
          }
          const auto [item, head, page] = known_.at(record);
          met[{item, head, part.part.first_row, page}]++;
        }
      direct_ += round.groups.size() - round.merged_groups;
      for (size_t g = 0; g < round.groups.size(); g++) {
        const PrefillGroup& group = round.groups[g];
        const bool first = begun.emplace(reinterpret_cast<uint64_t>(group.output), group.first_row).second;
        EXPECT_EQ(group.fresh, first ? 1 : 0);
        size_t writers = 0;
        for (const PrefillPartPlan& part : round.parts)
          if (part.part.group == static_cast<int32_t>(g)) writers++;
        EXPECT_EQ(writers, g < round.merged_groups ? 0u : 1u);
        EXPECT_TRUE(first || g < round.merged_groups);
      }
    }
    size_t groups = 0, wanted = 0;
    for (size_t i = 0; i < items_.size(); i++)
      for (int head = 0; head < kKvHeads; head++)
        for (int row = 0; row < items_[i].args.queries * (kHeads / kKvHeads); row += kernel_.rows) {
          groups++;
          for (int64_t page = 0; page * kBlockTokens < items_[i].tokens; page++) {
            const bool sees = Sees(items_[i], row, page);
            wanted += sees;
            EXPECT_EQ(met.count({i, head, row, page}), sees ? 1u : 0u) << "row " << row << " page " << page;
          }
        }
    EXPECT_EQ(begun.size(), groups);
    EXPECT_EQ(met.size(), wanted);
    for (const auto& [key, times] : met) EXPECT_EQ(times, 1);
    return in_place;
  }

  // Groups whose only part wrote their output.
  size_t direct() const { return direct_; }

 private:
  struct Item {
    PlanItem args;
    std::vector<BlockRun> runs;
    int64_t tokens = 0;
  };
  bool Sees(const Item& item, int row, int64_t page) const {
    constexpr int kGroup = kHeads / kKvHeads;
    const int rows = std::min(kernel_.rows, item.args.queries * kGroup - row);
    for (int query = row / kGroup; query <= (row + rows - 1) / kGroup; query++)
      for (int64_t t = page * kBlockTokens; t < std::min((page + 1) * kBlockTokens, item.tokens); t++) {
        const int64_t at = item.args.first_query_position + query;
        if ((!args_.causal || t <= at) && (args_.window == 0 || t > at - args_.window)) return true;
      }
    return false;
  }

  size_t direct_ = 0;
  const GroupShape shape_{1, kKvHeads, kDim, kDim};
  PrefillKernel kernel_;
  AttendEnvironment environment_;
  AttendPlanArgs args_;
  std::deque<BlockLayout> layouts_;
  std::deque<std::vector<std::byte*>> blocks_;
  std::deque<Item> items_;
  std::map<const std::byte*, std::tuple<size_t, int, int64_t>> known_;
};

TEST(PrefillRounds, EveryGroupMeetsEveryPageThatItSeesOnce) {
  for (const bool warpgroups : {false, true})
    for (const size_t scratch : {size_t{1}, size_t{1} << 20, size_t{64} << 20})
      for (const bool causal : {false, true})
        for (const int64_t window : {0, 300}) {
          SCOPED_TRACE("warpgroups " + std::to_string(warpgroups) + " scratch " + std::to_string(scratch) +
                       " causal " + std::to_string(causal) + " window " + std::to_string(window));
          Call call(warpgroups);
          call.AddItem(300, 800);
          call.AddRun("f16", 64, 1u << 30, 1u << 17);
          call.AddRun("turbo4/turbo3", 640, 2u << 30, 1u << 16);
          call.AddRun("f16", 420, 3u << 30, 1u << 17);
          call.AddItem(40, 0);
          call.AddRun("f16", 100, 1u << 29, 1u << 17);
          const size_t in_place = call.Check(scratch, causal, window);
          EXPECT_EQ(in_place > 0, warpgroups);
        }
}

TEST(PrefillRounds, ReadsOnlyFullF16PagesWithinReachInPlace) {
  const auto in_place = [](const char* pair, int64_t tokens, uint64_t address, uint64_t step) {
    Call call(true);
    call.AddItem(40, 0);  // two groups a head
    call.AddRun(pair, tokens, address, step);
    const size_t pages = call.Check(64u << 20, false, 0);
    EXPECT_EQ(call.direct(), 2u * kKvHeads);  // too short to be cut
    return pages / (2 * kKvHeads);
  };
  EXPECT_EQ(in_place("f16", 256, 1u << 30, 1u << 17), 4u);
  EXPECT_EQ(in_place("f16", 255, 1u << 30, 1u << 17), 3u);  // the last is not full
  EXPECT_EQ(in_place("bf16", 256, 1u << 30, 1u << 17), 0u);
  EXPECT_EQ(in_place("q8_0", 256, 1u << 30, 1u << 17), 0u);
  EXPECT_EQ(in_place("f16", 128, 1u << 30, (1u << 17) + 128), 1u);   // the second begins between two rows
  EXPECT_EQ(in_place("f16", 128, 1u << 30, uint64_t{1} << 40), 1u);  // and here too far away
}

}  // namespace
}  // namespace kvtide::cuda
