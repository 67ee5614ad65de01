// PagedAttention on the GPU passes its conformance suite: called step by step, and as CUDA graphs that
// recorded one step and are replayed over other lengths, tables and sequences, with and without the plan.
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/cuda/step/cuda_paged_attention.h"
#include "tests/kernels/paged_conformance.h"

namespace kvtide::testing {
namespace {

enum class Recorded { kNothing, kLayers, kStep };

void Check(cudaError_t error) { KVTIDE_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

class CudaWorld : public PagedWorld {
 public:
  explicit CudaWorld(Recorded recorded) : recorded_(recorded) {
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    other_ = Allocate(128);
  }
  ~CudaWorld() override {
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
    (void)cudaStreamDestroy(stream_);
    for (void* memory : memory_) (void)cudaFree(memory);
  }
  absl::StatusOr<std::unique_ptr<PagedAttention>> Make(const PagedOptions& options,
                                                       std::span<const PagedLayer> layers) override {
    return MakeCudaPagedAttention(options, layers);
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
  absl::Status Run(const std::function<absl::Status(void*)>& plan,
                   const std::function<absl::Status(void*)>& layers) override {
    absl::Status status;
    if (recorded_ != Recorded::kStep) status.Update(plan(stream_));
    // Work of the engine's own that is no kernel, before kernels that may start while the one before them
    // ends.
    const auto all = [&] {
      Check(cudaMemsetAsync(other_, 0, 128, stream_));
      return layers(stream_);
    };
    if (recorded_ == Recorded::kNothing) {
      status.Update(all());
    } else {
      if (graph_ == nullptr) {
        Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
        if (recorded_ == Recorded::kStep) status.Update(plan(stream_));
        status.Update(all());
        cudaGraph_t graph = nullptr;
        Check(cudaStreamEndCapture(stream_, &graph));
        Check(cudaGraphInstantiate(&graph_, graph, 0));
        (void)cudaGraphDestroy(graph);
      }
      Check(cudaGraphLaunch(graph_, stream_));
    }
    Check(cudaStreamSynchronize(stream_));
    return status;
  }
  bool replays() const override { return recorded_ != Recorded::kNothing; }

 private:
  const Recorded recorded_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::vector<void*> memory_;
  std::byte* other_ = nullptr;
};

PagedWorldCase CaseOf(const std::string& name, Recorded recorded) {
  return {name, [recorded] { return std::make_unique<CudaWorld>(recorded); }};
}

INSTANTIATE_TEST_SUITE_P(Cuda, PagedConformance,
                         ::testing::Values(CaseOf("cuda", Recorded::kNothing),
                                           CaseOf("cudalayers", Recorded::kLayers),
                                           CaseOf("cudastep", Recorded::kStep)),
                         PagedCaseName);

}  // namespace
}  // namespace kvtide::testing
