// Barriers in shared memory, copies that signal them, and the order of kernels: all instructions that copy from
// global to shared memory or order kernels are in this file.
#pragma once

#include <cstddef>

#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/warp.h"

namespace kvtide::cuda {

// Before 9.0 there are no bulk copies: all lanes of a warp copy 16 bytes each, and each lane arrives at the
// barrier.
inline constexpr bool kBulkCopies = HasBulkCopies(kThisCapability);
inline constexpr int kCopyArrivals = kBulkCopies ? 1 : 32;
// Lanes that call CopyBytes and CopyPiece.
KVTIDE_DEVICE bool IsCopyingLane() { return !kBulkCopies || DeviceWarp::Lane() == 0; }

KVTIDE_DEVICE uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

struct Barrier {
  static KVTIDE_DEVICE void Init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(bar), "r"(count) : "memory");
  }
  static KVTIDE_DEVICE void FenceInit() {
    if constexpr (kBulkCopies) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  static KVTIDE_DEVICE void Arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(bar) : "memory");
  }
  static KVTIDE_DEVICE void Wait(uint32_t bar, uint32_t parity) {
    uint32_t done;
    do {
      if constexpr (kBulkCopies) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
      } else {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
      }
    } while (!done);
  }
};

// Programmatic dependent launch: the next kernel of the stream may start; and earlier kernels are over and
// their writes visible (before the first write to memory that they may read).
KVTIDE_DEVICE void LetNextKernelStart() {
  if constexpr (kBulkCopies) asm volatile("griddepcontrol.launch_dependents;");
}
KVTIDE_DEVICE void WaitForEarlierKernels() {
  if constexpr (kBulkCopies) asm volatile("griddepcontrol.wait;" ::: "memory");
}
// After the lanes have written into memory that a copy will overwrite.
KVTIDE_DEVICE void LetCopiesOverwrite() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
}

KVTIDE_DEVICE void CopyByLanes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  __syncwarp();
  for (uint32_t at = 16 * static_cast<uint32_t>(DeviceWarp::Lane()); at < bytes; at += 512)
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + at),
                 "l"(static_cast<const std::byte*>(from) + at)
                 : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Bytes from global memory that are wanted once more (queries) ...
KVTIDE_DEVICE void CopyBytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if constexpr (!kBulkCopies) return CopyByLanes(to, from, bytes, barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// ... and a piece of a page, which is read once and should not push anything out of L2.
KVTIDE_DEVICE void CopyPiece(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if constexpr (!kBulkCopies) return CopyByLanes(to, from, bytes, barrier);
  constexpr uint64_t kEvictFirst = 0x12f0000000000000u;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0],[%1],%2,[%3],%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}

// A box of a tensor of two dimensions, from (x, y) on; by one thread, from 9.0 on.
KVTIDE_DEVICE void CopyBox(uint32_t to, const void* map, int x, uint32_t y, uint32_t bytes,
                           uint32_t barrier) {
  if constexpr (kBulkCopies) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0],[%1,{%2,%3}],[%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
  }
}

}  // namespace kvtide::cuda
