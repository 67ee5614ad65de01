// The CPU backend at every SIMD level of this machine passes the conformance suite.
#include <memory>
#include <tuple>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/attend_check.h"
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

// Why CheckAttend has a second yardstick.
TEST(AttendCheck, RoundingToF16PagesMovesARowByMoreThanTheTolerance) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  AttendCase c;
  c.queries = 2;
  for (const auto& [pair, low, high] : {std::tuple("planar3", 1e-3, 1.1e-3), std::tuple("f16", 0.0, 0.0)}) {
    SCOPED_TRACE(pair);
    TestSequence sequence(*backend, {1, 1, 80, 80});
    sequence.AddRun(pair, 130, GaussianRows(3));
    const std::vector<float> q = MakeQueries(sequence, c);
    const AttendResult exact = AttendByReference(sequence, c, q);
    const double distance = LargestDistance(AttendByReferenceOverF16(sequence, c, q), exact, 80);
    EXPECT_GE(distance, low);
    EXPECT_LE(distance, high);
  }
}

}  // namespace
}  // namespace kvtide::testing
