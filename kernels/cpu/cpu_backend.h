// The backend whose memory is host memory and whose processor is the CPU. It serves the host tier everywhere,
// and the device tier on machines without a GPU.
//
// Thread-safe, as Backend says. Work is shared by a pool of its own; copies run on one more thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/page/page_kernels.h"

namespace kvtide {

struct CpuBackendOptions {
  std::string name = "cpu";
  int threads = 0;  // the caller's thread included; 0 = one per processor
  SimdLevel simd =
      SimdLevel::kBest;    // for tests; an unsupported level falls back to the best that is supported
  bool huge_pages = true;  // advise the kernel to back slabs with 2 MiB pages
  // Slabs that other processes can map (file_slab.h), to read and write them, or to read alone. Huge pages
  // where the kernel has them for memory files.
  enum class Sharing : uint8_t { kNone, kWrite, kRead };
  Sharing sharing = Sharing::kNone;
  int max_copies = 4096;  // copies that may be under way at once
};

std::unique_ptr<Backend> MakeCpuBackend(const CpuBackendOptions& options = {});

}  // namespace kvtide
