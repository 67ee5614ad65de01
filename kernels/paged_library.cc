#include "kernels/paged_library.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {

std::string PagedBuild() {
  // The first number is raised when a virtual function or the meaning of a field changes.
  return absl::StrCat("5;", sizeof(PagedOptions), ";", sizeof(PagedLayer), ";", sizeof(PagedStep), ";",
                      sizeof(PageCopyOptions), ";", kCacheTypes, ";", __VERSION__);
}

namespace {

template <class Object, class Factory, class Options, class Layer>
int MakeByEntry(const Factory& factory, const char* build, const Options* options, const Layer* layers,
                size_t layer_count, Object** made, char* error, size_t error_bytes) {
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

template <class Object, class Entry, class Options, class Layer>
absl::StatusOr<std::unique_ptr<Object>> MakeWith(Entry entry, const Options& options,
                                                 std::span<Layer> layers) {
  Object* made = nullptr;
  char error[1024] = {};
  const int code =
      entry(PagedBuild().c_str(), &options, layers.data(), layers.size(), &made, error, sizeof error);
  if (code != 0) return absl::Status(static_cast<absl::StatusCode>(code), error);
  return std::unique_ptr<Object>(made);
}

template <class Entry>
absl::StatusOr<Entry> Find(const std::string& path, const char* name) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: objects live in it
  if (library == nullptr) return absl::NotFoundError(absl::StrCat(path, ": ", dlerror()));
  const auto entry = reinterpret_cast<Entry>(dlsym(library, name));
  if (entry == nullptr)
    return absl::FailedPreconditionError(
        absl::StrCat(path, " has no ", name, ": not a library of kvtide, or an older one"));
  return entry;
}

}  // namespace

int MakePagedByEntry(const PagedFactory& factory, const char* build, const PagedOptions* options,
                     const PagedLayer* layers, size_t layer_count, PagedAttention** made, char* error,
                     size_t error_bytes) {
  return MakeByEntry(factory, build, options, layers, layer_count, made, error, error_bytes);
}

int MakePageCopierByEntry(const PageCopierFactory& factory, const char* build, const PageCopyOptions* options,
                          std::byte* const* layers, size_t layer_count, PageCopier** made, char* error,
                          size_t error_bytes) {
  return MakeByEntry(factory, build, options, layers, layer_count, made, error, error_bytes);
}

absl::StatusOr<PagedFactory> LoadPagedLibrary(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const PagedEntry entry, Find<PagedEntry>(path, kPagedEntry));
  return [entry](const PagedOptions& options, std::span<const PagedLayer> layers) {
    return MakeWith<PagedAttention>(entry, options, layers);
  };
}

absl::StatusOr<PageCopierFactory> LoadPageCopierLibrary(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const PageCopierEntry entry, Find<PageCopierEntry>(path, kPageCopierEntry));
  return [entry](const PageCopyOptions& options, std::span<std::byte* const> layers) {
    return MakeWith<PageCopier>(entry, options, layers);
  };
}

}  // namespace kvtide
