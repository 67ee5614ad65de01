#include "kernels/cuda/prefill/prefill_rounds.h"

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/prefill/prefill_cut.h"

namespace kvtide::cuda {
namespace {

// What starting and ending a part costs, in pages; for the cut only.
constexpr int kPartOverhead = 8;
// Operations of a round, at most: they take 15 ms of an H200, 60 ms of a GPU of a quarter of its speed.
// Between rounds a call can be stopped.
constexpr double kMostOperations = 1e13;

int32_t Limit(int64_t n) { return static_cast<int32_t>(std::clamp<int64_t>(n, -(1 << 30), 1 << 30)); }
bool IsF16(CacheType type) {
  return !Info(type).calibrated &&
         VisitCodec(type, [](auto codec) { return std::is_same_v<decltype(codec), F16>; });
}

}  // namespace

PrefillRounds::PrefillRounds(const AttendPlanArgs& args, const GroupShape& shape,
                             const AttendEnvironment& environment, const PrefillKernel& kernel)
    : args_(args),
      shape_(shape),
      environment_(environment),
      kernel_(kernel),
      group_(args.heads / shape.kv_heads) {
  page_bytes_ = Size(4 * kBlockTokens * kernel_.dim);
  const size_t slot_bytes = Size(kernel_.rows) * (Size(kernel_.dim) * sizeof(float) + sizeof(float2));
  most_slots_ = std::max<size_t>(1, environment.scratch_bytes / 4 / slot_bytes);
  const size_t partials = most_slots_ * slot_bytes;
  most_pages_ = environment.scratch_bytes > partials
                    ? std::max<size_t>(1, (environment.scratch_bytes - partials) / page_bytes_)
                    : 1;
  most_group_pages_ = std::max<size_t>(
      1, static_cast<size_t>(kMostOperations / (4.0 * kBlockTokens * kernel_.rows * kernel_.dim)));
  for (const PlanItem& item : args_.items) AddSegments(item);
  for (size_t i = 0; i < args_.items.size(); i++) PlanGroupsOf(i);
  FinishRound();
  AddUntouchedGroups();
}

PageRange PrefillRounds::Visible(const PlanItem& item, const PrefillSegment& segment, int64_t first,
                                 int64_t last) const {
  return VisiblePages(args_, item, segment.first_position, segment.tokens, first, last);
}
PageRange PrefillRounds::Visible(const PrefillGroupPlan& group, const PrefillSegment& segment) const {
  return Visible(args_.items[group.item], segment, group.first_row / group_,
                 (group.first_row + group.rows - 1) / group_);
}

void PrefillRounds::AddSegments(const PlanItem& item) {
  std::vector<PrefillSegment>& segments = segments_.emplace_back();
  for (const BlockRun& run : item.runs) {
    if (run.tokens == 0) continue;
    if (segments.empty() || segments.back().tokens % kBlockTokens != 0 ||
        segments.back().first_position + segments.back().tokens != run.first_position) {
      segments.emplace_back();
      segments.back().first_position = run.first_position;
    }
    for (size_t block = 0; block < Size(BlocksOf(run)); block++) {
      const PrefillSegment::Page page{&run, block};
      segments.back().pages.push_back(page);
      if (!MayBeReadInPlace(page) || (blocks_ != nullptr && Record(page, 0) >= blocks_)) continue;
      blocks_ = Record(page, 0);
      in_place_ = run.layout;
    }
    segments.back().tokens += run.tokens;
  }
}

const std::byte* PrefillRounds::Record(const PrefillSegment::Page& page, int head) const {
  return page.run->blocks[page.block] + page.run->layout->RecordOffset(0, head);
}
// Whether a page is f16 as the kernel wants it. One that is not full may hold anything behind its tokens.
bool PrefillRounds::MayBeReadInPlace(const PrefillSegment::Page& page) const {
  const BlockLayout& layout = *page.run->layout;
  return environment_.read_in_place && kernel_.warpgroups && IsF16(layout.pair().k) &&
         IsF16(layout.pair().v) && shape_.head_dim_k == kernel_.dim && shape_.head_dim_v == kernel_.dim &&
         static_cast<int64_t>(page.block + 1) * kBlockTokens <= page.run->tokens;
}
bool PrefillRounds::IsReadInPlace(const PrefillSegment::Page& page, int head, PagePlace* place) const {
  return MayBeReadInPlace(page) && PlaceOfPage(blocks_, Record(page, head), kernel_.dim, place);
}

void PrefillRounds::PlanGroupsOf(size_t index) {
  const PlanItem& item = args_.items[index];
  first_query_.push_back(queries_);
  queries_ += Size(item.queries);
  const int rows = item.queries * group_;
  for (int head = 0; head < shape_.kv_heads; head++) {
    const size_t first = groups_.size();
    for (int row = 0; row < rows; row += kernel_.rows)
      groups_.push_back({index, head, row, std::min(kernel_.rows, rows - row), false});
    for (size_t begin = first; begin < groups_.size(); begin += most_slots_)
      PlanGroups(begin, std::min(most_slots_, groups_.size() - begin), segments_[index]);
  }
}

// Groups of one item and head, at most most_slots_.
void PrefillRounds::PlanGroups(size_t first, size_t count, const std::vector<PrefillSegment>& segments) {
  const PrefillGroupPlan &front = groups_[first], &back = groups_[first + count - 1];
  const PlanItem& item = args_.items[front.item];
  for (const PrefillSegment& segment : segments) {
    PageRange pages =
        Visible(item, segment, front.first_row / group_, (back.first_row + back.rows - 1) / group_);
    while (pages.begin < pages.end) {
      if (rounds_.empty() || round_done_ || rounds_.back().entry_groups + count > most_slots_ ||
          rounds_.back().scratch_pages == most_pages_ || rounds_.back().group_pages >= most_group_pages_) {
        FinishRound();
        rounds_.emplace_back();
        round_done_ = false;
      }
      PrefillRound& round = rounds_.back();
      PrefillRound::Entry entry{
          first, count, &segment, pages.begin, 0, round.scratch_pages, round.places.size()};
      for (; pages.begin < pages.end && round.group_pages < most_group_pages_; pages.begin++, entry.pages++) {
        const PrefillSegment::Page& page = segment.pages[Size(pages.begin)];
        PagePlace place;
        if (!IsReadInPlace(page, front.head, &place)) {
          if (round.scratch_pages == most_pages_) break;
          AddJobs(page, front.head, round.scratch_pages, &round);
          place = PlaceInScratch(round.scratch_pages);
          round.scratch_pages++;
        }
        if (kernel_.warpgroups) round.places.push_back(place);
        round.group_pages += count;
      }
      round.entries.push_back(entry);
      round.entry_groups += count;
      scratch_pages_ = std::max(scratch_pages_, round.scratch_pages);
    }
  }
}

void PrefillRounds::AddJobs(const PrefillSegment::Page& page, int head, size_t scratch_page,
                            PrefillRound* round) {
  const BlockLayout& layout = *page.run->layout;
  for (const Side side : {Side::kKey, Side::kValue}) {
    const bool key = side == Side::kKey;
    PrefillRound::Conversion* conversion = nullptr;
    for (PrefillRound::Conversion& c : round->conversions)
      if (c.side == side && *c.layout == layout) conversion = &c;
    if (conversion == nullptr)
      conversion = &round->conversions.emplace_back(PrefillRound::Conversion{&layout, side, {}, nullptr});
    PrefillJob job{Record(page, head) + (key ? 0 : layout.v_codes()),
                   scratch_page * page_bytes_ + (key ? 0 : page_bytes_ / 2), -1,
                   page.run->first_position + static_cast<int64_t>(page.block) * kBlockTokens};
    if (key && page.run->profile != nullptr && Info(layout.pair().k).storage == Storage::kCodes)
      job.profile = IndexOf({page.run->profile, head});
    conversion->jobs.push_back(job);
  }
}
int64_t PrefillRounds::IndexOf(const PrefillProfile& profile) {
  const auto [entry, added] = profile_index_.emplace(std::pair(profile.profile, profile.head),
                                                     static_cast<int64_t>(profiles_.size()));
  if (added) profiles_.push_back(profile);
  return entry->second;
}

// Cuts the entries of the last round into parts.
void PrefillRounds::FinishRound() {
  if (rounds_.empty() || round_done_) return;
  round_done_ = true;
  PrefillRound& round = rounds_.back();
  std::vector<PageRange> ranges;
  std::vector<int> lengths;
  for (const PrefillRound::Entry& entry : round.entries)
    for (size_t g = 0; g < entry.groups; g++) {
      PageRange pages = Visible(groups_[entry.first_group + g], *entry.segment);
      pages = {std::max(pages.begin, entry.first_page), std::min(pages.end, entry.first_page + entry.pages)};
      ranges.push_back(pages);
      lengths.push_back(static_cast<int>(std::max<int64_t>(0, pages.end - pages.begin)));
    }
  const int length = PartPages(lengths, environment_.processors * kernel_.ctas_per_processor, kPartOverhead,
                               most_slots_, kernel_.tile_pages);
  // Neighbouring CTAs read the same pages: parts of one stretch of pages of an entry follow each other.
  std::map<size_t, std::vector<uint32_t>> slots;
  size_t at = 0;
  int longest = 1;
  for (const PrefillRound::Entry& entry : round.entries) {
    for (size_t g = 0; g < entry.groups; g++) slots[entry.first_group + g];
    for (int64_t begin = 0; begin < entry.pages; begin += length)
      for (size_t g = 0; g < entry.groups; g++) {
        const PageRange range = ranges[at + g];
        const int64_t first = range.begin + begin, end = std::min(first + length, range.end);
        if (first >= end) continue;
        round.parts.push_back(MakePart(entry.first_group + g, entry, first, end));
        longest = std::max(longest, round.parts.back().part.page_count);
      }
    at += entry.groups;
  }
  // Much longer ones come first.
  const auto rank = [&](const PrefillPartPlan& plan) { return plan.part.page_count * 8 / longest; };
  std::stable_sort(round.parts.begin(), round.parts.end(),
                   [&](const PrefillPartPlan& a, const PrefillPartPlan& b) { return rank(a) > rank(b); });
  for (size_t i = 0; i < round.parts.size(); i++)
    slots[round.parts[i].group].push_back(static_cast<uint32_t>(i));
  for (const auto& [index, list] : slots) {
    if (list.size() == 1 && !groups_[index].merged) continue;
    AddGroup(index, static_cast<uint32_t>(round.slots.size()), static_cast<uint32_t>(list.size()), &round);
    round.slots.insert(round.slots.end(), list.begin(), list.end());
  }
  round.merged_groups = round.groups.size();
  for (PrefillPartPlan& plan : round.parts)
    if (!groups_[plan.group].merged) {
      plan.part.group = static_cast<int32_t>(round.groups.size());
      AddGroup(plan.group, 0, 0, &round);
    }
  most_parts_ = std::max(most_parts_, round.parts.size());
}

PrefillPartPlan PrefillRounds::MakePart(size_t index, const PrefillRound::Entry& entry, int64_t begin,
                                        int64_t end) const {
  const PrefillGroupPlan& group = groups_[index];
  const PlanItem& item = args_.items[group.item];
  const int64_t base = item.first_query_position - entry.segment->first_position - begin * kBlockTokens;
  PrefillPartPlan plan;
  plan.group = index;
  plan.tiles = (entry.scratch_page + Size(begin - entry.first_page)) * page_bytes_;
  plan.pages = entry.first_place + Size(begin - entry.first_page);
  plan.query =
      first_query_[group.item] * query_width() + Size(group.head) * Size(group_) * Size(shape_.head_dim_k);
  PrefillPart& part = plan.part;
  part.query_stride = static_cast<int64_t>(query_width());
  part.page_count = static_cast<int32_t>(end - begin);
  part.tokens = Limit(std::min(entry.segment->tokens - begin * kBlockTokens, (end - begin) * kBlockTokens));
  part.first_row = group.first_row;
  part.rows = group.rows;
  part.rows_per_query = group_;
  part.causal_end = args_.causal ? Limit(base + 1) : 1 << 30;
  part.window_begin = args_.window > 0 ? Limit(base - std::min(args_.window, kMostPosition) + 1) : -(1 << 30);
  return plan;
}

void PrefillRounds::AddGroup(size_t index, uint32_t first_slot, uint32_t slots, PrefillRound* round) {
  PrefillGroupPlan& plan = groups_[index];
  PrefillGroup group;
  const size_t heads_before = first_query_[plan.item] * Size(args_.heads) + Size(plan.head) * Size(group_);
  // Offsets until the results have a place.
  group.output = reinterpret_cast<float*>(heads_before * Size(shape_.head_dim_v) * sizeof(float));
  group.lse = reinterpret_cast<float*>(heads_before * sizeof(float));
  group.sinks = reinterpret_cast<const float*>(Size(plan.head) * Size(group_) * sizeof(float));
  group.output_stride = static_cast<int64_t>(output_width());
  group.lse_stride = args_.heads;
  group.first_slot = first_slot;
  group.slots = slots;
  group.first_row = plan.first_row;
  group.rows = plan.rows;
  group.rows_per_query = group_;
  group.fresh = plan.merged ? 0 : 1;
  plan.merged = true;
  round->groups.push_back(group);
}

// Rows that see nothing get their output too.
void PrefillRounds::AddUntouchedGroups() {
  PrefillRound round;
  for (size_t i = 0; i < groups_.size(); i++)
    if (!groups_[i].merged) AddGroup(i, 0, 0, &round);
  round.merged_groups = round.groups.size();
  if (!round.groups.empty()) rounds_.push_back(std::move(round));
}

}  // namespace kvtide::cuda
