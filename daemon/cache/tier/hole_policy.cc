#include "daemon/cache/tier/hole_policy.h"

#include <algorithm>
#include <map>

namespace kvtide {
namespace {

using Kind = ExtentView::Kind;

// Extents [begin, end) of the stretch.
struct Window {
  size_t begin = 0, end = 0;
  size_t offset = 0, bytes = 0;
  size_t in_the_way = 0;  // bytes of blocks
};

// For every extent the shortest window that begins there.
std::vector<Window> FindWindows(const StretchView& stretch, size_t bytes) {
  const std::vector<ExtentView>& extents = stretch.extents;
  std::vector<Window> windows;
  Window window;
  window.offset = stretch.offset;
  const auto used = [](const ExtentView& extent) { return extent.kind == Kind::kFree ? 0 : extent.bytes; };
  for (; window.begin < extents.size(); window.begin++) {
    while (window.bytes < bytes && window.end < extents.size() && extents[window.end].kind != Kind::kFixed) {
      window.bytes += extents[window.end].bytes;
      window.in_the_way += used(extents[window.end]);
      window.end++;
    }
    if (window.bytes >= bytes) windows.push_back(window);
    const ExtentView& first = extents[window.begin];
    window.offset += first.bytes;
    if (window.begin == window.end) {  // a fixed one
      window.end++;
    } else {
      window.bytes -= first.bytes;
      window.in_the_way -= used(first);
    }
  }
  return windows;
}

// Finds a place outside of the window for every block in it.
std::optional<HolePlan> Clear(const StretchView& stretch, const Window& window) {
  std::multimap<size_t, size_t> free;  // bytes -> offset
  std::vector<const ExtentView*> blocks;
  size_t offset = stretch.offset;
  for (size_t i = 0; i < stretch.extents.size(); i++) {
    const ExtentView& extent = stretch.extents[i];
    const bool inside = i >= window.begin && i < window.end;
    if (!inside && extent.kind == Kind::kFree) free.emplace(extent.bytes, offset);
    if (inside && extent.kind == Kind::kMovable) blocks.push_back(&extent);
    offset += extent.bytes;
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const ExtentView* a, const ExtentView* b) { return a->bytes > b->bytes; });
  HolePlan plan{window.offset, window.bytes, {}, 0};
  size_t room_below = stretch.room_below;
  for (const ExtentView* block : blocks) {
    const auto fits = free.lower_bound(block->bytes);
    plan.cost += static_cast<double>(block->bytes);
    if (fits != free.end()) {
      plan.moves.push_back({block->block, fits->second});
      const auto [bytes, at] = *fits;
      free.erase(fits);
      if (bytes > block->bytes) free.emplace(bytes - block->bytes, at + block->bytes);
    } else if (block->demotion_cost >= 0 && block->bytes <= std::min(room_below, stretch.largest_below)) {
      plan.moves.push_back({block->block, std::nullopt});
      plan.cost += block->demotion_cost;
      room_below -= block->bytes;
    } else {
      return std::nullopt;
    }
  }
  return plan;
}

}  // namespace

std::optional<HolePlan> PlanHole(const StretchView& stretch, size_t bytes) {
  constexpr size_t kTries = 32;
  std::vector<Window> windows = FindWindows(stretch, bytes);
  const size_t tries = std::min(windows.size(), kTries);
  std::partial_sort(windows.begin(), windows.begin() + static_cast<std::ptrdiff_t>(tries), windows.end(),
                    [](const Window& a, const Window& b) {
                      return a.in_the_way != b.in_the_way ? a.in_the_way < b.in_the_way : a.offset < b.offset;
                    });
  std::optional<HolePlan> best;
  for (size_t i = 0; i < tries; i++) {
    // Every byte in the way costs at least one.
    if (best.has_value() && static_cast<double>(windows[i].in_the_way) >= best->cost) break;
    std::optional<HolePlan> plan = Clear(stretch, windows[i]);
    if (plan.has_value() && (!best.has_value() || plan->cost < best->cost)) best = std::move(plan);
  }
  return best;
}

}  // namespace kvtide
