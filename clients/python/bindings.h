// The parts of the module.
#pragma once

#include <nanobind/nanobind.h>

namespace kvtide::python {

void BindPool(nanobind::module_& m);
void BindFormats(nanobind::module_& m);
void BindPlan(nanobind::module_& m);
void BindPaged(nanobind::module_& m);

}  // namespace kvtide::python
