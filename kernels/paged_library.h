// Implementations of PagedAttention and PageCopier that are found at run time: programs and Python modules
// built without CUDA load the shared library `libkvtide_cuda_paged.so` where there is one. Library and
// program are built from the same sources; a library of another build is refused.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/page_copier.h"
#include "kernels/paged_attention.h"

namespace kvtide {

using PagedFactory = std::function<absl::StatusOr<std::unique_ptr<PagedAttention>>(
    const PagedOptions& options, std::span<const PagedLayer> layers)>;
using PageCopierFactory = std::function<absl::StatusOr<std::unique_ptr<PageCopier>>(
    const PageCopyOptions& options, std::span<std::byte* const> layers)>;

inline constexpr char kCudaPagedLibrary[] = "libkvtide_cuda_paged.so";

// The factory of the library at `path` (a name without a slash is searched for as the dynamic linker does).
// NotFound if it cannot be loaded, with the linker's reason; FailedPrecondition if it is of another build.
// Objects keep their library loaded.
absl::StatusOr<PagedFactory> LoadPagedLibrary(const std::string& path = kCudaPagedLibrary);
absl::StatusOr<PageCopierFactory> LoadPageCopierLibrary(const std::string& path = kCudaPagedLibrary);

// What a library exports under these names, in C: makes an object or writes why not to `error`
// (NUL-terminated, `error_bytes` at most) and returns the absl::StatusCode. `build`: PagedBuild() of the
// caller.
using PagedEntry = int (*)(const char* build, const PagedOptions* options, const PagedLayer* layers,
                           size_t layer_count, PagedAttention** made, char* error, size_t error_bytes);
using PageCopierEntry = int (*)(const char* build, const PageCopyOptions* options, std::byte* const* layers,
                                size_t layer_count, PageCopier** made, char* error, size_t error_bytes);
inline constexpr char kPagedEntry[] = "kvtide_make_paged_attention";
inline constexpr char kPageCopierEntry[] = "kvtide_make_page_copier";

// Says which structs and which virtual functions this code was compiled with.
std::string PagedBuild();
// The bodies of entries over a factory.
int MakePagedByEntry(const PagedFactory& factory, const char* build, const PagedOptions* options,
                     const PagedLayer* layers, size_t layer_count, PagedAttention** made, char* error,
                     size_t error_bytes);
int MakePageCopierByEntry(const PageCopierFactory& factory, const char* build, const PageCopyOptions* options,
                          std::byte* const* layers, size_t layer_count, PageCopier** made, char* error,
                          size_t error_bytes);

}  // namespace kvtide
