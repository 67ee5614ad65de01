#include "kernels/cuda/cuda_direct_device.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/virtual_memory.h"
#include "kernels/cuda/step/cuda_paged_attention.h"

namespace kvtide::cuda {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(SlabHandle::ipc));

class MappedSlab : public Slab {
 public:
  MappedSlab(int device, void* data, size_t bytes)
      : device_(device), data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  ~MappedSlab() override {
    const DeviceGuard guard(device_);
    (void)cudaIpcCloseMemHandle(data_);
  }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  const int device_;
  std::byte* const data_;
  const size_t bytes_;
};

class ImportedSlab : public Slab {
 public:
  ImportedSlab(int device, std::unique_ptr<VirtualMemory> memory, size_t bytes)
      : device_(device), memory_(std::move(memory)), bytes_(bytes) {}
  ~ImportedSlab() override {
    const DeviceGuard guard(device_);
    memory_.reset();
  }
  std::byte* data() const override { return memory_->data(); }
  size_t bytes() const override { return bytes_; }

 private:
  const int device_;
  std::unique_ptr<VirtualMemory> memory_;
  const size_t bytes_;
};

class EventMark : public StreamMark {
 public:
  ~EventMark() override {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  absl::Status Create() {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    return absl::OkStatus();
  }
  absl::Status Set(void* stream) override {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(event_, static_cast<cudaStream_t>(stream)));
    return absl::OkStatus();
  }
  absl::Status Wait() override {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(event_));
    return absl::OkStatus();
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Pinned buffers in turns, so that the host fills one while the copy of another waits for its place in the
// stream.
class DeviceArrays : public StepArrays {
 public:
  absl::Status Create(size_t bytes) {
    KVTIDE_RETURN_IF_ERROR(device_.Reserve(bytes, bytes));
    for (Turn& turn : turns_) {
      KVTIDE_RETURN_IF_ERROR(turn.host.Reserve(bytes, bytes));
      KVTIDE_RETURN_IF_ERROR(turn.copied.Create());
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::byte*> Host() override {
    at_ = (at_ + 1) % kTurns;
    KVTIDE_RETURN_IF_ERROR(turns_[at_].copied.Wait());
    return turns_[at_].host.data();
  }
  const std::byte* device() const override { return device_.data(); }
  absl::Status Upload(std::span<const Range> ranges, void* stream) override {
    Turn& turn = turns_[at_];
    for (const Range& range : ranges)
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(device_.data() + range.offset,
                                                  turn.host.data() + range.offset, range.bytes,
                                                  cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
    return turn.copied.Set(stream);
  }

 private:
  static constexpr size_t kTurns = 3;
  struct Turn {
    Buffer<true> host;
    EventMark copied;
  };
  Buffer<false> device_;
  Turn turns_[kTurns];
  size_t at_ = 0;
};

class CudaDirectDevice : public DirectDevice {
 public:
  CudaDirectDevice(int device, std::string id) : device_(device), id_(std::move(id)) {}

  std::string id() const override { return id_; }
  absl::StatusOr<std::unique_ptr<Slab>> Map(const SlabHandle& handle) override {
    const std::string theirs(handle.device.data());
    const bool by_file = handle.kind == SlabHandle::Kind::kFile;
    if ((!by_file && handle.kind != SlabHandle::Kind::kCudaIpc) || theirs != id_) {
      if (handle.fd >= 0) ::close(handle.fd);
      return absl::FailedPreconditionError(
          absl::StrCat("the pool lies on ", theirs, ", this engine computes on ", id_));
    }
    const DeviceGuard guard(device_);
    if (by_file) {
      const auto bytes = static_cast<size_t>(handle.bytes);
      KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<VirtualMemory> memory, VirtualMemory::Import(handle.fd, bytes));
      return std::make_unique<ImportedSlab>(device_, std::move(memory), bytes);
    }
    cudaIpcMemHandle_t ipc;
    std::memcpy(&ipc, handle.ipc.data(), sizeof(ipc));
    void* data = nullptr;
    const cudaError_t error = cudaIpcOpenMemHandle(&data, ipc, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return absl::UnavailableError(absl::StrCat(
          "CUDA IPC does not map the pool's memory: ", cudaGetErrorString(error),
          "; both processes need the same GPU, and containers --ipc=host (one IPC and PID namespace), or "
          "kvtided --gpu-sharing descriptors"));
    }
    return std::make_unique<MappedSlab>(device_, data, static_cast<size_t>(handle.bytes));
  }
  absl::StatusOr<std::unique_ptr<PagedAttention>> MakeAttention(const PagedOptions& options,
                                                                std::span<const PagedLayer> layers) override {
    const DeviceGuard guard(device_);
    return MakeCudaPagedAttention(options, layers);
  }
  absl::StatusOr<std::unique_ptr<StepArrays>> MakeArrays(size_t bytes) override {
    const DeviceGuard guard(device_);
    auto arrays = std::make_unique<DeviceArrays>();
    KVTIDE_RETURN_IF_ERROR(arrays->Create(bytes));
    return arrays;
  }
  absl::StatusOr<std::unique_ptr<StreamMark>> MakeMark() override {
    const DeviceGuard guard(device_);
    auto mark = std::make_unique<EventMark>();
    KVTIDE_RETURN_IF_ERROR(mark->Create());
    return mark;
  }

 private:
  const int device_;
  const std::string id_;
};

}  // namespace
}  // namespace kvtide::cuda

namespace kvtide {

absl::StatusOr<std::unique_ptr<DirectDevice>> MakeCudaDirectDevice(const std::string& device) {
  KVTIDE_ASSIGN_OR_RETURN(const int index, FindCudaDevice(device));
  KVTIDE_ASSIGN_OR_RETURN(std::string id, CudaDeviceUuid(index));
  return std::make_unique<cuda::CudaDirectDevice>(index, std::move(id));
}

}  // namespace kvtide
