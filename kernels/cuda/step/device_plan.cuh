// The plan of launches of attention, made on the device: what NumberPages, CutShares and AppendSlots
// (attend_plan.h) compute on the host. CTA = launch; its *items* are up to kPlanItems sequences, or tiles of
// rows of sequences, each with pages of one or two kinds. Items without pages get no unit, so the attention
// kernel meets none that is empty; the grid is that of a full launch, CTAs beyond the pages find empty
// shares. Where both kinds of blocks are read by one launch (joint_kernel.cuh), it also says how many CTAs
// each gets.
//
// `Items` says what an item is: DecodeItems (device_decode.cu), TileItems (paged_attention.cu).
//   int2 Pages(kinds, k, item)            its pages of kind k: [x, y) of its row of the block table
//   blocks = Blocks(kinds, k, item)       that row
//   base = RecordBase(kinds, k, launch)   of KV head 0, added to what the table says
//   FillUnit(kinds, k, launch, item, head, pages, unit)    queries, rows, tokens, masks, profile
//   FillGroup(launch, item, head, group)                   output and rows
#pragma once

#include <cub/block/block_scan.cuh>

#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/format/page_order.h"

namespace kvtide::cuda {

constexpr int kPlanThreads = 1024, kPlanPerThread = 4, kPlanItems = kPlanThreads * kPlanPerThread;

// One kind of blocks, and where the plan goes. Arrays are of one launch; strides lead to the next.
struct PlanKind {
  const std::byte* const* blocks = nullptr;  // rows of `max_blocks`
  int32_t max_blocks = 0;
  uint64_t record_bytes = 0;
  AttendUnit* units = nullptr;
  AttendWorker* workers = nullptr;
  uint32_t* slots = nullptr;
  uint32_t unit_stride = 0, worker_stride = 0, slot_stride = 0;
  int32_t ctas = 0, warps = 0;  // the most CTAs, and workers in each
  int32_t entries = 0;          // of a CTA in the worker table, as many as workers unless the launch is joint
  // Of the launch: what the combine kernel reads.
  uint64_t outputs = 0, sums = 0;  // addresses
  int32_t slot_rows = 0;
  Rotation v_rotation;
  bool coded = false;
};
template <class Items>
struct PlanParams {
  Items items;
  PlanKind kinds[2];
  int32_t kind_count = 0;
  // Kinds 0 (coded) and 1 (f16) share the CTAs of one launch; they have the same worker table.
  bool joint = false;
  int32_t joint_ctas = 0;
  CombineGroup* groups = nullptr;    // [launches][group_stride]
  CombineSource* sources = nullptr;  // [launches][2 * group_stride]
  uint32_t group_stride = 0;
  int32_t item_count = 0;  // of a launch; all entries of theirs are written
  int32_t kv_heads = 0;
  int32_t team = 1;  // the most warps that a row of the merge may get
};

// Where the units of a kind begin: items that have pages, in order.
struct PlanIndex {
  uint32_t first_page[kPlanItems + 1];  // of a KV head's pages, by place among the items that have any
  uint16_t item[kPlanItems];            // by place
  uint32_t places;
};

template <class Items>
__device__ inline void PlanNumber(const PlanParams<Items>& params, int k, PlanIndex& index) {
  using Scan = cub::BlockScan<uint2, kPlanThreads>;
  __shared__ typename Scan::TempStorage storage;
  uint2 own[kPlanPerThread], before[kPlanPerThread];
  for (int i = 0; i < kPlanPerThread; i++) {
    const int item = static_cast<int>(threadIdx.x) * kPlanPerThread + i;
    own[i] = make_uint2(0, 0);
    if (item >= params.item_count) continue;
    const int2 pages = params.items.Pages(params.kinds, k, item);
    own[i] = make_uint2(static_cast<uint32_t>(pages.y - pages.x), pages.y > pages.x ? 1u : 0u);
  }
  uint2 all;
  const auto add = [](uint2 a, uint2 b) { return make_uint2(a.x + b.x, a.y + b.y); };
  __syncthreads();
  Scan(storage).ExclusiveScan(own, before, make_uint2(0, 0), add, all);
  for (int i = 0; i < kPlanPerThread; i++) {
    const int item = static_cast<int>(threadIdx.x) * kPlanPerThread + i;
    if (item >= params.item_count || own[i].y == 0) continue;
    index.first_page[before[i].y] = before[i].x;
    index.item[before[i].y] = static_cast<uint16_t>(item);
  }
  if (threadIdx.x == 0) {
    index.first_page[all.y] = all.x;
    index.places = all.y;
  }
  __syncthreads();
}

// Unit of page `page`, and the unit's pages.
struct PlanUnit {
  uint32_t unit, begin, end;
};
__device__ inline PlanUnit PlanUnitOf(const PlanIndex& index, uint32_t kv_heads, uint32_t page) {
  uint32_t low = 0, high = index.places;  // the last place whose first page is not after `page`
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (index.first_page[middle] * kv_heads <= page)
      low = middle;
    else
      high = middle;
  }
  const uint32_t own = index.first_page[low + 1] - index.first_page[low];
  const uint32_t head = (page - index.first_page[low] * kv_heads) / own;
  const uint32_t begin = index.first_page[low] * kv_heads + head * own;
  return {low * kv_heads + head, begin, begin + own};
}

template <class Items>
__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const __grid_constant__ PlanParams<Items> params) {
  extern __shared__ __align__(16) uint8_t memory[];
  PlanIndex* const indices = reinterpret_cast<PlanIndex*>(memory);  // one for each kind
  const size_t launch = blockIdx.x;
  const Items& items = params.items;
  const uint32_t kv_heads = static_cast<uint32_t>(params.kv_heads),
                 group_count = static_cast<uint32_t>(params.item_count) * kv_heads;
  CombineGroup* const groups = params.groups + launch * params.group_stride;
  CombineSource* const sources = params.sources + launch * 2 * params.group_stride;

  for (uint32_t g = threadIdx.x; g < group_count; g += kPlanThreads) {
    CombineGroup group;
    items.FillGroup(launch, static_cast<int>(g / kv_heads), static_cast<int>(g % kv_heads), group);
    group.first_source = 2 * g;
    groups[g] = group;
  }
  uint32_t pages_of[2] = {};
  for (int k = 0; k < params.kind_count; k++) {
    PlanNumber(params, k, indices[k]);
    pages_of[k] = indices[k].first_page[indices[k].places] * kv_heads;
  }
  uint32_t next_cta = 0;  // of the worker table
  for (int k = 0; k < params.kind_count; k++) {
    const PlanKind& kind = params.kinds[k];
    const PlanIndex& index = indices[k];
    AttendUnit* const units = kind.units + launch * kind.unit_stride;
    AttendWorker* const workers = kind.workers + launch * kind.worker_stride;
    uint32_t* const slots = kind.slots + launch * kind.slot_stride;
    const uint32_t pages = pages_of[k], warps = static_cast<uint32_t>(kind.warps),
                   entries = static_cast<uint32_t>(kind.entries);
    uint32_t ctas = static_cast<uint32_t>(kind.ctas), first_cta = 0;  // of this kind
    if (params.joint) {
      const uint32_t all = static_cast<uint32_t>(params.joint_ctas);
      const uint32_t exact = ExactCtas(all, pages_of[0], params.kinds[0].record_bytes, pages_of[1],
                                       params.kinds[1].record_bytes);
      ctas = k == 0 ? all - exact : exact;
      first_cta = next_cta;
    }
    ctas = min(ctas, pages);
    const uint32_t count = ctas * warps;  // workers that have a share
    next_cta = first_cta + ctas;
    const uint64_t record_base = items.RecordBase(params.kinds, k, launch);

    for (uint32_t u = threadIdx.x; u < group_count; u += kPlanThreads) {
      AttendUnit unit;
      if (u < index.places * kv_heads) {
        const uint32_t place = u / kv_heads, head = u % kv_heads;
        const int item = index.item[place];
        const uint32_t g = static_cast<uint32_t>(item) * kv_heads + head;
        const int2 range = items.Pages(params.kinds, k, item);
        unit.blocks = items.Blocks(params.kinds, k, item) + range.x;
        unit.record_offset = record_base + head * kind.record_bytes;
        unit.pages = static_cast<uint32_t>(range.y - range.x);
        unit.first_page = index.first_page[place] * kv_heads + head * unit.pages;
        items.FillUnit(params.kinds, k, launch, item, static_cast<int>(head), range, unit);

        CombineSource source;
        source.outputs = kind.outputs;
        source.sums = kind.sums;
        source.slot_rows = kind.slot_rows;
        source.v_rotation = kind.v_rotation;
        // Slots are unit + worker, so those of a unit have this part of the list to themselves.
        const uint32_t end = unit.first_page + unit.pages;
        const auto worker_of = [&](uint64_t page) { return WorkerOf(pages, count, page); };
        uint32_t* list = slots + u + worker_of(unit.first_page);
        source.slot_list = list;
        for (uint32_t page = unit.first_page; page < end;) {
          const uint32_t worker = worker_of(page), slot = u + worker;
          if (source.slots < 4) source.first_slots[source.slots] = slot;
          source.slots++;
          *list++ = slot;
          const uint32_t cta_end =
              WorkerBegin(pages, count, (worker / warps + 1) * static_cast<uint64_t>(warps));
          page = cta_end <= end ? cta_end : WorkerBegin(pages, count, worker + 1);
        }
        CombineGroup& group = groups[g];
        const uint32_t at = group.sources++;
        sources[2 * g + at] = source;
        group.first[at] = source;
        group.team = max(group.team, min(params.team, CombineTeam(source.slots)));
      }
      units[u] = unit;
    }
    // Of a joint launch, the last kind also writes the entries of the CTAs that have nothing to do.
    const uint32_t table_end = !params.joint                ? static_cast<uint32_t>(kind.ctas)
                               : k + 1 == params.kind_count ? static_cast<uint32_t>(params.joint_ctas)
                                                            : next_cta;
    for (uint32_t at_entry = threadIdx.x; at_entry < (table_end - first_cta) * entries;
         at_entry += kPlanThreads) {
      AttendWorker worker;
      const uint32_t cta = at_entry / entries, warp = at_entry % entries, i = cta * warps + warp;
      if (params.joint) {
        worker.exact = k == 1 && cta < ctas ? 1 : 0;
        worker.cta = cta;
      }
      if (cta < ctas && warp < warps) {
        worker.begin = WorkerBegin(pages, count, i);
        worker.end = WorkerBegin(pages, count, i + 1);
        const PlanUnit at = PlanUnitOf(index, kv_heads, worker.begin);
        const int item = index.item[at.unit / kv_heads];
        worker.blocks = items.Blocks(params.kinds, k, item) + items.Pages(params.kinds, k, item).x +
                        (worker.begin - at.begin);
        worker.record_offset = record_base + at.unit % kv_heads * kind.record_bytes;
        worker.unit = at.unit;
        worker.unit_end = at.end;
        worker.last_unit =
            PlanUnitOf(index, kv_heads,
                       WorkerBegin(pages, count, (i / warps + 1) * static_cast<uint64_t>(warps)) - 1)
                .unit;
      }
      workers[first_cta * entries + at_entry] = worker;
    }
    __syncthreads();  // sources of the first kind come first
  }
}

}  // namespace kvtide::cuda
