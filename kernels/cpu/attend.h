// Attention of the CPU backend above single pages: turns queries into the frames of the stored keys, cuts the
// work into tasks (item, KV head, rows, blocks), runs them on a pool and merges their attention states. The
// cut depends on the arguments alone, so that results do not depend on the number of threads or on the other
// items of a batch.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/page_kernels.h"

namespace kvtide {

// InvalidArgument if the arguments do not fit together.
absl::Status AttendOnCpu(const AttendArgs& args, const PageKernels& kernels, ThreadPool& pool);

}  // namespace kvtide
