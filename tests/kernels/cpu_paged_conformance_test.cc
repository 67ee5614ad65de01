// PagedAttention on the CPU passes its conformance suite.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_paged_attention.h"
#include "tests/kernels/paged_conformance.h"

namespace kvtide::testing {
namespace {

class CpuWorld : public PagedWorld {
 public:
  ~CpuWorld() override {
    for (void* memory : memory_) std::free(memory);
  }
  absl::StatusOr<std::unique_ptr<PagedAttention>> Make(const PagedOptions& options,
                                                       std::span<const PagedLayer> layers) override {
    return MakeCpuPagedAttention(*backend_, options, layers);
  }
  std::byte* Allocate(size_t bytes) override {
    memory_.push_back(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    KVTIDE_CHECK(memory_.back() != nullptr, "no memory");
    return static_cast<std::byte*>(memory_.back());
  }
  void Upload(const void* from, std::byte* to, size_t bytes) override { std::memcpy(to, from, bytes); }
  void Download(const std::byte* from, void* to, size_t bytes) override { std::memcpy(to, from, bytes); }
  absl::Status Run(const std::function<absl::Status(void*)>& plan,
                   const std::function<absl::Status(void*)>& layers) override {
    absl::Status status = plan(nullptr);
    if (status.ok()) status = layers(nullptr);
    return status;
  }

 private:
  std::unique_ptr<Backend> backend_ = MakeCpuBackend({.threads = 2});
  std::vector<void*> memory_;
};

INSTANTIATE_TEST_SUITE_P(Cpu, PagedConformance,
                         ::testing::Values(PagedWorldCase{"cpu",
                                                          [] { return std::make_unique<CpuWorld>(); }}),
                         PagedCaseName);

}  // namespace
}  // namespace kvtide::testing
