#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/attend/late_query.h"
#include "kernels/cuda/attend/level_kernels.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/settled.h"
#include "kernels/cuda/step/cuda_paged_attention.h"
#include "kernels/cuda/step/paged_prefill.h"
#include "kernels/cuda/step/paged_step.cuh"

namespace kvtide::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
// What query areas and partial states of a launch may take; a step with more tiles takes several launches.
constexpr size_t kLaunchBytes = size_t{128} << 20;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
size_t CeilDiv(size_t a, size_t b) { return (a + b - 1) / b; }
QueryType TypeOf(DataType type) {
  return type == DataType::kF32   ? QueryType::kF32
         : type == DataType::kF16 ? QueryType::kF16
                                  : QueryType::kBf16;
}

// The kernels for tiles of up to `rows` query rows: coded pages, if there are any, then exact ones.
struct TileKernels {
  int rows = 0, kinds = 0;
  const AttendKernel* of[2] = {};
  const AttendKernel* joint = nullptr;  // of the coded kind, if one launch reads both
  // Query kernels of the first kind, and of both, for launches that follow the kernel that writes rows, if
  // there are any.
  const void *late = nullptr, *late_joint = nullptr;
};

// Where a launch leaves what the next kernel reads; launches of a step use the same memory.
struct KindMemory {
  AttendUnit* units = nullptr;
  uint32_t* slots = nullptr;
  std::byte* queries = nullptr;
  float* outputs = nullptr;
  StateHead* sums = nullptr;
};

class PagedOnDevice final : public PagedAttention {
 public:
  absl::Status Create(const PagedOptions& options, std::span<const PagedLayer> layers) {
    KVTIDE_RETURN_IF_ERROR(CheckPagedOptions(options, layers));
    options_ = options;
    layers_.assign(layers.begin(), layers.end());
    coded_ = CodedPage(options);
    exact_ = ExactPage(options);
    if (options_.coded_stride == 0) options_.coded_stride = coded_.block_bytes();
    if (options_.exact_stride == 0) options_.exact_stride = exact_.block_bytes();
    if (options_.pool) options_.coded_stride = options_.exact_stride = kPoolUnit;
    kv_heads_ = Size(options.shape.kv_heads);
    group_ = options.heads / options.shape.kv_heads;
    int device = 0;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
    KVTIDE_ASSIGN_OR_RETURN(image_, FindDeviceImage(device));
    overlap_ = HasBulkCopies(image_.image_capability);
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
    KVTIDE_RETURN_IF_ERROR(FindBases());
    for (TileKernels* kernels : {&narrow_, &wide_})
      KVTIDE_RETURN_IF_ERROR(FindKernels(kernels == &narrow_ ? std::min(group_, 16) : 16, kernels));
    KVTIDE_RETURN_IF_ERROR(CopyProfiles());
    KVTIDE_RETURN_IF_ERROR(SendTransforms());
    KVTIDE_RETURN_IF_ERROR(AllocateTables());
    KVTIDE_RETURN_IF_ERROR(AllocateLaunches());
    KVTIDE_RETURN_IF_ERROR(AllocateSeals());
    KVTIDE_RETURN_IF_ERROR(prefill_.Create(options_, coded_, exact_, image_, processors_));
    query_stride_ = int64_t{options.heads} * options.shape.head_dim_k;
    output_stride_ = int64_t{options.heads} * options.shape.head_dim_v;
    KVTIDE_ASSIGN_OR_RETURN(unwanted_, Allocate<float>(Size(options.max_tokens) * Size(options.heads)));
    KVTIDE_ASSIGN_OR_RETURN(changed_, Allocate<unsigned long long>(1));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemset(changed_, 0, sizeof(*changed_)));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(PlanKernel<TileItems>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(2 * sizeof(PlanIndex))));
    return absl::OkStatus();
  }

  absl::Status Plan(const PagedStep& step, void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagedStep(step, options_));
    const auto of = static_cast<cudaStream_t>(stream);
    const absl::Status status = PlanTiles(step, of);
    planned_ = status.ok();
    return Settled(status, of);
  }

  absl::Status Write(int layer, PagedRows k, PagedRows v, void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckPagedWritten(k, v, step_, options_));
    const auto of = static_cast<cudaStream_t>(stream);
    return Settled(LaunchWrite(layers_[Size(layer)], k, v, of), of);
  }

  absl::Status Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckPagedAttended(q, out, options_));
    const auto of = static_cast<cudaStream_t>(stream);
    return Settled(LaunchAttend(Size(layer), q, out, lse, false, of), of);
  }

  absl::Status WriteAttend(int layer, PagedRows k, PagedRows v, PagedRows q, MutablePagedRows out, float* lse,
                           void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckPagedWritten(k, v, step_, options_));
    KVTIDE_RETURN_IF_ERROR(CheckPagedAttended(q, out, options_));
    const auto of = static_cast<cudaStream_t>(stream);
    absl::Status status = LaunchWrite(layers_[Size(layer)], k, v, of);
    if (status.ok()) status = LaunchAttend(Size(layer), q, out, lse, true, of);
    return Settled(status, of);
  }

  absl::Status Seal(int layer, void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    const auto of = static_cast<cudaStream_t>(stream);
    return Settled(LaunchSeals(layer, 1, of), of);
  }
  absl::Status SealLayers(void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(0));
    const auto of = static_cast<cudaStream_t>(stream);
    return Settled(LaunchSeals(0, static_cast<int>(layers_.size()), of), of);
  }

  absl::Status SetProfile(int index, const float* k_mean, const float* k_gain, void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagedProfile(index, options_));
    const auto of = static_cast<cudaStream_t>(stream);
    const auto set = [&](const float* from, float fill, float* all) -> absl::Status {
      if (all == nullptr) return absl::OkStatus();
      const std::vector<float> filled(from == nullptr ? Size(profile_stride_) : 0, fill);
      KVTIDE_CUDA_RETURN_IF_ERROR(
          cudaMemcpyAsync(all + index * profile_stride_, from == nullptr ? filled.data() : from,
                          Size(profile_stride_) * sizeof(float), cudaMemcpyHostToDevice, of));
      return StatusOf(KVTIDE_CUDA_TRY(cudaStreamSynchronize(of)), "a profile");
    };
    KVTIDE_RETURN_IF_ERROR(set(k_mean, 0, mean_));
    return set(k_gain, 1, gain_);
  }

  absl::StatusOr<uint64_t> ChangedValues(void* stream) override {
    unsigned long long changed = 0;
    const auto of = static_cast<cudaStream_t>(stream);
    KVTIDE_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(&changed, changed_, sizeof changed, cudaMemcpyDeviceToHost, of));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(of));
    return changed;
  }
  size_t bytes() const override { return bytes_ + prefill_.bytes(); }

 private:
  absl::Status CheckCall(int layer) const {
    if (layer < 0 || Size(layer) >= layers_.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " of ", layers_.size()));
    if (!planned_) return absl::FailedPreconditionError("no step is planned: call Plan first");
    return absl::OkStatus();
  }

  // The lowest page of any layer: where the pages of a layer begin is a parameter of its kernels.
  absl::Status FindBases() {
    for (const bool coded : {true, false}) {
      uint64_t low = UINT64_MAX, high = 0;
      for (const PagedLayer& layer : layers_) {
        const auto at = reinterpret_cast<uint64_t>(coded ? layer.coded : layer.exact);
        low = std::min(low, at);
        high = std::max(high, at);
      }
      if ((high - low) / kLineBytes > UINT32_MAX)
        return absl::InvalidArgumentError(
            absl::StrCat("the ", coded ? "coded" : "exact",
                         " pages of the layers are more than 512 GiB of addresses apart: take them from one "
                         "allocation, or make an object for each half of the layers"));
      (coded ? coded_base_ : exact_base_) = low;
    }
    return absl::OkStatus();
  }

  absl::Status FindKernels(int rows, TileKernels* kernels) const {
    for (const BlockLayout* layout : {&coded_, &exact_}) {
      if (layout == &coded_ && options_.max_coded_blocks == 0) continue;
      const bool calibrated = Info(layout->pair().k).calibrated;
      const AttendKernel* const kernel = (calibrated ? FindLevelKernel : FindAttendKernel)(
          FormOf(layout->pair().k), FormOf(layout->pair().v), layout->k().stored_dim, layout->v().stored_dim,
          rows, image_.shared_limit);
      if (kernel == nullptr)
        return absl::InvalidArgumentError(absl::StrCat(
            "no kernel reads ", PairName(layout->pair()), " pages of head dims K ", options_.shape.head_dim_k,
            " and V ", options_.shape.head_dim_v,
            calibrated
                ? ": calibrated keys go with turbo values of the same bits (tide1 with turbo2), at head "
                  "dims 64 and 128"
                : "; kernels/cuda/attend/instantiate.cuh lists the pairs"));
      kernels->rows = kernels->kinds == 0 ? kernel->rows : std::min(kernels->rows, kernel->rows);
      kernels->of[kernels->kinds++] = kernel;
    }
    const auto allow = [](const void* function, int bytes) {
      return StatusOf(
          KVTIDE_CUDA_TRY(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)),
          "shared memory of a kernel");
    };
    for (int k = 0; k < kernels->kinds; k++)
      KVTIDE_RETURN_IF_ERROR(allow(kernels->of[k]->function, kernels->of[k]->shared_bytes));
    if (FindCombineKernel(exact_.v().stored_dim, 1) == nullptr)
      return absl::InvalidArgumentError(
          absl::StrCat("head dim ", options_.shape.head_dim_v, " of V has no merge kernel"));
    if (!IsCalibrated(kernels->of[0]->k)) {
      kernels->late = LateQueryKernel(*kernels->of[0]);
      kernels->late_joint = LateJointQueryKernel(*kernels->of[0]);
    }
    if (kernels->kinds < 2 || processors_ < 2 || !CanJoin(*kernels->of[0], *kernels->of[1]))
      return absl::OkStatus();
    kernels->joint = kernels->of[0];
    return allow(kernels->joint->joint.function, kernels->joint->joint.shared_bytes);
  }

  absl::Status CopyProfiles() {
    const size_t values = kv_heads_ * Size(options_.shape.head_dim_k);
    const auto copy = [&](const float* PagedLayer::*field, float fill, float** to) -> absl::Status {
      const bool any = options_.max_profiles > 0 ||
                       std::any_of(layers_.begin(), layers_.end(),
                                   [&](const PagedLayer& layer) { return layer.*field != nullptr; });
      if (!any || options_.max_coded_blocks == 0 || Info(options_.pair.k).storage != Storage::kCodes ||
          Info(options_.pair.k).calibrated)
        return absl::OkStatus();
      KVTIDE_ASSIGN_OR_RETURN(float* const copied, Allocate<float>(values * layers_.size() *
                                                                   Size(std::max(1, options_.max_profiles))));
      const std::vector<float> filled(values, fill);
      for (size_t i = 0; i < layers_.size(); i++) {
        const float* const from = layers_[i].*field == nullptr ? filled.data() : layers_[i].*field;
        KVTIDE_RETURN_IF_ERROR(CopyToDevice(copied + i * values, from, values * sizeof(float)));
      }
      profile_stride_ = static_cast<int64_t>(values * layers_.size());
      *to = copied;
      return absl::OkStatus();
    };
    KVTIDE_RETURN_IF_ERROR(copy(&PagedLayer::k_mean, 0, &mean_));
    return copy(&PagedLayer::k_gain, 1, &gain_);
  }

  // Of calibrated keys: what attention reads, and what encoders and decoders do.
  absl::Status SendTransforms() {
    const CacheType type = options_.pair.k;
    if (!Info(type).calibrated) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const Profile profile, MakePagedKeyProfile(options_, layers_));
    KVTIDE_RETURN_IF_ERROR(transforms_.Send(profile, ProfilePart::kTransforms));
    if (options_.max_coded_blocks > 0) {
      KVTIDE_RETURN_IF_ERROR(head_tables_.Send(profile, TablesOf(type)));
      table_bytes_ = LevelTableBytes(coded_.k().stored_dim);
    }
    bytes_ += transforms_.bytes() + head_tables_.bytes();
    return absl::OkStatus();
  }
  // [kv_heads] of a layer, or null.
  const TideHead* HeadsOf(size_t layer) const {
    return transforms_.heads() == nullptr ? nullptr : transforms_.heads() + layer * kv_heads_;
  }

  absl::Status AllocateTables() {
    const size_t sequences = Size(options_.max_sequences);
    tables_.max_coded = options_.max_coded_blocks;
    tables_.max_exact = options_.max_exact_blocks;
    tables_.coded_stride = options_.coded_stride;
    tables_.exact_stride = options_.exact_stride;
    tables_.exact_pages = options_.exact_pages;
    if (options_.max_coded_blocks > 0) {
      KVTIDE_ASSIGN_OR_RETURN(tables_.coded, Allocate<uint64_t>(sequences * Size(tables_.max_coded)));
    }
    KVTIDE_ASSIGN_OR_RETURN(tables_.exact, Allocate<uint64_t>(sequences * Size(tables_.max_exact)));
    KVTIDE_ASSIGN_OR_RETURN(places_, Allocate<int2>(Size(options_.max_tokens)));
    return absl::OkStatus();
  }

  // Tiles that a step can have; a sequence whose queries are cut in two (PagedTables::QueriesBefore), one
  // more.
  size_t MostTiles(const TileKernels& kernels, int sequences, int tokens, int most_queries, bool cut) const {
    const size_t rows = Size(kernels.rows);
    return std::min(CeilDiv(Size(most_queries) * Size(group_), rows) * Size(sequences),
                    (Size(tokens) * Size(group_) + Size(sequences) * (rows - 1)) / rows) +
           (cut && most_queries > 1 ? std::min(Size(sequences), Size(tokens) / 2) : 0);
  }
  const TileKernels& KernelsFor(int most_queries) const {
    return int64_t{most_queries} * group_ <= narrow_.rows ? narrow_ : wide_;
  }

  absl::Status AllocateLaunches() {
    const auto most = [](auto of) { return std::max(of(0), of(1)); };
    const auto wider = [&](int k, int AttendKernel::*field) {
      return Size(std::max(narrow_.of[k]->*field, wide_.of[k]->*field));
    };
    const int kinds = wide_.kinds;
    size_t tile_bytes = 0;
    for (int k = 0; k < kinds; k++)
      tile_bytes += kv_heads_ * (wider(k, &AttendKernel::query_bytes) +
                                 wider(k, &AttendKernel::rows) * Size(wide_.of[k]->dv) * sizeof(float));
    const int sequences = options_.max_sequences;
    const size_t single = MostTiles(narrow_, sequences, sequences, 1, false),
                 all = std::max(single, MostTiles(wide_, sequences, options_.max_tokens, options_.max_tokens,
                                                  options_.max_coded_blocks > 0));
    batch_ = std::min<size_t>({kPlanItems, all, std::max(single, kLaunchBytes / tile_bytes)});
    const size_t launches = CeilDiv(all, batch_), units = batch_ * kv_heads_;
    KVTIDE_ASSIGN_OR_RETURN(tile_, Allocate<PagedTile>(launches * batch_));
    KVTIDE_ASSIGN_OR_RETURN(plan_groups_, Allocate<CombineGroup>(launches * units));
    KVTIDE_ASSIGN_OR_RETURN(plan_sources_, Allocate<CombineSource>(2 * launches * units));
    const size_t workers =
        Size(processors_) * Size(most([&](int k) {
          return k >= kinds ? 0 : std::max(narrow_.of[k]->threads, wide_.of[k]->threads) / 32;
        }));
    for (int k = 0; k < kinds; k++) {
      const size_t slots = SlotCount(units, workers), rows = wider(k, &AttendKernel::rows);
      KindMemory& memory = memory_[k];
      KVTIDE_ASSIGN_OR_RETURN(memory.units, Allocate<AttendUnit>(launches * units));
      KVTIDE_ASSIGN_OR_RETURN(workers_[k], Allocate<AttendWorker>(launches * workers));
      KVTIDE_ASSIGN_OR_RETURN(memory.slots, Allocate<uint32_t>(launches * slots));
      KVTIDE_ASSIGN_OR_RETURN(memory.queries,
                              Allocate<std::byte>(units * wider(k, &AttendKernel::query_bytes)));
      KVTIDE_ASSIGN_OR_RETURN(memory.outputs, Allocate<float>(slots * rows * Size(wide_.of[k]->dv)));
      KVTIDE_ASSIGN_OR_RETURN(memory.sums, Allocate<StateHead>(slots * rows));
    }
    worker_stride_ = workers;
    return absl::OkStatus();
  }

  absl::Status AllocateSeals() {
    if (options_.max_seals == 0) return absl::OkStatus();
    const size_t jobs = Size(options_.max_seals) * layers_.size() * kv_heads_;
    KVTIDE_ASSIGN_OR_RETURN(seal_.k, Allocate<CodecJob>(jobs));
    KVTIDE_ASSIGN_OR_RETURN(seal_.v, Allocate<CodecJob>(jobs));
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const blank, Allocate<std::byte>(exact_.record_bytes()));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemset(blank, 0, exact_.record_bytes()));
    seal_.blank = blank;
    KVTIDE_ASSIGN_OR_RETURN(seal_.waste, Allocate<std::byte>(coded_.record_bytes()));
    std::vector<SealParams::Layer> layers;
    const size_t values = kv_heads_ * Size(options_.shape.head_dim_k);
    for (size_t i = 0; i < layers_.size(); i++)
      layers.push_back({ExactOf(layers_[i]), layers_[i].coded,
                        mean_ == nullptr ? nullptr : mean_ + i * values,
                        gain_ == nullptr ? nullptr : gain_ + i * values, HeadsOf(i)});
    KVTIDE_ASSIGN_OR_RETURN(SealParams::Layer* const copied, Allocate<SealParams::Layer>(layers.size()));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(copied, layers.data(), layers.size() * sizeof(SealParams::Layer)));
    seal_.layers = copied;
    seal_.kv_heads = options_.shape.kv_heads;
    seal_.head_dim_k = options_.shape.head_dim_k;
    seal_.coded_stride = options_.coded_stride;
    seal_.exact_record = exact_.record_bytes();
    seal_.coded_record = coded_.record_bytes();
    seal_.exact_values = exact_.v_codes();
    seal_.coded_values = coded_.v_codes();
    return absl::OkStatus();
  }

  ExactPages ExactOf(const PagedLayer& layer) const {
    return {layer.exact, options_.scratch, options_.exact_pages, options_.exact_stride};
  }

  PagedPrefillLayer PrefillLayer(size_t layer) const {
    const size_t values = layer * kv_heads_ * Size(options_.shape.head_dim_k);
    return {layers_[layer].coded,
            layers_[layer].exact,
            mean_ == nullptr ? nullptr : mean_ + values,
            gain_ == nullptr ? nullptr : gain_ + values,
            layers_[layer].sinks,
            HeadsOf(layer)};
  }

  // Tiles of the step, and the most new tokens of a sequence that has any: exactly, where the host knows.
  void CountTiles(const PagedStep& step, int most_rows) {
    int most_queries = step.most_queries;
    if (most_rows < INT32_MAX) {
      most_queries = 0;
      for (int s = 0; s < step.sequences; s++) {
        const int queries = step.host_query_start[s + 1] - step.host_query_start[s];
        if (int64_t{queries} * group_ <= most_rows) most_queries = std::max(most_queries, queries);
      }
    }
    kernels_ = &KernelsFor(most_queries);
    tile_queries_ = most_queries;
    tiles_ = MostTiles(*kernels_, step.sequences, step.tokens, most_queries, step.among_coded);
    if (most_rows == INT32_MAX) return;
    tiles_ = 0;
    for (int s = 0; s < step.sequences; s++) {
      const int64_t rows = int64_t{step.host_query_start[s + 1] - step.host_query_start[s]} * group_;
      if (rows > 0 && rows <= most_rows) tiles_ += CeilDiv(Size(rows), Size(kernels_->rows));
    }
  }

  absl::Status PlanTiles(const PagedStep& step, cudaStream_t stream) {
    step_ = step;
    // Steps without prefills are planned by their bounds, as graphs are.
    const bool prefills = step.host_query_start != nullptr && options_.max_profiles == 0 &&
                          !step.among_coded && int64_t{step.most_queries} * group_ > prefill_.most_rows();
    const int most_rows = prefills ? prefill_.most_rows() : INT32_MAX;
    CountTiles(step, most_rows);
    if (step.sequences == 0) return absl::OkStatus();
    const TileKernels& kernels = *kernels_;

    tables_.query_start = step.query_start;
    tables_.lengths = step.lengths;
    tables_.coded_first = step.coded_first;
    tables_.coded_count = step.coded_count;
    tables_.coded_table = step.coded_table;
    tables_.exact_table = step.exact_table;
    tables_.coded_row = step.coded_row;
    tables_.exact_row = step.exact_row;
    tables_.sequences = step.sequences;
    tables_.places = step.write_slots == nullptr ? places_ : nullptr;
    tables_.tokens = step.tokens;
    PagedTilesParams tiles;
    tiles.tables = tables_;
    tiles.tiles = tile_;
    tiles.tile_count = static_cast<int32_t>(Launches() * Items());
    tiles.tile_rows = kernels.rows;
    tiles.group = group_;
    tiles.most_rows = most_rows;
    tiles.window = options_.window;
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(reinterpret_cast<const void*>(&PagedTilesKernel),
                                        1 + Size(step.sequences), kTileThreads, 0, false, &tiles, stream));
    // Prefills know the profiles of layers, not those of sequences, and stand behind the coded blocks.
    if (options_.max_profiles == 0) {
      PagedStep of_prefills = step;
      if (step.among_coded) of_prefills.host_query_start = nullptr;
      KVTIDE_RETURN_IF_ERROR(prefill_.Plan(of_prefills, tables_.coded, tables_.exact, stream));
    }

    // Few rows are cut into many states each, and leave warps free to share them (device_decode.cu).
    const size_t rows = tiles_ * kv_heads_ * Size(std::min(kernels.rows, tile_queries_ * group_)),
                 processors = Size(processors_);
    team_ = rows < 6 * processors ? 4 : rows < 12 * processors || kv_heads_ < 4 ? 2 : 1;
    return LaunchPlan(stream);
  }

  // How the tiles are cut: launches of so many tiles each.
  size_t Launches() const { return CeilDiv(tiles_, batch_); }
  size_t Items() const { return std::min(tiles_, batch_); }

  absl::Status LaunchPlan(cudaStream_t stream) {
    if (tiles_ == 0) return absl::OkStatus();
    const TileKernels& kernels = *kernels_;
    PlanParams<TileItems> plan;
    plan.items.tiles = tile_;
    plan.items.batch = static_cast<int32_t>(Items());
    plan.items.heads = options_.heads;
    plan.items.group = group_;
    plan.items.head_dim_k = options_.shape.head_dim_k;
    plan.items.head_dim_v = options_.shape.head_dim_v;
    plan.items.query_stride = query_stride_;
    plan.items.output_stride = output_stride_;
    plan.items.mean = mean_;
    plan.items.gain = gain_;
    plan.items.profiles = step_.profiles;
    plan.items.most_profiles = options_.max_profiles;
    plan.items.profile_stride = profile_stride_;
    plan.items.tables = table_bytes_ == 0 ? nullptr : head_tables_.tables();
    plan.items.table_bytes = table_bytes_;
    plan.groups = plan_groups_;
    plan.sources = plan_sources_;
    plan.group_stride = static_cast<uint32_t>(batch_ * kv_heads_);
    plan.item_count = static_cast<int32_t>(Items());
    plan.kv_heads = options_.shape.kv_heads;
    plan.team = team_;
    plan.kind_count = kernels.kinds;
    plan.joint = kernels.joint != nullptr;
    plan.joint_ctas = processors_;
    for (int k = 0; k < kernels.kinds; k++) {
      const bool coded = kernels.kinds == 2 && k == 0;
      KVTIDE_CHECK(!IsCalibrated(kernels.of[k]->k) || plan.items.tables != nullptr);
      plan.items.kinds[k] = coded ? 0 : 1;
      plan.items.bases[k] = coded ? coded_base_ : exact_base_;
      KVTIDE_ASSIGN_OR_RETURN(plan.kinds[k], PlanKindOf(kernels, k, coded));
    }
    return LaunchKernel(reinterpret_cast<const void*>(&PlanKernel<TileItems>), Launches(), kPlanThreads,
                        kernels.kinds * static_cast<int>(sizeof(PlanIndex)), false, &plan, stream);
  }

  absl::StatusOr<PlanKind> PlanKindOf(const TileKernels& kernels, int k, bool coded) {
    const AttendKernel& kernel = *kernels.of[k];
    const BlockLayout& layout = coded ? coded_ : exact_;
    const KindMemory& memory = memory_[k];
    PlanKind kind;
    kind.blocks = reinterpret_cast<const std::byte* const*>(coded ? tables_.coded : tables_.exact);
    kind.max_blocks = coded ? tables_.max_coded : tables_.max_exact;
    kind.record_bytes = layout.record_bytes();
    kind.units = memory.units;
    kind.unit_stride = static_cast<uint32_t>(batch_ * kv_heads_);
    kind.workers = workers_[kernels.joint != nullptr ? 0 : k];
    kind.worker_stride = static_cast<uint32_t>(worker_stride_);
    kind.slots = memory.slots;
    kind.slot_stride = static_cast<uint32_t>(SlotCount(batch_ * kv_heads_, worker_stride_));
    kind.ctas = processors_;
    kind.warps = kernels.joint != nullptr && k == 1 ? kernels.joint->joint.exact_warps : kernel.threads / 32;
    kind.entries = kernels.joint != nullptr ? kernels.joint->threads / 32 : kind.warps;
    kind.outputs = reinterpret_cast<uint64_t>(memory.outputs);
    kind.sums = reinterpret_cast<uint64_t>(memory.sums);
    kind.slot_rows = kernel.rows;
    KVTIDE_ASSIGN_OR_RETURN(kind.v_rotation, rotations_.Get(layout.pair().v, layout.v().stored_dim, true));
    kind.coded = Info(layout.pair().k).storage == Storage::kCodes;
    return kind;
  }

  absl::Status LaunchWrite(const PagedLayer& layer, PagedRows k, PagedRows v, cudaStream_t stream) {
    if (step_.sequences == 0 && step_.write_slots == nullptr) return absl::OkStatus();
    WriteParams params;
    params.k = {k.data, k.stride, exact_.k().head_dim, exact_.k().stored_dim, 0};
    params.v = {v.data, v.stride, exact_.v().head_dim, exact_.v().stored_dim,
                static_cast<int32_t>(exact_.v_codes())};
    params.slots = step_.write_slots;
    params.places = places_;
    params.tokens = step_.tokens;
    params.kv_heads = options_.shape.kv_heads;
    params.record_bytes = exact_.record_bytes();
    params.exact = ExactOf(layer);
    params.changed = changed_;
    params.tables = tables_;
    params.fill_scratch = options_.scratch != nullptr && step_.most_queries > 1;
    params.layer_base = reinterpret_cast<uint64_t>(layer.exact);
    const void* const kernel =
        options_.type == DataType::kF32   ? reinterpret_cast<const void*>(&WriteKernel<float>)
        : options_.type == DataType::kF16 ? reinterpret_cast<const void*>(&WriteKernel<__half>)
                                          : reinterpret_cast<const void*>(&WriteKernel<__nv_bfloat16>);
    const size_t chunks = kv_heads_ * Size(exact_.k().stored_dim + exact_.v().stored_dim) / 8;
    // It waits before it reads: whatever was launched last may be under way.
    return LaunchKernel(kernel, CeilDiv(Size(step_.tokens), 2), kWriteThreads, 0, overlap_, &params, stream,
                        CeilDiv(chunks, kWriteThreads));
  }

  // after_rows: the stream has got the kernel last that writes the step's rows of this layer.
  absl::Status LaunchAttend(size_t layer, PagedRows q, MutablePagedRows out, float* lse, bool after_rows,
                            cudaStream_t stream) {
    // Where rows of q and out begin is part of the plan; the first layers of an object may say something new.
    if (q.stride != query_stride_ || out.stride != output_stride_) {
      query_stride_ = q.stride;
      output_stride_ = out.stride;
      after_rows = false;
      KVTIDE_RETURN_IF_ERROR(LaunchPlan(stream));
    }
    for (size_t first = 0; first < tiles_; first += batch_)
      KVTIDE_RETURN_IF_ERROR(LaunchTiles(layer, first / batch_, std::min(batch_, tiles_ - first), q, out, lse,
                                         after_rows && first == 0, stream));
    return prefill_.Attend(PrefillLayer(layer), q, out, lse, stream);
  }

  absl::Status LaunchTiles(size_t layer, size_t launch, size_t tiles, PagedRows q, MutablePagedRows out,
                           float* lse, bool after_rows, cudaStream_t stream) {
    const TileKernels& kernels = *kernels_;
    const size_t units = tiles * kv_heads_, unit_stride = batch_ * kv_heads_;
    const int rows = std::min(kernels.rows, tile_queries_ * group_);
    const auto params_of = [&](int k) -> absl::StatusOr<AttendParams> {
      const AttendKernel& kernel = *kernels.of[k];
      const bool coded = kernels.kinds == 2 && k == 0;
      const BlockLayout& layout = coded ? coded_ : exact_;
      AttendParams params;
      params.units = memory_[k].units + launch * unit_stride;
      params.workers = workers_[kernels.joint != nullptr ? 0 : k] + launch * worker_stride_;
      params.queries = memory_[k].queries;
      params.outputs = memory_[k].outputs;
      params.sums = memory_[k].sums;
      params.head_dim = options_.shape.head_dim_k;
      params.query_type = TypeOf(options_.type);
      KVTIDE_ASSIGN_OR_RETURN(params.k_rotation,
                              rotations_.Get(layout.pair().k, layout.k().stored_dim, false));
      params.scale = options_.scale * kLog2E;
      params.key_scale = params.scale * kernel.key_unit;
      params.softcap = options_.softcap * kLog2E;
      const auto base = reinterpret_cast<uint64_t>(coded ? layers_[layer].coded : layers_[layer].exact);
      params.layer_lines = static_cast<uint32_t>((base - (coded ? coded_base_ : exact_base_)) / kLineBytes);
      params.profile_offset = static_cast<int64_t>(layer * kv_heads_ * Size(options_.shape.head_dim_k));
      params.table_offset = layer * kv_heads_ * table_bytes_;
      params.query = q.data;
      return params;
    };
    // The first kernel waits for everything before it, unless that is the one that writes rows, which has:
    // many queries are prepared meanwhile. Few leave room for CTAs of the attention kernel that begin beside
    // them, once the rows are there.
    const void* const late = kernels.joint != nullptr ? kernels.late_joint : kernels.late;
    bool dependent =
        after_rows && overlap_ && late != nullptr && Size(kernels.kinds) * units >= Size(processors_);
    const auto attend = [&](const void* query, int query_threads, size_t count, const void* function,
                            int threads, int shared, void* params) -> absl::Status {
      KVTIDE_RETURN_IF_ERROR(LaunchKernel(query, count, query_threads, 0, dependent, params, stream));
      dependent = overlap_;
      return LaunchKernel(function, Size(processors_), threads, shared, overlap_, params, stream);
    };
    if (kernels.joint != nullptr) {
      JointParams params;
      KVTIDE_ASSIGN_OR_RETURN(params.coded, params_of(0));
      KVTIDE_ASSIGN_OR_RETURN(params.exact, params_of(1));
      params.workers = params.coded.workers;
      params.coded_units = static_cast<uint32_t>(units);
      const JointKernel& joint = kernels.joint->joint;
      KVTIDE_RETURN_IF_ERROR(attend(dependent ? late : joint.query_function, 32 * rows, 2 * units,
                                    joint.function, kernels.joint->threads, joint.shared_bytes, &params));
    } else {
      for (int k = 0; k < kernels.kinds; k++) {
        const AttendKernel& kernel = *kernels.of[k];
        KVTIDE_ASSIGN_OR_RETURN(AttendParams params, params_of(k));
        // Once one has waited, all are behind the rows.
        const bool after = k == 0 && dependent;
        // Rows of calibrated keys' queries are turned together, by all warps that there may be.
        KVTIDE_RETURN_IF_ERROR(attend(after ? late : kernel.query_function,
                                      IsCalibrated(kernel.k) ? kernel.query_threads : 32 * rows, units,
                                      kernel.function, kernel.threads, kernel.shared_bytes, &params));
      }
    }
    CombineParams merge;
    merge.groups = plan_groups_ + launch * unit_stride;
    merge.sources = plan_sources_ + 2 * launch * unit_stride;
    merge.group_count = static_cast<int32_t>(units);
    merge.rows = rows;
    merge.team = team_;
    merge.head_dim = options_.shape.head_dim_v;
    merge.output_type = TypeOf(options_.output_type);
    merge.output = out.data;
    merge.lse = lse == nullptr ? unwanted_ : lse;
    merge.sinks = layers_[layer].sinks;
    const size_t warps = units * Size(rows) * Size(team_);
    return LaunchKernel(FindCombineKernel(exact_.v().stored_dim, team_), CeilDiv(warps, kCombineWarps),
                        32 * kCombineWarps, 0, overlap_, &merge, stream);
  }

  absl::Status LaunchSeals(int first_layer, int layers, cudaStream_t stream) {
    if (step_.seals == 0) return absl::OkStatus();
    SealParams params = seal_;
    params.pages = step_.seal_pages;
    params.count = step_.seal_count;
    params.seals = step_.seals;
    params.profiles = step_.seal_profiles;
    params.most_profiles = options_.max_profiles;
    params.profile_stride = profile_stride_;
    params.first_layer = first_layer;
    params.layer_count = layers;
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(reinterpret_cast<const void*>(&SealJobsKernel), 1, kSealThreads, 0,
                                        false, &params, stream));
    const int jobs = step_.seals * layers * options_.shape.kv_heads;
    KVTIDE_CUDA_RETURN_IF_ERROR(
        LaunchEncode(options_.pair.k, Side::kKey, coded_.k(), RowSource::kF16Page, params.k, jobs, stream));
    KVTIDE_CUDA_RETURN_IF_ERROR(
        LaunchEncode(options_.pair.v, Side::kValue, coded_.v(), RowSource::kF16Page, params.v, jobs, stream));
    return absl::OkStatus();
  }

  template <class T>
  absl::StatusOr<T*> Allocate(size_t count) {
    buffers_.emplace_back();
    KVTIDE_RETURN_IF_ERROR(buffers_.back().Reserve(count * sizeof(T), count * sizeof(T)));
    bytes_ += count * sizeof(T);
    return reinterpret_cast<T*>(buffers_.back().data());
  }

  PagedOptions options_;
  std::vector<PagedLayer> layers_;
  BlockLayout coded_, exact_;
  DeviceImage image_;
  int processors_ = 0, group_ = 0;
  bool overlap_ = false;  // kernels may start while those before them end
  size_t kv_heads_ = 0, bytes_ = 0;
  uint64_t coded_base_ = 0, exact_base_ = 0;
  TileKernels narrow_, wide_;
  Rotations rotations_;
  std::vector<DeviceBuffer> buffers_;
  float *mean_ = nullptr, *gain_ = nullptr;  // [max_profiles, at least 1][layers][kv_heads][head_dim_k]
  int64_t profile_stride_ = 0;               // from a profile to the next, if there are any
  DeviceProfile transforms_, head_tables_;   // of calibrated keys, [layers][kv_heads]
  size_t table_bytes_ = 0;                   // of a head of the latter, if there are any
  int2* places_ = nullptr;                   // of the step's rows
  PagedTables tables_;
  PagedTile* tile_ = nullptr;
  CombineGroup* plan_groups_ = nullptr;
  CombineSource* plan_sources_ = nullptr;
  KindMemory memory_[2];
  AttendWorker* workers_[2] = {};
  size_t worker_stride_ = 0;
  size_t batch_ = 0;  // tiles of a launch
  SealParams seal_;
  unsigned long long* changed_ = nullptr;
  float* unwanted_ = nullptr;  // log-sum-exps that nobody asked for
  // The step at hand.
  bool planned_ = false;
  PagedStep step_;
  const TileKernels* kernels_ = nullptr;
  size_t tiles_ = 0;
  int tile_queries_ = 0;  // of a sequence with tiles, at most
  PagedPrefill prefill_;
  int64_t query_stride_ = 0, output_stride_ = 0;  // elements, as planned
  int team_ = 1;
};

}  // namespace
}  // namespace kvtide::cuda

namespace kvtide {

absl::StatusOr<std::unique_ptr<PagedAttention>> MakeCudaPagedAttention(const PagedOptions& options,
                                                                       std::span<const PagedLayer> layers) {
  auto attention = std::make_unique<cuda::PagedOnDevice>();
  KVTIDE_RETURN_IF_ERROR(attention->Create(options, layers));
  return attention;
}

}  // namespace kvtide
