// PageCopier on the CPU passes its conformance suite.
#include "kernels/cpu/cpu_page_copier.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/page_copier_conformance.h"

namespace kvtide::testing {
namespace {

class CpuWorld : public PageCopierWorld {
 public:
  ~CpuWorld() override {
    for (void* memory : memory_) std::free(memory);
  }
  absl::StatusOr<std::unique_ptr<PageCopier>> Make(const PageCopyOptions& options,
                                                   std::span<std::byte* const> layers) override {
    return MakeCpuPageCopier(*backend_, options, layers);
  }
  std::byte* Allocate(size_t bytes) override {
    memory_.push_back(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    KVTIDE_CHECK(memory_.back() != nullptr, "no memory");
    return static_cast<std::byte*>(memory_.back());
  }
  void Upload(const void* from, std::byte* to, size_t bytes) override { std::memcpy(to, from, bytes); }
  void Download(const std::byte* from, void* to, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  std::unique_ptr<Backend> backend_ = MakeCpuBackend({.threads = 2});
  std::vector<void*> memory_;
};

INSTANTIATE_TEST_SUITE_P(Cpu, PageCopierConformance,
                         ::testing::Values(PageCopierCase{"cpu",
                                                          [] { return std::make_unique<CpuWorld>(); }}),
                         PageCopierCaseName);

}  // namespace
}  // namespace kvtide::testing
