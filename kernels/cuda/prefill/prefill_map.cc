#include "kernels/cuda/prefill/prefill_map.h"

#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/prefill/prefill_pages.h"

namespace kvtide::cuda {
namespace {

// Of the driver, without linking to it.
decltype(&cuTensorMapEncodeTiled) FindEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
             : nullptr;
}

}  // namespace

absl::Status MakePageMap(const std::byte* base, int dim, CUtensorMap* map) {
  static const auto encode = FindEncoder();
  if (encode == nullptr)
    return absl::FailedPreconditionError("the CUDA driver has no tensor maps: 12.0 or later is needed");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), kScratchPlace};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * dim)};
  const cuuint32_t box[] = {64, kBlockTokens}, steps[] = {1, 1};
  // Pages are swizzled already.
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<std::byte*>(base), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return absl::InternalError(absl::StrCat("tensor map of rows of ", dim, " values: CUDA error ", result));
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
