// The CUDA backend on the machine's first GPU passes the conformance suite of backends. Skipped without a
// GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "planner/engines/kvtide_engine.h"
#include "tests/gpu/cuda_ipc_case.h"
#include "tests/kernels/attend_check.h"
#include "tests/kernels/backend_conformance.h"

namespace kvtide::testing {
namespace {

BackendCase CaseOf(const std::string& name, int most_decode_rows, bool warpgroups = true) {
  return {name, [most_decode_rows, warpgroups] {
            CudaBackendOptions options;
            options.scratch_bytes = 1u << 20;  // small: decoded blocks come in several parts
            options.most_decode_rows = most_decode_rows;
            options.warpgroups = warpgroups;
            auto backend = MakeCudaBackend(options);
            KVTIDE_CHECK(backend.ok(), std::string(backend.status().message()));
            return std::move(backend).value();
          }};
}

// All rows by the kernels for few rows, and all that may be (attend_check.h) by the prefill kernels: the
// device's own, and those for any GPU.
INSTANTIATE_TEST_SUITE_P(Cuda, BackendConformance,
                         ::testing::Values(CaseOf("cuda", 1 << 30), CaseOf("prefill", kFewRows),
                                           CaseOf("plainprefill", kFewRows, false)),
                         CaseName);

TEST(CudaBackendOptions, ScratchIsWhatThePlannerCounts) {
  EXPECT_EQ(static_cast<int64_t>(CudaBackendOptions().scratch_bytes), planner::kKvtideScratchBytes);
}

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
