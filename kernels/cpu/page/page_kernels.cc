#include "kernels/cpu/page/page_kernels.h"

#include <array>

#include "kernels/base/check.h"
#include "kernels/cpu/page/plain_kernels.h"
#include "kernels/cpu/page/simd_attend.h"
#include "kernels/cpu/page/simd_convert.h"
#include "kernels/cpu/page/simd_encode.h"

namespace kvtide {
namespace {

// By level; empty where a level is not supported.
using Tables = std::array<PageKernels, kVectorLevels.size() + 2>;

Tables MakeTables() {
  Tables tables;
  for (SimdLevel level : kVectorLevels) {
    const AttendPages attend = SimdAttendFew(level);
    if (attend == nullptr || !ProcessorHas(level)) continue;
    PageKernels& table = tables[static_cast<size_t>(level)];
    table = PlainKernels();
    table.name = SimdLevelName(level);
    table.level = level;
    table.attend = attend;
    table.attend_many = SimdAttendMany(level);
    UseSimdConversions(level, table);
    UseSimdEncoders(level, table);
  }
  return tables;
}

const PageKernels* FindVectorKernels(SimdLevel level) {
  static const Tables kTables = MakeTables();
  const PageKernels& table = kTables[static_cast<size_t>(level)];
  return table.attend == nullptr ? nullptr : &table;
}

}  // namespace

KeyRebuild MakeKeyRebuild(CacheType type, const HeadProfile& profile) {
  return {static_cast<int>(profile.centre.size()),
          WidthsOf(type, profile).data(),
          profile.inverse.data(),
          profile.centre.data(),
          profile.rope.frequencies.data(),
          static_cast<int>(profile.rope.frequencies.size()),
          profile.rope.pairs};
}

PageSegment MakePageSegment(const BlockLayout& layout, int layer, int kv_head, const HeadProfile* profile,
                            std::span<std::byte* const> blocks, int64_t first_position, int64_t tokens) {
  PageSegment segment;
  segment.layout = &layout;
  segment.k = {&CodeTableOf(layout.pair().k), layout.k().stored_dim, layout.k().groups, layout.k_codes(),
               layout.k_scales()};
  segment.v = {&CodeTableOf(layout.pair().v), layout.v().stored_dim, layout.v().groups, layout.v_codes(),
               layout.v_scales()};
  segment.profile = profile;
  if (segment.k.table->calibrated) {
    KVTIDE_CHECK(profile != nullptr, Name(layout.pair().k), " without a profile");
    segment.k.rebuild = MakeKeyRebuild(layout.pair().k, *profile);
  }
  segment.record_bytes = layout.record_bytes();
  segment.record_offset = layout.RecordOffset(layer, kv_head);
  segment.blocks = blocks;
  segment.first_position = first_position;
  segment.tokens = tokens;
  return segment;
}

std::vector<SimdLevel> SupportedSimdLevels() {
  std::vector<SimdLevel> levels = {SimdLevel::kPlain};
  for (SimdLevel level : kVectorLevels)
    if (FindVectorKernels(level) != nullptr) levels.push_back(level);
  return levels;
}

const PageKernels* FindPageKernels(SimdLevel level) {
  if (level == SimdLevel::kBest) level = SupportedSimdLevels().back();
  return level == SimdLevel::kPlain ? &PlainKernels() : FindVectorKernels(level);
}

}  // namespace kvtide
