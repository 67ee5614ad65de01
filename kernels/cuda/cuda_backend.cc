#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "kernels/base/status.h"
#include "kernels/check_pieces.h"
#include "kernels/cuda/attend/attend_call.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/codec/recode_call.h"
#include "kernels/cuda/copy/copy_engine.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide {
namespace cuda {
namespace {

class DeviceSlab : public Slab {
 public:
  explicit DeviceSlab(int device) : device_(device) {}
  ~DeviceSlab() override {
    const DeviceGuard guard(device_);
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  // A plain allocation, so that other processes can map it (CUDA IPC).
  absl::Status Allocate(size_t bytes) {
    void* p = nullptr;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMalloc(&p, bytes));
    data_ = static_cast<std::byte*>(p);
    bytes_ = bytes;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemset(p, 0, bytes));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
    return absl::OkStatus();
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  const int device_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaBackendOptions& options, int device, int processors, const DeviceImage& image)
      : options_(options),
        device_(device),
        processors_(processors),
        image_(image),
        pool_(options.workspaces),
        copies_(device, options.copy_piece_bytes, options.max_copies) {}

  std::string name() const override { return absl::StrCat("cuda:", device_); }

  absl::Status CheckSupport(const BlockLayout& layout) const override {
    return CheckGroupShape(layout.shape());
  }

  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    if (bytes == 0) return absl::InvalidArgumentError("a slab of 0 bytes");
    const DeviceGuard guard(device_);
    auto slab = std::make_unique<DeviceSlab>(device_);
    const absl::Status status = slab->Allocate(bytes);
    if (!status.ok())
      return Annotate(status, absl::StrCat(name(), ": no ", bytes, " bytes of device memory"));
    return std::unique_ptr<Slab>(std::move(slab));
  }

  absl::Status Append(const AppendArgs& args) override {
    if (args.pieces.empty()) return absl::OkStatus();
    const DeviceGuard guard(device_);
    size_t rows = 0;
    DataType type = KeysOf(args, args.pieces[0]).type;
    for (const AppendPiece& piece : args.pieces) {
      KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
      if (!(*piece.layout == *args.pieces[0].layout))
        return absl::InvalidArgumentError("append: pieces of unequal layouts");
      rows += static_cast<size_t>(piece.tokens);
      for (const TensorView view : {KeysOf(args, piece), ValuesOf(args, piece)})
        if (view.type != type) type = DataType::kF32;  // where unlike tensors meet
    }
    const BlockLayout& layout = *args.pieces[0].layout;
    const GroupShape& shape = layout.shape();
    const size_t k_width = static_cast<size_t>(shape.kv_heads * shape.head_dim_k),
                 v_width = static_cast<size_t>(shape.kv_heads * shape.head_dim_v),
                 k_bytes = rows * k_width * DataTypeBytes(type),
                 v_bytes = rows * v_width * DataTypeBytes(type);
    KVTIDE_ASSIGN_OR_RETURN(auto workspace, pool_.Take());
    KVTIDE_RETURN_IF_ERROR(workspace->Begin(
        Workspace::Bound(4, k_bytes + v_bytes + 2 * args.pieces.size() * sizeof(AppendJob))));
    const auto k = workspace->Place<std::byte>(k_bytes), v = workspace->Place<std::byte>(v_bytes);
    const auto stage = [&](TensorView from, const AppendPiece& piece, size_t width, size_t row,
                           std::byte* to) {
      const size_t count = static_cast<size_t>(piece.tokens) * width, first = piece.source_row * width;
      to += row * width * DataTypeBytes(type);
      if (from.type == type) {
        std::memcpy(to, static_cast<const std::byte*>(from.data) + first * DataTypeBytes(type),
                    count * DataTypeBytes(type));
      } else {
        for (size_t i = 0; i < count; i++) reinterpret_cast<float*>(to)[i] = from.At(first + i);
      }
    };
    std::vector<AppendJob> k_jobs, v_jobs;
    size_t row = 0;
    for (const AppendPiece& piece : args.pieces) {
      if (piece.tokens == 0) continue;
      stage(KeysOf(args, piece), piece, k_width, row, k.host);
      stage(ValuesOf(args, piece), piece, v_width, row, v.host);
      AppendJob job;
      job.target = piece.block + layout.RecordOffset(piece.layer, 0);
      job.first_row = static_cast<int64_t>(row);
      row += static_cast<size_t>(piece.tokens);
      job.first_token = piece.first_token;
      job.tokens = piece.tokens;
      k_jobs.push_back(job);
      job.target += layout.v_codes();
      v_jobs.push_back(job);
    }
    const AppendJob* k_device = workspace->Upload(k_jobs);
    const AppendJob* v_device = workspace->Upload(v_jobs);
    KVTIDE_RETURN_IF_ERROR(workspace->Send());
    if (!k_jobs.empty()) {
      const int count = static_cast<int>(k_jobs.size());
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchAppend(layout.pair().k, layout.k(), layout.record_bytes(),
                                               shape.kv_heads, k.device, type, k_device, count,
                                               workspace->stream()));
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchAppend(layout.pair().v, layout.v(), layout.record_bytes(),
                                               shape.kv_heads, v.device, type, v_device, count,
                                               workspace->stream()));
    }
    return Annotate(workspace->Finish(), name());
  }

  absl::Status Recode(std::span<const RecodePiece> pieces) override {
    const DeviceGuard guard(device_);
    for (const RecodePiece& piece : pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    // Neighbours of the same kind go in one launch, up to kMostRecords.
    for (size_t first = 0; first < pieces.size();) {
      size_t count = 0, records = 0;
      while (first + count < pieces.size()) {
        const RecodePiece &a = pieces[first], &b = pieces[first + count];
        records += static_cast<size_t>(b.layers * b.from->shape().kv_heads);
        if (count > 0 && (records > kMostRecords || !SameKind(a, b))) break;
        count++;
      }
      KVTIDE_ASSIGN_OR_RETURN(auto workspace, pool_.Take());
      KVTIDE_RETURN_IF_ERROR(Annotate(RecodeCall(pieces.subspan(first, count), *workspace), name()));
      first += count;
    }
    return absl::OkStatus();
  }

  absl::Status Attend(const AttendArgs& args) override {
    const DeviceGuard guard(device_);
    KVTIDE_ASSIGN_OR_RETURN(auto workspace, pool_.Take());
    AttendEnvironment environment;
    environment.processors = processors_;
    environment.scratch_bytes = options_.scratch_bytes;
    environment.rotations = &rotations_;
    environment.most_decode_rows = options_.most_decode_rows;
    environment.shared_limit = image_.shared_limit;
    environment.warpgroups = options_.warpgroups && HasWarpgroups(image_.image_capability);
    environment.dependent_launches = HasBulkCopies(image_.image_capability);
    return Annotate(AttendCall(args, environment, *workspace), name());
  }

  absl::Status Decode(const DecodeArgs& args) override {
    if (args.layout == nullptr || args.block == nullptr)
      return absl::InvalidArgumentError("decode: no layout or no block");
    const BlockLayout& layout = *args.layout;
    const GroupShape& shape = layout.shape();
    if (args.layer < 0 || args.layer >= shape.layers)
      return absl::InvalidArgumentError(absl::StrCat("decode: layer ", args.layer, " of ", shape.layers));
    const DeviceGuard guard(device_);
    KVTIDE_ASSIGN_OR_RETURN(auto workspace, pool_.Take());
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      float* const out = key ? args.k : args.v;
      if (out == nullptr) continue;
      const HalfLayout& half = key ? layout.k() : layout.v();
      const size_t dim = static_cast<size_t>(half.head_dim), heads = static_cast<size_t>(shape.kv_heads);
      const size_t bytes = kBlockTokens * heads * dim * sizeof(float);
      KVTIDE_RETURN_IF_ERROR(workspace->rows.Reserve(bytes));
      KVTIDE_RETURN_IF_ERROR(workspace->results_host.Reserve(bytes));
      KVTIDE_RETURN_IF_ERROR(workspace->Begin(
          Workspace::Bound(3 + 2 * heads, heads * (sizeof(CodecJob) + 2 * dim * sizeof(float)))));
      std::vector<CodecJob> jobs;
      for (int head = 0; head < shape.kv_heads; head++) {
        CodecJob job;
        job.source = args.block + layout.RecordOffset(args.layer, head) + (key ? 0 : layout.v_codes());
        job.target = workspace->rows.data() + static_cast<size_t>(head) * dim * sizeof(float);
        job.row_stride = static_cast<int32_t>(heads * dim);
        if (key && args.profile != nullptr) {
          const HeadProfile& profile = args.profile->key(args.layer, head);
          if (!profile.mean.empty()) job.mean = workspace->Upload(profile.mean);
          if (!profile.gain.empty()) job.gain = workspace->Upload(profile.gain);
        }
        jobs.push_back(job);
      }
      const CodecJob* device_jobs = workspace->Upload(jobs);
      KVTIDE_RETURN_IF_ERROR(workspace->Send());
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(key ? layout.pair().k : layout.pair().v, side, half,
                                               RowTarget::kF32Rows, 0, device_jobs,
                                               static_cast<int>(jobs.size()), workspace->stream()));
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace->results_host.data(), workspace->rows.data(),
                                                  bytes, cudaMemcpyDeviceToHost, workspace->stream()));
      KVTIDE_RETURN_IF_ERROR(Annotate(workspace->Finish(), name()));
      std::memcpy(out, workspace->results_host.data(), bytes);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    return copies_.Submit(pieces, direction);
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override { return copies_.Poll(ticket); }

 private:
  static constexpr size_t kMostRecords = 8192;

  const CudaBackendOptions options_;
  const int device_, processors_;
  const DeviceImage image_;
  WorkspacePool pool_;
  Rotations rotations_;
  CopyEngine copies_;
};

std::string UuidText(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; i++) {
    char part[4];
    std::snprintf(part, sizeof(part), "%02x",
                  static_cast<unsigned>(static_cast<unsigned char>(uuid.bytes[i])));
    text += part;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

absl::StatusOr<int> FindDevice(const std::string& wanted) {
  KVTIDE_ASSIGN_OR_RETURN(const int count, CountCudaDevices());
  int index = -1;
  if (absl::SimpleAtoi(wanted, &index)) {
    if (index >= 0 && index < count) return index;
    return absl::NotFoundError(absl::StrCat("no CUDA device ", wanted, "; there are ", count));
  }
  std::string known;
  for (int i = 0; i < count; i++) {
    cudaDeviceProp properties{};
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, i));
    const std::string uuid = UuidText(properties.uuid);
    if (uuid == wanted) return i;
    absl::StrAppend(&known, i == 0 ? "" : ", ", uuid);
  }
  return absl::NotFoundError(absl::StrCat("no CUDA device '", wanted, "'; give an index or one of: ", known));
}

}  // namespace
}  // namespace cuda

absl::StatusOr<int> CountCudaDevices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return absl::FailedPreconditionError(absl::StrCat("CUDA does not start: ", cudaGetErrorString(error)));
  }
  return count;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaBackendOptions& options) {
  if (options.workspaces < 1 || options.max_copies < 1 || options.copy_piece_bytes < 4096 ||
      options.scratch_bytes < (size_t{1} << 20))
    return absl::InvalidArgumentError(
        "CUDA backend: at least 1 workspace, 1 copy, copy pieces of 4 KiB and 1 MiB of scratch are needed");
  KVTIDE_ASSIGN_OR_RETURN(const int device, cuda::FindDevice(options.device));
  KVTIDE_ASSIGN_OR_RETURN(const cuda::DeviceImage image, cuda::FindDeviceImage(device));
  int processors = 0;
  const cuda::DeviceGuard guard(device);
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  KVTIDE_RETURN_IF_ERROR(cuda::PrepareAttendKernels(image));
  return std::unique_ptr<Backend>(std::make_unique<cuda::CudaBackend>(options, device, processors, image));
}

absl::StatusOr<std::unique_ptr<PinnedRange>> PinnedRange::Make(std::byte* data, size_t bytes) {
  const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterPortable);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // otherwise the next call would report it
    return absl::ResourceExhaustedError(absl::StrCat("pinning ", bytes, " bytes of host memory: ",
                                                     cudaGetErrorString(error), "; raise the memlock limit"));
  }
  return std::unique_ptr<PinnedRange>(new PinnedRange(data));
}

PinnedRange::~PinnedRange() { (void)cudaHostUnregister(data_); }

}  // namespace kvtide
