// The attention kernels that exist: for pairs of stored forms, head dims and 8 or 16 query rows. What has no
// kernel of its own is converted to f16 first (decode_tables.h). Kernels are instantiated in kernels_d*.cu,
// one file per head dim.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/format/catalogue.h"

namespace kvtide::cuda {

// Ways of storing, whatever the rotation: one attention kernel serves all types of one form.
enum class Form : int {
  kF16,
  kBf16,
  kQ8,
  kQ5,
  kQ4,
  kCode4,
  kCode3,
  kCode2,
  kUniform4,
  kTide4,
  kTide3,
  kTide2,
  kTide1,
  kOther
};
Form FormOf(CacheType type);
inline bool IsCalibrated(Form form) { return form >= Form::kTide4 && form <= Form::kTide1; }

// The kernel of a coded pair that reads f16 pages in the same launch (joint_kernel.cuh), with its threads and
// rows.
struct JointKernel {
  const void* function = nullptr;  // JointKernelFunction<...>(JointParams), null: there is none
  const void* query_function =
      nullptr;  // JointQueryKernel<...>(JointParams): a CTA for each unit of either form
  int shared_bytes = 0;
  int exact_warps = 0;  // of a CTA that reads f16 pages
};

struct AttendKernel {
  Form k = Form::kOther, v = Form::kOther;
  int dk = 0, dv = 0;  // stored dims
  int rows = 0;        // query rows of a unit
  int threads = 0;
  int shared_bytes = 0;
  const void* function = nullptr;  // AttendKernelFunction<...>(AttendParams)
  const void* query_function =
      nullptr;  // QueryKernel<...>(AttendParams): one CTA for each unit, launched before
  int query_threads = 0;
  int query_bytes = 0;   // of a unit's query area
  float key_unit = 1;    // what one step of a stored key is worth
  int shared_limit = 0;  // for GPUs with this much shared memory (capability.h)
  JointKernel joint;
};

// The kernel for up to `rows` rows: the smallest that takes them all, else the widest. Null if the pair has
// none. `shared_limit`: that of the GPU (device_image.h); 0 = the largest of this build.
const AttendKernel* FindAttendKernel(Form k, Form v, int dk, int dv, int rows, int shared_limit = 0);
const std::vector<AttendKernel>& AllAttendKernels();
// Whether f16 pages of `exact` may go into one launch with coded pages of `coded`.
inline bool CanJoin(const AttendKernel& coded, const AttendKernel& exact) {
  return coded.joint.function != nullptr && exact.k == Form::kF16 && exact.v == Form::kF16 &&
         exact.dk == coded.dk && exact.dv == coded.dv && exact.rows == coded.rows;
}
// Function of CombineKernel<dv, ...>, null for a dim without kernels. team: the largest of any group.
const void* FindCombineKernel(int dv, int team);

// The dims that kernels exist for, ascending.
inline constexpr int kKernelDims[] = {64, 96, 128, 192, 256, 512};

void AddKernels64(std::vector<AttendKernel>* list);
void AddKernels96(std::vector<AttendKernel>* list);
void AddKernels128(std::vector<AttendKernel>* list);
void AddKernels192(std::vector<AttendKernel>* list);
void AddKernels256(std::vector<AttendKernel>* list);
void AddKernels512(std::vector<AttendKernel>* list);
// Of calibrated keys.
void AddTideKernels64(std::vector<AttendKernel>* list);
void AddTideKernels128(std::vector<AttendKernel>* list);

}  // namespace kvtide::cuda
