// Which blocks of running sequences have an exact (f16) copy, in the block tables of an engine that manages
// its own pages: what an attention backend tells PagedAttention (kernels/paged_attention.h) in each step.
//
// The engine (vLLM) names blocks by page ids and says in each step, for each row of its batch, the tokens
// that the row has after the step, how many of them are new, and its pages. It does not say which request a
// row is, nor when a request ends. So everything hangs on page ids:
//   * A block that gets its token 0 in this step is *fresh*: what was known about its page is forgotten (the
//     engine has given the page to somebody else), and it gets an exact page.
//   * A block that goes on where an earlier step ended has an exact page still.
//   * A full block is sealed into its coded page in the step that fills it, and again in every step that
//     writes into it (speculation). From then on its exact page is a better copy, nothing more.
//   * Every other block was sealed by somebody: it is attended coded (prefix hits, resumed requests).
//   * A page whose coded bytes somebody else writes (a KV connector's load) is *forgotten*: its block is
//     attended coded like a prefix hit.
// Exact pages are of two kinds. A *slot* keeps its block over steps: the first and last blocks and the tail.
// A *scratch page* serves one layer of one step: the other blocks of a prefill chunk (`blocks_stay`: slots
// serve them too).
//
// Slots that the step does not need are taken again: copies of sealed blocks, the longest unused first, and
// unfinished blocks where there are more of them than 2 * max_sequences. A copy can always be lost: its block
// is attended coded then. An unfinished block of a sequence that runs, but has no row in some steps, is lost
// only if max_sequences other requests begin and end meanwhile; its next step then says FailedPrecondition,
// never a wrong answer.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/format/exact_window.h"

namespace kvtide::python {

struct ExactPagesOptions {
  int pages = 0;          // ids are below; page 0 is nobody's (padding)
  int slots = 0;          // slot 0 is that of page 0 and never written
  ExactWindow window;     // full blocks that rows attend exact; first_blocks 0 with a sliding window
  int64_t sliding = 0;    // attention window; 0 = all
  int max_sequences = 0;  // rows of a step
  int max_tokens = 0;     // new tokens of a step
  int rewritten = 0;      // last tokens that a later step may write again (speculation)
  // No scratch pages: every block that a step writes has a slot until the step ends, for layers that attend
  // what another layer has written before.
  bool blocks_stay = false;

  // Every step finds its slots with this many: one for page 0, and for each row the block that it goes on
  // with and the one that it begins, those that it may write again, and one for a sequence that waits.
  int LeastSlots() const {
    return 1 + max_sequences * (3 + (rewritten + kBlockTokens - 1) / kBlockTokens) +
           (blocks_stay ? MaxSeals() : 0);
  }
  // With this many, every row finds its whole window.
  int AllSlots() const {
    return LeastSlots() + max_sequences * (window.first_blocks + window.last_blocks) +
           max_tokens / kBlockTokens;
  }
  // Full blocks that one step can write to no slot.
  int Scratch() const { return blocks_stay ? 0 : MaxSeals(); }
  int ExactRow() const { return window.first_blocks + window.last_blocks + max_tokens / kBlockTokens + 4; }
  int MaxSeals() const { return max_tokens / kBlockTokens + 2 * max_sequences; }
};

class ExactPages {
 public:
  static absl::StatusOr<ExactPages> Make(const ExactPagesOptions& options);

  // The tables of one step: new tokens of row s are [query_start[s], query_start[s + 1]), lengths[s] counts
  // them in. A row without new tokens, or of length 0, is padding. `table`: page ids, `row` from one row to
  // the next and `columns` in each, of which the first ceil(lengths[s] / 64) count. InvalidArgument leaves
  // everything as it was; FailedPrecondition and ResourceExhausted are broken bounds (above).
  absl::Status Step(std::span<const int32_t> query_start, std::span<const int32_t> lengths,
                    std::span<const int32_t> table, int64_t row, int64_t columns);

  // The engine has given these pages to blocks whose coded bytes come from elsewhere: exact copies of what
  // was in them mean nothing. InvalidArgument, with nothing forgotten, for a page that is none.
  absl::Status Forget(std::span<const int32_t> pages);

  // Results of the last Step, as PagedStep wants them. The memory stays where it is.
  std::span<int32_t> coded_first() { return coded_first_; }
  std::span<int32_t> coded_count() { return coded_count_; }
  std::span<int32_t> exact_table() { return exact_table_; }  // [max_sequences][ExactRow()]
  std::span<int32_t> write_slots() { return write_slots_; }  // [max_tokens], -1 behind the last token
  std::span<int32_t> seal_pages() { return seal_pages_; }    // [MaxSeals()][2]
  std::span<int32_t> seal_count() { return seal_count_; }    // [1]
  int most_queries() const { return most_queries_; }

  const ExactPagesOptions& options() const { return options_; }
  // Since the object was made.
  struct Counts {
    int64_t steps = 0, seals = 0, exact_blocks = 0, coded_blocks = 0, lost_copies = 0;
  };
  const Counts& counts() const { return counts_; }

 private:
  // Slots by what may be done with them; each list from the longest unused to the last used.
  enum List : int8_t { kFree, kCopies, kUnfinished, kLists };
  struct Slot {
    int32_t page = -1;
    int32_t previous = 0, next = 0;
    List list = kFree;
    int64_t step = -1;    // last used
    int64_t needed = -1;  // must not be taken in this step
  };

  explicit ExactPages(const ExactPagesOptions& options);
  absl::Status Check(std::span<const int32_t> query_start, std::span<const int32_t> lengths,
                     std::span<const int32_t> table, int64_t row, int64_t columns) const;
  int End(List list) const { return options_.slots + list; }
  void Move(int slot, List list);  // to the end of the list
  void Use(int slot, List list) {
    Move(slot, list);
    slots_[static_cast<size_t>(slot)].step = step_;
  }
  // The first slot of a list that this step has not used, or, if it comes to the worst, does not need; -1.
  int First(List list, bool worst) const;
  // A slot without a page; -1: none that may be taken. `must`: whatever this step does not need.
  int Take(bool must);
  int PlaceOf(int32_t page) const;
  void Free(int32_t page);  // the slot of a page, if it has one
  void Keep(int32_t page, bool fresh, bool stays, bool must, List list);
  void MakeTables(size_t s, int first_row, int64_t before, int64_t after, std::span<const int32_t> pages);

  ExactPagesOptions options_;
  std::vector<Slot> slots_;  // behind them the ends of the lists
  int sizes_[kLists] = {};
  std::vector<int32_t> slot_of_;     // of a page, -1 = none
  std::vector<int32_t> scratch_of_;  // of a page that is written in this step
  std::vector<int64_t> written_;     // last step that wrote into a page
  int64_t step_ = 0;
  int scratch_used_ = 0, most_queries_ = 0;
  std::vector<int32_t> coded_first_, coded_count_, exact_table_, write_slots_, seal_pages_, seal_count_;
  Counts counts_;
};

}  // namespace kvtide::python
