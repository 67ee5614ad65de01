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

// What a CTA plans: one launch, whose tables are parts of those in the parameters.
template <class Items>
struct PlanLaunch {
  const PlanParams<Items>& params;
  size_t launch;
  const PlanIndex* indices;  // one for each kind
  uint32_t pages_of[2] = {};

  __device__ uint32_t kv_heads() const { return static_cast<uint32_t>(params.kv_heads); }
  __device__ uint32_t group_count() const { return static_cast<uint32_t>(params.item_count) * kv_heads(); }
  __device__ CombineGroup* groups() const { return params.groups + launch * params.group_stride; }
  __device__ CombineSource* sources() const { return params.sources + launch * 2 * params.group_stride; }
};

// How the pages of a kind are shared.
struct PlanShare {
  int kind = 0;
  uint32_t pages = 0, warps = 0;
  uint32_t first_cta = 0, ctas = 0;  // in the worker table; those that have pages
  uint32_t count = 0;                // workers that have a share
  uint64_t record_base = 0;
};

template <class Items>
__device__ inline PlanShare ShareOf(const PlanLaunch<Items>& plan, int k, uint32_t next_cta) {
  const PlanKind* const kinds = plan.params.kinds;
  PlanShare share;
  share.kind = k;
  share.pages = plan.pages_of[k];
  share.warps = static_cast<uint32_t>(kinds[k].warps);
  uint32_t ctas = static_cast<uint32_t>(kinds[k].ctas);
  if (plan.params.joint) {
    const uint32_t all = static_cast<uint32_t>(plan.params.joint_ctas);
    const uint32_t exact =
        ExactCtas(all, plan.pages_of[0], kinds[0].record_bytes, plan.pages_of[1], kinds[1].record_bytes);
    ctas = k == 0 ? all - exact : exact;
    share.first_cta = next_cta;
  }
  share.ctas = min(ctas, share.pages);
  share.count = share.ctas * share.warps;
  share.record_base = plan.params.items.RecordBase(kinds, k, plan.launch);
  return share;
}

template <class Items>
__device__ inline void PlanGroups(const PlanLaunch<Items>& plan) {
  for (uint32_t g = threadIdx.x; g < plan.group_count(); g += kPlanThreads) {
    CombineGroup group;
    plan.params.items.FillGroup(plan.launch, static_cast<int>(g / plan.kv_heads()),
                                static_cast<int>(g % plan.kv_heads()), group);
    group.first_source = 2 * g;
    plan.groups()[g] = group;
  }
}

// The slots of unit `u`, listed, and the unit as a source of its group.
template <class Items>
__device__ inline void PlanSource(const PlanLaunch<Items>& plan, const PlanShare& share, uint32_t u,
                                  const AttendUnit& unit, uint32_t g) {
  const PlanKind& kind = plan.params.kinds[share.kind];
  CombineSource source;
  source.outputs = kind.outputs;
  source.sums = kind.sums;
  source.slot_rows = kind.slot_rows;
  source.v_rotation = kind.v_rotation;
  // Slots are unit + worker, so those of a unit have this part of the list to themselves.
  const uint32_t end = unit.first_page + unit.pages;
  const auto worker_of = [&](uint64_t page) { return WorkerOf(share.pages, share.count, page); };
  uint32_t* list = kind.slots + plan.launch * kind.slot_stride + u + worker_of(unit.first_page);
  source.slot_list = list;
  for (uint32_t page = unit.first_page; page < end;) {
    const uint32_t worker = worker_of(page), slot = u + worker;
    if (source.slots < 4) source.first_slots[source.slots] = slot;
    source.slots++;
    *list++ = slot;
    const uint32_t cta_end = WorkerBegin(share.pages, share.count,
                                         (worker / share.warps + 1) * static_cast<uint64_t>(share.warps));
    page = cta_end <= end ? cta_end : WorkerBegin(share.pages, share.count, worker + 1);
  }
  CombineGroup& group = plan.groups()[g];
  const uint32_t at = group.sources++;
  plan.sources()[2 * g + at] = source;
  group.first[at] = source;
  group.team = max(group.team, min(plan.params.team, CombineTeam(source.slots)));
}

// Units of a kind, blank ones behind, and their sources.
template <class Items>
__device__ inline void PlanUnits(const PlanLaunch<Items>& plan, const PlanShare& share) {
  const PlanKind& kind = plan.params.kinds[share.kind];
  const PlanIndex& index = plan.indices[share.kind];
  const Items& items = plan.params.items;
  AttendUnit* const units = kind.units + plan.launch * kind.unit_stride;
  for (uint32_t u = threadIdx.x; u < plan.group_count(); u += kPlanThreads) {
    AttendUnit unit;
    if (u < index.places * plan.kv_heads()) {
      const uint32_t place = u / plan.kv_heads(), head = u % plan.kv_heads();
      const int item = index.item[place];
      const int2 range = items.Pages(plan.params.kinds, share.kind, item);
      unit.blocks = items.Blocks(plan.params.kinds, share.kind, item) + range.x;
      unit.record_offset = share.record_base + head * kind.record_bytes;
      unit.pages = static_cast<uint32_t>(range.y - range.x);
      unit.first_page = index.first_page[place] * plan.kv_heads() + head * unit.pages;
      items.FillUnit(plan.params.kinds, share.kind, plan.launch, item, static_cast<int>(head), range, unit);
      PlanSource(plan, share, u, unit, static_cast<uint32_t>(item) * plan.kv_heads() + head);
    }
    units[u] = unit;
  }
}

// Worker `warp` of the kind's CTA `cta`, one without pages where the kind has none for it.
template <class Items>
__device__ inline AttendWorker PlanWorker(const PlanLaunch<Items>& plan, const PlanShare& share, uint32_t cta,
                                          uint32_t warp) {
  AttendWorker worker;
  if (plan.params.joint) {
    worker.exact = share.kind == 1 && cta < share.ctas ? 1 : 0;
    worker.cta = cta;
  }
  if (cta >= share.ctas || warp >= share.warps) return worker;
  const PlanIndex& index = plan.indices[share.kind];
  const Items& items = plan.params.items;
  const uint32_t i = cta * share.warps + warp;
  worker.begin = WorkerBegin(share.pages, share.count, i);
  worker.end = WorkerBegin(share.pages, share.count, i + 1);
  const PlanUnit at = PlanUnitOf(index, plan.kv_heads(), worker.begin);
  const int item = index.item[at.unit / plan.kv_heads()];
  worker.blocks = items.Blocks(plan.params.kinds, share.kind, item) +
                  items.Pages(plan.params.kinds, share.kind, item).x + (worker.begin - at.begin);
  worker.record_offset =
      share.record_base + at.unit % plan.kv_heads() * plan.params.kinds[share.kind].record_bytes;
  worker.unit = at.unit;
  worker.unit_end = at.end;
  const uint32_t cta_end =
      WorkerBegin(share.pages, share.count, (i / share.warps + 1) * static_cast<uint64_t>(share.warps));
  worker.last_unit = PlanUnitOf(index, plan.kv_heads(), cta_end - 1).unit;
  return worker;
}

template <class Items>
__device__ inline void PlanWorkers(const PlanLaunch<Items>& plan, const PlanShare& share) {
  const PlanParams<Items>& params = plan.params;
  const PlanKind& kind = params.kinds[share.kind];
  const auto entries = static_cast<uint32_t>(kind.entries);
  AttendWorker* const workers =
      kind.workers + plan.launch * kind.worker_stride + static_cast<size_t>(share.first_cta) * entries;
  // Of a joint launch, the last kind also writes the entries of the CTAs that have nothing to do.
  const uint32_t end = !params.joint                         ? static_cast<uint32_t>(kind.ctas)
                       : share.kind + 1 == params.kind_count ? static_cast<uint32_t>(params.joint_ctas)
                                                             : share.first_cta + share.ctas;
  for (uint32_t entry = threadIdx.x; entry < (end - share.first_cta) * entries; entry += kPlanThreads)
    workers[entry] = PlanWorker(plan, share, entry / entries, entry % entries);
}

template <class Items>
__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const __grid_constant__ PlanParams<Items> params) {
  extern __shared__ __align__(16) uint8_t memory[];
  PlanIndex* const indices = reinterpret_cast<PlanIndex*>(memory);
  PlanLaunch<Items> plan{params, blockIdx.x, indices};
  PlanGroups(plan);
  for (int k = 0; k < params.kind_count; k++) {
    PlanNumber(params, k, indices[k]);
    plan.pages_of[k] = indices[k].first_page[indices[k].places] * plan.kv_heads();
  }
  uint32_t next_cta = 0;  // of the worker table
  for (int k = 0; k < params.kind_count; k++) {
    const PlanShare share = ShareOf(plan, k, next_cta);
    next_cta = share.first_cta + share.ctas;
    PlanUnits(plan, share);
    PlanWorkers(plan, share);
    __syncthreads();  // sources of the first kind come first
  }
}

}  // namespace kvtide::cuda
