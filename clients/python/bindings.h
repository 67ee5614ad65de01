// The parts of the module.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "clients/cpp/call_trace.h"
#include "clients/cpp/pool.h"

namespace kvtide::python {

void BindPool(nanobind::module_& m);
void BindBlocks(nanobind::module_& m);
void BindCalibration(nanobind::module_& m);
void BindFormats(nanobind::module_& m);
void BindPlan(nanobind::module_& m);
void BindPaged(nanobind::module_& m);
void BindPages(nanobind::module_& m);
void BindSteps(nanobind::module_& m);

// The trace of the calls that this context of Python makes (kvtide/_trace.py); none where it has none. With
// the GIL.
std::optional<client::CallTrace> TraceOfContext();

// Runs a blocking call without the GIL, with the trace of the context that makes it.
template <class F>
auto Blocking(F&& call) {
  std::optional<client::CallTrace> trace = TraceOfContext();
  const nanobind::gil_scoped_release release;
  std::optional<client::TraceCalls> calls;
  if (trace.has_value()) calls.emplace(*std::move(trace));
  return call();
}

// An open namespace (bind_blocks.cc); `spec` has the fields of kvtide.block_store.Namespace.
nanobind::object OpenBlockStore(std::shared_ptr<client::Pool> pool, const nanobind::dict& spec);

// A model as Pool.register_model takes it; layers have the fields of kvtide.Layer.
client::Model MakeModel(const std::string& name, const std::vector<nanobind::dict>& layers);

// Steps on the device of the pool (bind_steps.cc); `spec` has the fields of DirectOptions.
nanobind::object OpenDeviceSteps(std::shared_ptr<client::Pool> pool, const client::Model& model,
                                 const nanobind::dict& spec);

}  // namespace kvtide::python
