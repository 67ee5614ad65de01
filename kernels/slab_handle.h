// How a process tells another one of this host where a slab of its memory is, so that both have it mapped.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvtide {

struct SlabHandle {
  enum class Kind : uint32_t {
    kNone = 0,
    kFile = 1,     // a descriptor: a sealed file without a name (host), or a GPU's memory by the driver
    kCudaIpc = 2,  // memory of a GPU: cudaIpcMemHandle_t
  };
  Kind kind = Kind::kNone;
  int fd = -1;                    // kFile: borrowed from the slab, or the receiver's own
  uint64_t bytes = 0;             // of the slab
  std::array<char, 48> device{};  // UUID of the GPU, "GPU-..."; "cpu". NUL at the end
  std::array<std::byte, 64> ipc{};
};

}  // namespace kvtide
