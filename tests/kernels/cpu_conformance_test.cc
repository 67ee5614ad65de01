// The CPU backend at every SIMD level of this machine passes the conformance suite.
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/backend_conformance.h"

namespace kvtide::testing {
namespace {

std::vector<BackendCase> CpuCases() {
  std::vector<BackendCase> cases;
  for (SimdLevel level : SupportedSimdLevels())
    cases.push_back({SimdLevelName(level), [level] {
                       CpuBackendOptions options;
                       options.simd = level;
                       options.threads = 2;
                       options.huge_pages = false;
                       return MakeCpuBackend(options);
                     }});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Cpu, BackendConformance, ::testing::ValuesIn(CpuCases()), CaseName);

}  // namespace
}  // namespace kvtide::testing
