#include "kernels/cuda/codec/decode_call.h"

#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"

namespace kvtide::cuda {
namespace {

// K or V.
absl::Status DecodeSide(const DecodeArgs& args, Side side, float* out, Workspace& workspace) {
  const BlockLayout& layout = *args.layout;
  const bool key = side == Side::kKey;
  const HalfLayout& half = key ? layout.k() : layout.v();
  const size_t dim = static_cast<size_t>(half.head_dim), heads = static_cast<size_t>(layout.shape().kv_heads),
               bytes = kBlockTokens * heads * dim * sizeof(float);
  KVTIDE_RETURN_IF_ERROR(workspace.rows.Reserve(bytes));
  KVTIDE_RETURN_IF_ERROR(workspace.results_host.Reserve(bytes));
  KVTIDE_RETURN_IF_ERROR(
      workspace.Begin(Workspace::Bound(3 + 2 * heads, heads * (sizeof(CodecJob) + 2 * dim * sizeof(float)))));
  std::vector<CodecJob> jobs;
  for (size_t head = 0; head < heads; head++) {
    const int h = static_cast<int>(head);
    CodecJob job;
    job.source = args.block + layout.RecordOffset(args.layer, h) + (key ? 0 : layout.v_codes());
    job.target = workspace.rows.data() + head * dim * sizeof(float);
    job.row_stride = static_cast<int32_t>(heads * dim);
    if (key && args.profile != nullptr) {
      const HeadProfile& profile = args.profile->key(args.layer, h);
      if (!profile.mean.empty()) job.mean = workspace.Upload(profile.mean);
      if (!profile.gain.empty()) job.gain = workspace.Upload(profile.gain);
    }
    jobs.push_back(job);
  }
  const CodecJob* device_jobs = workspace.Upload(jobs);
  KVTIDE_RETURN_IF_ERROR(workspace.Send());
  KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(key ? layout.pair().k : layout.pair().v, side, half,
                                           RowTarget::kF32Rows, 0, device_jobs, static_cast<int>(jobs.size()),
                                           workspace.stream()));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace.results_host.data(), workspace.rows.data(), bytes,
                                              cudaMemcpyDeviceToHost, workspace.stream()));
  KVTIDE_RETURN_IF_ERROR(workspace.Finish());
  std::memcpy(out, workspace.results_host.data(), bytes);
  return absl::OkStatus();
}

}  // namespace

absl::Status DecodeCall(const DecodeArgs& args, Workspace& workspace) {
  if (args.layout == nullptr || args.block == nullptr)
    return absl::InvalidArgumentError("decode: no layout or no block");
  if (args.layer < 0 || args.layer >= args.layout->shape().layers)
    return absl::InvalidArgumentError(
        absl::StrCat("decode: layer ", args.layer, " of ", args.layout->shape().layers));
  if (args.k != nullptr) KVTIDE_RETURN_IF_ERROR(DecodeSide(args, Side::kKey, args.k, workspace));
  if (args.v != nullptr) KVTIDE_RETURN_IF_ERROR(DecodeSide(args, Side::kValue, args.v, workspace));
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
