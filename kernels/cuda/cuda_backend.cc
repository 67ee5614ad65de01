#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "kernels/attend_args.h"
#include "kernels/base/mutex.h"
#include "kernels/base/second_hand.h"
#include "kernels/base/status.h"
#include "kernels/check_pieces.h"
#include "kernels/cuda/attend/decode_tables.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/codec/append_call.h"
#include "kernels/cuda/codec/decode_call.h"
#include "kernels/cuda/codec/recode_call.h"
#include "kernels/cuda/copy/copy_engine.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/pinned_ranges.h"
#include "kernels/cuda/device/profile_store.h"
#include "kernels/cuda/device/rotations.h"
#include "kernels/cuda/device/virtual_memory.h"
#include "kernels/cuda/device/workspace.h"
#include "kernels/cuda/layer_plan.h"
#include "kernels/cuda/prefill/prefill_call.h"

namespace kvtide {
namespace cuda {
namespace {

class DeviceSlab : public Slab {
 public:
  explicit DeviceSlab(int device) : device_(device) {}
  ~DeviceSlab() override {
    const DeviceGuard guard(device_);
    memory_ = DeviceBuffer();
    virtual_.reset();
  }
  // Memory that other processes can map: a plain allocation (CUDA IPC), or one with a descriptor.
  absl::Status Allocate(size_t bytes, SlabSharing sharing) {
    if (sharing == SlabSharing::kDescriptors || (sharing == SlabSharing::kAuto && !MakesIpcHandles())) {
      KVTIDE_ASSIGN_OR_RETURN(virtual_, VirtualMemory::Make(bytes));
    } else {
      KVTIDE_RETURN_IF_ERROR(memory_.Reserve(bytes, bytes));
    }
    bytes_ = bytes;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemset(data(), 0, bytes));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceSynchronize());
    return absl::OkStatus();
  }
  std::byte* data() const override { return virtual_ != nullptr ? virtual_->data() : memory_.data(); }
  size_t bytes() const override { return bytes_; }
  absl::StatusOr<SlabHandle> Share() const override {
    const DeviceGuard guard(device_);
    SlabHandle handle;
    handle.bytes = bytes_;
    KVTIDE_ASSIGN_OR_RETURN(const std::string id, CudaDeviceUuid(device_));
    id.copy(handle.device.data(), handle.device.size() - 1);
    if (virtual_ != nullptr) {
      handle.kind = SlabHandle::Kind::kFile;  // of the driver
      handle.fd = virtual_->fd();
      return handle;
    }
    cudaIpcMemHandle_t ipc;
    if (const cudaError_t error = cudaIpcGetMemHandle(&ipc, memory_.data()); error != cudaSuccess) {
      (void)cudaGetLastError();
      return absl::FailedPreconditionError(
          absl::StrCat("CUDA IPC does not share the pool's memory here: ", cudaGetErrorString(error),
                       "; try --gpu-sharing descriptors"));
    }
    handle.kind = SlabHandle::Kind::kCudaIpc;
    std::memcpy(handle.ipc.data(), &ipc, sizeof(ipc));
    return handle;
  }

 private:
  // Whether this process may share memory of the current device by CUDA IPC.
  static bool MakesIpcHandles() {
    DeviceBuffer probe;
    cudaIpcMemHandle_t ipc;
    const bool can = probe.Reserve(1).ok() && cudaIpcGetMemHandle(&ipc, probe.data()) == cudaSuccess;
    (void)cudaGetLastError();
    return can;
  }

  const int device_;
  DeviceBuffer memory_;                     // or
  std::unique_ptr<VirtualMemory> virtual_;  // this
  size_t bytes_ = 0;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaBackendOptions& options, int device, int processors, const DeviceImage& image)
      : options_(options),
        device_(device),
        image_(image),
        hand_(options.second_hand && std::thread::hardware_concurrency() > 2 ? std::make_unique<SecondHand>()
                                                                             : nullptr),
        pool_(options.workspaces),
        copies_(device, options.copy_piece_bytes, options.max_copies) {
    environment_.processors = processors;
    environment_.scratch_bytes = options_.scratch_bytes;
    environment_.in_place_bytes = options_.in_place_bytes;
    environment_.hand = hand_.get();
    environment_.rotations = &rotations_;
    environment_.profiles = &profiles_;
    environment_.most_decode_rows = options_.most_decode_rows;
    environment_.shared_limit = image_.shared_limit;
    environment_.warpgroups = options_.warpgroups && HasWarpgroups(image_.image_capability);
    environment_.dependent_launches = HasBulkCopies(image_.image_capability);
  }

  std::string name() const override { return absl::StrCat("cuda:", device_); }

  absl::Status CheckSupport(const BlockLayout& layout) const override {
    if (Info(layout.pair().v).calibrated)
      return absl::InvalidArgumentError(
          absl::StrCat(PairName(layout.pair()), ": ", Name(layout.pair().v), " codes keys only"));
    return CheckGroupShape(layout.shape());
  }

  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    if (bytes == 0) return absl::InvalidArgumentError("a slab of 0 bytes");
    KVTIDE_RETURN_IF_ERROR(CheckDevice(device_));
    const DeviceGuard guard(device_);
    auto slab = std::make_unique<DeviceSlab>(device_);
    const absl::Status status = slab->Allocate(bytes, options_.sharing);
    if (!status.ok())
      return Annotate(status, absl::StrCat(name(), ": no ", bytes, " bytes of device memory"));
    return std::unique_ptr<Slab>(std::move(slab));
  }

  absl::Status Append(const AppendArgs& args) override {
    // All are looked at before anything is written; then one kernel for each layout (layer group).
    for (const AppendPiece& piece : args.pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    std::vector<AppendPiece> left(args.pieces.begin(), args.pieces.end());
    while (!left.empty()) {
      const BlockLayout& layout = *left.front().layout;
      const auto others = std::stable_partition(
          left.begin(), left.end(), [&](const AppendPiece& piece) { return *piece.layout == layout; });
      AppendArgs same = args;
      same.pieces = {left.data(), static_cast<size_t>(others - left.begin())};
      KVTIDE_RETURN_IF_ERROR(WithWorkspace(
          [&](Workspace& workspace) { return AppendCall(same, options_.in_place_bytes, workspace); }));
      left.erase(left.begin(), others);
    }
    return absl::OkStatus();
  }

  absl::Status Recode(std::span<const RecodePiece> pieces) override {
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
      KVTIDE_RETURN_IF_ERROR(WithWorkspace([&](Workspace& workspace) {
        return RecodeCall(pieces.subspan(first, count), profiles_, workspace);
      }));
      first += count;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    KVTIDE_RETURN_IF_ERROR(CheckDevice(device_));
    const DeviceGuard guard(device_);
    std::unique_ptr<LayerPlan> mine;
    if (auto* const made_here = dynamic_cast<PlanHere*>(previous.get()); made_here != nullptr)
      mine = std::move(made_here->plan);
    auto plan = LayerPlan::Make(args, environment_, std::move(mine));
    if (!plan.ok()) return Annotate(plan.status(), name());
    return std::unique_ptr<AttendPlan>(std::make_unique<PlanHere>(device_, std::move(plan).value()));
  }

  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    auto* const here = dynamic_cast<PlanHere*>(&plan);
    if (here == nullptr || here->device != device_)
      return absl::InvalidArgumentError(absl::StrCat("attend: the plan is not one of ", name()));
    AttendLayerArgs left = args;
    if (here->plan->QueuesAppend(args)) {
      for (const AppendPiece& piece : args.append) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    } else {
      KVTIDE_RETURN_IF_ERROR(RunMeanwhile(args));
      KVTIDE_RETURN_IF_ERROR(AppendFirst(*this, args));
      left.append = {};
      left.meanwhile = nullptr;
    }
    return WithWorkspace(
        [&](Workspace& workspace) { return here->plan->Attend(left, environment_, workspace); });
  }

  // A plan for one layer; tests and benchmarks call it, and whoever has no use for a plan.
  absl::Status Attend(const AttendArgs& args) override {
    KVTIDE_RETURN_IF_ERROR(CheckAttendArgs(args).status());
    std::vector<PlanItem> items;
    std::vector<LayerItem> tensors;
    for (const AttendItem& item : args.items) {
      items.push_back({item.runs, item.queries, item.first_query_position});
      tensors.push_back({{item.q, DataType::kF32}, {item.out, DataType::kF32}, item.lse});
    }
    AttendPlanArgs plan_args;
    plan_args.heads = args.heads;
    plan_args.causal = args.causal;
    plan_args.window = args.window;
    plan_args.items = items;
    AttendLayerArgs layer_args;
    layer_args.layer = args.layer;
    layer_args.scale = args.scale;
    layer_args.softcap = args.softcap;
    layer_args.sinks = args.sinks;
    layer_args.items = tensors;
    layer_args.cancellation = args.cancellation;
    std::unique_ptr<AttendPlan> plan;
    {
      const MutexLock lock(spare_mutex_);
      if (!spare_plans_.empty()) {
        plan = std::move(spare_plans_.back());
        spare_plans_.pop_back();
      }
    }
    KVTIDE_ASSIGN_OR_RETURN(plan, PlanAttend(plan_args, std::move(plan)));
    const absl::Status status = AttendLayer(*plan, layer_args);
    const MutexLock lock(spare_mutex_);
    if (spare_plans_.size() < static_cast<size_t>(options_.workspaces))
      spare_plans_.push_back(std::move(plan));
    return status;
  }

  absl::Status Decode(const DecodeArgs& args) override {
    return WithWorkspace([&](Workspace& workspace) { return DecodeCall(args, profiles_, workspace); });
  }
  absl::Status DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation) override {
    for (const DecodePiece& piece : pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    return WithWorkspace(
        [&](Workspace& workspace) { return DecodeTokensCall(pieces, cancellation, profiles_, workspace); });
  }

  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    KVTIDE_RETURN_IF_ERROR(CheckDevice(device_));
    return copies_.Submit(pieces, direction);
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override { return copies_.Poll(ticket); }

 private:
  static constexpr size_t kMostRecords = 8192;

  // Destroyed with its device current.
  struct PlanHere : AttendPlan {
    PlanHere(int on, std::unique_ptr<LayerPlan> made) : device(on), plan(std::move(made)) {}
    ~PlanHere() override {
      const DeviceGuard guard(device);
      plan.reset();
    }
    const int device;
    std::unique_ptr<LayerPlan> plan;
  };

  // Every call that computes: refused once the device is lost; whatever way it ends, nothing of it still
  // runs.
  template <class Call>
  absl::Status WithWorkspace(Call call) {
    KVTIDE_RETURN_IF_ERROR(CheckDevice(device_));
    const DeviceGuard guard(device_);
    (void)cudaGetLastError();  // what others of this thread left behind: launches would report it as theirs
    KVTIDE_ASSIGN_OR_RETURN(const WorkspacePool::Lease workspace, pool_.Take());
    return Annotate(call(*workspace), name());
  }

  const CudaBackendOptions options_;
  const int device_;
  const DeviceImage image_;
  AttendEnvironment environment_;
  const std::unique_ptr<SecondHand> hand_;
  Rotations rotations_;
  ProfileStore profiles_;
  WorkspacePool pool_;
  Mutex spare_mutex_;
  std::vector<std::unique_ptr<AttendPlan>> spare_plans_ ABSL_GUARDED_BY(spare_mutex_);  // memory for Attend
  CopyEngine copies_;
};

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

absl::StatusOr<std::string> CudaDeviceUuid(int index) {
  cudaDeviceProp properties{};
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&properties, index));
  std::string text = "GPU-";
  for (int i = 0; i < 16; i++) {
    char part[4];
    std::snprintf(part, sizeof(part), "%02x",
                  static_cast<unsigned>(static_cast<unsigned char>(properties.uuid.bytes[i])));
    text += part;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

absl::StatusOr<int> FindCudaDevice(const std::string& wanted) {
  KVTIDE_ASSIGN_OR_RETURN(const int count, CountCudaDevices());
  int index = -1;
  if (absl::SimpleAtoi(wanted, &index)) {
    if (index >= 0 && index < count) return index;
    return absl::NotFoundError(absl::StrCat("no CUDA device ", wanted, "; there are ", count));
  }
  std::string known;
  for (int i = 0; i < count; i++) {
    KVTIDE_ASSIGN_OR_RETURN(const std::string uuid, CudaDeviceUuid(i));
    if (uuid == wanted) return i;
    absl::StrAppend(&known, i == 0 ? "" : ", ", uuid);
  }
  return absl::NotFoundError(absl::StrCat("no CUDA device '", wanted, "'; give an index or one of: ", known));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaBackendOptions& options) {
  if (options.workspaces < 1 || options.max_copies < 1 || options.copy_piece_bytes < 4096 ||
      options.scratch_bytes < (size_t{1} << 20))
    return absl::InvalidArgumentError(
        "CUDA backend: at least 1 workspace, 1 copy, copy pieces of 4 KiB and 1 MiB of scratch are needed");
  KVTIDE_ASSIGN_OR_RETURN(const int device, FindCudaDevice(options.device));
  KVTIDE_ASSIGN_OR_RETURN(const cuda::DeviceImage image, cuda::FindDeviceImage(device));
  int processors = 0;
  const cuda::DeviceGuard guard(device);
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  KVTIDE_RETURN_IF_ERROR(cuda::PrepareAttendKernels(image));
  KVTIDE_RETURN_IF_ERROR(cuda::PreparePrefillKernels(image));
  return std::unique_ptr<Backend>(std::make_unique<cuda::CudaBackend>(options, device, processors, image));
}

absl::StatusOr<std::unique_ptr<PinnedRange>> PinnedRange::Make(std::byte* data, size_t bytes) {
  const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // otherwise the next call would report it
    return absl::ResourceExhaustedError(absl::StrCat("pinning ", bytes, " bytes of host memory: ",
                                                     cudaGetErrorString(error), "; raise the memlock limit"));
  }
  // Kernels use the host's address, which all 64-bit systems but a few allow.
  void* device = nullptr;
  if (cudaHostGetDevicePointer(&device, data, 0) == cudaSuccess && device == data) {
    cuda::PinnedRanges::Add(data, bytes);
  } else {
    (void)cudaGetLastError();
  }
  return std::unique_ptr<PinnedRange>(new PinnedRange(data));
}

PinnedRange::~PinnedRange() {
  cuda::PinnedRanges::Remove(data_);
  (void)cudaHostUnregister(data_);
}

}  // namespace kvtide
