// PagedAttention on one NVIDIA GPU, with the attention kernels of attend/ and prefill/ and the encoders of
// codec/. Streams are cudaStream_t; the device current at Make must be current in all calls. What Attend
// computes is planned on the device from the step's arrays (device_plan.cuh), so captured graphs replay over
// changing lengths, tables and sequences.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/paged_attention.h"

namespace kvtide {

// InvalidArgument for a pair or shape without kernels, FailedPrecondition without a device that the build has
// code for, ResourceExhausted when memory is short.
absl::StatusOr<std::unique_ptr<PagedAttention>> MakeCudaPagedAttention(const PagedOptions& options,
                                                                       std::span<const PagedLayer> layers);

}  // namespace kvtide
