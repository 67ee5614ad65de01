#include "kernels/cuda/codec/decode_call.h"

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/cancellation.h"
#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/store_row.h"

namespace kvtide::cuda {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// One layer of a block, and the rows of it that somebody wants.
struct BlockRows {
  const std::byte* block = nullptr;
  int layer = 0;
  int64_t position = 0;  // of its first token in the sequence
  int64_t first = 0, count = kBlockTokens;
  MutableTensorView k, v;             // null = not wanted
  size_t k_row = 0, v_row = 0;        // of the tensors, where row `first` goes
  size_t k_stride = 0, v_stride = 0;  // elements
};

// K or V of blocks of one layout and profile.
absl::Status DecodeSide(const BlockLayout& layout, const Profile* profile, std::span<const BlockRows> blocks,
                        Side side, ProfileStore& store, Workspace& workspace) {
  const bool key = side == Side::kKey;
  const CacheType type = key ? layout.pair().k : layout.pair().v;
  const auto target_of = [key](const BlockRows& rows) { return key ? rows.k : rows.v; };
  if (std::all_of(blocks.begin(), blocks.end(),
                  [&](const BlockRows& rows) { return target_of(rows).data == nullptr; }))
    return absl::OkStatus();
  const HalfLayout& half = key ? layout.k() : layout.v();
  std::shared_ptr<const DeviceProfile> transforms;
  if (Info(type).calibrated) {
    KVTIDE_ASSIGN_OR_RETURN(transforms, store.Get(*profile, ProfilePart::kTransforms));
  }
  const size_t dim = Size(half.head_dim), heads = Size(layout.shape().kv_heads), width = heads * dim,
               block_values = kBlockTokens * width, bytes = blocks.size() * block_values * sizeof(float);
  KVTIDE_RETURN_IF_ERROR(workspace.rows.Reserve(bytes));
  KVTIDE_RETURN_IF_ERROR(workspace.results_host.Reserve(bytes));
  const size_t jobs_count = blocks.size() * heads,
               profiles = 2 * std::min(jobs_count, Size(layout.shape().layers) * heads);
  KVTIDE_RETURN_IF_ERROR(workspace.Begin(Workspace::Bound(
      1 + profiles,
      jobs_count * sizeof(CodecJob) + (profile == nullptr ? 0 : profiles * dim * sizeof(float)))));
  std::map<const std::vector<float>*, const float*> placed;  // means and gains
  const auto place = [&](const std::vector<float>& values) -> const float* {
    if (values.empty()) return nullptr;
    const auto [entry, added] = placed.emplace(&values, nullptr);
    if (added) entry->second = workspace.Upload(values);
    return entry->second;
  };
  std::vector<CodecJob> jobs;
  jobs.reserve(jobs_count);
  for (size_t b = 0; b < blocks.size(); b++)
    for (size_t head = 0; head < heads; head++) {
      const int h = static_cast<int>(head);
      CodecJob job;
      job.source = blocks[b].block + layout.RecordOffset(blocks[b].layer, h) + (key ? 0 : layout.v_codes());
      job.target = workspace.rows.data() + (b * block_values + head * dim) * sizeof(float);
      job.row_stride = static_cast<int32_t>(width);
      job.position = blocks[b].position;
      if (transforms != nullptr) {
        job.tide = transforms->heads() + Size(blocks[b].layer) * heads + head;
      } else if (key && profile != nullptr) {
        job.mean = place(profile->key(blocks[b].layer, h).mean);
        job.gain = place(profile->key(blocks[b].layer, h).gain);
      }
      jobs.push_back(job);
    }
  const CodecJob* const device_jobs = workspace.Upload(jobs);
  KVTIDE_RETURN_IF_ERROR(workspace.Send());
  KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(type, side, half, RowTarget::kF32Rows, 0, device_jobs,
                                           static_cast<int>(jobs.size()), workspace.stream()));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace.results_host.data(), workspace.rows.data(), bytes,
                                              cudaMemcpyDeviceToHost, workspace.stream()));
  KVTIDE_RETURN_IF_ERROR(workspace.Finish());
  const auto* const decoded = reinterpret_cast<const float*>(workspace.results_host.data());
  for (size_t b = 0; b < blocks.size(); b++) {
    const BlockRows& rows = blocks[b];
    for (int64_t t = 0; t < rows.count; t++)
      StoreRow(decoded + b * block_values + Size(rows.first + t) * width, width, target_of(rows),
               (key ? rows.k_row : rows.v_row) + Size(t) * (key ? rows.k_stride : rows.v_stride));
  }
  return absl::OkStatus();
}

absl::Status DecodeBlocks(const BlockLayout& layout, const Profile* profile,
                          std::span<const BlockRows> blocks, ProfileStore& store, Workspace& workspace) {
  KVTIDE_RETURN_IF_ERROR(DecodeSide(layout, profile, blocks, Side::kKey, store, workspace));
  return DecodeSide(layout, profile, blocks, Side::kValue, store, workspace);
}

size_t RowsWidth(const BlockLayout& layout, bool key) {
  return Size(layout.shape().kv_heads) * Size(key ? layout.shape().head_dim_k : layout.shape().head_dim_v);
}

}  // namespace

absl::Status DecodeCall(const DecodeArgs& args, ProfileStore& profiles, Workspace& workspace) {
  if (args.layout == nullptr || args.block == nullptr)
    return absl::InvalidArgumentError("decode: no layout or no block");
  if (args.layer < 0 || args.layer >= args.layout->shape().layers)
    return absl::InvalidArgumentError(
        absl::StrCat("decode: layer ", args.layer, " of ", args.layout->shape().layers));
  if (args.k != nullptr)
    KVTIDE_RETURN_IF_ERROR(
        Annotate(CheckProfileFor(args.layout->pair().k, args.layout->shape(), args.profile), "decode"));
  BlockRows rows;
  rows.block = args.block;
  rows.position = args.position;
  rows.layer = args.layer;
  rows.k = args.k;
  rows.v = args.v;
  rows.k_stride = RowsWidth(*args.layout, true);
  rows.v_stride = RowsWidth(*args.layout, false);
  return DecodeBlocks(*args.layout, args.profile, {&rows, 1}, profiles, workspace);
}

absl::Status DecodeTokensCall(std::span<const DecodePiece> pieces, const Cancellation* cancellation,
                              ProfileStore& profiles, Workspace& workspace) {
  std::vector<BlockRows> blocks;  // of one layout and profile, and not too many
  const BlockLayout* layout = nullptr;
  const Profile* profile = nullptr;
  const auto flush = [&]() -> absl::Status {
    if (blocks.empty()) return absl::OkStatus();
    if (IsCancelled(cancellation)) return absl::CancelledError("decode: cancelled");
    const absl::Status status = DecodeBlocks(*layout, profile, blocks, profiles, workspace);
    blocks.clear();
    return status;
  };
  for (const DecodePiece& piece : pieces) {
    const BlockRun& run = *piece.run;
    const size_t k_width = RowsWidth(*run.layout, true), v_width = RowsWidth(*run.layout, false);
    const size_t most =
        std::max<size_t>(1, kDecodeBytes / (kBlockTokens * std::max(k_width, v_width) * sizeof(float)));
    if (layout == nullptr || !(*layout == *run.layout) || profile != run.profile) {
      KVTIDE_RETURN_IF_ERROR(flush());
      layout = run.layout;
      profile = run.profile;
    }
    const size_t k_stride = piece.k_stride == 0 ? k_width : piece.k_stride,
                 v_stride = piece.v_stride == 0 ? v_width : piece.v_stride;
    for (int64_t done = 0; done < piece.tokens;) {
      if (blocks.size() >= most) KVTIDE_RETURN_IF_ERROR(flush());
      const int64_t token = piece.first_token + done;
      BlockRows rows;
      rows.block = run.blocks[Size(token / kBlockTokens)];
      rows.layer = piece.layer;
      rows.position = run.first_position + token / kBlockTokens * kBlockTokens;
      rows.first = token % kBlockTokens;
      rows.count = std::min(kBlockTokens - rows.first, piece.tokens - done);
      rows.k = piece.k;
      rows.v = piece.v;
      rows.k_row = Size(done) * k_stride;
      rows.v_row = Size(done) * v_stride;
      rows.k_stride = k_stride;
      rows.v_stride = v_stride;
      done += rows.count;
      blocks.push_back(rows);
    }
  }
  return flush();
}

}  // namespace kvtide::cuda
