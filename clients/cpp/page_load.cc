#include "clients/cpp/page_load.h"

#include <algorithm>
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
  int64_t written[PageCopier::kSlots] = {};  // chunks up to the end of the slot's piece
  bool failed = false;                       // a piece did not get there: what is behind it does not count
  const auto settle = [&](int slot) -> absl::Status {
    const absl::Status status = copier.Wait(slot);
    failed = failed || !status.ok();
    if (!failed) report->chunks = std::max(report->chunks, written[slot]);
    return status;
  };
  const auto piece = [&](int64_t first, int slot) -> absl::Status {
    KVTIDE_RETURN_IF_ERROR(settle(slot));  // the buffer is free
    const int64_t count = std::min(step, load.chunks - first);
    std::vector<int64_t> lost;
    KVTIDE_RETURN_IF_ERROR(store.Load(load.lease, first, count,
                                      load.buffers[slot].first(Size(count) * chunk_bytes), BlockForm::kBytes,
                                      {}, &lost));
    int64_t good = first + count;
    for (const int64_t chunk : lost) good = std::min(good, chunk);
    if (good < first + count) report->lost = good;
    // Pages of the load before and behind this piece; its first chunk may begin in the middle.
    const int64_t begin = std::max<int64_t>(0, first * load.chunk_pages - load.skip);
    const int64_t end =
        std::min(static_cast<int64_t>(load.pages.size()), good * load.chunk_pages - load.skip);
    if (end > begin)
      KVTIDE_RETURN_IF_ERROR(copier.Write(slot, load.buffers[slot].data(), first == 0 ? load.skip : 0,
                                          load.pages.subspan(Size(begin), Size(end - begin))));
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
  return status;
}

}  // namespace kvtide::client
