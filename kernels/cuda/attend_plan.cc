#include "kernels/cuda/attend_plan.h"

#include <algorithm>

namespace kvtide::cuda {
namespace {

uint32_t ShareBegin(uint64_t pages, size_t shares, size_t i) { return static_cast<uint32_t>(pages * i / shares); }
// The share that page `page` lies in.
size_t ShareOf(uint64_t pages, size_t shares, uint64_t page) { return static_cast<size_t>(((page + 1) * shares - 1) / pages); }

}  // namespace

uint32_t NumberPages(std::vector<AttendUnit>* units) {
  uint32_t pages = 0;
  for (AttendUnit& unit : *units) {
    unit.first_page = pages;
    pages += unit.pages;
  }
  return pages;
}

std::vector<AttendShare> CutShares(const std::vector<AttendUnit>& units, int ctas) {
  if (units.empty()) return {};
  const uint64_t pages = uint64_t{units.back().first_page} + units.back().pages;
  std::vector<AttendShare> shares(std::min<size_t>(static_cast<size_t>(ctas), pages));
  size_t unit = 0;
  for (size_t i = 0; i < shares.size(); i++) {
    AttendShare& share = shares[i];
    share.begin = ShareBegin(pages, shares.size(), i);
    share.end = ShareBegin(pages, shares.size(), i + 1);
    while (units[unit].first_page + units[unit].pages <= share.begin) unit++;
    share.unit = static_cast<uint32_t>(unit);
    share.first = units[unit];
  }
  return shares;
}

SlotRange SlotsOf(const std::vector<AttendUnit>& units, size_t index, size_t shares) {
  const uint64_t pages = uint64_t{units.back().first_page} + units.back().pages;
  const AttendUnit& unit = units[index];
  const size_t first = ShareOf(pages, shares, unit.first_page);
  const size_t last = ShareOf(pages, shares, uint64_t{unit.first_page} + unit.pages - 1);
  return {static_cast<uint32_t>(index + first), static_cast<uint32_t>(last - first + 1)};
}

}  // namespace kvtide::cuda
