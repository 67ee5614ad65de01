#include "kernels/cuda/attend/decode_tables.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/attend/level_kernels.h"
#include "kernels/cuda/attend/scatter_combine.h"
#include "kernels/cuda/attend/visible_pages.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/tide_tables.h"

namespace kvtide::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// Block tables keep their places while they grow by less.
constexpr size_t kTableRoom = 64;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
int32_t Limit(int64_t n) { return static_cast<int32_t>(std::clamp<int64_t>(n, -(1 << 30), 1 << 30)); }

// The dim of converted pages: kernels for f16 have the same dims of K and V.
int PageDim(const GroupShape& shape) {
  const int wide = std::max(StoredDim(shape.head_dim_k), StoredDim(shape.head_dim_v));
  for (const int dim : kKernelDims)
    if (dim >= wide) return dim;
  return 0;
}

const AttendKernel* KernelOf(const BlockLayout& layout, bool levels, int rows, int shared_limit) {
  return (levels ? FindLevelKernel : FindAttendKernel)(FormOf(layout.pair().k), FormOf(layout.pair().v),
                                                       layout.k().stored_dim, layout.v().stored_dim, rows,
                                                       shared_limit);
}

// Whether keys are calibrated and coded after RoPE.
bool HasLevels(const BlockRun& run) {
  return Info(run.layout->pair().k).calibrated && run.profile != nullptr && !run.profile->keys_turned_back();
}

// Bytes of a launch's partial states, outputs first.
size_t OutputBytes(const LaunchPlan& plan) {
  return Aligned(SlotCount(plan.units.size(), plan.workers.size()) * Size(plan.kernel->rows) *
                 Size(plan.kernel->dv) * sizeof(float));
}
size_t SumBytes(const LaunchPlan& plan) {
  return Aligned(SlotCount(plan.units.size(), plan.workers.size()) * Size(plan.kernel->rows) *
                 sizeof(StateHead));
}

}  // namespace

absl::Status PrepareAttendKernels(const DeviceImage& image) {
  std::vector<AttendKernel> all = AllAttendKernels();
  all.insert(all.end(), AllLevelKernels().begin(), AllLevelKernels().end());
  for (const AttendKernel& kernel : all) {
    if (kernel.shared_limit != image.shared_limit) continue;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
    if (kernel.joint.function != nullptr)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
          kernel.joint.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.joint.shared_bytes));
  }
  return absl::OkStatus();
}

bool HasAttendKernel(const BlockLayout& layout, int shared_limit) {
  return KernelOf(layout, false, 1, shared_limit) != nullptr;
}

int UnitRows(const GroupShape& shape, int64_t queries, int group, int shared_limit) {
  const int dim = PageDim(shape), rows = static_cast<int>(std::min<int64_t>(queries * group, 1 << 20));
  const AttendKernel* const kernel = FindAttendKernel(Form::kF16, Form::kF16, dim, dim, rows, shared_limit);
  return kernel == nullptr ? 0 : kernel->rows;
}

const DecodeTables::RunKind& DecodeTables::KindOf(const BlockRun& run) const {
  return *std::find_if(kinds_.begin(), kinds_.end(), [&](const RunKind& kind) {
    return kind.pair == run.layout->pair() && kind.levels == HasLevels(run);
  });
}

absl::Status DecodeTables::Make(const AttendPlanArgs& batch, const GroupShape& shape,
                                const AttendEnvironment& environment, std::optional<Convert> convert) {
  environment_ = &environment;
  convert_ = convert;
  shape_ = shape;
  heads_ = batch.heads;
  group_ = batch.heads / shape.kv_heads;
  most_queries_ = 0;
  tile_rows_ = 0;
  kinds_.clear();
  launches_.clear();
  converting_ = static_cast<size_t>(-1);
  scratch_needed_ = 0;
  scratch_tables_.clear();
  groups_.clear();
  merge_ = {};
  sent_ = false;
  // Those that are wanted again are found in the store, so the old ones go last.
  const std::vector<std::shared_ptr<const DeviceProfile>> before = std::exchange(profiles_, {});

  for (const PlanItem& item : batch.items) most_queries_ = std::max(most_queries_, item.queries);
  KVTIDE_RETURN_IF_ERROR(ChooseKernels(batch));
  KVTIDE_RETURN_IF_ERROR(memory_.Begin(TableBound(batch)));
  size_t first_query = 0;
  for (const PlanItem& item : batch.items) {
    KVTIDE_RETURN_IF_ERROR(PlanItemUnits(batch, item, first_query));
    first_query += Size(item.queries);
  }
  CutLaunches(&launches_, environment.processors);
  KVTIDE_RETURN_IF_ERROR(PlaceScratch());
  PlaceLaunches();
  PlaceMerge();
  return absl::OkStatus();
}

absl::Status DecodeTables::ChooseKernels(const AttendPlanArgs& batch) {
  page_dim_ = PageDim(shape_);
  converted_ = FindAttendKernel(Form::kF16, Form::kF16, page_dim_, page_dim_, most_queries_ * group_,
                                environment_->shared_limit);
  if (converted_ == nullptr)
    return absl::InvalidArgumentError(
        absl::StrCat("head dims K ", shape_.head_dim_k, " and V ", shape_.head_dim_v, " have no kernel"));
  tile_rows_ = converted_->rows;
  for (const PlanItem& item : batch.items)
    for (const BlockRun& run : item.runs) KVTIDE_RETURN_IF_ERROR(AddKind(run));
  record_bytes_ = kBlockTokens * Size(page_dim_) * 4;
  pages_per_chunk_ = std::max<int64_t>(
      1, static_cast<int64_t>(environment_->scratch_bytes / (record_bytes_ * Size(shape_.kv_heads))));
  return absl::OkStatus();
}

// The kernel of a pair, and the launch that reads its pages where they lie.
absl::Status DecodeTables::AddKind(const BlockRun& run) {
  const BlockLayout& layout = *run.layout;
  RunKind kind;
  kind.pair = layout.pair();
  kind.levels = HasLevels(run);
  for (const RunKind& other : kinds_)
    if (other.pair == kind.pair && other.levels == kind.levels) return absl::OkStatus();
  kind.kernel = KernelOf(layout, kind.levels, most_queries_ * group_, environment_->shared_limit);
  if (kind.kernel != nullptr) {
    if (const int stored = layout.k().stored_dim; Info(kind.pair.k).calibrated)
      kind.table_bytes = kind.levels ? LevelTableBytes(stored) : TideTableBytes(stored);
    tile_rows_ = std::min(tile_rows_, kind.kernel->rows);
    KVTIDE_ASSIGN_OR_RETURN(const Rotation k_rotation,
                            environment_->rotations->Get(kind.pair.k, layout.k().stored_dim, false));
    KVTIDE_ASSIGN_OR_RETURN(kind.v_rotation,
                            environment_->rotations->Get(kind.pair.v, layout.v().stored_dim, true));
    const auto same = [&](const LaunchPlan& plan) {
      return plan.kernel == kind.kernel && plan.k_rotation == k_rotation;
    };
    kind.launch =
        static_cast<size_t>(std::find_if(launches_.begin(), launches_.end(), same) - launches_.begin());
    if (kind.launch == launches_.size()) {
      LaunchPlan& plan = launches_.emplace_back();
      plan.kernel = kind.kernel;
      plan.k_rotation = k_rotation;
      plan.page_bytes = layout.record_bytes();
      plan.layer_bytes = layout.record_bytes() * Size(shape_.kv_heads);
      plan.table_bytes = kind.table_bytes;
    }
  }
  kinds_.push_back(kind);
  return absl::OkStatus();
}

// An upper bound of the tables' bytes.
size_t DecodeTables::TableBound(const AttendPlanArgs& batch) const {
  size_t bytes = 0, arrays = 16, chunks = 4;
  const size_t heads = Size(shape_.kv_heads), workers = Size(environment_->processors) * Size(kMostWarps);
  for (const PlanItem& item : batch.items) {
    const size_t groups = Size(TilesOf(item)) * heads;
    bytes += groups * sizeof(CombineGroup);
    for (const BlockRun& run : item.runs) {
      const bool native = KindOf(run).kernel != nullptr;
      const size_t parts = native ? 1 : Size(BlocksOf(run) / pages_per_chunk_ + 2);
      bytes += parts * groups * (sizeof(AttendUnit) + sizeof(CombineSource) + sizeof(uint32_t));
      bytes += (Size(BlocksOf(run)) + kTableRoom) * sizeof(std::byte*);
      arrays += parts;
      if (native) continue;
      chunks += parts;
      bytes += Size(BlocksOf(run)) * 2 * heads * sizeof(CodecJob);
    }
  }
  // Launches: of chunks, and of pairs of forms and rotations.
  chunks += 64;
  arrays += 8 * chunks;
  return TableMemory::Bound(arrays, bytes + chunks * workers * (sizeof(AttendWorker) + sizeof(uint32_t)));
}

absl::Status DecodeTables::PlanItemUnits(const AttendPlanArgs& batch, const PlanItem& item,
                                         size_t first_query) {
  const size_t first_group = groups_.size();
  for (int head = 0; head < shape_.kv_heads; head++)
    for (int tile = 0; tile < TilesOf(item); tile++) {
      CombineGroup& group = groups_.emplace_back().group;
      const int64_t heads_before = static_cast<int64_t>(first_query) * heads_ + head * group_;
      group.first_output = heads_before * shape_.head_dim_v;
      group.first_lse = heads_before;
      group.first_head = head * group_;
      group.output_stride = int64_t{heads_} * shape_.head_dim_v;
      group.lse_stride = heads_;
      group.first_row = tile * tile_rows_;
      group.rows = std::min(tile_rows_, item.queries * group_ - group.first_row);
      group.rows_per_query = group_;
    }
  for (const BlockRun& run : item.runs)
    if (run.tokens > 0) KVTIDE_RETURN_IF_ERROR(PlanRun(batch, item, run, first_query, first_group));
  return absl::OkStatus();
}

absl::Status DecodeTables::PlanRun(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run,
                                   size_t first_query, size_t first_group) {
  const PageRange all = VisiblePages(batch, item, run.first_position, run.tokens, 0, item.queries - 1);
  if (all.begin >= all.end) return absl::OkStatus();
  const RunKind& kind = KindOf(run);
  if (kind.kernel == nullptr) return ConvertRun(batch, item, run, all, first_query, first_group);
  RunProfile profile;
  if (run.profile != nullptr && Info(run.layout->pair().k).storage == Storage::kCodes) {
    const CacheType type = run.layout->pair().k;
    const bool calibrated = Info(type).calibrated;
    KVTIDE_ASSIGN_OR_RETURN(
        std::shared_ptr<const DeviceProfile> sent,
        environment_->profiles->Get(*run.profile, calibrated ? TablesOf(type) : ProfilePart::kMeans));
    profile = {sent->mean(), sent->gain(), calibrated ? sent->tables() : nullptr, kind.table_bytes};
    profiles_.push_back(std::move(sent));
  }
  const size_t blocks = Size(BlocksOf(run));
  const auto table = memory_.Place<std::byte*>(blocks, (blocks + kTableRoom - 1) / kTableRoom * kTableRoom);
  std::copy_n(run.blocks.begin(), blocks, table.host);
  AddUnits(
      batch, item, run, first_query, first_group, all, table.device, 0,
      [&](int head) { return run.layout->RecordOffset(0, head); }, profile, kind.launch, kind.v_rotation);
  return absl::OkStatus();
}

absl::Status DecodeTables::ConvertRun(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run,
                                      PageRange all, size_t first_query, size_t first_group) {
  KVTIDE_CHECK(convert_.has_value(), "pages of ", PairName(run.layout->pair()),
               " are planned for one layer only");
  const size_t heads = Size(shape_.kv_heads), dim = Size(shape_.head_dim_k);
  RunProfile profile;
  const TideHead* transforms = nullptr;  // of the layer
  if (run.profile != nullptr && Info(run.layout->pair().k).storage == Storage::kCodes) {
    const bool calibrated = Info(run.layout->pair().k).calibrated;
    KVTIDE_ASSIGN_OR_RETURN(std::shared_ptr<const DeviceProfile> sent,
                            environment_->profiles->Get(
                                *run.profile, calibrated ? ProfilePart::kTransforms : ProfilePart::kMeans));
    const size_t before = Size(convert_->layer) * heads * dim;
    profile.mean = sent->mean() == nullptr ? nullptr : sent->mean() + before;
    profile.gain = sent->gain() == nullptr ? nullptr : sent->gain() + before;
    if (calibrated) transforms = sent->heads() + Size(convert_->layer) * heads;
    profiles_.push_back(std::move(sent));
  }
  for (int64_t page = all.begin; page < all.end;) {
    if (converting_ >= launches_.size() || launches_[converting_].scratch_used >= Size(pages_per_chunk_)) {
      converting_ = launches_.size();
      launches_.emplace_back().kernel = converted_;
    }
    LaunchPlan& plan = launches_[converting_];
    const int64_t count =
        std::min(all.end - page, pages_per_chunk_ - static_cast<int64_t>(plan.scratch_used));
    const size_t first_scratch = plan.scratch_used;
    plan.scratch_used += Size(count);
    scratch_needed_ = std::max(scratch_needed_, plan.scratch_used * heads * record_bytes_);
    if (plan.conversions.empty() || !(*plan.conversions.back().layout == *run.layout))
      plan.conversions.emplace_back().layout = run.layout;
    Conversion& conversion = plan.conversions.back();
    const auto table = memory_.Place<std::byte*>(Size(count));
    for (int64_t i = 0; i < count; i++) {
      // Addresses in scratch are offsets until it is allocated.
      const size_t target = (first_scratch + Size(i)) * heads * record_bytes_;
      table.host[i] = reinterpret_cast<std::byte*>(target);
      for (size_t head = 0; head < heads; head++) {
        CodecJob job;
        job.source =
            run.blocks[Size(page + i)] + run.layout->RecordOffset(convert_->layer, static_cast<int>(head));
        job.target = reinterpret_cast<std::byte*>(target + head * record_bytes_);
        job.mean = profile.mean == nullptr ? nullptr : profile.mean + head * dim;
        job.gain = profile.gain == nullptr ? nullptr : profile.gain + head * dim;
        job.position = run.first_position + (page + i) * kBlockTokens;
        if (transforms != nullptr) job.tide = transforms + head;
        conversion.k.push_back(job);
        job.source += run.layout->v_codes();
        job.target += record_bytes_ / 2;
        job.mean = job.gain = nullptr;
        conversion.v.push_back(job);
      }
    }
    scratch_tables_.push_back({table.host, Size(count)});
    AddUnits(
        batch, item, run, first_query, first_group, {page, page + count}, table.device, page,
        [&](int head) { return Size(head) * record_bytes_; }, {}, converting_, Rotation{});
    page += count;
  }
  return absl::OkStatus();
}

// Units of all heads and row tiles over pages [range.begin, range.end) of a run; table[0] is page
// `table_page`.
template <class Offset>
void DecodeTables::AddUnits(const AttendPlanArgs& batch, const PlanItem& item, const BlockRun& run,
                            size_t first_query, size_t first_group, PageRange range, std::byte* const* table,
                            int64_t table_page, Offset offset, const RunProfile& profile, size_t launch,
                            const Rotation& v_rotation) {
  const int64_t window = std::min(batch.window, kMostPosition);
  for (int head = 0; head < shape_.kv_heads; head++)
    for (int tile = 0; tile < TilesOf(item); tile++) {
      GroupPlan& plan = groups_[first_group + Size(head * TilesOf(item) + tile)];
      const int64_t first = plan.group.first_row / group_,
                    last = (plan.group.first_row + plan.group.rows - 1) / group_;
      PageRange pages = VisiblePages(batch, item, run.first_position, run.tokens, first, last);
      pages = {std::max(pages.begin, range.begin), std::min(pages.end, range.end)};
      if (pages.begin >= pages.end) continue;
      const int64_t base = item.first_query_position - run.first_position - pages.begin * kBlockTokens;
      const int64_t head_values = int64_t{head} * shape_.head_dim_k;
      AttendUnit unit;
      unit.blocks = table + (pages.begin - table_page);
      unit.record_offset = offset(head);
      unit.first_query =
          (static_cast<int64_t>(first_query) * heads_ + int64_t{head} * group_) * shape_.head_dim_k;
      unit.gain = profile.gain == nullptr ? nullptr : profile.gain + head_values;
      unit.mean = profile.mean == nullptr ? nullptr : profile.mean + head_values;
      unit.query_stride = int64_t{heads_} * shape_.head_dim_k;
      if (profile.tables != nullptr) unit.tables = profile.tables + Size(head) * profile.table_bytes;
      unit.position = run.first_position + pages.begin * kBlockTokens;
      unit.pages = static_cast<uint32_t>(pages.end - pages.begin);
      unit.tokens =
          Limit(std::min(run.tokens - pages.begin * kBlockTokens, (pages.end - pages.begin) * kBlockTokens));
      unit.first_row = plan.group.first_row;
      unit.rows = plan.group.rows;
      unit.rows_per_query = group_;
      unit.causal_end = batch.causal ? Limit(base + 1) : 1 << 30;
      unit.window_begin = window > 0 ? Limit(base - window + 1) : -(1 << 30);
      plan.refs.push_back({launch, launches_[launch].units.size(), v_rotation});
      launches_[launch].units.push_back(unit);
    }
}

absl::Status DecodeTables::PlaceScratch() {
  if (scratch_needed_ == 0) return absl::OkStatus();
  DeviceBuffer& memory = convert_->workspace->scratch;
  KVTIDE_RETURN_IF_ERROR(memory.Reserve(scratch_needed_, environment_->scratch_bytes));
  std::byte* const scratch = memory.data();
  for (const ScratchTable& table : scratch_tables_)
    for (size_t i = 0; i < table.count; i++)
      table.table[i] = scratch + reinterpret_cast<size_t>(table.table[i]);
  for (LaunchPlan& plan : launches_)
    for (Conversion& conversion : plan.conversions) {
      for (std::vector<CodecJob>* jobs : {&conversion.k, &conversion.v})
        for (CodecJob& job : *jobs) job.target = scratch + reinterpret_cast<size_t>(job.target);
      conversion.k_device = memory_.Upload(conversion.k);
      conversion.v_device = memory_.Upload(conversion.v);
    }
  return absl::OkStatus();
}

void DecodeTables::PlaceLaunches() {
  partial_bytes_ = query_bytes_ = 0;
  for (LaunchPlan& plan : launches_) {
    if (plan.units.empty()) continue;
    AttendParams& params = plan.params;
    params.units = memory_.Upload(plan.units);
    if (plan.exact != nullptr)
      plan.joint_workers =
          memory_.Upload(JoinWorkers(plan.workers, plan.warps, plan.exact->workers, plan.exact->warps));
    else if (!plan.joined)
      params.workers = memory_.Upload(plan.workers);
    params.head_dim = shape_.head_dim_k;
    params.k_rotation = plan.k_rotation;
    plan.first_partial = partial_bytes_;
    partial_bytes_ += OutputBytes(plan) + SumBytes(plan);
    plan.first_query = query_bytes_;
    query_bytes_ += plan.units.size() * Size(plan.kernel->query_bytes);
  }
}

void DecodeTables::PlaceMerge() {
  std::vector<CombineSource> sources;
  std::vector<uint32_t> slots;
  for (GroupPlan& plan : groups_) {
    uint32_t most_slots = 0;
    plan.group.first_source = static_cast<uint32_t>(sources.size());
    plan.group.sources = static_cast<uint32_t>(plan.refs.size());
    for (const UnitRef& ref : plan.refs) {
      const LaunchPlan& launch = launches_[ref.launch];
      CombineSource source;
      source.outputs = launch.first_partial;
      source.sums = launch.first_partial + OutputBytes(launch);
      source.slots = AppendSlots(launch.units, ref.unit, launch.workers.size(), launch.warps, &slots);
      for (size_t i = 0; i < std::min<size_t>(source.slots, std::size(source.first_slots)); i++)
        source.first_slots[i] = slots[slots.size() - source.slots + i];
      source.slot_rows = launch.kernel->rows;
      source.v_rotation = ref.v_rotation;
      most_slots = std::max(most_slots, source.slots);
      sources.push_back(source);
    }
    plan.group.team = CombineTeam(most_slots);
    merge_.team = std::max(merge_.team, plan.group.team);
  }
  const uint32_t* slot_list = memory_.Upload(slots);
  for (CombineSource& source : sources) {
    source.slot_list = slot_list;
    slot_list += source.slots;
  }
  std::vector<CombineGroup> groups;
  groups.reserve(groups_.size());
  for (GroupPlan& plan : groups_) {
    for (uint32_t s = 0; s < std::min<size_t>(plan.group.sources, std::size(plan.group.first)); s++)
      plan.group.first[s] = sources[plan.group.first_source + s];
    groups.push_back(plan.group);
  }
  merge_.groups = memory_.Upload(groups);
  merge_.sources = memory_.Upload(sources);
  merge_.group_count = static_cast<int32_t>(groups.size());
  merge_.rows = tile_rows_;
  merge_.head_dim = shape_.head_dim_v;
}

absl::Status DecodeTables::Launch(const AttendLayerArgs& args, const LayerTensors& tensors, Way way,
                                  const AttendEnvironment& environment, Workspace& workspace) {
  const cudaStream_t stream = workspace.stream();
  // Whether the kernel at hand follows another one.
  bool follows = way.after_rows && sent_ && !way.careful && environment.begin == nullptr;
  if (!sent_) KVTIDE_RETURN_IF_ERROR(memory_.Send(stream));
  sent_ = true;
  KVTIDE_RETURN_IF_ERROR(workspace.partials.Reserve(partial_bytes_));
  KVTIDE_RETURN_IF_ERROR(workspace.queries.Reserve(query_bytes_));
  // Warps leave out states that are no numbers: what nobody writes is to be none either.
  if (way.careful && partial_bytes_ > 0)
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(workspace.partials.data(), 0xff, partial_bytes_, stream));
  for (LaunchPlan& plan : launches_) {
    AttendParams& params = plan.params;
    params.queries = workspace.queries.data() + plan.first_query;
    params.outputs = reinterpret_cast<float*>(workspace.partials.data() + plan.first_partial);
    params.sums =
        reinterpret_cast<StateHead*>(workspace.partials.data() + plan.first_partial + OutputBytes(plan));
    params.query = tensors.query();
    params.query_type = QueryTypeOf(tensors.query_type());
    params.scale = args.scale * kLog2E;
    params.key_scale = params.scale * plan.kernel->key_unit;
    params.softcap = args.softcap * kLog2E;
    params.layer_lines = static_cast<uint32_t>(Size(args.layer) * plan.layer_bytes / kLineBytes);
    params.profile_offset = int64_t{args.layer} * shape_.kv_heads * shape_.head_dim_k;
    params.table_offset = Size(args.layer) * Size(shape_.kv_heads) * plan.table_bytes;
  }
  if (environment.begin != nullptr) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment.begin, stream));
  bool rows = way.after_rows;
  for (const LaunchPlan& plan : launches_) {
    const UnitsAfter after = !follows ? UnitsAfter::kAnything : rows ? UnitsAfter::kRows : UnitsAfter::kUnits;
    KVTIDE_RETURN_IF_ERROR(LaunchUnits(plan, page_dim_, environment.dependent_launches, after, stream));
    rows = rows && (plan.units.empty() || plan.joined);
    follows = follows || (!plan.units.empty() && !plan.joined);
  }
  CombineParams merge = merge_;
  merge.partials = workspace.partials.data();
  merge.output = tensors.output();
  merge.output_type = QueryTypeOf(tensors.output_type());
  merge.lse = tensors.lse();
  merge.marks = tensors.marks();
  merge.sinks = tensors.sinks();
  ScatterParams scatter{merge, tensors.output_rows()};
  const bool scattered = scatter.output_rows != nullptr;
  const void* const function =
      scattered ? FindScatterCombineKernel(page_dim_, merge.team) : FindCombineKernel(page_dim_, merge.team);
  const size_t warps = groups_.size() * Size(tile_rows_) * Size(merge.team);
  KVTIDE_RETURN_IF_ERROR(LaunchKernel(function, (warps + kCombineWarps - 1) / kCombineWarps,
                                      32 * kCombineWarps, 0, environment.dependent_launches && follows,
                                      scattered ? static_cast<void*>(&scatter) : &merge, stream));
  if (environment.end != nullptr) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment.end, stream));
  return absl::OkStatus();
}

void DecodeTables::Forget() {
  memory_.Forget();
  sent_ = false;
}

}  // namespace kvtide::cuda
