#include "clients/python/exact_pages.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::python {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

absl::StatusOr<ExactPages> ExactPages::Make(const ExactPagesOptions& options) {
  const auto positive = [](const char* name, int64_t value, int64_t most) {
    return value >= 1 && value <= most ? absl::OkStatus()
                                       : absl::InvalidArgumentError(absl::StrCat(
                                             name, " is ", value, ", 1 to ", most, " are possible"));
  };
  KVTIDE_RETURN_IF_ERROR(positive("pages", options.pages, INT32_MAX / kBlockTokens));
  KVTIDE_RETURN_IF_ERROR(positive("max_sequences", options.max_sequences, 4096));
  KVTIDE_RETURN_IF_ERROR(positive("max_tokens", options.max_tokens, 1 << 20));
  const auto none = [](const char* name, int64_t value, int64_t most) {
    return value >= 0 && value <= most ? absl::OkStatus()
                                       : absl::InvalidArgumentError(absl::StrCat(
                                             name, " is ", value, ", 0 to ", most, " are possible"));
  };
  KVTIDE_RETURN_IF_ERROR(none("first_blocks", options.window.first_blocks, options.sliding > 0 ? 0 : 1024));
  KVTIDE_RETURN_IF_ERROR(none("last_blocks", options.window.last_blocks, 1024));
  KVTIDE_RETURN_IF_ERROR(none("sliding", options.sliding, int64_t{1} << 40));
  KVTIDE_RETURN_IF_ERROR(none("rewritten", options.rewritten, options.max_tokens));
  if (options.slots < options.LeastSlots())
    return absl::InvalidArgumentError(
        absl::StrCat(options.slots, " exact pages for ", options.max_sequences, " sequences: at least ",
                     options.LeastSlots(), " are needed; allow fewer sequences at once or more memory"));
  return ExactPages(options);
}

ExactPages::ExactPages(const ExactPagesOptions& options)
    : options_(options),
      slots_(Size(options.slots + kLists)),
      slot_of_(Size(options.pages), -1),
      scratch_of_(Size(options.pages), -1),
      written_(Size(options.pages), -1),
      coded_first_(Size(options.max_sequences)),
      coded_count_(Size(options.max_sequences)),
      exact_table_(Size(options.max_sequences) * Size(options.ExactRow())),
      write_slots_(Size(options.max_tokens), -1),
      seal_pages_(Size(options.MaxSeals()) * 2, -1),
      seal_count_(1) {
  for (int list = 0; list < kLists; list++) {
    Slot& end = slots_[Size(End(static_cast<List>(list)))];
    end.previous = end.next = End(static_cast<List>(list));
  }
  for (int slot = 0; slot < options.slots; slot++)
    slots_[Size(slot)].previous = slots_[Size(slot)].next = slot;
  for (int slot = 1; slot < options.slots; slot++) {
    sizes_[kFree]++;  // Move takes it away again
    Move(slot, kFree);
  }
}

void ExactPages::Move(int slot, List list) {
  Slot& moved = slots_[Size(slot)];
  slots_[Size(moved.previous)].next = moved.next;
  slots_[Size(moved.next)].previous = moved.previous;
  sizes_[moved.list]--;
  Slot& end = slots_[Size(End(list))];
  moved.list = list;
  moved.next = End(list);
  moved.previous = end.previous;
  slots_[Size(end.previous)].next = slot;
  end.previous = slot;
  sizes_[list]++;
}

int ExactPages::First(List list, bool worst) const {
  for (int slot = slots_[Size(End(list))].next; slot != End(list); slot = slots_[Size(slot)].next) {
    if (slots_[Size(slot)].step != step_) return slot;
    if (!worst) return -1;  // all behind it were used in this step too
    if (slots_[Size(slot)].needed != step_) return slot;
  }
  return -1;
}

int ExactPages::Take(bool must) {
  int slot = First(kFree, false);
  if (slot < 0 && sizes_[kUnfinished] > 2 * options_.max_sequences) slot = First(kUnfinished, false);
  if (slot < 0) slot = First(kCopies, false);
  if (slot < 0 && must) slot = First(kCopies, true);
  if (slot < 0 && must) slot = First(kUnfinished, false);
  if (slot < 0) return -1;
  Slot& taken = slots_[Size(slot)];
  if (taken.page >= 0) {
    slot_of_[Size(taken.page)] = -1;
    if (taken.list == kCopies) counts_.lost_copies++;
    taken.page = -1;
  }
  return slot;
}

int ExactPages::PlaceOf(int32_t page) const {
  if (page == 0) return 0;
  if (slot_of_[Size(page)] >= 0) return slot_of_[Size(page)];
  return written_[Size(page)] == step_ ? options_.slots + scratch_of_[Size(page)] : -1;
}

absl::Status ExactPages::Check(std::span<const int32_t> query_start, std::span<const int32_t> lengths,
                               std::span<const int32_t> table, int64_t row, int64_t columns) const {
  if (lengths.size() > Size(options_.max_sequences))
    return absl::InvalidArgumentError(
        absl::StrCat(lengths.size(), " rows; max_sequences is ", options_.max_sequences));
  if (query_start.size() != lengths.size() + 1 || query_start.front() != 0)
    return absl::InvalidArgumentError("query_start has one number more than lengths and begins with 0");
  if (columns < 0 || row < columns ||
      (!lengths.empty() && table.size() < (lengths.size() - 1) * Size(row) + Size(columns)))
    return absl::InvalidArgumentError(absl::StrCat("a table of ", table.size(), " pages, rows of ", columns));
  if (query_start.back() > options_.max_tokens)
    return absl::InvalidArgumentError(
        absl::StrCat(query_start.back(), " new tokens; max_tokens is ", options_.max_tokens));
  for (size_t s = 0; s < lengths.size(); s++) {
    const auto wrong = [s](const auto&... what) {
      return absl::InvalidArgumentError(absl::StrCat("row ", s, ": ", what...));
    };
    const int64_t queries = int64_t{query_start[s + 1]} - query_start[s], length = lengths[s];
    if (queries < 0 || length < 0 || (length > 0 && queries > length))
      return wrong(queries, " new tokens of ", length);
    if (queries == 0 || length == 0) continue;
    const int64_t blocks = (length + kBlockTokens - 1) / kBlockTokens;
    if (blocks > columns) return wrong(length, " tokens in ", columns, " pages");
    const std::span<const int32_t> pages = table.subspan(s * Size(row), Size(blocks));
    for (const int32_t page : pages)
      if (page < 0 || page >= options_.pages) return wrong("page ", page, " of ", options_.pages);
    const int64_t before = length - queries;
    const int32_t goes_on = pages[Size(before / kBlockTokens)];
    if (before % kBlockTokens != 0 && goes_on != 0 && slot_of_[Size(goes_on)] < 0)
      return absl::FailedPreconditionError(absl::StrCat(
          "row ", s, " goes on at token ", before, " in page ", goes_on,
          ", whose exact copy is lost: either something else wrote this page (a KV connector, a hit inside a "
          "block), or more than ",
          options_.max_sequences,
          " requests came and went while this one waited; allow more sequences at once (--max-num-seqs)"));
  }
  return absl::OkStatus();
}

void ExactPages::Free(int32_t page) {
  const int slot = slot_of_[Size(page)];
  if (slot < 0) return;
  slots_[Size(slot)].page = -1;
  Move(slot, kFree);
  slot_of_[Size(page)] = -1;
}

absl::Status ExactPages::Forget(std::span<const int32_t> pages) {
  for (const int32_t page : pages)
    if (page <= 0 || page >= options_.pages)
      return absl::InvalidArgumentError(
          absl::StrCat("page ", page, " of ", options_.pages, " is written from elsewhere"));
  for (const int32_t page : pages) Free(page);
  return absl::OkStatus();
}

void ExactPages::Keep(int32_t page, bool fresh, bool stays, bool must, List list) {
  if (fresh && !stays) Free(page);
  int slot = slot_of_[Size(page)];
  if (stays && slot < 0) {
    slot = Take(must);
    if (slot >= 0) {
      slots_[Size(slot)].page = page;
      slot_of_[Size(page)] = slot;
    }
  }
  if (slot >= 0) {
    Use(slot, list);
    slots_[Size(slot)].needed = step_;
  } else if (written_[Size(page)] != step_) {
    scratch_of_[Size(page)] = scratch_used_++;
  }
  written_[Size(page)] = step_;
}

void ExactPages::MakeTables(size_t s, int first_row, int64_t before, int64_t after,
                            std::span<const int32_t> pages) {
  const int64_t first_new = before / kBlockTokens, blocks = static_cast<int64_t>(pages.size());
  int32_t* exact = exact_table_.data() + s * Size(options_.ExactRow());
  int64_t first = 0;
  while (first < std::min<int64_t>(options_.window.first_blocks, blocks) && pages[Size(first)] != 0 &&
         PlaceOf(pages[Size(first)]) >= 0)
    *exact++ = PlaceOf(pages[Size(first++)]);
  int64_t last = std::max(first, first_new);
  while (last > first && pages[Size(last - 1)] != 0) {
    const int32_t page = pages[Size(last - 1)];
    const bool in_window = last - 1 >= first_new - options_.window.last_blocks && slot_of_[Size(page)] >= 0;
    // What another row writes in this step is not sealed yet.
    if (written_[Size(page)] != step_ && !in_window) break;
    last--;
  }
  coded_first_[s] = static_cast<int32_t>(first);
  coded_count_[s] = static_cast<int32_t>(last - first);
  counts_.coded_blocks += last - first;
  counts_.exact_blocks += blocks - (last - first);
  for (int64_t b = last; b < blocks; b++) *exact++ = PlaceOf(pages[Size(b)]);
  for (int64_t p = before; p < after; p++) {
    const int32_t page = pages[Size(p / kBlockTokens)];
    write_slots_[Size(first_row + p - before)] =
        page == 0 ? -1 : PlaceOf(page) * kBlockTokens + static_cast<int32_t>(p % kBlockTokens);
  }
}

absl::Status ExactPages::Step(std::span<const int32_t> query_start, std::span<const int32_t> lengths,
                              std::span<const int32_t> table, int64_t row, int64_t columns) {
  KVTIDE_RETURN_IF_ERROR(Check(query_start, lengths, table, row, columns));
  step_++;
  counts_.steps++;
  scratch_used_ = most_queries_ = 0;
  const auto for_each_row = [&](const auto& body) {
    for (size_t s = 0; s < lengths.size(); s++) {
      const int queries = query_start[s + 1] - query_start[s];
      if (queries <= 0 || lengths[s] == 0) continue;
      const int64_t after = lengths[s], blocks = (after + kBlockTokens - 1) / kBlockTokens;
      body(s, after - queries, after, table.subspan(s * Size(row), Size(blocks)));
    }
  };

  // What the rows have, before anything is taken away: the blocks that they go on with, their windows.
  for_each_row([&](size_t, int64_t before, int64_t, std::span<const int32_t> pages) {
    const int64_t first_new = before / kBlockTokens;
    const auto use = [&](int64_t b, List list, bool needed) {
      const int32_t page = pages[Size(b)];
      const int slot = page == 0 ? -1 : slot_of_[Size(page)];
      if (slot < 0) return;
      Use(slot, list);
      if (needed) slots_[Size(slot)].needed = step_;
    };
    const int64_t last_begin = std::max<int64_t>(0, first_new - options_.window.last_blocks);
    for (int64_t b = 0; b < std::min<int64_t>(options_.window.first_blocks, last_begin); b++)
      use(b, kCopies, false);
    for (int64_t b = last_begin; b < first_new; b++) use(b, kCopies, false);
    if (before % kBlockTokens != 0) use(first_new, kUnfinished, true);
  });

  // What they write: unfinished blocks find a slot first, copies of full ones take what is left.
  int seals = 0;
  for (const bool must_pass : {true, false}) {
    for_each_row([&](size_t, int64_t before, int64_t after, std::span<const int32_t> pages) {
      for (int64_t b = before / kBlockTokens; b < static_cast<int64_t>(pages.size()); b++) {
        if (pages[Size(b)] == 0) continue;
        const int64_t end = (b + 1) * kBlockTokens;
        const bool final = end <= after - options_.rewritten;  // full, and no later step writes into it
        if (must_pass == final) continue;
        const bool must = !final || options_.blocks_stay;
        const bool stays = must || b < options_.window.first_blocks ||
                           b >= after / kBlockTokens - options_.window.last_blocks;
        Keep(pages[Size(b)], b * kBlockTokens >= before, stays, must, final ? kCopies : kUnfinished);
        if (end > after) continue;
        seal_pages_[Size(2 * seals)] = PlaceOf(pages[Size(b)]);
        seal_pages_[Size(2 * seals + 1)] = pages[Size(b)];
        seals++;
      }
    });
  }
  counts_.seals += seals;
  seal_count_[0] = seals;
  std::fill(seal_pages_.begin() + 2 * seals, seal_pages_.end(), -1);

  std::fill(coded_first_.begin(), coded_first_.end(), 0);
  std::fill(coded_count_.begin(), coded_count_.end(), 0);
  std::fill(write_slots_.begin(), write_slots_.end(), -1);
  for_each_row([&](size_t s, int64_t before, int64_t after, std::span<const int32_t> pages) {
    most_queries_ = std::max(most_queries_, static_cast<int>(after - before));
    MakeTables(s, query_start[s], before, after, pages);
  });
  return absl::OkStatus();
}

}  // namespace kvtide::python
