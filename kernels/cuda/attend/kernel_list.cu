#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attend/combine_kernel.cuh"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/attend/level_kernels.h"
#include "kernels/format/tide.h"

namespace kvtide::cuda {

Form FormOf(CacheType type) {
  if (Info(type).calibrated) {
    constexpr Form kForms[kTideTypes] = {Form::kTide4, Form::kTide3, Form::kTide2, Form::kTide1};
    return kForms[CalibratedIndex(type)];
  }
  return VisitStored(type, [](auto codec) {
    using C = decltype(codec);
    if (std::is_same_v<C, F16>) return Form::kF16;
    if (std::is_same_v<C, Bf16>) return Form::kBf16;
    if (std::is_same_v<C, Q8_0>) return Form::kQ8;
    if (std::is_same_v<C, Q5_0>) return Form::kQ5;
    if (std::is_same_v<C, Q4_0>) return Form::kQ4;
    if (std::is_same_v<C, Turbo4::Stored>) return Form::kCode4;
    if (std::is_same_v<C, Turbo3::Stored>) return Form::kCode3;
    if (std::is_same_v<C, Turbo2::Stored>) return Form::kCode2;
    if (std::is_same_v<C, Wht4::Stored>) return Form::kUniform4;
    return Form::kOther;
  });
}

const std::vector<AttendKernel>& AllAttendKernels() {
  static const std::vector<AttendKernel>* const list = [] {
    auto* all = new std::vector<AttendKernel>;
    AddKernels64(all);
    AddKernels96(all);
    AddKernels128(all);
    AddKernels192(all);
    AddKernels256(all);
    AddKernels512(all);
    AddTideKernels64(all);
    AddTideKernels128(all);
    return all;
  }();
  return *list;
}

const std::vector<AttendKernel>& AllLevelKernels() {
  static const std::vector<AttendKernel>* const list = [] {
    auto* all = new std::vector<AttendKernel>;
    AddLevelKernels64(all);
    AddLevelKernels128(all);
    return all;
  }();
  return *list;
}

namespace {

const AttendKernel* FindIn(const std::vector<AttendKernel>& list, Form k, Form v, int dk, int dv, int rows,
                           int shared_limit) {
  const AttendKernel* best = nullptr;
  if (shared_limit == 0)
    for (const AttendKernel& kernel : list) shared_limit = std::max(shared_limit, kernel.shared_limit);
  for (const AttendKernel& kernel : list) {
    if (kernel.shared_limit != shared_limit) continue;
    if (kernel.k != k || kernel.v != v || kernel.dk != dk || kernel.dv != dv) continue;
    if (best == nullptr || (best->rows < rows && kernel.rows > best->rows) ||
        (kernel.rows >= rows && kernel.rows < best->rows))
      best = &kernel;
  }
  return best;
}

}  // namespace

const AttendKernel* FindAttendKernel(Form k, Form v, int dk, int dv, int rows, int shared_limit) {
  return FindIn(AllAttendKernels(), k, v, dk, dv, rows, shared_limit);
}

const AttendKernel* FindLevelKernel(Form k, Form v, int dk, int dv, int rows, int shared_limit) {
  return FindIn(AllLevelKernels(), k, v, dk, dv, rows, shared_limit);
}

namespace {

template <int DV>
const void* MergeOf(int team, bool scattered) {
  if (scattered)
    return team == 1 ? reinterpret_cast<const void*>(&ScatterCombineKernel<DV, true>)
                     : reinterpret_cast<const void*>(&ScatterCombineKernel<DV, false>);
  return team == 1 ? reinterpret_cast<const void*>(&CombineKernel<DV, true>)
                   : reinterpret_cast<const void*>(&CombineKernel<DV, false>);
}

const void* FindMerge(int dv, int team, bool scattered) {
  switch (dv) {
    case 64:
      return MergeOf<64>(team, scattered);
    case 96:
      return MergeOf<96>(team, scattered);
    case 128:
      return MergeOf<128>(team, scattered);
    case 192:
      return MergeOf<192>(team, scattered);
    case 256:
      return MergeOf<256>(team, scattered);
    case 512:
      return MergeOf<512>(team, scattered);
    default:
      return nullptr;
  }
}

}  // namespace

const void* FindCombineKernel(int dv, int team) { return FindMerge(dv, team, false); }
const void* FindScatterCombineKernel(int dv, int team) { return FindMerge(dv, team, true); }

}  // namespace kvtide::cuda
