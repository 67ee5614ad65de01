// Vector attention over the pages of one KV head, for each instruction set that this build has.
#pragma once

#include "kernels/cpu/page/page_segment.h"
#include "kernels/cpu/page/simd_level.h"

namespace kvtide {

using AttendPages = void (*)(const PageSegment& segment, const QueryRows& rows, float* out, float* lse);
// For few and for many rows; null if the build lacks the level.
AttendPages SimdAttendFew(SimdLevel level);
AttendPages SimdAttendMany(SimdLevel level);

}  // namespace kvtide
