// The conformance suite of backends. A backend passes by instantiating it with a factory:
//     INSTANTIATE_TEST_SUITE_P(Cpu, BackendConformance, ::testing::Values(BackendCase{"plain", [] { return
//     ...; }}), CaseName);
// The cases are in backend_conformance.cc, which the test binary links.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "kernels/backend.h"

namespace kvtide::testing {

struct BackendCase {
  std::string name;  // letters and digits
  std::function<std::unique_ptr<Backend>()> make;
  friend void PrintTo(const BackendCase& c, std::ostream* out) { *out << c.name; }
};

class BackendConformance : public ::testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override { backend_ = GetParam().make(); }
  Backend& backend() { return *backend_; }

 private:
  std::unique_ptr<Backend> backend_;
};

inline std::string CaseName(const ::testing::TestParamInfo<BackendCase>& info) { return info.param.name; }

}  // namespace kvtide::testing
