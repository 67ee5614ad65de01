// What a prefill computes: rows in groups, the pages that they see in rounds that fit in scratch memory, and
// in each round the pages to decode, the parts and what is merged. A round takes a bounded time. Addresses
// that are known only when memory is taken are offsets here (prefill_call.cc makes them addresses). Made on
// the host once for all layers of a group, whose records lie equally far apart in all blocks of a layout; the
// caller's arguments must outlive it.
#pragma once

#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "kernels/attend_args.h"
#include "kernels/backend.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/attend/visible_pages.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/prefill/prefill_pages.h"
#include "kernels/cuda/prefill/prefill_plan.h"

namespace kvtide::cuda {

// Runs of an item whose positions follow each other without a gap inside a page.
struct PrefillSegment {
  struct Page {
    const BlockRun* run;
    size_t block;
  };
  std::vector<Page> pages;
  int64_t first_position = 0, tokens = 0;
};

// One half of one block of one head, to be decoded.
struct PrefillJob {
  const std::byte* source;  // of layer 0
  size_t target;            // in the scratch memory
  int64_t profile;          // which of PrefillRounds::profiles() its keys have, -1 = none
  int64_t position;         // of the block's first token
};
// What one head's keys have in a profile, in all layers.
struct PrefillProfile {
  const Profile* profile;
  int head;
  bool operator==(const PrefillProfile&) const = default;
};

struct PrefillPartPlan {
  PrefillPart part;
  size_t group;                // in the call
  size_t tiles, pages, query;  // offsets: bytes of scratch, places of the round, values of queries
};

struct PrefillGroupPlan {
  size_t item = 0;
  int head = 0, first_row = 0, rows = 0;
  bool merged = false;
};

// What runs between two uses of the scratch memory.
struct PrefillRound {
  struct Conversion {
    const BlockLayout* layout;
    Side side;
    std::vector<PrefillJob> jobs;
    const CodecJob* device = nullptr;
  };
  // Tiles of rows of one head over some pages of a segment.
  struct Entry {
    size_t first_group, groups;
    const PrefillSegment* segment;
    int64_t first_page, pages;
    size_t scratch_page, first_place;
  };
  std::vector<Conversion> conversions;
  std::vector<Entry> entries;
  std::vector<PrefillPartPlan> parts;
  std::vector<PrefillGroup> groups;
  std::vector<uint32_t> slots;
  std::vector<PagePlace> places;
  size_t merged_groups = 0;  // the first of `groups`; parts write the output of the others
  size_t scratch_pages = 0, entry_groups = 0;
  size_t group_pages = 0;  // pages that groups meet, all together
  PrefillParams attend;
  PrefillMergeParams merge;
};

class PrefillRounds {
 public:
  PrefillRounds(const AttendPlanArgs& args, const GroupShape& shape, const AttendEnvironment& environment,
                const PrefillKernel& kernel);
  PrefillRounds(const PrefillRounds&) = delete;
  PrefillRounds& operator=(const PrefillRounds&) = delete;

  std::vector<PrefillRound>& rounds() { return rounds_; }
  const PrefillKernel& kernel() const { return kernel_; }
  size_t query_width() const { return Size(args_.heads) * Size(shape_.head_dim_k); }
  size_t output_width() const { return Size(args_.heads) * Size(shape_.head_dim_v); }
  size_t queries() const { return queries_; }  // tokens of all items
  size_t first_query(size_t item) const { return first_query_[item]; }
  size_t scratch_bytes() const { return scratch_pages_ * page_bytes_; }  // of decoded pages
  size_t most_parts() const { return most_parts_; }                      // of a round
  const std::vector<PrefillProfile>& profiles() const { return profiles_; }
  // From where a layer's places in blocks are counted; null: no page is read in place.
  const std::byte* blocks(int layer) const {
    return blocks_ == nullptr ? nullptr : blocks_ + in_place_->RecordOffset(layer, 0);
  }

 private:
  static size_t Size(int64_t n) { return static_cast<size_t>(n); }
  PageRange Visible(const PlanItem& item, const PrefillSegment& segment, int64_t first, int64_t last) const;
  PageRange Visible(const PrefillGroupPlan& group, const PrefillSegment& segment) const;
  void AddSegments(const PlanItem& item);
  const std::byte* Record(const PrefillSegment::Page& page, int head) const;
  bool MayBeReadInPlace(const PrefillSegment::Page& page) const;
  bool IsReadInPlace(const PrefillSegment::Page& page, int head, PagePlace* place) const;
  void PlanGroupsOf(size_t index);
  void PlanGroups(size_t first, size_t count, const std::vector<PrefillSegment>& segments);
  void AddJobs(const PrefillSegment::Page& page, int head, size_t scratch_page, PrefillRound* round);
  int64_t IndexOf(const PrefillProfile& profile);
  void FinishRound();
  PrefillPartPlan MakePart(size_t index, const PrefillRound::Entry& entry, int64_t begin, int64_t end) const;
  void AddGroup(size_t index, uint32_t first_slot, uint32_t slots, PrefillRound* round);
  void AddUntouchedGroups();

  const AttendPlanArgs& args_;
  const GroupShape& shape_;
  const AttendEnvironment& environment_;
  const PrefillKernel& kernel_;
  const int group_;
  const std::byte* blocks_ = nullptr;      // of layer 0
  const BlockLayout* in_place_ = nullptr;  // of the pages that are read there: one for all
  size_t page_bytes_ = 0;                  // a K and a V page in scratch memory
  size_t most_pages_ = 0, most_slots_ = 0, most_group_pages_ = 0;  // of a round
  size_t queries_ = 0, scratch_pages_ = 0, most_parts_ = 0;
  std::vector<size_t> first_query_;
  std::deque<std::vector<PrefillSegment>> segments_;  // by item; entries point into it
  std::vector<PrefillGroupPlan> groups_;
  std::vector<PrefillProfile> profiles_;
  std::map<std::pair<const Profile*, int>, int64_t> profile_index_;
  std::vector<PrefillRound> rounds_;
  bool round_done_ = false;
};

}  // namespace kvtide::cuda
