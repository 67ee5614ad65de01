// kvtide._core: what the package's Python files are thin wrappers of. Nothing here is public.
#include <nanobind/nanobind.h>

#include "clients/python/bindings.h"
#include "clients/python/raise.h"

namespace nb = nanobind;

NB_MODULE(_core, m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const kvtide::python::StatusException& e) {
      const nb::object made =
          nb::module_::import_("kvtide.errors")
              .attr("from_status")(absl::StatusCodeToString(e.status().code()).c_str(), e.what());
      PyErr_SetObject(made.type().ptr(), made.ptr());
    }
  });
  kvtide::python::BindBlocks(m);
  kvtide::python::BindCalibration(m);
  kvtide::python::BindPool(m);
  kvtide::python::BindFormats(m);
  kvtide::python::BindPlan(m);
  kvtide::python::BindPaged(m);
  kvtide::python::BindPages(m);
  kvtide::python::BindSteps(m);
}
