// Where an engine's pages lie, and what works on them there.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "clients/python/raise.h"
#include "kernels/base/data_type.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_page_copier.h"
#include "kernels/cpu/cpu_paged_attention.h"
#include "kernels/paged_library.h"

namespace kvtide::python {

template <class T>
T* At(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DataType ParseType(const std::string& name) {
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
    if (name == DataTypeName(type)) return type;
  throw StatusException(absl::InvalidArgumentError("\"" + name + "\": tensors are f32, f16 or bf16"));
}

// In host memory, or on the GPU that the CUDA library works on.
class PagedDevice {
 public:
  PagedDevice(const std::string& device, int threads, std::string library)
      : library_(library.empty() ? std::string(kCudaPagedLibrary) : std::move(library)) {
    if (device == "cpu") {
      CpuBackendOptions options;
      options.threads = threads;
      backend_ = MakeCpuBackend(options);
    } else {
      factory_ = Raise(LoadPagedLibrary(library_));
    }
  }
  std::unique_ptr<PagedAttention> Make(const PagedOptions& options,
                                       std::span<const PagedLayer> layers) const {
    if (backend_ != nullptr) return Raise(MakeCpuPagedAttention(*backend_, options, layers));
    return Raise(factory_(options, layers));
  }
  std::unique_ptr<PageCopier> MakeCopier(const PageCopyOptions& options,
                                         std::span<std::byte* const> layers) const {
    if (backend_ != nullptr) return Raise(MakeCpuPageCopier(*backend_, options, layers));
    return Raise(Raise(LoadPageCopierLibrary(library_))(options, layers));
  }

 private:
  const std::string library_;
  std::unique_ptr<Backend> backend_;
  PagedFactory factory_;
};

}  // namespace kvtide::python
