// Paged attention (kernels/paged_attention.h) in host memory, over the kernels of the CPU backend: what an
// engine runs on a machine without a GPU, and what the CUDA implementation is compared with. Pages are read
// and written where they lie; `stream` is ignored, work is done when a call returns.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/paged_attention.h"

namespace kvtide {

// `backend` is a CPU backend (cpu_backend.h), which may serve many objects; it outlives them.
absl::StatusOr<std::unique_ptr<PagedAttention>> MakeCpuPagedAttention(Backend& backend,
                                                                      const PagedOptions& options,
                                                                      std::span<const PagedLayer> layers);

}  // namespace kvtide
