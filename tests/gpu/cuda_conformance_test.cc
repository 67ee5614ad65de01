// The CUDA backend on the machine's first GPU passes the conformance suite of backends. Skipped without a GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/cuda_ipc_case.h"
#include "tests/kernels/backend_conformance.h"

namespace kvtide::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(Cuda, BackendConformance, ::testing::Values(BackendCase{"cuda", [] {
                           CudaBackendOptions options;
                           options.scratch_bytes = 1u << 20;  // small: converted blocks come in several parts
                           auto backend = MakeCudaBackend(options);
                           KVTIDE_CHECK(backend.ok(), std::string(backend.status().message()));
                           return std::move(backend).value();
                         }}),
                         CaseName);

}  // namespace
}  // namespace kvtide::testing

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--attend-by-ipc") == 0) return kvtide::testing::AttendByIpc();
  ::testing::InitGoogleTest(&argc, argv);
  const auto probe = kvtide::MakeCudaBackend();
  if (!probe.ok()) {
    std::printf("no GPU to test on: %s\n", std::string(probe.status().message()).c_str());
    return 77;  // CTest: skipped
  }
  return RUN_ALL_TESTS();
}
