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

// A warp's list of pages, in shared memory, so that it takes no registers while pages are computed: the addresses of
// pages 16b .. 16b + 15 and of the 16 after, fetched one batch ahead, and where the walk over the units stands.
struct PageList {
  struct Entry {
    uint64_t block;  // filled by an asynchronous copy from the block table
    uint64_t record_offset;
  };
  Entry entries[32];
  const std::byte* const* blocks;
  uint64_t record_offset;
  const AttendUnit* units;
  uint32_t unit, unit_first, unit_end, share_end;
  uint32_t first_page, padding[3];

  // Lane l fetches the address of the warp's page `begin` + l, `lanes` of them.
  template <int kWarps>
  KVTIDE_DEVICE void Fetch(uint32_t begin, int lanes) {
    const int lane = DeviceWarp::Lane();
    const uint32_t page = first_page + (begin + static_cast<uint32_t>(lane)) * kWarps;
    const std::byte* const* table = blocks;
    uint64_t offset = record_offset;
    uint32_t u = unit, first = unit_first, end = unit_end;
    const bool active = lane < lanes && page < share_end;
    if (active) {
      while (page >= end) {
        const AttendUnit& next = units[++u];
        first = next.first_page;
        end = first + next.pages;
        table = next.blocks;
        offset = next.record_offset;
      }
      Entry& entry = entries[(begin + static_cast<uint32_t>(lane)) % 32];
      entry.record_offset = offset;
      asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(SharedAddress(&entry.block)), "l"(table + (page - first)) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    __syncwarp();
    if (active && lane == lanes - 1) {
      blocks = table;
      record_offset = offset;
      unit = u;
      unit_first = first;
      unit_end = end;
    }
    __syncwarp();
  }
  static KVTIDE_DEVICE void Arrived() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
  }
};

// Pieces of a page in the order in which they are used: K and V of tile 0, of tile 1, ...
template <class Tile, int kWarps, int kSlots>
struct PieceRing {
  static constexpr int kPieceBytes = ((Tile::kKBytes > Tile::kVBytes ? Tile::kKBytes : Tile::kVBytes) + 127) / 128 * 128;
  static constexpr int kBytes = kSlots * kPieceBytes;

  PageList* list;
  uint32_t buffer, barriers;
  int slot;
  uint32_t parity;
  uint32_t my_pages;
  uint32_t issue_page;  // page of the next piece
  int issue_tile;       // and its tile

  KVTIDE_DEVICE void Init(PageList* pages, uint32_t ring, uint32_t bars, int warp, const AttendParams& params, const AttendShare& share) {
    const int lane = DeviceWarp::Lane();
    list = pages;
    buffer = ring;
    barriers = bars;
    slot = 0;
    parity = 0;
    issue_page = 0;
    issue_tile = 0;
    const uint32_t first = share.begin + static_cast<uint32_t>(warp), end = share.end;
    my_pages = first < end ? (end - first + kWarps - 1) / kWarps : 0;
    if (lane == 0) {
      list->blocks = share.first.blocks;
      list->record_offset = share.first.record_offset;
      list->units = params.units;
      list->unit = share.unit;
      list->unit_first = share.first.first_page;
      list->unit_end = share.first.first_page + share.first.pages;
      list->share_end = end;
      list->first_page = first;
      for (int i = 0; i < kSlots; i++) Barrier::Init(barriers + 8 * i, 1);
      Barrier::FenceInit();
    }
    __syncwarp();
    list->Fetch<kWarps>(0, 32);
    PageList::Arrived();
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      if (i % 2 == 0) Issue<false>(i);
      if (i % 2 == 1) Issue<true>(i);
    }
  }

  // Starts the copy of the next piece, a V part or not, into `target`, which must be free.
  template <bool kValue>
  KVTIDE_DEVICE void Issue(int target) {
    if (issue_page >= my_pages) return;
    if (!kValue && issue_page % 16 == 0 && issue_page > 0 && issue_tile == 0) {
      PageList::Arrived();
      list->Fetch<kWarps>(issue_page + 16, 16);
    }
    if (DeviceWarp::Lane() == 0) {
      constexpr uint32_t kBytesOfPiece = kValue ? Tile::kVBytes : Tile::kKBytes;
      const uint32_t offset = static_cast<uint32_t>(kValue ? Tile::kVPieceOffset(issue_tile) : Tile::kKPieceOffset(issue_tile));
      const PageList::Entry entry = list->entries[issue_page % 32];
      const uint32_t bar = barriers + 8 * target;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "n"(kBytesOfPiece) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                       buffer + target * kPieceBytes),
                   "l"(entry.block + entry.record_offset + offset), "n"(kBytesOfPiece), "r"(bar)
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
