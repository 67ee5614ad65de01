// PageCopier on one NVIDIA GPU: a launch gathers or scatters all layers of a piece, the encoders and decoders
// of codec/ turn rows into records, and one copy for each piece crosses the bus, on a stream of the object's
// own. The device current at Make is used whatever is current later.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/page_copier.h"

namespace kvtide {

// FailedPrecondition without a device that the build has code for, ResourceExhausted when memory is short.
absl::StatusOr<std::unique_ptr<PageCopier>> MakeCudaPageCopier(const PageCopyOptions& options,
                                                               std::span<std::byte* const> layers);

}  // namespace kvtide
