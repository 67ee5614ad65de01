#include "kernels/cuda/attend/attend_call.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attend/attend_args.h"
#include "kernels/cuda/attend/attend_launch.h"
#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/prefill/prefill_call.h"

namespace kvtide::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
int32_t Limit(int64_t n) { return static_cast<int32_t>(std::clamp<int64_t>(n, -(1 << 30), 1 << 30)); }

struct UnitRef {
  size_t launch, unit;
  Rotation v_rotation;
};
struct GroupPlan {
  CombineGroup group;
  std::vector<UnitRef> refs;
};

class Planner {
 public:
  Planner(const AttendArgs& args, const GroupShape& shape, const AttendEnvironment& environment,
          Workspace& workspace)
      : args_(args),
        environment_(environment),
        workspace_(workspace),
        shape_(&shape),
        group_(args.heads / shape.kv_heads) {
    for (const AttendItem& item : args.items) {
      queries_ += Size(item.queries);
      most_queries_ = std::max(most_queries_, item.queries);
    }
  }

  absl::Status Run() {
    KVTIDE_RETURN_IF_ERROR(ChooseKernels());
    KVTIDE_RETURN_IF_ERROR(workspace_.Begin(StagingBound()));
    KVTIDE_RETURN_IF_ERROR(workspace_.results.Reserve(ResultBytes()));
    KVTIDE_RETURN_IF_ERROR(workspace_.results_host.Reserve(ResultBytes()));
    KVTIDE_RETURN_IF_ERROR(Plan());
    KVTIDE_RETURN_IF_ERROR(Place());
    return Execute();
  }

 private:
  const AttendKernel* NativeKernel(const BlockRun& run) const {
    return FindAttendKernel(FormOf(run.layout->pair().k), FormOf(run.layout->pair().v),
                            run.layout->k().stored_dim, run.layout->v().stored_dim,
                            static_cast<int>(most_queries_) * group_, environment_.shared_limit);
  }

  absl::Status ChooseKernels() {
    const int wide = std::max(StoredDim(shape_->head_dim_k), StoredDim(shape_->head_dim_v));
    for (const int dim : kKernelDims)
      if (page_dim_ == 0 && dim >= wide) page_dim_ = dim;
    converted_ = FindAttendKernel(Form::kF16, Form::kF16, page_dim_, page_dim_, most_queries_ * group_,
                                  environment_.shared_limit);
    if (converted_ == nullptr)
      return absl::InvalidArgumentError(
          absl::StrCat("head dims K ", shape_->head_dim_k, " and V ", shape_->head_dim_v, " have no kernel"));
    tile_rows_ = converted_->rows;
    for (const AttendItem& item : args_.items)
      for (const BlockRun& run : item.runs) {
        const AttendKernel* kernel = NativeKernel(run);
        if (kernel != nullptr) tile_rows_ = std::min(tile_rows_, kernel->rows);
      }
    record_bytes_ = kBlockTokens * Size(page_dim_) * 4;
    pages_per_chunk_ = std::max<int64_t>(
        1, static_cast<int64_t>(environment_.scratch_bytes / (record_bytes_ * Size(shape_->kv_heads))));
    return absl::OkStatus();
  }

  int TilesOf(const AttendItem& item) const { return (item.queries * group_ + tile_rows_ - 1) / tile_rows_; }
  size_t OutputWidth() const { return Size(args_.heads) * Size(shape_->head_dim_v); }
  size_t OutputBytes() const { return (queries_ * OutputWidth() * sizeof(float) + 255) / 256 * 256; }
  size_t ResultBytes() const { return OutputBytes() + queries_ * Size(args_.heads) * sizeof(float); }

  // An upper bound of what is uploaded.
  size_t StagingBound() const {
    size_t bytes = queries_ * Size(args_.heads) * Size(shape_->head_dim_k) * sizeof(float), arrays = 16;
    const size_t heads = Size(shape_->kv_heads), workers = Size(environment_.processors) * Size(kMostWarps);
    for (const AttendItem& item : args_.items) {
      const size_t tiles = Size(TilesOf(item));
      bytes += tiles * heads * sizeof(CombineGroup);
      arrays++;
      for (const BlockRun& run : item.runs) {
        const size_t chunks = Size(BlocksOf(run) / pages_per_chunk_ + 2);
        bytes +=
            chunks * (tiles * heads * (sizeof(AttendUnit) + sizeof(CombineSource)) +
                      workers * (sizeof(AttendWorker) + sizeof(uint32_t)) + tiles * heads * sizeof(uint32_t));
        bytes += run.blocks.size() * (sizeof(std::byte*) + 2 * heads * sizeof(CodecJob));
        bytes += 2 * heads * (Size(shape_->head_dim_k) * sizeof(float) + 256);
        arrays += 8 * chunks;
      }
    }
    return Workspace::Bound(arrays, bytes + Size(args_.heads) * sizeof(float));
  }

  absl::Status Plan() {
    if (args_.sinks != nullptr)
      sinks_ = workspace_.Upload(std::vector<float>(args_.sinks, args_.sinks + args_.heads));
    size_t first_query = 0;
    for (const AttendItem& item : args_.items) {
      if (item.queries == 0) continue;
      KVTIDE_RETURN_IF_ERROR(PlanItem(item, first_query));
      first_query += Size(item.queries);
    }
    return absl::OkStatus();
  }

  absl::Status PlanItem(const AttendItem& item, size_t first_query) {
    const size_t q_values = Size(item.queries) * Size(args_.heads) * Size(shape_->head_dim_k);
    const auto q = workspace_.Place<float>(q_values);
    std::memcpy(q.host, item.q, q_values * sizeof(float));
    const size_t first_group = groups_.size();
    for (int head = 0; head < shape_->kv_heads; head++)
      for (int tile = 0; tile < TilesOf(item); tile++) {
        GroupPlan plan;
        CombineGroup& group = plan.group;
        const size_t heads_before = first_query * Size(args_.heads) + Size(head) * Size(group_);
        group.output =
            reinterpret_cast<float*>(workspace_.results.data()) + heads_before * Size(shape_->head_dim_v);
        group.lse = reinterpret_cast<float*>(workspace_.results.data() + OutputBytes()) + heads_before;
        group.sinks = sinks_ == nullptr ? nullptr : sinks_ + head * group_;
        group.output_stride = static_cast<int64_t>(OutputWidth());
        group.lse_stride = args_.heads;
        group.first_row = tile * tile_rows_;
        group.rows = std::min(tile_rows_, item.queries * group_ - group.first_row);
        group.rows_per_query = group_;
        groups_.push_back(plan);
      }
    for (const BlockRun& run : item.runs) {
      if (run.tokens == 0) continue;
      KVTIDE_RETURN_IF_ERROR(PlanRun(item, run, q.device, first_group));
    }
    return absl::OkStatus();
  }

  PageRange Visible(const AttendItem& item, const BlockRun& run, int64_t first, int64_t last) const {
    return VisiblePages(args_, item, run.first_position, run.tokens, first, last);
  }

  absl::Status PlanRun(const AttendItem& item, const BlockRun& run, const float* q, size_t first_group) {
    const PageRange all = Visible(item, run, 0, item.queries - 1);
    if (all.begin >= all.end) return absl::OkStatus();
    const AttendKernel* native = NativeKernel(run);
    const bool coded = Info(run.layout->pair().k).storage == Storage::kCodes;
    std::vector<const float*> mean(Size(shape_->kv_heads)), gain(Size(shape_->kv_heads));
    if (coded && run.profile != nullptr)
      for (int head = 0; head < shape_->kv_heads; head++) {
        const HeadProfile& profile = run.profile->key(args_.layer, head);
        if (!profile.mean.empty()) mean[Size(head)] = workspace_.Upload(profile.mean);
        if (!profile.gain.empty()) gain[Size(head)] = workspace_.Upload(profile.gain);
      }
    if (native != nullptr) {
      Rotation k_rotation, v_rotation;
      KVTIDE_ASSIGN_OR_RETURN(
          k_rotation, environment_.rotations->Get(run.layout->pair().k, run.layout->k().stored_dim, false));
      KVTIDE_ASSIGN_OR_RETURN(
          v_rotation, environment_.rotations->Get(run.layout->pair().v, run.layout->v().stored_dim, true));
      size_t launch = 0;
      while (launch < launches_.size() &&
             !(launches_[launch].kernel == native && launches_[launch].k_rotation == k_rotation &&
               launches_[launch].conversions.empty()))
        launch++;
      if (launch == launches_.size()) {
        launches_.emplace_back();
        launches_.back().kernel = native;
        launches_.back().k_rotation = k_rotation;
        launches_.back().page_bytes = run.layout->record_bytes();
      }
      const auto table = workspace_.Place<std::byte*>(run.blocks.size());
      std::copy(run.blocks.begin(), run.blocks.end(), table.host);
      AddUnits(
          item, run, q, first_group, all, table.device, 0,
          [&](int head) { return run.layout->RecordOffset(args_.layer, head); }, mean, gain, launch,
          v_rotation);
      return absl::OkStatus();
    }
    for (int64_t page = all.begin; page < all.end;) {
      size_t launch = converting_;
      if (launch >= launches_.size() || launches_[launch].scratch_used >= Size(pages_per_chunk_)) {
        launch = converting_ = launches_.size();
        launches_.emplace_back();
        launches_.back().kernel = converted_;
      }
      LaunchPlan& plan = launches_[launch];
      const int64_t count =
          std::min(all.end - page, pages_per_chunk_ - static_cast<int64_t>(plan.scratch_used));
      const size_t heads = Size(shape_->kv_heads), first_scratch = plan.scratch_used;
      plan.scratch_used += Size(count);
      const size_t needed = plan.scratch_used * heads * record_bytes_;
      scratch_needed_ = std::max(scratch_needed_, needed);
      if (plan.conversions.empty() || !(*plan.conversions.back().layout == *run.layout)) {
        plan.conversions.emplace_back();
        plan.conversions.back().layout = run.layout;
      }
      const auto table = workspace_.Place<std::byte*>(Size(count));
      for (int64_t i = 0; i < count; i++) {
        // Addresses in scratch are offsets until it is allocated.
        const size_t target = (first_scratch + Size(i)) * heads * record_bytes_;
        table.host[i] = reinterpret_cast<std::byte*>(target);
        for (int head = 0; head < shape_->kv_heads; head++) {
          CodecJob job;
          job.source = run.blocks[Size(page + i)] + run.layout->RecordOffset(args_.layer, head);
          job.target = reinterpret_cast<std::byte*>(target + Size(head) * record_bytes_);
          job.mean = mean[Size(head)];
          job.gain = gain[Size(head)];
          plan.conversions.back().k.push_back(job);
          job.source += run.layout->v_codes();
          job.target += record_bytes_ / 2;
          job.mean = job.gain = nullptr;
          plan.conversions.back().v.push_back(job);
        }
      }
      scratch_tables_.push_back({table.host, Size(count)});
      const std::vector<const float*> none(heads);
      AddUnits(
          item, run, q, first_group, {page, page + count}, table.device, page,
          [&](int head) { return Size(head) * record_bytes_; }, none, none, launch, Rotation{});
      page += count;
    }
    return absl::OkStatus();
  }

  // Units of all heads and row tiles over pages [range.begin, range.end) of a run; table[0] is page
  // `table_page`.
  template <class Offset>
  void AddUnits(const AttendItem& item, const BlockRun& run, const float* q, size_t first_group,
                PageRange range, std::byte* const* table, int64_t table_page, Offset offset,
                const std::vector<const float*>& mean, const std::vector<const float*>& gain, size_t launch,
                const Rotation& v_rotation) {
    for (int head = 0; head < shape_->kv_heads; head++)
      for (int tile = 0; tile < TilesOf(item); tile++) {
        GroupPlan& plan = groups_[first_group + Size(head * TilesOf(item) + tile)];
        const int64_t first = plan.group.first_row / group_,
                      last = (plan.group.first_row + plan.group.rows - 1) / group_;
        PageRange pages = Visible(item, run, first, last);
        pages = {std::max(pages.begin, range.begin), std::min(pages.end, range.end)};
        if (pages.begin >= pages.end) continue;
        const int64_t base = item.first_query_position - run.first_position - pages.begin * kBlockTokens;
        AttendUnit unit;
        unit.blocks = table + (pages.begin - table_page);
        unit.record_offset = offset(head);
        unit.query = q + Size(head) * Size(group_) * Size(shape_->head_dim_k);
        unit.gain = gain[Size(head)];
        unit.mean = mean[Size(head)];
        unit.query_stride = static_cast<int64_t>(args_.heads) * shape_->head_dim_k;
        unit.pages = static_cast<uint32_t>(pages.end - pages.begin);
        unit.tokens = Limit(
            std::min(run.tokens - pages.begin * kBlockTokens, (pages.end - pages.begin) * kBlockTokens));
        unit.first_row = plan.group.first_row;
        unit.rows = plan.group.rows;
        unit.rows_per_query = group_;
        unit.causal_end = args_.causal ? Limit(base + 1) : 1 << 30;
        unit.window_begin = args_.window > 0 ? Limit(base - args_.window + 1) : -(1 << 30);
        plan.refs.push_back({launch, launches_[launch].units.size(), v_rotation});
        launches_[launch].units.push_back(unit);
      }
  }

  // Cuts the launches, allocates partial states and places everything that the device reads.
  absl::Status Place() {
    size_t partial_bytes = 0, query_bytes = 0;
    CutLaunches(&launches_, environment_.processors);
    for (LaunchPlan& plan : launches_) {
      if (plan.units.empty()) continue;
      const size_t rows = SlotCount(plan.units.size(), plan.workers.size()) * Size(plan.kernel->rows);
      query_bytes += plan.units.size() * Size(plan.kernel->query_bytes);
      partial_bytes +=
          (rows * (Size(plan.kernel->dv) * sizeof(float) + sizeof(StateHead)) + 255) / 256 * 256 + 256;
    }
    KVTIDE_RETURN_IF_ERROR(workspace_.partials.Reserve(partial_bytes));
    KVTIDE_RETURN_IF_ERROR(workspace_.queries.Reserve(query_bytes));
    KVTIDE_RETURN_IF_ERROR(workspace_.scratch.Reserve(scratch_needed_));
    std::byte* const scratch = workspace_.scratch.data();
    for (const auto& [table, count] : scratch_tables_)
      for (size_t i = 0; i < count; i++) table[i] = scratch + reinterpret_cast<size_t>(table[i]);
    size_t at = 0, query_at = 0;
    for (LaunchPlan& plan : launches_) {
      if (plan.units.empty()) continue;
      const size_t rows = SlotCount(plan.units.size(), plan.workers.size()) * Size(plan.kernel->rows);
      AttendParams& params = plan.params;
      params.units = workspace_.Upload(plan.units);
      if (plan.exact != nullptr)
        plan.joint_workers =
            workspace_.Upload(JoinWorkers(plan.workers, plan.warps, plan.exact->workers, plan.exact->warps));
      else if (!plan.joined)
        params.workers = workspace_.Upload(plan.workers);
      params.queries = workspace_.queries.data() + query_at;
      query_at += plan.units.size() * Size(plan.kernel->query_bytes);
      params.outputs = reinterpret_cast<float*>(workspace_.partials.data() + at);
      at += (rows * Size(plan.kernel->dv) * sizeof(float) + 255) / 256 * 256;
      params.sums = reinterpret_cast<StateHead*>(workspace_.partials.data() + at);
      at += (rows * sizeof(StateHead) + 255) / 256 * 256;
      params.head_dim = shape_->head_dim_k;
      params.k_rotation = plan.k_rotation;
      params.scale = args_.scale * kLog2E;
      params.key_scale = params.scale * plan.kernel->key_unit;
      params.softcap = args_.softcap * kLog2E;
      for (Conversion& conversion : plan.conversions) {
        for (std::vector<CodecJob>* jobs : {&conversion.k, &conversion.v})
          for (CodecJob& job : *jobs) job.target = scratch + reinterpret_cast<size_t>(job.target);
        conversion.k_device = workspace_.Upload(conversion.k);
        conversion.v_device = workspace_.Upload(conversion.v);
      }
    }
    std::vector<CombineGroup> groups;
    std::vector<CombineSource> sources;
    std::vector<uint32_t> slots;
    for (GroupPlan& plan : groups_) {
      uint32_t most_slots = 0;
      plan.group.first_source = static_cast<uint32_t>(sources.size());
      plan.group.sources = static_cast<uint32_t>(plan.refs.size());
      for (const UnitRef& ref : plan.refs) {
        const LaunchPlan& launch = launches_[ref.launch];
        CombineSource source;
        source.outputs = launch.params.outputs;
        source.sums = launch.params.sums;
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
    const uint32_t* slot_list = workspace_.Upload(slots);
    for (CombineSource& source : sources) {
      source.slot_list = slot_list;
      slot_list += source.slots;
    }
    for (GroupPlan& plan : groups_) {
      for (uint32_t s = 0; s < std::min<size_t>(plan.group.sources, std::size(plan.group.first)); s++)
        plan.group.first[s] = sources[plan.group.first_source + s];
      groups.push_back(plan.group);
    }
    merge_.groups = workspace_.Upload(groups);
    merge_.sources = workspace_.Upload(sources);
    merge_.group_count = static_cast<int32_t>(groups.size());
    merge_.rows = tile_rows_;
    merge_.head_dim = shape_->head_dim_v;
    return absl::OkStatus();
  }

  absl::Status Execute() {
    const cudaStream_t stream = workspace_.stream();
    KVTIDE_RETURN_IF_ERROR(workspace_.Send());
    if (environment_.begin != nullptr)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.begin, stream));
    bool attended = false;
    for (const LaunchPlan& plan : launches_) {
      KVTIDE_RETURN_IF_ERROR(
          LaunchUnits(plan, page_dim_, environment_.dependent_launches, !attended, stream));
      attended = attended || (!plan.units.empty() && !plan.joined);
    }
    const size_t warps = groups_.size() * Size(tile_rows_) * Size(merge_.team);
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(FindCombineKernel(page_dim_, merge_.team),
                                        (warps + kCombineWarps - 1) / kCombineWarps, 32 * kCombineWarps, 0,
                                        environment_.dependent_launches && attended, &merge_, stream));
    if (environment_.end != nullptr) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.end, stream));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace_.results_host.data(), workspace_.results.data(),
                                                ResultBytes(), cudaMemcpyDeviceToHost, stream));
    KVTIDE_RETURN_IF_ERROR(workspace_.Finish());
    const auto* out = reinterpret_cast<const float*>(workspace_.results_host.data());
    const auto* lse = reinterpret_cast<const float*>(workspace_.results_host.data() + OutputBytes());
    for (const AttendItem& item : args_.items) {
      const size_t rows = Size(item.queries) * Size(args_.heads);
      if (rows == 0) continue;
      std::memcpy(item.out, out, rows * Size(shape_->head_dim_v) * sizeof(float));
      std::memcpy(item.lse, lse, rows * sizeof(float));
      out += rows * Size(shape_->head_dim_v);
      lse += rows;
    }
    return absl::OkStatus();
  }

  const AttendArgs& args_;
  const AttendEnvironment& environment_;
  Workspace& workspace_;
  const GroupShape* const shape_;
  const int group_;
  size_t queries_ = 0;
  int most_queries_ = 0;
  int page_dim_ = 0;   // head dim of converted pages
  int tile_rows_ = 0;  // query rows of a unit
  size_t record_bytes_ = 0;
  int64_t pages_per_chunk_ = 1;
  const AttendKernel* converted_ = nullptr;
  const float* sinks_ = nullptr;
  std::vector<LaunchPlan> launches_;
  size_t converting_ = static_cast<size_t>(-1);  // the launch that takes further conversions
  size_t scratch_needed_ = 0;
  std::vector<std::pair<std::byte**, size_t>> scratch_tables_;
  std::vector<GroupPlan> groups_;
  CombineParams merge_;
};

}  // namespace

absl::Status PrepareAttendKernels(const DeviceImage& image) {
  for (const AttendKernel& kernel : AllAttendKernels()) {
    if (kernel.shared_limit != image.shared_limit) continue;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
    if (kernel.joint.function != nullptr)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
          kernel.joint.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.joint.shared_bytes));
  }
  return PreparePrefillKernels(image);
}

absl::Status AttendCall(const AttendArgs& args, const AttendEnvironment& environment, Workspace& workspace) {
  const GroupShape* shape = nullptr;
  KVTIDE_RETURN_IF_ERROR(CheckAttendArgs(args, &shape));
  // Items with many rows go their own way.
  std::vector<AttendItem> few, many;
  for (const AttendItem& item : args.items)
    if (item.queries > 0) (IsPrefill(item, *shape, args.heads, environment) ? many : few).push_back(item);
  AttendArgs part = args;
  if (!few.empty()) {
    part.items = few;
    KVTIDE_RETURN_IF_ERROR(Planner(part, *shape, environment, workspace).Run());
  }
  if (many.empty()) return absl::OkStatus();
  part.items = many;
  return PrefillCall(part, *shape, environment, workspace);
}

}  // namespace kvtide::cuda
