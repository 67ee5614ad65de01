#include "kernels/cpu/cpu_direct_device.h"

#include <unistd.h>

#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_paged_attention.h"
#include "kernels/cpu/file_slab.h"

namespace kvtide {
namespace {

class HostArrays : public StepArrays {
 public:
  explicit HostArrays(size_t bytes) : bytes_(bytes) {}
  absl::StatusOr<std::byte*> Host() override { return bytes_.data(); }
  const std::byte* device() const override { return bytes_.data(); }
  absl::Status Upload(std::span<const Range>, void*) override { return absl::OkStatus(); }

 private:
  std::vector<std::byte> bytes_;
};

// Work is done when its call returns.
class HostMark : public StreamMark {
 public:
  absl::Status Set(void*) override { return absl::OkStatus(); }
  absl::Status Wait() override { return absl::OkStatus(); }
};

class CpuDirectDevice : public DirectDevice {
 public:
  explicit CpuDirectDevice(int threads) {
    CpuBackendOptions options;
    options.threads = threads;
    backend_ = MakeCpuBackend(options);
  }
  std::string id() const override { return "cpu"; }
  absl::StatusOr<std::unique_ptr<Slab>> Map(const SlabHandle& handle) override {
    const bool here = std::string_view(handle.device.data()) == "cpu";
    if (here && handle.kind == SlabHandle::Kind::kFile) return MapFileSlab(handle);
    if (handle.fd >= 0) ::close(handle.fd);
    return absl::FailedPreconditionError(
        absl::StrCat("the pool lies on ", handle.device.data(), ", this engine computes on the CPU"));
  }
  absl::StatusOr<std::unique_ptr<PagedAttention>> MakeAttention(const PagedOptions& options,
                                                                std::span<const PagedLayer> layers) override {
    return MakeCpuPagedAttention(*backend_, options, layers);
  }
  absl::StatusOr<std::unique_ptr<StepArrays>> MakeArrays(size_t bytes) override {
    return std::make_unique<HostArrays>(bytes);
  }
  absl::StatusOr<std::unique_ptr<StreamMark>> MakeMark() override { return std::make_unique<HostMark>(); }

 private:
  std::unique_ptr<Backend> backend_;
};

}  // namespace

std::unique_ptr<DirectDevice> MakeCpuDirectDevice(int threads) {
  return std::make_unique<CpuDirectDevice>(threads);
}

}  // namespace kvtide
