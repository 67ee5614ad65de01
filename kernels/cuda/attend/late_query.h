// Query kernels for attention over rows that the kernel before has written, or is still writing: an attention
// kernel begins to copy pages as soon as it may start, before it waits for what is before it. These let it
// start only when their CTAs are over, and each of those has waited for the kernel that writes.
//
//   rows are written -> queries are prepared, beside that -> attention
//
// The queries themselves must be there when the rows begin to be written.
#pragma once

#include "kernels/cuda/attend/kernel_list.h"

namespace kvtide::cuda {

// Instead of AttendKernel::query_function and JointKernel::query_function, with the same arguments and grids.
// Null: there is none, launch the attention kernel after the query kernel is over.
const void* LateQueryKernel(const AttendKernel& kernel);
const void* LateJointQueryKernel(const AttendKernel& kernel);

}  // namespace kvtide::cuda
