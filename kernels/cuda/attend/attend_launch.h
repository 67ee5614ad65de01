// The units that one kernel reads in an Attend, how they are cut, and their launch. f16 pages and coded pages
// that have a kernel in common go into one launch (joint_kernel.cuh). Not thread-safe; the arrays that a
// launch reads are the caller's, in device memory until the stream is done with them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/codec/codec_kernels.h"

namespace kvtide::cuda {

// Blocks to convert to f16 pages, of one pair: jobs of both sides.
struct Conversion {
  const BlockLayout* layout = nullptr;
  std::vector<CodecJob> k, v;
  const CodecJob *k_device = nullptr, *v_device = nullptr;
};

struct LaunchPlan {
  const AttendKernel* kernel = nullptr;
  Rotation k_rotation;
  size_t page_bytes = 0;  // of a record
  size_t layer_bytes =
      0;  // from a layer's records in a block to the next layer's; 0: pages of one layer only
  size_t table_bytes = 0;  // of a calibrated KV head
  std::vector<AttendUnit> units;
  std::vector<Conversion> conversions;  // what the units wait for
  size_t scratch_used = 0;              // by their pages

  // By CutLaunches.
  uint32_t pages = 0;
  int ctas = 0, warps = 0;  // the most CTAs, and workers in each
  std::vector<AttendWorker> workers;
  int most_rows = 0;  // of a unit
  // Of a joint launch: coded pages take the f16 pages of another plan along, which is then `joined`.
  const LaunchPlan* exact = nullptr;
  bool joined = false;

  // By the owner, in memory: what the kernels are told. Partial states and query areas begin where in theirs.
  size_t first_partial = 0, first_query = 0;
  AttendParams params;
  const AttendWorker* joint_workers = nullptr;  // the table of both
};

// Numbers the pages of each launch, lets f16 pages join the coded pages that are most bytes, if there is a
// kernel for both, and cuts shares. The launches must stay where they are from then on.
void CutLaunches(std::vector<LaunchPlan>* launches, int processors);

// Conversions (to pages of `page_dim` values a row), queries and attention; nothing for a plan that joined
// another. overlap: kernels of the call may overlap, each waits for the ones before it only where it needs
// their results; after: what the stream has got last, units of the call, rows of its pages (late_query.h), or
// anything else.
enum class UnitsAfter { kAnything, kUnits, kRows };
absl::Status LaunchUnits(const LaunchPlan& plan, int page_dim, bool overlap, UnitsAfter after,
                         cudaStream_t stream);

}  // namespace kvtide::cuda
