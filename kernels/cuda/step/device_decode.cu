#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/settled.h"
#include "kernels/cuda/step/device_decode.h"
#include "kernels/cuda/step/device_plan.cuh"

namespace kvtide {
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
QueryType TypeOf(DataType type) {
  return type == DataType::kF32   ? QueryType::kF32
         : type == DataType::kF16 ? QueryType::kF16
                                  : QueryType::kBf16;
}

struct DecodeLayerPlan {
  int32_t layer = 0;
  const float* mean = nullptr;
  const float* gain = nullptr;
};

// Items are sequences with one query each, launches are layers. Sequences without tokens get output 0.
struct DecodeItems {
  struct Kind {
    const int32_t* tokens = nullptr;
    const int32_t* hidden = nullptr;
  };
  Kind of_kind[2];
  const DecodeLayerPlan* layers = nullptr;
  int32_t kv_heads = 0, group = 0, head_dim_k = 0, head_dim_v = 0;

  __device__ int Hidden(int k, int item) const {
    return of_kind[k].hidden == nullptr ? 0 : max(of_kind[k].hidden[item], 0);
  }
  __device__ int Tokens(const PlanKind* kinds, int k, int item) const {
    return min(max(of_kind[k].tokens[item], 0), kinds[k].max_blocks * kBlockTokens);
  }
  // Pages [hidden / 64, ceil(tokens / 64)) of a sequence.
  __device__ int2 Pages(const PlanKind* kinds, int k, int item) const {
    const int tokens = Tokens(kinds, k, item), hidden = Hidden(k, item);
    return hidden >= tokens ? make_int2(0, 0)
                            : make_int2(hidden / kBlockTokens, (tokens + kBlockTokens - 1) / kBlockTokens);
  }
  __device__ const std::byte* const* Blocks(const PlanKind* kinds, int k, int item) const {
    return kinds[k].blocks + static_cast<size_t>(item) * static_cast<size_t>(kinds[k].max_blocks);
  }
  __device__ uint64_t RecordBase(const PlanKind* kinds, int k, size_t launch) const {
    return static_cast<uint64_t>(layers[launch].layer) * static_cast<uint64_t>(kv_heads) *
           kinds[k].record_bytes;
  }
  __device__ void FillUnit(const PlanKind* kinds, int k, size_t launch, int item, int head, int2 pages,
                           AttendUnit& unit) const {
    const int64_t g = int64_t{item} * kv_heads + head;
    unit.first_query = g * group * head_dim_k;
    if (kinds[k].coded && layers[launch].mean != nullptr) unit.mean = layers[launch].mean + g * head_dim_k;
    if (kinds[k].coded && layers[launch].gain != nullptr) unit.gain = layers[launch].gain + g * head_dim_k;
    unit.tokens = Tokens(kinds, k, item) - pages.x * kBlockTokens;
    unit.rows = unit.rows_per_query = group;
    unit.causal_end = 1 << 30;
    unit.window_begin = Hidden(k, item) - pages.x * kBlockTokens;
  }
  __device__ void FillGroup(size_t, int item, int head, CombineGroup& to) const {
    const int64_t g = int64_t{item} * kv_heads + head;
    to.first_output = g * group * head_dim_v;
    to.first_lse = g * group;
    to.first_head = head * group;
    to.rows = to.rows_per_query = group;
  }
};

class DecodeOnDevice final : public DeviceDecode {
 public:
  absl::Status Create(const DecodeOptions& options, const std::vector<DecodeLayer>& layers) {
    options_ = options;
    KVTIDE_RETURN_IF_ERROR(Check(layers));
    int device = 0;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
    KVTIDE_ASSIGN_OR_RETURN(image_, FindDeviceImage(device));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
    group_ = options.heads / options.shape.kv_heads;
    of_layers_ = layers;
    layers_ = layers.size();
    units_ = Size(options.max_sequences) * Size(options.shape.kv_heads);
    KVTIDE_RETURN_IF_ERROR(FindKernels());
    if (options.coded.blocks != nullptr) KVTIDE_RETURN_IF_ERROR(AddKind(options.coded, options.pair));
    if (options.exact.blocks != nullptr) KVTIDE_RETURN_IF_ERROR(AddKind(options.exact, ExactPair()));
    if (joint_ != nullptr) KVTIDE_RETURN_IF_ERROR(JoinKinds());

    std::vector<DecodeLayerPlan> plan;
    for (const DecodeLayer& layer : layers) plan.push_back({layer.layer, layer.k_mean, layer.k_gain});
    DecodeLayerPlan* plan_layers = nullptr;
    KVTIDE_ASSIGN_OR_RETURN(plan_layers, Allocate<DecodeLayerPlan>(plan.size()));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(plan_layers, plan.data(), plan.size() * sizeof(DecodeLayerPlan)));
    KVTIDE_ASSIGN_OR_RETURN(plan_.groups, Allocate<CombineGroup>(layers_ * units_));
    KVTIDE_ASSIGN_OR_RETURN(plan_.sources, Allocate<CombineSource>(2 * layers_ * units_));
    plan_.group_stride = static_cast<uint32_t>(units_);
    plan_.item_count = options.max_sequences;
    plan_.kv_heads = options.shape.kv_heads;
    plan_.items.layers = plan_layers;
    plan_.items.kv_heads = options.shape.kv_heads;
    plan_.items.group = group_;
    plan_.items.head_dim_k = options.shape.head_dim_k;
    plan_.items.head_dim_v = options.shape.head_dim_v;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        PlanKernel<DecodeItems>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(PlanBytes())));

    const int stored_v = StoredDim(options.shape.head_dim_v);
    // Few rows are cut into many states each, and leave warps free to share them. Many rows fill the GPU by
    // themselves, and further warps would be in their way (unless one KV head alone may be cut for all CTAs).
    const size_t rows = units_ * Size(group_), processors = Size(processors_);
    merge_.team = plan_.team = rows < 6 * processors                                  ? 4
                               : rows < 12 * processors || options.shape.kv_heads < 4 ? 2
                                                                                      : 1;
    combine_ = FindCombineKernel(stored_v, merge_.team);
    if (combine_ == nullptr)
      return absl::InvalidArgumentError(
          absl::StrCat("head dim ", options.shape.head_dim_v, " of V has no merge kernel"));
    merge_.group_count = static_cast<int32_t>(units_);
    merge_.rows = group_;
    merge_.head_dim = options.shape.head_dim_v;
    merge_.output_type = TypeOf(options.type);
    return absl::OkStatus();
  }

  absl::Status Plan(cudaStream_t stream) override {
    return Settled(LaunchKernel(reinterpret_cast<const void*>(&PlanKernel<DecodeItems>), layers_,
                                kPlanThreads, static_cast<int>(PlanBytes()), false, &plan_, stream),
                   stream);
  }
  absl::Status Attend(int index, cudaStream_t stream) override {
    return Settled(Launch(index, stream), stream);
  }

  size_t device_bytes() const override { return bytes_; }

 private:
  absl::Status Launch(int index, cudaStream_t stream) {
    if (index < 0 || Size(index) >= layers_)
      return absl::InvalidArgumentError(absl::StrCat("layer index ", index, " of ", layers_));
    const size_t layer = Size(index);
    bool dependent = false;  // the first kernel waits for everything before it: for the plan, and for what
                             // the engine wrote
    const auto params_of = [&](int k) {
      const PlanKind& kind = plan_.kinds[k];
      AttendParams params = params_[k];
      params.units = kind.units + layer * kind.unit_stride;
      params.workers = kind.workers + layer * kind.worker_stride;
      params.query = of_layers_[layer].q;
      return params;
    };
    const bool overlap = HasBulkCopies(image_.image_capability);
    const auto launch = [&](const void* query, size_t units, const void* attend, int32_t ctas, int threads,
                            int shared, void* params) -> absl::Status {
      KVTIDE_RETURN_IF_ERROR(LaunchKernel(query, units, 32 * group_, 0, dependent, params, stream));
      dependent = overlap;
      return LaunchKernel(attend, Size(ctas), threads, shared, dependent, params, stream);
    };
    if (joint_ != nullptr) {
      JointParams params{params_of(0), params_of(1)};
      params.workers = params.coded.workers;
      params.coded_units = static_cast<uint32_t>(units_);
      KVTIDE_RETURN_IF_ERROR(launch(joint_->joint.query_function, 2 * units_, joint_->joint.function,
                                    plan_.joint_ctas, joint_->threads, joint_->joint.shared_bytes, &params));
    } else {
      for (int k = 0; k < plan_.kind_count; k++) {
        const AttendKernel& kernel = *kernels_[k];
        AttendParams params = params_of(k);
        KVTIDE_RETURN_IF_ERROR(launch(kernel.query_function, units_, kernel.function, plan_.kinds[k].ctas,
                                      kernel.threads, kernel.shared_bytes, &params));
      }
    }
    CombineParams merge = merge_;
    merge.groups = plan_.groups + layer * units_;
    merge.sources = plan_.sources + 2 * layer * units_;
    merge.output = of_layers_[layer].out;
    merge.lse = of_layers_[layer].lse;
    merge.sinks = of_layers_[layer].sinks;
    const size_t warps = units_ * Size(group_) * Size(merge.team);
    return LaunchKernel(combine_, (warps + kCombineWarps - 1) / kCombineWarps, 32 * kCombineWarps, 0,
                        dependent, &merge, stream);
  }

  absl::Status Check(const std::vector<DecodeLayer>& layers) const {
    KVTIDE_RETURN_IF_ERROR(CheckGroupShape(options_.shape));
    if (options_.heads <= 0 || options_.heads % options_.shape.kv_heads != 0)
      return absl::InvalidArgumentError(
          absl::StrCat(options_.heads, " query heads over ", options_.shape.kv_heads, " KV heads"));
    if (options_.max_sequences < 1 || options_.max_sequences > kPlanItems)
      return absl::InvalidArgumentError(
          absl::StrCat("max_sequences is ", options_.max_sequences, ", 1..", kPlanItems, " are possible"));
    if (layers.empty()) return absl::InvalidArgumentError("no layers");
    for (const DecodeTable* table : {&options_.coded, &options_.exact})
      if (table->blocks != nullptr && (table->tokens == nullptr || table->max_blocks < 1))
        return absl::InvalidArgumentError("a block table without tokens or with max_blocks 0");
    if (options_.coded.blocks == nullptr && options_.exact.blocks == nullptr)
      return absl::InvalidArgumentError("no block table");
    for (const DecodeLayer& layer : layers) {
      if (layer.layer < 0 || layer.layer >= options_.shape.layers)
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer.layer, " of ", options_.shape.layers));
      if (layer.q == nullptr || layer.out == nullptr || layer.lse == nullptr)
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer.layer, ": no q, out or lse"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<const AttendKernel*> KernelOf(CachePair pair) const {
    if (Info(pair.k).calibrated)
      return absl::InvalidArgumentError(
          absl::StrCat(PairName(pair),
                       ": calibrated keys need transforms, which sequences do not name here; "
                       "choose another K type"));
    const BlockLayout layout(options_.shape, pair);
    const AttendKernel* const kernel = FindAttendKernel(FormOf(pair.k), FormOf(pair.v), layout.k().stored_dim,
                                                        layout.v().stored_dim, group_, image_.shared_limit);
    if (kernel == nullptr || kernel->rows < group_)
      return absl::InvalidArgumentError(absl::StrCat(
          "no kernel reads ", PairName(pair), " pages of head dims K ", options_.shape.head_dim_k, " and V ",
          options_.shape.head_dim_v, " for ", group_,
          " query heads per KV head; kernels/cuda/attend/instantiate.cuh lists the pairs, up to 16 heads"));
    return kernel;
  }

  // The kernel of each kind, and whether one launch can read both.
  absl::Status FindKernels() {
    const auto allow = [](const void* function, int bytes) {
      return StatusOf(
          KVTIDE_CUDA_TRY(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)),
          "shared memory of a kernel");
    };
    int kinds = 0;
    for (const auto& [table, pair] :
         {std::pair{&options_.coded, options_.pair}, std::pair{&options_.exact, ExactPair()}}) {
      if (table->blocks == nullptr) continue;
      KVTIDE_ASSIGN_OR_RETURN(kernels_[kinds], KernelOf(pair));
      KVTIDE_RETURN_IF_ERROR(allow(kernels_[kinds]->function, kernels_[kinds]->shared_bytes));
      kinds++;
    }
    if (kinds < 2 || processors_ < 2 || !CanJoin(*kernels_[0], *kernels_[1])) return absl::OkStatus();
    joint_ = kernels_[0];
    return allow(joint_->joint.function, joint_->joint.shared_bytes);
  }

  absl::Status AddKind(const DecodeTable& table, CachePair pair) {
    const BlockLayout layout(options_.shape, pair);
    const AttendKernel* const kernel = kernels_[plan_.kind_count];
    PlanKind kind;
    kind.blocks = table.blocks;
    plan_.items.of_kind[plan_.kind_count] = {table.tokens, table.hidden};
    kind.max_blocks = table.max_blocks;
    kind.record_bytes = layout.record_bytes();
    // No more CTAs than pages that there can be.
    kind.ctas = static_cast<int32_t>(std::min(Size(processors_), units_ * Size(table.max_blocks)));
    kind.warps = joint_ != nullptr && kernel != joint_ ? joint_->joint.exact_warps : kernel->threads / 32;
    kind.entries = kind.warps;
    const size_t workers = Size(kind.ctas) * Size(kind.warps), slots = SlotCount(units_, workers);
    kind.unit_stride = static_cast<uint32_t>(units_);
    kind.slot_stride = static_cast<uint32_t>(slots);
    KVTIDE_ASSIGN_OR_RETURN(kind.units, Allocate<AttendUnit>(layers_ * units_));
    if (joint_ == nullptr) {
      KVTIDE_ASSIGN_OR_RETURN(kind.workers, Allocate<AttendWorker>(layers_ * workers));
      kind.worker_stride = static_cast<uint32_t>(workers);
    }
    KVTIDE_ASSIGN_OR_RETURN(kind.slots, Allocate<uint32_t>(layers_ * slots));
    AttendParams& params = params_[plan_.kind_count];
    KVTIDE_ASSIGN_OR_RETURN(params.queries, Allocate<std::byte>(units_ * Size(kernel->query_bytes)));
    KVTIDE_ASSIGN_OR_RETURN(params.outputs, Allocate<float>(slots * Size(kernel->rows) * Size(kernel->dv)));
    KVTIDE_ASSIGN_OR_RETURN(params.sums, Allocate<StateHead>(slots * Size(kernel->rows)));
    params.head_dim = options_.shape.head_dim_k;
    params.query_type = TypeOf(options_.type);
    KVTIDE_ASSIGN_OR_RETURN(params.k_rotation, rotations_.Get(pair.k, layout.k().stored_dim, false));
    params.scale = options_.scale * kLog2E;
    params.key_scale = params.scale * kernel->key_unit;
    params.softcap = options_.softcap * kLog2E;
    kind.outputs = reinterpret_cast<uint64_t>(params.outputs);
    kind.sums = reinterpret_cast<uint64_t>(params.sums);
    kind.slot_rows = kernel->rows;
    KVTIDE_ASSIGN_OR_RETURN(kind.v_rotation, rotations_.Get(pair.v, layout.v().stored_dim, true));
    kind.coded = Info(pair.k).storage == Storage::kCodes;
    plan_.kinds[plan_.kind_count++] = kind;
    return absl::OkStatus();
  }

  // One launch for both kinds, and one worker table.
  absl::Status JoinKinds() {
    plan_.joint = true;
    plan_.joint_ctas = std::min(processors_, plan_.kinds[0].ctas + plan_.kinds[1].ctas);
    const int entries = joint_->threads / 32;
    const size_t workers = Size(plan_.joint_ctas) * Size(entries);
    AttendWorker* table = nullptr;
    KVTIDE_ASSIGN_OR_RETURN(table, Allocate<AttendWorker>(layers_ * workers));
    for (PlanKind& kind : plan_.kinds) {
      kind.workers = table;
      kind.worker_stride = static_cast<uint32_t>(workers);
      kind.entries = entries;
    }
    return absl::OkStatus();
  }

  size_t PlanBytes() const { return Size(plan_.kind_count) * sizeof(PlanIndex); }

  template <class T>
  absl::StatusOr<T*> Allocate(size_t count) {
    buffers_.emplace_back();
    KVTIDE_RETURN_IF_ERROR(buffers_.back().Reserve(count * sizeof(T)));
    bytes_ += count * sizeof(T);
    return reinterpret_cast<T*>(buffers_.back().data());
  }

  DecodeOptions options_;
  DeviceImage image_;
  int processors_ = 0, group_ = 0;
  std::vector<DecodeLayer> of_layers_;
  size_t layers_ = 0, units_ = 0, bytes_ = 0;
  Rotations rotations_;
  std::vector<DeviceBuffer> buffers_;
  const AttendKernel* kernels_[2] = {};
  const AttendKernel* joint_ = nullptr;  // of the coded kind, if one launch reads both
  AttendParams params_[2];
  PlanParams<DecodeItems> plan_;
  CombineParams merge_;
  const void* combine_ = nullptr;
};

}  // namespace
}  // namespace cuda

absl::StatusOr<std::unique_ptr<DeviceDecode>> DeviceDecode::Make(const DecodeOptions& options,
                                                                 const std::vector<DecodeLayer>& layers) {
  auto decode = std::make_unique<cuda::DecodeOnDevice>();
  KVTIDE_RETURN_IF_ERROR(decode->Create(options, layers));
  return decode;
}

}  // namespace kvtide
