// What libkvtide_cuda_paged.so exports (kernels/paged_library.h).
#include "kernels/cuda/step/cuda_paged_attention.h"
#include "kernels/paged_library.h"

extern "C" __attribute__((visibility("default"))) int kvtide_make_paged_attention(
    const char* build, const kvtide::PagedOptions* options, const kvtide::PagedLayer* layers,
    size_t layer_count, kvtide::PagedAttention** made, char* error, size_t error_bytes) {
  return kvtide::MakePagedByEntry(kvtide::MakeCudaPagedAttention, build, options, layers, layer_count, made,
                                  error, error_bytes);
}
