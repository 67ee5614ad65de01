#include "kernels/cuda/layer_plan.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"
#include "kernels/cuda/codec/append_call.h"

namespace kvtide::cuda {
namespace {

// Bounds of a batch. Reading so many bytes takes 8 ms of an H200, 40 ms at 1 TB/s; its units have some 10 MB
// of tables; and its queries take so much pinned memory, as many bytes of results.
constexpr int64_t kMostPageBytes = int64_t{32} << 30, kMostUnits = 1 << 16,
                  kMostQueryBytes = int64_t{64} << 20;

// What a slice of an item costs in a batch.
struct Cost {
  int64_t page_bytes = 0, units = 0, query_bytes = 0;
  Cost& operator+=(const Cost& other) {
    page_bytes = SaturatingAdd(page_bytes, other.page_bytes);
    units += other.units;
    query_bytes += other.query_bytes;
    return *this;
  }
  bool Fits() const {
    return page_bytes <= kMostPageBytes && units <= kMostUnits && query_bytes <= kMostQueryBytes;
  }
};

class Cutter {
 public:
  Cutter(const AttendPlanArgs& args, const AttendShape& shape, const AttendEnvironment& environment)
      : shape_(shape),
        group_(shape.heads / shape.group.kv_heads),
        most_queries_(MostQueries(args)),
        unit_rows_(std::max(1, UnitRows(shape.group, most_queries_, group_, environment.shared_limit))) {}

  // Of `queries` queries of an item by the kernels for few rows: every unit reads what its run's pages are.
  Cost FewRows(const PlanItem& item, int64_t queries) const {
    const int64_t tiles = DivideUp<int64_t>(queries * group_, unit_rows_), heads = shape_.group.kv_heads;
    Cost cost;
    for (const BlockRun& run : item.runs) {
      const int64_t bytes = SaturatingMul(BlocksOf(run), static_cast<int64_t>(run.layout->record_bytes()));
      cost.page_bytes = SaturatingAdd(cost.page_bytes, SaturatingMul(tiles * heads, bytes));
    }
    cost.units = tiles * heads * std::max<int64_t>(1, static_cast<int64_t>(item.runs.size()));
    cost.query_bytes = QueryBytes(queries);
    return cost;
  }
  // Of a prefill, whose rounds are bounded by themselves.
  Cost ManyRows(const PlanItem&, int64_t queries) const { return {0, 0, QueryBytes(queries)}; }

 private:
  static int MostQueries(const AttendPlanArgs& args) {
    int most = 0;
    for (const PlanItem& item : args.items) most = std::max(most, item.queries);
    return most;
  }
  int64_t QueryBytes(int64_t queries) const {
    return queries * shape_.heads * std::max(shape_.group.head_dim_k, shape_.group.head_dim_v) * 2;
  }

  const AttendShape& shape_;
  const int group_, most_queries_, unit_rows_;
};

// Whether logits could come near the end of f32: with keys of f16's range and a thousand for what gains may
// do.
bool MayLeaveF32(std::span<const ItemSlice> slices, const AttendLayerArgs& args, const AttendShape& shape) {
  const double largest =
      1e34 / (double{kMaxF16} * shape.group.head_dim_k * std::max(std::fabs(double{args.scale}), 1e-30));
  for (const ItemSlice& slice : slices) {
    const TensorView q = args.items[slice.item].q;
    if (q.type == DataType::kF16 && largest >= double{kMaxF16}) continue;
    const size_t width = static_cast<size_t>(shape.heads) * static_cast<size_t>(shape.group.head_dim_k);
    const TensorView rows{static_cast<const std::byte*>(q.data) +
                              static_cast<size_t>(slice.first_query) * width * DataTypeBytes(q.type),
                          q.type};
    const size_t count = static_cast<size_t>(slice.queries) * width;
    const auto limit = static_cast<float>(std::clamp(largest, 1e-30, 1e37));
    if (FirstBeyond(rows, count, limit) != count) return true;
  }
  return false;
}

// Beyond, the rounding of the quick tanh of the kernels for many rows would be seen.
constexpr float kMostSoftcapOfMany = 1000;

}  // namespace

absl::StatusOr<std::unique_ptr<LayerPlan>> LayerPlan::Make(const AttendPlanArgs& args,
                                                           const AttendEnvironment& environment,
                                                           std::unique_ptr<LayerPlan> previous) {
  std::unique_ptr<LayerPlan> plan = previous != nullptr ? std::move(previous) : std::make_unique<LayerPlan>();
  KVTIDE_ASSIGN_OR_RETURN(plan->shape_, CheckAttendPlan(args));
  plan->causal_ = args.causal;
  plan->window_ = args.window;
  plan->Cut(args, environment);
  plan->Keep(args);
  for (const Batch& batch : plan->batches_) {
    if (batch.kind != Batch::kPlanned) continue;
    std::vector<PlanItem> items;
    for (const ItemSlice& slice : batch.slices) items.push_back(args.items[slice.item]);
    AttendPlanArgs planned = args;
    planned.items = items;
    KVTIDE_RETURN_IF_ERROR(plan->tables_.Make(planned, plan->shape_.group, environment, std::nullopt));
  }
  return plan;
}

// Into batches, in the order of the items: those of few rows first. They are planned here if they are one
// batch.
void LayerPlan::Cut(const AttendPlanArgs& args, const AttendEnvironment& environment) {
  batches_.clear();
  if (args.items.empty()) return;
  const Cutter cutter(args, shape_, environment);
  for (const bool many : {false, true}) {
    const size_t first = batches_.size();
    Cost cost;
    bool converts = false, kernel_of_last = false;
    CachePair last;
    for (size_t i = 0; i < args.items.size(); i++) {
      const PlanItem& item = args.items[i];
      if (item.queries == 0 || IsPrefill(item, shape_.group, shape_.heads, environment) != many) continue;
      const auto cost_of = [&](int64_t queries) {
        return many ? cutter.ManyRows(item, queries) : cutter.FewRows(item, queries);
      };
      // The longest slices that are within the bounds, by halves.
      int step = item.queries;
      while (step > 1 && !cost_of(step).Fits()) step = (step + 1) / 2;
      for (int query = 0; query < item.queries; query += step) {
        const int queries = std::min(step, item.queries - query);
        Cost sum = cost;
        sum += cost_of(queries);
        if (batches_.size() == first || !sum.Fits()) {
          batches_.push_back({many ? Batch::kManyRows : Batch::kFewRows, {}, nullptr});
          sum = cost_of(queries);
        }
        cost = sum;
        batches_.back().slices.push_back({i, query, queries});
      }
      for (const BlockRun& run : item.runs) {
        if (many || (kernel_of_last && run.layout->pair() == last)) continue;
        last = run.layout->pair();
        kernel_of_last = HasAttendKernel(*run.layout, environment.shared_limit);
        converts = converts || !kernel_of_last;
      }
    }
    const bool whole =
        batches_.size() == first + 1 &&
        std::all_of(batches_[first].slices.begin(), batches_[first].slices.end(),
                    [&](const ItemSlice& s) { return s.queries == args.items[s.item].queries; });
    if (!many && whole && !converts) batches_[first].kind = Batch::kPlanned;
  }
}

// What batches are planned from again. Layouts and profiles stay the caller's.
void LayerPlan::Keep(const AttendPlanArgs& args) {
  items_.clear();
  items_.resize(args.items.size());
  for (const Batch& batch : batches_)
    for (const ItemSlice& slice : batch.slices) {
      const PlanItem& from = args.items[slice.item];
      KeptItem& to = items_[slice.item];
      to.first_query_position = from.first_query_position;
      if (!to.positions.empty()) continue;  // another slice's
      for (const BlockRun& run : from.runs)
        to.positions.push_back({run.first_position, run.first_position + run.tokens});
      if (batch.kind == Batch::kPlanned) continue;
      for (const BlockRun& run : from.runs)
        to.blocks.insert(to.blocks.end(), run.blocks.begin(), run.blocks.end());
      size_t at = 0;
      for (BlockRun run : from.runs) {
        run.blocks = std::span<std::byte* const>(to.blocks).subspan(at, run.blocks.size());
        at += run.blocks.size();
        to.runs.push_back(run);
      }
    }
}

bool LayerPlan::QueuesAppend(const AttendLayerArgs& args) const {
  return !batches_.empty() && batches_.front().kind == Batch::kPlanned &&
         std::all_of(args.append.begin(), args.append.end(), [&](const AppendPiece& piece) {
           return piece.layout != nullptr && *piece.layout == *args.append.front().layout;
         });
}

absl::Status LayerPlan::Attend(const AttendLayerArgs& args, const AttendEnvironment& environment,
                               Workspace& workspace) {
  KVTIDE_RETURN_IF_ERROR(CheckAttendLayer(args, shape_));
  for (Batch& batch : batches_) {
    if (IsCancelled(args.cancellation)) return absl::CancelledError("attention was cancelled");
    const absl::Status status = AttendBatch(batch, args, environment, workspace);
    if (!status.ok()) {
      tables_.Forget();
      return status;
    }
  }
  return absl::OkStatus();
}

bool LayerPlan::SeesAToken(size_t item, int query) const {
  const PositionRange seen = VisiblePositions(items_[item].first_query_position + query, causal_, window_);
  return std::any_of(items_[item].positions.begin(), items_[item].positions.end(),
                     [&](const PositionRange& run) {
                       return std::max(seen.begin, run.begin) < std::min(seen.end, run.end);
                     });
}

// The arguments of a batch that is planned for one layer.
AttendPlanArgs LayerPlan::PlanAgain(const Batch& batch, std::vector<PlanItem>* items) const {
  for (const ItemSlice& slice : batch.slices) {
    const KeptItem& kept = items_[slice.item];
    items->push_back({kept.runs, slice.queries, kept.first_query_position + slice.first_query});
  }
  return {shape_.heads, causal_, window_, *items};
}

absl::Status LayerPlan::AttendBatch(Batch& batch, const AttendLayerArgs& args,
                                    const AttendEnvironment& environment, Workspace& workspace) {
  std::vector<PlanItem> items;
  LayerTensors tensors(shape_.group, shape_.heads, batch.slices, args, environment.hand);
  const bool careful = MayLeaveF32(batch.slices, args, shape_);
  if (batch.kind == Batch::kManyRows) {
    if (careful || args.softcap > kMostSoftcapOfMany)
      return AttendWithCare(batch, args, environment, workspace);
    if (batch.prefill == nullptr) {
      const AttendPlanArgs planned = PlanAgain(batch, &items);
      batch.prefill = std::make_unique<PrefillPlan>(std::move(items), planned, shape_.group, environment);
    }
    KVTIDE_RETURN_IF_ERROR(batch.prefill->Attend(args, tensors, workspace));
  } else {
    if (batch.kind == Batch::kFewRows)
      KVTIDE_RETURN_IF_ERROR(tables_.Make(PlanAgain(batch, &items), shape_.group, environment,
                                          DecodeTables::Convert{args.layer, &workspace}));
    AppendArgs append;
    if (&batch == &batches_.front()) append.pieces = args.append;
    KVTIDE_ASSIGN_OR_RETURN(AppendRows rows, AppendRows::Make(append));
    const bool in_place = tensors.query_bytes() + rows.row_bytes() <= environment.in_place_bytes,
               results_in_place = tensors.result_bytes() <= environment.in_place_bytes;
    if (in_place && results_in_place) {
      const std::shared_ptr<const PinnedRanges> pinned = PinnedRanges::Now();
      tensors.UsePinned(*pinned);
      rows.UsePinned(*pinned);
    }
    KVTIDE_RETURN_IF_ERROR(
        workspace.Begin(Workspace::Bound(LayerTensors::kArrays + AppendRows::kArrays + 1,
                                         tensors.staging_bytes() + rows.staging_bytes() +
                                             CopiesIn::staging_bytes(tensors.copies_in() + rows.copies_in())),
                        in_place));
    KVTIDE_RETURN_IF_ERROR(tensors.ReserveResults(workspace, results_in_place, true));
    CopiesIn copies;
    KVTIDE_RETURN_IF_ERROR(tensors.PlaceQueries(workspace, &copies));
    KVTIDE_RETURN_IF_ERROR(tensors.SendQueries(workspace));
    KVTIDE_RETURN_IF_ERROR(
        rows.Place(workspace, environment.hand, &copies));  // while the queries are on their way
    KVTIDE_RETURN_IF_ERROR(copies.Launch(workspace));
    KVTIDE_RETURN_IF_ERROR(workspace.Send());
    KVTIDE_RETURN_IF_ERROR(rows.Launch(workspace.stream()));
    KVTIDE_RETURN_IF_ERROR(tables_.Launch(args, tensors, {careful, !rows.empty()}, environment, workspace));
  }
  KVTIDE_RETURN_IF_ERROR(tensors.Fetch(workspace));
  if (&batch == &batches_.front()) KVTIDE_RETURN_IF_ERROR(RunMeanwhile(args));  // while the device computes
  KVTIDE_ASSIGN_OR_RETURN(
      const std::optional<LayerTensors::Row> beyond,
      tensors.Take(workspace, [&](size_t item, int query) { return SeesAToken(item, query); }));
  if (!beyond.has_value()) return absl::OkStatus();
  const ItemSlice from = origin_.empty() ? ItemSlice{beyond->item, 0, 0} : origin_[beyond->item];
  return absl::InternalError(absl::StrCat("item ", from.item, ", query ", from.first_query + beyond->query,
                                          ", head ", beyond->head, ": its logits do not fit f32 with scale ",
                                          args.scale, "; use smaller queries or a smaller scale"));
}

absl::Status LayerPlan::AttendWithCare(const Batch& batch, const AttendLayerArgs& args,
                                       const AttendEnvironment& environment, Workspace& workspace) {
  AttendEnvironment careful = environment;
  careful.most_decode_rows = INT_MAX;
  std::vector<PlanItem> items;
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<LayerPlan> plan,
                          Make(PlanAgain(batch, &items), careful, nullptr));
  plan->origin_ = batch.slices;
  std::vector<LayerItem> slices;
  for (const ItemSlice& slice : batch.slices) {
    LayerItem item = args.items[slice.item];
    const size_t row = static_cast<size_t>(slice.first_query) * static_cast<size_t>(shape_.heads);
    item.q.data = static_cast<const std::byte*>(item.q.data) +
                  row * static_cast<size_t>(shape_.group.head_dim_k) * DataTypeBytes(item.q.type);
    item.out.data = static_cast<std::byte*>(item.out.data) +
                    row * static_cast<size_t>(shape_.group.head_dim_v) * DataTypeBytes(item.out.type);
    if (item.lse != nullptr) item.lse += row;
    slices.push_back(item);
  }
  AttendLayerArgs layer = args;
  layer.items = slices;
  return plan->Attend(layer, careful, workspace);
}

}  // namespace kvtide::cuda
