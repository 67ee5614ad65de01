// kvtide._core: what the package's Python files are thin wrappers of. Nothing here is public.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "clients/python/bindings.h"
#include "clients/python/raise.h"

namespace nb = nanobind;

namespace {

// A contextvars.ContextVar of (request id, traceparent) or None; borrowed for the life of the process.
PyObject* trace_variable = nullptr;

}  // namespace

std::optional<kvtide::client::CallTrace> kvtide::python::TraceOfContext() {
  PyObject* value = nullptr;
  if (trace_variable == nullptr || PyContextVar_Get(trace_variable, nullptr, &value) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  const nb::object held = nb::steal(value);
  if (!held.is_valid() || held.is_none()) return std::nullopt;
  return client::CallTrace{nb::cast<std::string>(held[0]), nb::cast<std::string>(held[1])};
}

NB_MODULE(_core, m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const kvtide::python::StatusException& e) {
      const nb::object made =
          nb::module_::import_("kvtide.errors")
              .attr("from_status")(absl::StatusCodeToString(e.status().code()).c_str(), e.what(),
                                   kvtide::client::RequestIdOf(e.status()).c_str());
      PyErr_SetObject(made.type().ptr(), made.ptr());
    }
  });
  m.def("set_trace_variable", [](nb::handle variable) {
    Py_XDECREF(trace_variable);
    trace_variable = nb::borrow(variable).release().ptr();
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
