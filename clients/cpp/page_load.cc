#include "clients/cpp/page_load.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

absl::Status LoadPages(BlockStore& store, PageCopier& copier, const PageLoad& load, PageLoadReport* report) {
  *report = {};
  const size_t chunk_bytes = copier.chunk_bytes();
  if (store.block_bytes() != static_cast<int64_t>(chunk_bytes))
    return absl::InvalidArgumentError(absl::StrCat("the store's blocks have ", store.block_bytes(),
                                                   " bytes, the pages' chunks ", chunk_bytes));
  const auto step = static_cast<int64_t>(load.buffers[0].size() / chunk_bytes);
  if (step < 1)
    return absl::InvalidArgumentError(
        absl::StrCat("a buffer has ", load.buffers[0].size(), " bytes, a chunk ", chunk_bytes));
  const HostTier tier = load.in_place ? store.host_tier() : HostTier();  // mapped until all is copied
  int64_t written[PageCopier::kSlots] = {};  // chunks up to the end of the slot's piece
  uint64_t held[PageCopier::kSlots] = {};    // what the slot copies from; 0 = a buffer
  std::vector<uint64_t> done;                // places that nothing copies from any more
  bool failed = false;                       // a piece did not get there: what is behind it does not count
  const auto settle = [&](int slot) -> absl::Status {
    const absl::Status status = copier.Wait(slot);
    failed = failed || !status.ok();
    if (!failed) report->chunks = std::max(report->chunks, written[slot]);
    if (held[slot] != 0) done.push_back(std::exchange(held[slot], 0));
    return status;
  };
  // Pages of the load before and behind the chunks [first, good); the first chunk may begin in the middle.
  const auto pages_of = [&](int64_t first, int64_t good) {
    const int64_t begin = std::max<int64_t>(0, first * load.chunk_pages - load.skip);
    const int64_t end =
        std::min(static_cast<int64_t>(load.pages.size()), good * load.chunk_pages - load.skip);
    return end > begin ? load.pages.subspan(Size(begin), Size(end - begin)) : std::span<const int32_t>();
  };
  const auto end_of = [](int64_t first, int64_t count, std::span<const int64_t> lost) {
    int64_t good = first + count;
    for (const int64_t chunk : lost) good = std::min(good, chunk);
    return good;
  };
  const auto skip_of = [&](int64_t first) { return first == 0 ? load.skip : 0; };
  // False: some of the chunks lie elsewhere, and nothing was put on its way.
  const auto from_places = [&](int64_t first, int64_t count, int slot) -> absl::StatusOr<bool> {
    KVTIDE_ASSIGN_OR_RETURN(const BlocksInPlace there, store.LoadInPlace(load.lease, first, count, done));
    done.clear();
    if (there.places != 0) done.push_back(there.places);
    const int64_t good = end_of(first, count, there.lost);
    const std::span<const std::byte* const> chunks = std::span(there.blocks).first(Size(good - first));
    if (std::any_of(chunks.begin(), chunks.end(), [](const auto* at) { return at == nullptr; })) return false;
    if (good < first + count) report->lost = good;
    if (const std::span<const int32_t> pages = pages_of(first, good); !pages.empty()) {
      const size_t wanted =
          (Size(skip_of(first)) + pages.size() + Size(load.chunk_pages) - 1) / Size(load.chunk_pages);
      KVTIDE_RETURN_IF_ERROR(copier.WriteChunks(slot, chunks.first(wanted), skip_of(first), pages));
      if (there.places != 0) done.pop_back();
      held[slot] = there.places;
      report->in_place += static_cast<int64_t>(wanted);
    }
    written[slot] = good;
    return true;
  };
  const auto piece = [&](int64_t first, int slot) -> absl::Status {
    KVTIDE_RETURN_IF_ERROR(settle(slot));  // the buffer is free
    const int64_t count = std::min(step, load.chunks - first);
    if (!tier.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(const bool all, from_places(first, count, slot));
      if (all) return absl::OkStatus();
    }
    std::vector<int64_t> lost;
    KVTIDE_RETURN_IF_ERROR(store.Load(load.lease, first, count,
                                      load.buffers[slot].first(Size(count) * chunk_bytes), BlockForm::kBytes,
                                      {}, &lost));
    const int64_t good = end_of(first, count, lost);
    if (good < first + count) report->lost = good;
    const std::span<const int32_t> pages = pages_of(first, good);
    if (!pages.empty())
      KVTIDE_RETURN_IF_ERROR(copier.Write(slot, load.buffers[slot].data(), skip_of(first), pages));
    written[slot] = good;
    return absl::OkStatus();
  };
  absl::Status status;
  int slot = 0;
  for (int64_t first = 0; first < load.chunks && status.ok() && report->lost < 0;
       first += step, slot = (slot + 1) % PageCopier::kSlots)
    status = piece(first, slot);
  for (int i = 0; i < PageCopier::kSlots;
       i++, slot = (slot + 1) % PageCopier::kSlots) {  // the older one first
    const absl::Status settled = settle(slot);
    if (status.ok()) status = settled;
  }
  // A daemon that cannot be told has given them back, or will with the connection.
  store.GiveBack(done).IgnoreError();
  return status;
}

}  // namespace kvtide::client
