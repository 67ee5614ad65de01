#include "kernels/cuda/prefill/prefill_call.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/prefill/convert_rows.h"
#include "kernels/cuda/prefill/prefill_map.h"
#include "kernels/cuda/prefill/prefill_plan.h"
#include "kernels/cuda/prefill/prefill_rounds.h"

namespace kvtide::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

size_t Size(int64_t n) { return static_cast<size_t>(n); }
size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }
int WidestDim(const GroupShape& shape) { return std::max(shape.head_dim_k, shape.head_dim_v); }

class Prefill {
 public:
  Prefill(PrefillRounds& plan, PrefillTransforms& transforms, const GroupShape& shape,
          const AttendLayerArgs& args, LayerTensors& tensors, const AttendEnvironment& environment,
          Workspace& workspace)
      : shape_(shape),
        args_(args),
        tensors_(tensors),
        environment_(environment),
        workspace_(workspace),
        kernel_(plan.kernel()),
        plan_(plan),
        transforms_(transforms) {}

  absl::Status Run() {
    KVTIDE_RETURN_IF_ERROR(Place());
    return Execute();
  }

 private:
  bool WidensQueries() const { return tensors_.query_type() != DataType::kF32; }
  bool NarrowsOutput() const { return tensors_.output_type() != DataType::kF32; }

  // The layer's means and gains of all heads that jobs name.
  void GatherProfiles() {
    const auto add = [&](const std::vector<float>& values) {
      const auto at = static_cast<int64_t>(floats_.size());
      floats_.insert(floats_.end(), values.begin(), values.end());
      return values.empty() ? -1 : at;
    };
    for (const PrefillProfile& of : plan_.profiles()) {
      const HeadProfile& head = of.profile->key(args_.layer, of.head);
      const int64_t mean = add(head.mean), gain = add(head.gain);
      profiles_.push_back({mean, gain});
    }
  }

  // What the keys of a job are coded with: means and gains among `floats`, or the head's transform.
  absl::Status SetProfile(const PrefillRound::Conversion& conversion, int64_t profile, const float* floats,
                          CodecJob* job) {
    if (Info(conversion.layout->pair().k).calibrated) {
      const PrefillProfile& of = plan_.profiles()[Size(profile)];
      std::shared_ptr<const DeviceProfile>& sent = transforms_[of.profile];
      if (sent == nullptr) {
        KVTIDE_ASSIGN_OR_RETURN(sent, environment_.profiles->Get(*of.profile, ProfilePart::kTransforms));
      }
      job->tide = sent->heads() + args_.layer * shape_.kv_heads + of.head;
      return absl::OkStatus();
    }
    const ProfilePlace& place = profiles_[Size(profile)];
    job->mean = place.mean < 0 ? nullptr : floats + place.mean;
    job->gain = place.gain < 0 ? nullptr : floats + place.gain;
    return absl::OkStatus();
  }

  // Takes memory and makes offsets addresses.
  absl::Status Place() {
    GatherProfiles();
    size_t bytes = tensors_.staging_bytes() + floats_.size() * sizeof(float), arrays = 4;
    for (const PrefillRound& round : plan_.rounds()) {
      bytes += round.parts.size() * sizeof(PrefillPart) + round.groups.size() * sizeof(PrefillGroup) +
               round.slots.size() * sizeof(uint32_t) + round.places.size() * sizeof(PagePlace);
      for (const PrefillRound::Conversion& c : round.conversions) bytes += c.jobs.size() * sizeof(CodecJob);
      arrays += 4 + round.conversions.size();
    }
    const size_t tiles = RoundUp(plan_.scratch_bytes()),
                 outputs = RoundUp(plan_.most_parts() * Size(kernel_.rows * kernel_.dim) * sizeof(float));
    KVTIDE_RETURN_IF_ERROR(workspace_.Begin(Workspace::Bound(arrays, bytes)));
    KVTIDE_RETURN_IF_ERROR(tensors_.ReserveResults(workspace_, false, false));
    // The kernels take and give f32.
    const size_t wide_queries = WidensQueries() ? RoundUp(tensors_.query_values() * sizeof(float)) : 0,
                 wide_output = NarrowsOutput() ? tensors_.output_values() * sizeof(float) : 0;
    KVTIDE_RETURN_IF_ERROR(workspace_.rows.Reserve(wide_queries + wide_output));
    KVTIDE_RETURN_IF_ERROR(
        workspace_.scratch.Reserve(tiles + outputs + plan_.most_parts() * Size(kernel_.rows) * sizeof(float2),
                                   environment_.scratch_bytes));
    std::byte* const scratch = workspace_.scratch.data();
    PageMaps maps;
    if (kernel_.warpgroups && plan_.most_parts() > 0) {
      const std::byte* const blocks = plan_.blocks(args_.layer);
      KVTIDE_RETURN_IF_ERROR(MakePageMap(scratch, kernel_.dim, &maps.scratch));
      KVTIDE_RETURN_IF_ERROR(MakePageMap(blocks == nullptr ? scratch : blocks, kernel_.dim, &maps.blocks));
    }
    KVTIDE_RETURN_IF_ERROR(tensors_.PlaceQueries(workspace_, nullptr));
    queries_ = WidensQueries() ? reinterpret_cast<float*>(workspace_.rows.data())
                               : static_cast<const float*>(tensors_.query());
    std::byte* const output =
        NarrowsOutput() ? workspace_.rows.data() + wide_queries : static_cast<std::byte*>(tensors_.output());
    output_ = reinterpret_cast<float*>(output);
    const float* const floats = workspace_.Upload(floats_);
    const float* const sinks = tensors_.sinks();
    const auto moved = [](auto* offset, std::byte* base) {
      return reinterpret_cast<decltype(offset)>(base + reinterpret_cast<size_t>(offset));
    };
    for (PrefillRound& round : plan_.rounds()) {
      for (PrefillRound::Conversion& c : round.conversions) {
        const auto jobs = workspace_.Place<CodecJob>(c.jobs.size());
        for (size_t i = 0; i < c.jobs.size(); i++) {
          CodecJob job;
          job.source = c.jobs[i].source + c.layout->RecordOffset(args_.layer, 0);
          job.target = scratch + c.jobs[i].target;
          job.position = c.jobs[i].position;
          if (c.jobs[i].profile >= 0) KVTIDE_RETURN_IF_ERROR(SetProfile(c, c.jobs[i].profile, floats, &job));
          jobs.host[i] = job;
        }
        c.device = jobs.device;
      }
      const PagePlace* const places = workspace_.Upload(round.places);
      const auto parts = workspace_.Place<PrefillPart>(round.parts.size());
      for (size_t i = 0; i < round.parts.size(); i++) {
        parts.host[i] = round.parts[i].part;
        parts.host[i].tiles = scratch + round.parts[i].tiles;
        parts.host[i].pages = places + round.parts[i].pages;
        parts.host[i].query = queries_ + round.parts[i].query;
      }
      std::vector<PrefillGroup> groups = round.groups;
      for (PrefillGroup& group : groups) {
        group.output = moved(group.output, output);
        group.lse = moved(group.lse, reinterpret_cast<std::byte*>(tensors_.lse()));
        group.sinks =
            sinks == nullptr ? nullptr : sinks + reinterpret_cast<size_t>(group.sinks) / sizeof(float);
      }
      round.attend.maps = maps;
      round.attend.parts = parts.device;
      round.attend.outputs = reinterpret_cast<float*>(scratch + tiles);
      round.attend.sums = reinterpret_cast<float2*>(scratch + tiles + outputs);
      round.attend.head_dim = shape_.head_dim_k;
      round.attend.value_dim = shape_.head_dim_v;
      round.attend.scale = args_.scale * kLog2E;
      round.attend.softcap = args_.softcap * kLog2E;
      round.attend.groups = round.merge.groups = workspace_.Upload(groups);
      round.merge.slots = workspace_.Upload(round.slots);
      round.merge.outputs = round.attend.outputs;
      round.merge.sums = round.attend.sums;
      round.merge.group_count = static_cast<int32_t>(round.merged_groups);
      round.merge.head_dim = shape_.head_dim_v;
      round.merge.rows = kernel_.rows;
    }
    return absl::OkStatus();
  }

  absl::Status Execute() {
    const cudaStream_t stream = workspace_.stream();
    KVTIDE_RETURN_IF_ERROR(workspace_.Send());
    if (environment_.begin != nullptr)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.begin, stream));
    if (WidensQueries())
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchWiden(tensors_.query(), tensors_.query_type(),
                                              const_cast<float*>(queries_), tensors_.query_values(), stream));
    const bool many = plan_.rounds().size() > 2;
    for (PrefillRound& round : plan_.rounds()) {
      if (IsCancelled(args_.cancellation)) return absl::CancelledError("attention was cancelled");
      KVTIDE_RETURN_IF_ERROR(LaunchRound(round));
      if (many) KVTIDE_RETURN_IF_ERROR(workspace_.EndStep());
    }
    if (NarrowsOutput())
      KVTIDE_CUDA_RETURN_IF_ERROR(
          LaunchNarrow(output_, tensors_.output(), tensors_.output_type(), tensors_.output_values(), stream));
    if (environment_.end != nullptr) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(environment_.end, stream));
    return absl::OkStatus();
  }

  // Decodes, attends and merges.
  absl::Status LaunchRound(PrefillRound& round) {
    const cudaStream_t stream = workspace_.stream();
    for (const PrefillRound::Conversion& c : round.conversions) {
      const bool key = c.side == Side::kKey;
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(
          key ? c.layout->pair().k : c.layout->pair().v, c.side, key ? c.layout->k() : c.layout->v(),
          kernel_.warpgroups ? RowTarget::kF16Page : RowTarget::kF16Tile, kernel_.dim, c.device,
          static_cast<int>(c.jobs.size()), stream));
    }
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(kernel_.attend, round.parts.size(), kernel_.threads,
                                        kernel_.shared_bytes, false, &round.attend, stream));
    return LaunchKernel(kernel_.merge,
                        (round.merged_groups * Size(kernel_.rows) + kMergeWarps - 1) / kMergeWarps,
                        32 * kMergeWarps, 0, false, &round.merge, stream);
  }

  const GroupShape& shape_;
  const AttendLayerArgs& args_;
  LayerTensors& tensors_;
  const AttendEnvironment& environment_;
  Workspace& workspace_;
  const PrefillKernel& kernel_;
  PrefillRounds& plan_;
  PrefillTransforms& transforms_;
  std::vector<float> floats_;
  struct ProfilePlace {
    int64_t mean, gain;  // in floats_, -1 = none
  };
  std::vector<ProfilePlace> profiles_;
  const float* queries_ = nullptr;  // on the device, f32
  float* output_ = nullptr;
};

// Whether decoding a block to tiles is fast.
bool DecodesFast(CachePair pair) {
  const auto fast = [](CacheType type) {
    return Info(type).storage == Storage::kHalf || Info(type).calibrated || HasRowCodec(type);
  };
  return fast(pair.k) && fast(pair.v);
}

}  // namespace

bool IsPrefill(const PlanItem& item, const GroupShape& shape, int heads,
               const AttendEnvironment& environment) {
  if (int64_t{item.queries} * (heads / shape.kv_heads) <= environment.most_decode_rows || item.runs.empty())
    return false;
  for (const BlockRun& run : item.runs)
    if (!DecodesFast(run.layout->pair())) return false;
  const PrefillKernel* kernel = FindPrefillKernel(WidestDim(shape), environment.warpgroups);
  return kernel != nullptr &&
         (environment.shared_limit == 0 || kernel->shared_bytes <= environment.shared_limit);
}

absl::Status PreparePrefillKernels(const DeviceImage& image) {
  for (const PrefillKernel& kernel : AllPrefillKernels()) {
    if (kernel.shared_bytes > image.shared_limit ||
        (kernel.warpgroups && !HasWarpgroups(image.image_capability)))
      continue;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kernel.attend, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes));
  }
  return absl::OkStatus();
}

PrefillPlan::PrefillPlan(std::vector<PlanItem> items, const AttendPlanArgs& batch, const GroupShape& shape,
                         const AttendEnvironment& environment)
    : items_(std::move(items)),
      batch_{batch.heads, batch.causal, batch.window, items_},
      shape_(shape),
      environment_(environment),
      rounds_(batch_, shape, environment, *FindPrefillKernel(WidestDim(shape), environment.warpgroups)) {}

absl::Status PrefillPlan::Attend(const AttendLayerArgs& args, LayerTensors& tensors, Workspace& workspace) {
  return Prefill(rounds_, transforms_, shape_, args, tensors, environment_, workspace).Run();
}

}  // namespace kvtide::cuda
