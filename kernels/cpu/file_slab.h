// Slabs of host memory that other processes can map: files without a name, whose size is sealed, so that
// nobody can make another one fault.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace kvtide {

// Zeros; pages are taken as they are first used. ResourceExhausted without memory or descriptors.
absl::StatusOr<std::unique_ptr<Slab>> MakeFileSlab(size_t bytes);
// The same that nobody but this process can write: what Share() gives is for reading, and the file takes no
// other mapping that writes. FailedPrecondition where the kernel cannot seal it so (Linux before 5.1).
absl::StatusOr<std::unique_ptr<Slab>> MakeReadableSlab(size_t bytes);
// One that came from another process; the descriptor is taken. InvalidArgument if its size is not what the
// handle says, or may change.
absl::StatusOr<std::unique_ptr<Slab>> MapFileSlab(const SlabHandle& handle);

}  // namespace kvtide
