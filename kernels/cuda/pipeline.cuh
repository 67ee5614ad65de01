// The data path of one warp: a ring of pieces (K or V part of a page tile) in shared memory, each filled by one bulk copy
// that signals an mbarrier, and the list of pages behind it. Nothing here waits for another warp.
#pragma once

#include "kernels/cuda/attend_plan.h"
#include "kernels/cuda/warp.h"

namespace kvtide::cuda {

KVTIDE_DEVICE uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

struct Barrier {
  static KVTIDE_DEVICE void Init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(bar), "r"(count) : "memory");
  }
  static KVTIDE_DEVICE void FenceInit() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  static KVTIDE_DEVICE void Arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(bar) : "memory");
  }
  static KVTIDE_DEVICE void Wait(uint32_t bar, uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}"
          : "=r"(done)
          : "r"(bar), "r"(parity)
          : "memory");
    } while (!done);
  }
};

// Pieces of a page in the order in which they are used: K and V of tile 0, of tile 1, ...
template <class Tile, int kWarps, int kSlots>
struct PieceRing {
  static constexpr int kPieceBytes = ((Tile::kKBytes > Tile::kVBytes ? Tile::kKBytes : Tile::kVBytes) + 127) / 128 * 128;
  static constexpr int kBytes = kSlots * kPieceBytes;

  uint32_t buffer, barriers;
  int slot;
  uint32_t parity;
  uint32_t my_pages;
  uint32_t issue_page;             // page of the next piece
  int issue_tile;                  // and its tile
  uint64_t source;                 // address of that page
  uint64_t pages_now, pages_next;  // one page address for each lane: pages 32b .. 32b+31 and the 32 after

  // For the batches of page addresses.
  const AttendUnit* units;
  uint32_t unit, unit_first, unit_end, share_end, next_page;
  const std::byte* const* blocks;
  uint64_t record_offset;

  KVTIDE_DEVICE void Init(uint32_t ring, uint32_t bars, int warp, const AttendParams& params, const AttendShare& share) {
    const int lane = DeviceWarp::Lane();
    buffer = ring;
    barriers = bars;
    slot = 0;
    parity = 0;
    if (lane == 0) {
      for (int i = 0; i < kSlots; i++) Barrier::Init(barriers + 8 * i, 1);
      Barrier::FenceInit();
    }
    __syncwarp();
    units = params.units;
    unit = share.unit;
    unit_first = share.first.first_page;
    unit_end = unit_first + share.first.pages;
    blocks = share.first.blocks;
    record_offset = share.first.record_offset;
    share_end = share.end;
    const uint32_t first = share.begin + static_cast<uint32_t>(warp);
    my_pages = first < share.end ? (share.end - first + kWarps - 1) / kWarps : 0;
    issue_page = 0;
    issue_tile = 0;
    source = 0;
    next_page = first + static_cast<uint32_t>(lane) * kWarps;
    pages_now = NextBatch();
    pages_next = my_pages > 32 ? NextBatch() : 0;
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      if (i % 2 == 0) Issue<false>(i);
      if (i % 2 == 1) Issue<true>(i);
    }
  }

  // Each lane finds the address of its next page; lanes walk the units on their own.
  KVTIDE_DEVICE uint64_t NextBatch() {
    if (next_page >= share_end) return 0;
    while (next_page >= unit_end) {
      const AttendUnit& u = units[++unit];
      unit_first = u.first_page;
      unit_end = unit_first + u.pages;
      blocks = u.blocks;
      record_offset = u.record_offset;
    }
    const uint64_t page = reinterpret_cast<uint64_t>(blocks[next_page - unit_first]) + record_offset;
    next_page += 32 * kWarps;
    return page;
  }

  // Starts the copy of the next piece, a V part or not, into `target`, which must be free.
  template <bool kValue>
  KVTIDE_DEVICE void Issue(int target) {
    if (issue_page >= my_pages) return;
    if (!kValue && issue_tile == 0) {
      if (issue_page % 32 == 0 && issue_page > 0) {
        pages_now = pages_next;
        pages_next = NextBatch();
      }
      source = __shfl_sync(0xffffffffu, pages_now, static_cast<int>(issue_page % 32));
    }
    if (DeviceWarp::Lane() == 0) {
      constexpr uint32_t kBytesOfPiece = kValue ? Tile::kVBytes : Tile::kKBytes;
      const uint32_t offset = static_cast<uint32_t>(kValue ? Tile::kVPieceOffset(issue_tile) : Tile::kKPieceOffset(issue_tile));
      const uint32_t bar = barriers + 8 * target;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "n"(kBytesOfPiece) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                       buffer + target * kPieceBytes),
                   "l"(source + offset), "n"(kBytesOfPiece), "r"(bar)
                   : "memory");
    }
    if constexpr (kValue) {
      if (Tile::kTilesPerPage == 1 || ++issue_tile == Tile::kTilesPerPage) {
        issue_tile = 0;
        issue_page++;
      }
    }
  }

  KVTIDE_DEVICE uint32_t Wait() {
    Barrier::Wait(barriers + 8 * slot, parity);
    return buffer + slot * kPieceBytes;
  }
  // All lanes are done with the piece, a V part or not: its slot takes the piece kSlots further on.
  template <bool kValue>
  KVTIDE_DEVICE void Release() {
    __syncwarp();
    Issue<(kSlots % 2 == 0) == kValue>(slot);
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace kvtide::cuda
