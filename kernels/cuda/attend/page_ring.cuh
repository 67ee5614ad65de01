// The data path of one warp: a ring of pieces (K or V part of a page tile) in shared memory, each filled by
// one bulk copy that signals an mbarrier, and the list of pages behind it. Nothing here waits for another
// warp.
#pragma once

#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/device/pipeline.cuh"

namespace kvtide::cuda {

// A warp's list of pages, in shared memory, so that it takes no registers while pages are computed: the
// addresses of a batch of pages and of the batch after it, fetched one batch ahead, and where the walk over
// the units stands.
struct PageList {
  static constexpr int kBatch = 4;
  struct Entry {
    uint64_t block;  // filled by an asynchronous copy from the block table
    uint64_t record_offset;
  };
  Entry entries[2 * kBatch];  // of page p of the launch: number p % (2 * kBatch)
  const std::byte* const* blocks;
  uint64_t record_offset;
  const AttendUnit* units;
  uint32_t unit, unit_first, unit_end, end;  // `blocks` is the entry of page unit_first
  uint32_t begin, layer_lines;

  // Lane l fetches the address of page `from` + l: a batch of them; from: a multiple of kBatch.
  KVTIDE_DEVICE void Fetch(uint32_t from) {
    const int lane = DeviceWarp::Lane();
    const uint32_t page = from + static_cast<uint32_t>(lane);
    const std::byte* const* table = blocks;
    uint64_t offset = record_offset;
    uint32_t u = unit, first = unit_first, behind = unit_end;
    const bool active = lane < kBatch && page >= begin && page < end;
    if (active) {
      while (page >= behind) {
        const AttendUnit& next = units[++u];
        first = next.first_page;
        behind = first + next.pages;
        table = next.blocks;
        offset = next.record_offset + uint64_t{layer_lines} * kLineBytes;
      }
      Entry& entry = entries[page % (2 * kBatch)];
      entry.record_offset = offset;
      if constexpr (kBulkCopies) {
        asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(SharedAddress(&entry.block)),
                     "l"(table + (page - first))
                     : "memory");
      } else {  // a wait for this copy would be one for all pieces in flight
        entry.block = reinterpret_cast<uint64_t>(table[page - first]);
      }
    }
    if constexpr (kBulkCopies) asm volatile("cp.async.commit_group;" ::: "memory");
    __syncwarp();
    if (active && lane == kBatch - 1) {
      blocks = table;
      record_offset = offset;
      unit = u;
      unit_first = first;
      unit_end = behind;
    }
    __syncwarp();
  }
  static KVTIDE_DEVICE void Arrived() {
    if constexpr (kBulkCopies) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
  }
};

// Pieces of a page in the order in which they are used: the page, or K and V of tile 0, of tile 1, ...
template <class Tile, int kSlots, bool kWhole>
struct PieceRing {
  static constexpr bool kWholePages = kWhole;
  static_assert(!kWhole || (Tile::kTilesPerPage == 1 && Tile::kVPieceOffset(0) == Tile::kKBytes));
  static constexpr int kPieceBytes =
      (kWholePages ? Tile::kKBytes + Tile::kVBytes
                   : (Tile::kKBytes > Tile::kVBytes ? Tile::kKBytes : Tile::kVBytes) + 127) /
      128 * 128;
  static constexpr int kBytes = kSlots * kPieceBytes;
  static constexpr int kFirstSlots =
      kWholePages ? 1 : 2;  // filled at once; the rest when all warps' first copies are out

  PageList* list;
  uint32_t buffer, barriers, entries;  // shared addresses; of the list's entries
  int slot;
  uint32_t parity;
  uint32_t end;         // behind the warp's last page
  uint32_t issue_page;  // page of the next piece
  int issue_tile;       // and its tile

  // Begins to copy the pages of a worker.
  KVTIDE_DEVICE void Start(PageList* page_list, uint32_t ring, uint32_t bars, const AttendUnit* units,
                           const AttendWorker& worker, uint32_t layer_lines) {
    list = page_list;
    constexpr bool kKeep = Tile::kRows == 8;
    buffer = DeviceWarp::Kept<kKeep>(ring);
    barriers = DeviceWarp::Kept<kKeep>(bars);
    entries = DeviceWarp::Kept<kKeep>(SharedAddress(page_list->entries));
    slot = 0;
    parity = 0;
    issue_page = worker.begin;
    issue_tile = 0;
    end = worker.end;
    if (DeviceWarp::Lane() == 0) {
      list->blocks = worker.blocks;
      list->record_offset = worker.record_offset + uint64_t{layer_lines} * kLineBytes;
      list->layer_lines = layer_lines;
      list->units = units;
      list->unit = worker.unit;
      list->unit_first = worker.begin;
      list->unit_end = worker.unit_end;
      list->begin = worker.begin;
      list->end = worker.end;
      for (int i = 0; i < kSlots; i++) Barrier::Init(barriers + 8 * i, kCopyArrivals);
      Barrier::FenceInit();
    }
    __syncwarp();
    const uint32_t batch = worker.begin / PageList::kBatch * PageList::kBatch;
    list->Fetch(batch);
    list->Fetch(batch + PageList::kBatch);
    PageList::Arrived();
    Issue<kWholePages>(0);
    if constexpr (kFirstSlots > 1) Issue<true>(1);
  }
  // The rest of the ring.
  KVTIDE_DEVICE void Fill() {
#pragma unroll
    for (int i = kFirstSlots; i < kSlots; i++) {
      if (i % 2 == 0) Issue<kWholePages>(i);
      if (i % 2 == 1) Issue<true>(i);
    }
  }

  // Starts the copy of the next piece into `target`, which must be free. kValue: it ends a tile.
  template <bool kValue>
  KVTIDE_DEVICE void Issue(int target) {
    if (issue_page >= end) return;
    if (IsCopyingLane()) {
      const uint32_t offset = static_cast<uint32_t>(kWholePages ? 0
                                                    : kValue    ? Tile::kVPieceOffset(issue_tile)
                                                                : Tile::kKPieceOffset(issue_tile));
      uint32_t entry[4];  // a PageList::Entry
      DeviceWarp::Load128(
          entries + issue_page % (2 * PageList::kBatch) * static_cast<uint32_t>(sizeof(PageList::Entry)),
          entry);
      const auto joined = [&](int i) { return static_cast<uint64_t>(entry[i + 1]) << 32 | entry[i]; };
      CopyPiece(buffer + target * kPieceBytes, reinterpret_cast<const void*>(joined(0) + joined(2) + offset),
                kWholePages ? Tile::kKBytes + Tile::kVBytes
                : kValue    ? Tile::kVBytes
                            : Tile::kKBytes,
                barriers + 8 * target);
    }
    if constexpr (kValue) {
      if (Tile::kTilesPerPage == 1 || ++issue_tile == Tile::kTilesPerPage) {
        issue_tile = 0;
        issue_page++;
        if (issue_page % PageList::kBatch == 0) {
          PageList::Arrived();
          list->Fetch(issue_page + PageList::kBatch);
        }
      }
    }
  }

  KVTIDE_DEVICE uint32_t Wait() {
    Barrier::Wait(barriers + 8 * slot, parity);
    return buffer + slot * kPieceBytes;
  }
  // All lanes are done with the piece, which ended a tile or not: its slot takes the piece kSlots further on.
  template <bool kValue>
  KVTIDE_DEVICE void Release() {
    __syncwarp();
    Issue<kWholePages || (kSlots % 2 == 0) == kValue>(slot);
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace kvtide::cuda
