// The attention kernels for calibrated keys that are coded after RoPE (level_tile.h): for the same pairs and
// head dims as those for keys that are rebuilt (instantiate_tide.cuh), so that whether a page is read where
// it lies does not depend on its profile. Instantiated in kernels_level*.cu.
#pragma once

#include <vector>

#include "kernels/cuda/attend/kernel_list.h"

namespace kvtide::cuda {

const std::vector<AttendKernel>& AllLevelKernels();

// As FindAttendKernel, of keys coded after RoPE.
const AttendKernel* FindLevelKernel(Form k, Form v, int dk, int dv, int rows, int shared_limit = 0);

void AddLevelKernels64(std::vector<AttendKernel>* list);
void AddLevelKernels128(std::vector<AttendKernel>* list);

}  // namespace kvtide::cuda
