// PageCopier on the GPU passes its conformance suite, and waits for what the engine put on its stream.
#include "kernels/cuda/pages/cuda_page_copier.h"

#include <cuda_runtime.h>

#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "tests/kernels/page_copier_conformance.h"

namespace kvtide::testing {
namespace {

void Check(cudaError_t error) { KVTIDE_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

class CudaWorld : public PageCopierWorld {
 public:
  ~CudaWorld() override {
    for (void* memory : memory_) (void)cudaFree(memory);
  }
  absl::StatusOr<std::unique_ptr<PageCopier>> Make(const PageCopyOptions& options,
                                                   std::span<std::byte* const> layers) override {
    return MakeCudaPageCopier(options, layers);
  }
  std::byte* Allocate(size_t bytes) override {
    void* memory = nullptr;
    Check(cudaMalloc(&memory, bytes));
    memory_.push_back(memory);
    return static_cast<std::byte*>(memory);
  }
  void Upload(const void* from, std::byte* to, size_t bytes) override {
    KVTIDE_CHECK(cuda::CopyToDevice(to, from, bytes).ok());
  }
  void Download(const std::byte* from, void* to, size_t bytes) override {
    Check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
  }

 private:
  std::vector<void*> memory_;
};

INSTANTIATE_TEST_SUITE_P(Cuda, PageCopierConformance,
                         ::testing::Values(PageCopierCase{"cuda",
                                                          [] { return std::make_unique<CudaWorld>(); }}),
                         PageCopierCaseName);

TEST(CudaPageCopier, BeginsBehindTheEngine) {
  CudaWorld world;
  PageCopyOptions options;
  options.page_bytes = options.page_stride = 4096;
  options.pages = 4;
  options.piece_bytes = 4096;
  std::byte* const pages[] = {world.Allocate(4 * 4096)};
  Check(cudaMemset(pages[0], 1, 4 * 4096));
  const auto copier = world.Make(options, pages);
  ASSERT_TRUE(copier.ok()) << copier.status();
  constexpr size_t kBusy = size_t{1} << 30;
  std::byte* const busy = world.Allocate(kBusy);
  cudaStream_t engine = nullptr;
  cudaEvent_t written = nullptr;
  Check(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking));
  Check(cudaEventCreateWithFlags(&written, cudaEventDisableTiming));
  for (int i = 0; i < 20; i++) Check(cudaMemsetAsync(busy, i, kBusy, engine));  // some milliseconds
  Check(cudaMemsetAsync(pages[0], 7, 4 * 4096, engine));
  Check(cudaEventRecord(written, engine));
  ASSERT_TRUE((*copier)->After(written).ok());
  std::vector<std::byte> payload(4096);
  const std::vector<int32_t> page = {2};
  ASSERT_TRUE((*copier)->Read(0, page, payload.data()).ok());
  ASSERT_TRUE((*copier)->Wait(0).ok());
  EXPECT_EQ(payload, std::vector<std::byte>(4096, std::byte{7}));
  Check(cudaStreamDestroy(engine));
  Check(cudaEventDestroy(written));
}

}  // namespace
}  // namespace kvtide::testing
