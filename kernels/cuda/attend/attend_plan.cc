#include "kernels/cuda/attend/attend_plan.h"

#include <algorithm>

namespace kvtide::cuda {
namespace {

uint64_t PagesOf(const std::vector<AttendUnit>& units) {
  return uint64_t{units.back().first_page} + units.back().pages;
}

}  // namespace

uint32_t NumberPages(std::vector<AttendUnit>* units) {
  uint32_t pages = 0;
  for (AttendUnit& unit : *units) {
    unit.first_page = pages;
    pages += unit.pages;
  }
  return pages;
}

std::vector<AttendWorker> CutShares(const std::vector<AttendUnit>& units, int ctas, int warps) {
  if (units.empty()) return {};
  const uint64_t pages = PagesOf(units);
  std::vector<AttendWorker> workers(std::min<size_t>(static_cast<size_t>(ctas), pages) *
                                    static_cast<size_t>(warps));
  size_t unit = 0;
  for (size_t i = 0; i < workers.size(); i++) {
    AttendWorker& worker = workers[i];
    worker.begin = WorkerBegin(pages, workers.size(), i);
    worker.end = WorkerBegin(pages, workers.size(), i + 1);
    while (units[unit].first_page + units[unit].pages <= worker.begin) unit++;
    worker.unit = static_cast<uint32_t>(unit);
    worker.unit_end = units[unit].first_page + units[unit].pages;
    worker.blocks = units[unit].blocks + (worker.begin - units[unit].first_page);
    worker.record_offset = units[unit].record_offset;
    if ((i + 1) % static_cast<size_t>(warps) != 0) continue;
    size_t last = unit;  // the CTA is complete; its last worker may have no page
    while (units[last].first_page >= worker.end) last--;
    while (units[last].first_page + units[last].pages < worker.end) last++;
    for (size_t w = 0; w < static_cast<size_t>(warps); w++)
      workers[i - w].last_unit = static_cast<uint32_t>(last);
  }
  return workers;
}

std::vector<AttendWorker> JoinWorkers(const std::vector<AttendWorker>& coded, int warps,
                                      const std::vector<AttendWorker>& exact, int exact_warps) {
  const size_t width = static_cast<size_t>(warps), exact_width = static_cast<size_t>(exact_warps);
  std::vector<AttendWorker> workers = coded;
  for (size_t i = 0; i < workers.size(); i++) workers[i].cta = static_cast<uint32_t>(i / width);
  const size_t first = workers.size();
  workers.resize(first + exact.size() / exact_width * width);
  for (size_t i = first; i < workers.size(); i++) {
    const size_t cta = (i - first) / width, warp = (i - first) % width;
    if (warp < exact_width) workers[i] = exact[cta * exact_width + warp];
    workers[i].exact = 1;
    workers[i].cta = static_cast<uint32_t>(cta);
  }
  return workers;
}

uint32_t AppendSlots(const std::vector<AttendUnit>& units, size_t index, size_t workers, int warps,
                     std::vector<uint32_t>* slots) {
  const uint64_t pages = PagesOf(units);
  const AttendUnit& unit = units[index];
  const size_t per_cta = static_cast<size_t>(warps);
  uint32_t count = 0;
  for (uint64_t page = unit.first_page, end = page + unit.pages; page < end; count++) {
    const size_t worker = WorkerOf(pages, workers, page);
    slots->push_back(static_cast<uint32_t>(index + worker));
    const uint32_t cta_end = WorkerBegin(pages, workers, (worker / per_cta + 1) * per_cta);
    page = cta_end <= end ? cta_end : WorkerBegin(pages, workers, worker + 1);
  }
  return count;
}

}  // namespace kvtide::cuda
