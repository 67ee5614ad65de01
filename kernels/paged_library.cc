#include "kernels/paged_library.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace kvtide {

std::string PagedBuild() {
  // The first number is raised when a virtual function of PagedAttention or the meaning of a field changes.
  return absl::StrCat("1;", sizeof(PagedOptions), ";", sizeof(PagedLayer), ";", sizeof(PagedStep), ";",
                      kCacheTypes, ";", __VERSION__);
}

int MakePagedByEntry(const PagedFactory& factory, const char* build, const PagedOptions* options,
                     const PagedLayer* layers, size_t layer_count, PagedAttention** made, char* error,
                     size_t error_bytes) {
  *made = nullptr;
  absl::Status status;
  if (std::strcmp(build, PagedBuild().c_str()) != 0) {
    status = absl::FailedPreconditionError(absl::StrCat("the library is of another build (", PagedBuild(),
                                                        ", this program ", build,
                                                        "): install both from one source tree"));
  } else {
    auto object = factory(*options, {layers, layer_count});
    if (object.ok()) {
      *made = object->release();
      return 0;
    }
    status = object.status();
  }
  std::snprintf(error, error_bytes, "%s", std::string(status.message()).c_str());
  return static_cast<int>(status.code());
}

absl::StatusOr<PagedFactory> LoadPagedLibrary(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: objects live in it
  if (library == nullptr) return absl::NotFoundError(absl::StrCat(path, ": ", dlerror()));
  const auto entry = reinterpret_cast<PagedEntry>(dlsym(library, kPagedEntry));
  if (entry == nullptr)
    return absl::FailedPreconditionError(
        absl::StrCat(path, " has no ", kPagedEntry, ": not a library of kvtide"));
  return [entry](const PagedOptions& options,
                 std::span<const PagedLayer> layers) -> absl::StatusOr<std::unique_ptr<PagedAttention>> {
    PagedAttention* made = nullptr;
    char error[1024] = {};
    const int code =
        entry(PagedBuild().c_str(), &options, layers.data(), layers.size(), &made, error, sizeof error);
    if (code != 0) return absl::Status(static_cast<absl::StatusCode>(code), error);
    return std::unique_ptr<PagedAttention>(made);
  };
}

}  // namespace kvtide
