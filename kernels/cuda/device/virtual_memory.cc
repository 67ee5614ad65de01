#include "kernels/cuda/device/virtual_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"
#include "kernels/cuda/device/cuda_error.h"

namespace kvtide::cuda {
namespace {

constexpr CUmemAllocationHandleType kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

struct Driver {
  decltype(&cuDeviceGetAttribute) attribute = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) access = nullptr;
};

template <class Function>
absl::Status Find(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult how;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &how);
  if (error != cudaSuccess || how != cudaDriverEntryPointSuccess || found == nullptr) {
    (void)cudaGetLastError();
    return absl::FailedPreconditionError(
        absl::StrCat("the CUDA driver has no ", name, ": memory is not shared by file descriptors"));
  }
  *function = reinterpret_cast<Function>(found);
  return absl::OkStatus();
}

absl::StatusOr<Driver> FindDriver() {
  Driver driver;
  KVTIDE_RETURN_IF_ERROR(Find("cuDeviceGetAttribute", &driver.attribute));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemGetAllocationGranularity", &driver.granularity));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemCreate", &driver.create));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemRelease", &driver.release));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemExportToShareableHandle", &driver.export_handle));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemImportFromShareableHandle", &driver.import_handle));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemAddressReserve", &driver.reserve));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemAddressFree", &driver.free));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemMap", &driver.map));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemUnmap", &driver.unmap));
  KVTIDE_RETURN_IF_ERROR(Find("cuMemSetAccess", &driver.access));
  return driver;
}

const absl::StatusOr<Driver>& TheDriver() {
  static const auto* const driver = new absl::StatusOr<Driver>(FindDriver());
  return *driver;
}

absl::Status Failed(const char* what, CUresult result) {
  const std::string text = absl::StrCat(what, ": CUDA driver error ", static_cast<int>(result));
  return result == CUDA_ERROR_OUT_OF_MEMORY ? absl::ResourceExhaustedError(text)
                                            : absl::UnavailableError(text);
}

CUmemAllocationProp Properties(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = kDescriptor;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

// Of the current device, whose context exists afterwards. Indices of the driver and the runtime are the same.
absl::StatusOr<int> CurrentDevice() {
  int device = 0;
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaFree(nullptr));
  return device;
}

absl::StatusOr<size_t> WholePages(const Driver& driver, int device, size_t bytes) {
  const CUmemAllocationProp properties = Properties(device);
  size_t page = 0;
  const CUresult result = driver.granularity(&page, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (result != CUDA_SUCCESS || page == 0) return Failed("pages of device memory", result);
  return DivideUp(bytes, page) * page;
}

}  // namespace

absl::Status VirtualMemory::Map(size_t bytes, int device, unsigned long long handle) {
  const Driver& driver = *TheDriver();
  CUdeviceptr address = 0;
  if (const CUresult result = driver.reserve(&address, bytes, 0, 0, 0); result != CUDA_SUCCESS)
    return Failed("addresses for device memory", result);
  data_ = reinterpret_cast<std::byte*>(address);
  bytes_ = bytes;
  if (const CUresult result = driver.map(address, bytes, 0, handle, 0); result != CUDA_SUCCESS)
    return Failed("the driver does not map the memory", result);
  mapped_ = true;
  CUmemAccessDesc access = {};
  access.location = Properties(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (const CUresult result = driver.access(address, bytes, &access, 1); result != CUDA_SUCCESS)
    return Failed("the device may not access the memory", result);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<VirtualMemory>> VirtualMemory::Make(size_t bytes) {
  KVTIDE_RETURN_IF_ERROR(TheDriver().status());
  const Driver& driver = *TheDriver();
  KVTIDE_ASSIGN_OR_RETURN(const int device, CurrentDevice());
  int supported = 0;
  const CUresult asked =
      driver.attribute(&supported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
  if (asked != CUDA_SUCCESS || supported == 0)
    return absl::FailedPreconditionError("this GPU shares no memory by file descriptors");
  KVTIDE_ASSIGN_OR_RETURN(const size_t whole, WholePages(driver, device, bytes));
  const CUmemAllocationProp properties = Properties(device);
  CUmemGenericAllocationHandle handle = 0;
  if (const CUresult result = driver.create(&handle, whole, &properties, 0); result != CUDA_SUCCESS)
    return Failed("device memory", result);
  // The mapping and the descriptor keep the memory.
  const absl::Cleanup release = [&] { (void)driver.release(handle); };
  std::unique_ptr<VirtualMemory> memory(new VirtualMemory);
  KVTIDE_RETURN_IF_ERROR(memory->Map(whole, device, handle));
  if (const CUresult result = driver.export_handle(&memory->fd_, handle, kDescriptor, 0);
      result != CUDA_SUCCESS) {
    memory->fd_ = -1;
    return Failed("a descriptor of device memory", result);
  }
  (void)::fcntl(memory->fd_, F_SETFD, FD_CLOEXEC);
  return memory;
}

absl::StatusOr<std::unique_ptr<VirtualMemory>> VirtualMemory::Import(int fd, size_t bytes) {
  const absl::Cleanup close = [&] {
    if (fd >= 0) ::close(fd);
  };
  KVTIDE_RETURN_IF_ERROR(TheDriver().status());
  const Driver& driver = *TheDriver();
  KVTIDE_ASSIGN_OR_RETURN(const int device, CurrentDevice());
  KVTIDE_ASSIGN_OR_RETURN(const size_t whole, WholePages(driver, device, bytes));
  CUmemGenericAllocationHandle handle = 0;
  // The driver takes the number itself where the address of a handle would stand.
  const CUresult result =
      driver.import_handle(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)), kDescriptor);
  if (result != CUDA_SUCCESS)
    return Failed("the driver does not take the descriptor of device memory", result);
  const absl::Cleanup release = [&] { (void)driver.release(handle); };
  std::unique_ptr<VirtualMemory> memory(new VirtualMemory);
  KVTIDE_RETURN_IF_ERROR(memory->Map(whole, device, handle));
  return memory;
}

VirtualMemory::~VirtualMemory() {
  const auto address = reinterpret_cast<CUdeviceptr>(data_);
  if (mapped_) (void)TheDriver()->unmap(address, bytes_);
  if (data_ != nullptr) (void)TheDriver()->free(address, bytes_);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace kvtide::cuda
