#include "kernels/cuda/prefill_call.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <type_traits>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/cuda/attend_args.h"
#include "kernels/cuda/capability.h"
#include "kernels/cuda/codec_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill_cut.h"
#include "kernels/cuda/prefill_map.h"
#include "kernels/cuda/prefill_pages.h"
#include "kernels/cuda/prefill_plan.h"

namespace kvtide::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// What starting and ending a part costs, in pages; for the cut only.
constexpr int kPartOverhead = 8;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
int32_t Limit(int64_t n) { return static_cast<int32_t>(std::clamp<int64_t>(n, -(1 << 30), 1 << 30)); }
size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }
bool IsF16(CacheType type) {
  return VisitCodec(type, [](auto codec) { return std::is_same_v<decltype(codec), F16>; });
}
int WidestDim(const GroupShape& shape) { return std::max(shape.head_dim_k, shape.head_dim_v); }

// Runs of an item whose positions follow each other without a gap inside a page.
struct Segment {
  struct Page {
    const BlockRun* run;
    size_t block;
  };
  std::vector<Page> pages;
  int64_t first_position = 0, tokens = 0;
};

// One half of one block of one head, to be decoded. Places in arrays of floats, -1 = none.
struct TileJob {
  const std::byte* source;
  size_t target;  // in the scratch memory
  int64_t mean, gain;
};

struct PartPlan {
  PrefillPart part;
  size_t group;                // in the call
  size_t tiles, pages, query;  // offsets: bytes of scratch, places of the round, values of queries
};

struct GroupPlan {
  size_t item = 0;
  int head = 0, first_row = 0, rows = 0;
  bool merged = false;
};

// What runs between two uses of the scratch memory.
struct Round {
  struct Conversion {
    const BlockLayout* layout;
    Side side;
    std::vector<TileJob> jobs;
    const CodecJob* device = nullptr;
  };
  // Tiles of rows of one head over some pages of a segment.
  struct Entry {
    size_t first_group, groups;
    const Segment* segment;
    int64_t first_page, pages;
    size_t scratch_page, first_place;
  };
  std::vector<Conversion> conversions;
  std::vector<Entry> entries;
  std::vector<PartPlan> parts;
  std::vector<PrefillGroup> groups;
  std::vector<uint32_t> slots;
  std::vector<PagePlace> places;
  size_t scratch_pages = 0, group_count = 0, merged_groups = 0;  // the first of `groups`
  PrefillParams attend;
  PrefillMergeParams merge;
};

class Planner {
 public:
  Planner(const AttendArgs& args, const GroupShape& shape, const AttendEnvironment& environment,
          Workspace& workspace)
      : args_(args),
        shape_(shape),
        environment_(environment),
        workspace_(workspace),
        kernel_(*FindPrefillKernel(WidestDim(shape), environment.warpgroups)),
        group_(args.heads / shape.kv_heads) {
    page_bytes_ = Size(4 * kBlockTokens * kernel_.dim);
    slot_bytes_ = Size(kernel_.rows) * (Size(kernel_.dim) * sizeof(float) + sizeof(float2));
    most_slots_ = std::max<size_t>(1, environment.scratch_bytes / 4 / slot_bytes_);
    const size_t partials = most_slots_ * slot_bytes_;
    most_pages_ = environment.scratch_bytes > partials
                      ? std::max<size_t>(1, (environment.scratch_bytes - partials) / page_bytes_)
                      : 1;
  }

  absl::Status Run() {
    for (const AttendItem& item : args_.items) AddSegments(item);
    for (size_t i = 0; i < args_.items.size(); i++) PlanItem(i);
    FinishRound();
    AddUntouchedGroups();
    KVTIDE_RETURN_IF_ERROR(Place());
    return Execute();
  }

 private:
  size_t QueryWidth() const { return Size(args_.heads) * Size(shape_.head_dim_k); }
  size_t OutputWidth() const { return Size(args_.heads) * Size(shape_.head_dim_v); }
  size_t OutputBytes() const { return RoundUp(queries_ * OutputWidth() * sizeof(float)); }
  size_t ResultBytes() const { return OutputBytes() + queries_ * Size(args_.heads) * sizeof(float); }

  PageRange Visible(const AttendItem& item, const Segment& segment, int64_t first, int64_t last) const {
    return VisiblePages(args_, item, segment.first_position, segment.tokens, first, last);
  }
  PageRange Visible(const GroupPlan& group, const Segment& segment) const {
    return Visible(args_.items[group.item], segment, group.first_row / group_,
                   (group.first_row + group.rows - 1) / group_);
  }

  void AddSegments(const AttendItem& item) {
    std::vector<Segment>& segments = segments_.emplace_back();
    for (const BlockRun& run : item.runs) {
      if (run.tokens == 0) continue;
      if (segments.empty() || segments.back().tokens % kBlockTokens != 0 ||
          segments.back().first_position + segments.back().tokens != run.first_position) {
        segments.emplace_back();
        segments.back().first_position = run.first_position;
      }
      for (size_t block = 0; block < Size(BlocksOf(run)); block++) {
        const Segment::Page page{&run, block};
        segments.back().pages.push_back(page);
        if (MayBeReadInPlace(page) && (blocks_ == nullptr || Record(page, 0) < blocks_))
          blocks_ = Record(page, 0);
      }
      segments.back().tokens += run.tokens;
    }
  }

  const std::byte* Record(const Segment::Page& page, int head) const {
    return page.run->blocks[page.block] + page.run->layout->RecordOffset(args_.layer, head);
  }
  // Whether a page is f16 as the kernel wants it. One that is not full may hold anything behind its tokens.
  bool MayBeReadInPlace(const Segment::Page& page) const {
    const BlockLayout& layout = *page.run->layout;
    return kernel_.warpgroups && IsF16(layout.pair().k) && IsF16(layout.pair().v) &&
           shape_.head_dim_k == kernel_.dim && shape_.head_dim_v == kernel_.dim &&
           static_cast<int64_t>(page.block + 1) * kBlockTokens <= page.run->tokens;
  }
  bool IsReadInPlace(const Segment::Page& page, int head, PagePlace* place) const {
    return MayBeReadInPlace(page) && PlaceOfPage(blocks_, Record(page, head), kernel_.dim, place);
  }

  void PlanItem(size_t index) {
    const AttendItem& item = args_.items[index];
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
  void PlanGroups(size_t first, size_t count, const std::vector<Segment>& segments) {
    const GroupPlan &front = groups_[first], &back = groups_[first + count - 1];
    const AttendItem& item = args_.items[front.item];
    for (const Segment& segment : segments) {
      PageRange pages =
          Visible(item, segment, front.first_row / group_, (back.first_row + back.rows - 1) / group_);
      while (pages.begin < pages.end) {
        if (rounds_.empty() || round_done_ || rounds_.back().group_count + count > most_slots_ ||
            rounds_.back().scratch_pages == most_pages_) {
          FinishRound();
          rounds_.emplace_back();
          round_done_ = false;
        }
        Round& round = rounds_.back();
        Round::Entry entry{first, count, &segment, pages.begin, 0, round.scratch_pages, round.places.size()};
        for (; pages.begin < pages.end; pages.begin++, entry.pages++) {
          const Segment::Page& page = segment.pages[Size(pages.begin)];
          PagePlace place;
          if (!IsReadInPlace(page, front.head, &place)) {
            if (round.scratch_pages == most_pages_) break;
            AddJobs(page, front.head, round.scratch_pages, &round);
            place = PlaceInScratch(round.scratch_pages);
            round.scratch_pages++;
          }
          if (kernel_.warpgroups) round.places.push_back(place);
        }
        round.entries.push_back(entry);
        round.group_count += count;
        scratch_pages_ = std::max(scratch_pages_, round.scratch_pages);
      }
    }
  }

  void AddJobs(const Segment::Page& page, int head, size_t scratch_page, Round* round) {
    const BlockLayout& layout = *page.run->layout;
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      Round::Conversion* conversion = nullptr;
      for (Round::Conversion& c : round->conversions)
        if (c.side == side && *c.layout == layout) conversion = &c;
      if (conversion == nullptr)
        conversion = &round->conversions.emplace_back(Round::Conversion{&layout, side, {}, nullptr});
      TileJob job{Record(page, head) + (key ? 0 : layout.v_codes()),
                  scratch_page * page_bytes_ + (key ? 0 : page_bytes_ / 2), -1, -1};
      if (key && page.run->profile != nullptr && Info(layout.pair().k).storage == Storage::kCodes) {
        const HeadProfile& profile = page.run->profile->key(args_.layer, head);
        job.mean = PlaceOf(profile.mean);
        job.gain = PlaceOf(profile.gain);
      }
      conversion->jobs.push_back(job);
    }
  }
  int64_t PlaceOf(const std::vector<float>& values) {
    if (values.empty()) return -1;
    const auto [entry, added] = places_.emplace(&values, static_cast<int64_t>(floats_.size()));
    if (added) floats_.insert(floats_.end(), values.begin(), values.end());
    return entry->second;
  }

  // Cuts the entries of the last round into parts.
  void FinishRound() {
    if (rounds_.empty() || round_done_) return;
    round_done_ = true;
    Round& round = rounds_.back();
    std::vector<PageRange> ranges;
    std::vector<int> lengths;
    for (const Round::Entry& entry : round.entries)
      for (size_t g = 0; g < entry.groups; g++) {
        PageRange pages = Visible(groups_[entry.first_group + g], *entry.segment);
        pages = {std::max(pages.begin, entry.first_page),
                 std::min(pages.end, entry.first_page + entry.pages)};
        ranges.push_back(pages);
        lengths.push_back(static_cast<int>(std::max<int64_t>(0, pages.end - pages.begin)));
      }
    const int length = PartPages(lengths, environment_.processors * kernel_.ctas_per_processor, kPartOverhead,
                                 most_slots_, kernel_.tile_pages);
    // Neighbouring CTAs read the same pages: parts of one stretch of pages of an entry follow each other.
    std::map<size_t, std::vector<uint32_t>> slots;
    size_t at = 0;
    int longest = 1;
    for (const Round::Entry& entry : round.entries) {
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
    const auto rank = [&](const PartPlan& plan) { return plan.part.page_count * 8 / longest; };
    std::stable_sort(round.parts.begin(), round.parts.end(),
                     [&](const PartPlan& a, const PartPlan& b) { return rank(a) > rank(b); });
    for (size_t i = 0; i < round.parts.size(); i++)
      slots[round.parts[i].group].push_back(static_cast<uint32_t>(i));
    for (const auto& [index, list] : slots) {
      if (list.size() == 1 && !groups_[index].merged) continue;
      AddGroup(index, static_cast<uint32_t>(round.slots.size()), static_cast<uint32_t>(list.size()), &round);
      round.slots.insert(round.slots.end(), list.begin(), list.end());
    }
    round.merged_groups = round.groups.size();
    for (PartPlan& plan : round.parts)
      if (!groups_[plan.group].merged) {
        plan.part.group = static_cast<int32_t>(round.groups.size());
        AddGroup(plan.group, 0, 0, &round);
      }
    most_parts_ = std::max(most_parts_, round.parts.size());
  }

  PartPlan MakePart(size_t index, const Round::Entry& entry, int64_t begin, int64_t end) const {
    const GroupPlan& group = groups_[index];
    const AttendItem& item = args_.items[group.item];
    const int64_t base = item.first_query_position - entry.segment->first_position - begin * kBlockTokens;
    PartPlan plan;
    plan.group = index;
    plan.tiles = (entry.scratch_page + Size(begin - entry.first_page)) * page_bytes_;
    plan.pages = entry.first_place + Size(begin - entry.first_page);
    plan.query =
        first_query_[group.item] * QueryWidth() + Size(group.head) * Size(group_) * Size(shape_.head_dim_k);
    PrefillPart& part = plan.part;
    part.query_stride = static_cast<int64_t>(QueryWidth());
    part.page_count = static_cast<int32_t>(end - begin);
    part.tokens = Limit(std::min(entry.segment->tokens - begin * kBlockTokens, (end - begin) * kBlockTokens));
    part.first_row = group.first_row;
    part.rows = group.rows;
    part.rows_per_query = group_;
    part.causal_end = args_.causal ? Limit(base + 1) : 1 << 30;
    part.window_begin = args_.window > 0 ? Limit(base - args_.window + 1) : -(1 << 30);
    return plan;
  }

  void AddGroup(size_t index, uint32_t first_slot, uint32_t slots, Round* round) {
    GroupPlan& plan = groups_[index];
    PrefillGroup group;
    const size_t heads_before = first_query_[plan.item] * Size(args_.heads) + Size(plan.head) * Size(group_);
    // Offsets until the results have a place.
    group.output = reinterpret_cast<float*>(heads_before * Size(shape_.head_dim_v) * sizeof(float));
    group.lse = reinterpret_cast<float*>(heads_before * sizeof(float));
    group.sinks = reinterpret_cast<const float*>(Size(plan.head) * Size(group_) * sizeof(float));
    group.output_stride = static_cast<int64_t>(OutputWidth());
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
  void AddUntouchedGroups() {
    Round round;
    for (size_t i = 0; i < groups_.size(); i++)
      if (!groups_[i].merged) AddGroup(i, 0, 0, &round);
    round.merged_groups = round.groups.size();
    if (!round.groups.empty()) rounds_.push_back(std::move(round));
  }

  absl::Status Place() {
    size_t bytes = queries_ * QueryWidth() * sizeof(float) + floats_.size() * sizeof(float) +
                   Size(args_.heads) * sizeof(float);
    size_t arrays = 3;
    for (const Round& round : rounds_) {
      bytes += round.parts.size() * sizeof(PrefillPart) + round.groups.size() * sizeof(PrefillGroup) +
               round.slots.size() * sizeof(uint32_t) + round.places.size() * sizeof(PagePlace);
      for (const Round::Conversion& c : round.conversions) bytes += c.jobs.size() * sizeof(CodecJob);
      arrays += 4 + round.conversions.size();
    }
    const size_t tiles = RoundUp(scratch_pages_ * page_bytes_),
                 outputs = RoundUp(most_parts_ * Size(kernel_.rows * kernel_.dim) * sizeof(float));
    KVTIDE_RETURN_IF_ERROR(workspace_.Begin(Workspace::Bound(arrays, bytes)));
    KVTIDE_RETURN_IF_ERROR(workspace_.results.Reserve(ResultBytes()));
    KVTIDE_RETURN_IF_ERROR(workspace_.results_host.Reserve(ResultBytes()));
    KVTIDE_RETURN_IF_ERROR(
        workspace_.scratch.Reserve(tiles + outputs + most_parts_ * Size(kernel_.rows) * sizeof(float2)));
    std::byte* const scratch = workspace_.scratch.data();
    PageMaps maps;
    if (kernel_.warpgroups && most_parts_ > 0) {
      KVTIDE_RETURN_IF_ERROR(MakePageMap(scratch, kernel_.dim, &maps.scratch));
      KVTIDE_RETURN_IF_ERROR(MakePageMap(blocks_ == nullptr ? scratch : blocks_, kernel_.dim, &maps.blocks));
    }
    const auto queries = workspace_.Place<float>(queries_ * QueryWidth());
    for (size_t i = 0; i < args_.items.size(); i++)
      std::memcpy(queries.host + first_query_[i] * QueryWidth(), args_.items[i].q,
                  Size(args_.items[i].queries) * QueryWidth() * sizeof(float));
    const float* const floats = workspace_.Upload(floats_);
    const float* const sinks =
        args_.sinks == nullptr
            ? nullptr
            : workspace_.Upload(std::vector<float>(args_.sinks, args_.sinks + args_.heads));
    const auto moved = [](auto* offset, std::byte* base) {
      return reinterpret_cast<decltype(offset)>(base + reinterpret_cast<size_t>(offset));
    };
    for (Round& round : rounds_) {
      for (Round::Conversion& c : round.conversions) {
        const auto jobs = workspace_.Place<CodecJob>(c.jobs.size());
        for (size_t i = 0; i < c.jobs.size(); i++) {
          CodecJob job;
          job.source = c.jobs[i].source;
          job.target = scratch + c.jobs[i].target;
          job.mean = c.jobs[i].mean < 0 ? nullptr : floats + c.jobs[i].mean;
          job.gain = c.jobs[i].gain < 0 ? nullptr : floats + c.jobs[i].gain;
          jobs.host[i] = job;
        }
        c.device = jobs.device;
      }
      const PagePlace* const places = workspace_.Upload(round.places);
      const auto parts = workspace_.Place<PrefillPart>(round.parts.size());
      for (size_t i = 0; i < round.parts.size(); i++) {
        parts.host[i] = round.parts[i].part;
        parts.host[i].tiles = scratch + round.parts[i].tiles;
        parts.host[i].pages = places + round.parts[i].pages;
        parts.host[i].query = queries.device + round.parts[i].query;
      }
      for (PrefillGroup& group : round.groups) {
        group.output = moved(group.output, workspace_.results.data());
        group.lse = moved(group.lse, workspace_.results.data() + OutputBytes());
        group.sinks =
            sinks == nullptr ? nullptr : sinks + reinterpret_cast<size_t>(group.sinks) / sizeof(float);
      }
      round.attend.maps = maps;
      round.attend.parts = parts.device;
      round.attend.outputs = reinterpret_cast<float*>(scratch + tiles);
      round.attend.sums = reinterpret_cast<float2*>(scratch + tiles + outputs);
      round.attend.head_dim = shape_.head_dim_k;
      round.attend.value_dim = shape_.head_dim_v;
      round.attend.scale = args_.scale * kLog2E;
      round.attend.softcap = args_.softcap * kLog2E;
      round.attend.groups = round.merge.groups = workspace_.Upload(round.groups);
      round.merge.slots = workspace_.Upload(round.slots);
      round.merge.outputs = round.attend.outputs;
      round.merge.sums = round.attend.sums;
      round.merge.group_count = static_cast<int32_t>(round.merged_groups);
      round.merge.head_dim = shape_.head_dim_v;
      round.merge.rows = kernel_.rows;
    }
    return absl::OkStatus();
  }

  absl::Status Execute() {
    const cudaStream_t stream = workspace_.stream();
    KVTIDE_RETURN_IF_ERROR(workspace_.Send());
    if (environment_.begin != nullptr)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.begin, stream));
    for (Round& round : rounds_) {
      for (const Round::Conversion& c : round.conversions) {
        const bool key = c.side == Side::kKey;
        KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(
            key ? c.layout->pair().k : c.layout->pair().v, c.side, key ? c.layout->k() : c.layout->v(),
            kernel_.warpgroups ? RowTarget::kF16Page : RowTarget::kF16Tile, kernel_.dim, c.device,
            static_cast<int>(c.jobs.size()), stream));
      }
      KVTIDE_RETURN_IF_ERROR(LaunchKernel(kernel_.attend, round.parts.size(), kernel_.threads,
                                          kernel_.shared_bytes, false, &round.attend, stream));
      KVTIDE_RETURN_IF_ERROR(LaunchKernel(
          kernel_.merge, (round.merged_groups * Size(kernel_.rows) + kMergeWarps - 1) / kMergeWarps,
          32 * kMergeWarps, 0, false, &round.merge, stream));
    }
    if (environment_.end != nullptr) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.end, stream));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace_.results_host.data(), workspace_.results.data(),
                                                ResultBytes(), cudaMemcpyDeviceToHost, stream));
    KVTIDE_RETURN_IF_ERROR(workspace_.Finish());
    const auto* out = reinterpret_cast<const float*>(workspace_.results_host.data());
    const auto* lse = reinterpret_cast<const float*>(workspace_.results_host.data() + OutputBytes());
    for (size_t i = 0; i < args_.items.size(); i++) {
      const size_t rows = Size(args_.items[i].queries) * Size(args_.heads);
      std::memcpy(args_.items[i].out, out + first_query_[i] * OutputWidth(),
                  rows * Size(shape_.head_dim_v) * sizeof(float));
      std::memcpy(args_.items[i].lse, lse + first_query_[i] * Size(args_.heads), rows * sizeof(float));
    }
    return absl::OkStatus();
  }

  const AttendArgs& args_;
  const GroupShape& shape_;
  const AttendEnvironment& environment_;
  Workspace& workspace_;
  const PrefillKernel& kernel_;
  const int group_;
  size_t page_bytes_ = 0, slot_bytes_ = 0;  // a K and a V tile; a partial state
  size_t most_pages_ = 0, most_slots_ = 0;  // of a round
  const std::byte* blocks_ = nullptr;       // the first page that may be read in place
  size_t queries_ = 0, scratch_pages_ = 0, most_parts_ = 0;
  std::vector<size_t> first_query_;
  std::deque<std::vector<Segment>> segments_;  // by item; entries point into it
  std::vector<GroupPlan> groups_;
  std::vector<float> floats_;
  std::map<const std::vector<float>*, int64_t> places_;
  std::vector<Round> rounds_;
  bool round_done_ = false;
};

// Whether decoding a block to tiles is fast.
bool DecodesFast(CachePair pair) {
  const auto fast = [](CacheType type) { return Info(type).storage == Storage::kHalf || HasRowCodec(type); };
  return fast(pair.k) && fast(pair.v);
}

}  // namespace

bool IsPrefill(const AttendItem& item, const GroupShape& shape, int heads,
               const AttendEnvironment& environment) {
  for (const BlockRun& run : item.runs)
    if (!DecodesFast(run.layout->pair())) return false;
  if (static_cast<int64_t>(item.queries) * (heads / shape.kv_heads) <= environment.most_decode_rows ||
      item.runs.empty())
    return false;
  const PrefillKernel* kernel = FindPrefillKernel(WidestDim(shape), environment.warpgroups);
  return kernel != nullptr &&
         (environment.shared_limit == 0 || kernel->shared_bytes <= environment.shared_limit);
}

absl::Status PreparePrefillKernels(const DeviceImage& image) {
  for (const PrefillKernel& kernel : AllPrefillKernels()) {
    if (kernel.shared_bytes > image.shared_limit ||
        (kernel.warpgroups && !HasWarpgroups(image.image_capability)))
      continue;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kernel.attend, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
  }
  return absl::OkStatus();
}

absl::Status PrefillCall(const AttendArgs& args, const GroupShape& shape,
                         const AttendEnvironment& environment, Workspace& workspace) {
  return Planner(args, shape, environment, workspace).Run();
}

}  // namespace kvtide::cuda
