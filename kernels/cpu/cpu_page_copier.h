// PageCopier over pages in host memory, with the codecs of a CPU backend: the work is done when the call that
// puts it on returns.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/page_copier.h"

namespace kvtide {

// The backend outlives the copier.
absl::StatusOr<std::unique_ptr<PageCopier>> MakeCpuPageCopier(Backend& backend,
                                                              const PageCopyOptions& options,
                                                              std::span<std::byte* const> layers);

}  // namespace kvtide
