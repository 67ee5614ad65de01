// What libkvtide_cuda_paged.so exports beside attention (kernels/paged_library.h).
#include "kernels/cuda/pages/cuda_page_copier.h"
#include "kernels/paged_library.h"

extern "C" __attribute__((visibility("default"))) int kvtide_make_page_copier(
    const char* build, const kvtide::PageCopyOptions* options, std::byte* const* layers, size_t layer_count,
    kvtide::PageCopier** made, char* error, size_t error_bytes) {
  return kvtide::MakePageCopierByEntry(kvtide::MakeCudaPageCopier, build, options, layers, layer_count, made,
                                       error, error_bytes);
}
