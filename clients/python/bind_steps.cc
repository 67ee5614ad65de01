// Steps over a pool that is mapped into this process: clients/cpp/direct_attention.h for Python. Tensors go
// in as addresses, as in bind_paged.cc; kvtide/device_steps.py keeps them alive. Every call gives up the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "clients/cpp/direct_attention.h"
#include "clients/python/bindings.h"
#include "clients/python/paged_device.h"
#include "clients/python/raise.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvtide::python {
namespace {

// A DirectAttention with its open step, and the pool that it needs.
class DeviceSteps {
 public:
  DeviceSteps(std::shared_ptr<client::Pool> pool, const client::Model& model,
              const client::DirectOptions& options)
      : pool_(std::move(pool)) {
    attention_ = Raise(Blocking([&] { return client::DirectAttention::Make(pool_.get(), model, options); }));
  }
  ~DeviceSteps() {
    const nb::gil_scoped_release release;
    if (step_) {
      attention_->Mark(*step_, stream_).IgnoreError();
      attention_->RollBack(*std::move(step_)).IgnoreError();
    }
    attention_.reset();
    pool_.reset();
  }

  // `token_ids`: of each item, or empty.
  std::vector<int64_t> Begin(const std::vector<std::pair<client::SequenceId, int64_t>>& items,
                             const std::vector<std::vector<client::TokenId>>& token_ids, uintptr_t stream) {
    if (step_) throw StatusException(absl::FailedPreconditionError("a step is open: end it first"));
    std::vector<client::StepItem> asked;
    for (size_t i = 0; i < items.size(); i++)
      asked.push_back({items[i].first, items[i].second, token_ids.at(i)});
    stream_ = At<void>(stream);
    step_ = Raise(Blocking([&] { return attention_->Begin(asked, stream_); }));
    return step_->starts;
  }
  // Items: sequence, queries, and at the end of how many tokens they stand, 0 = all.
  std::vector<int64_t> Pin(const std::vector<std::tuple<client::SequenceId, int64_t, int64_t>>& items,
                           uintptr_t stream) {
    if (step_) throw StatusException(absl::FailedPreconditionError("a step is open: end it first"));
    std::vector<client::PinnedItem> asked;
    for (const auto& [sequence, queries, tokens] : items) asked.push_back({sequence, queries, tokens});
    stream_ = At<void>(stream);
    step_ = Raise(Blocking([&] { return attention_->Pin(asked, stream_); }));
    return step_->starts;
  }
  void Write(int layer, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride) {
    Open();
    Raise(Blocking([&] {
      return attention_->Write(layer, {At<void>(k), k_stride}, {At<void>(v), v_stride}, stream_);
    }));
  }
  void Attend(int layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, uintptr_t lse) {
    Open();
    Raise(Blocking([&] {
      return attention_->Attend(layer, {At<void>(q), q_stride}, {At<void>(out), out_stride}, At<float>(lse),
                                stream_);
    }));
  }
  void WriteAttend(int layer, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t q,
                   int64_t q_stride, uintptr_t out, int64_t out_stride) {
    Open();
    Raise(Blocking([&] {
      return attention_->WriteAttend(layer, {At<void>(k), k_stride}, {At<void>(v), v_stride},
                                     {At<void>(q), q_stride}, {At<void>(out), out_stride}, nullptr, stream_);
    }));
  }
  void End(const std::vector<std::vector<client::TokenId>>& token_ids) {
    client::DirectStep& step = Open();
    std::vector<client::StepTokens> said;
    for (size_t i = 0; i < token_ids.size(); i++)
      if (!token_ids[i].empty()) said.push_back({i, token_ids[i]});
    Raise(Blocking([&]() -> absl::Status {
      absl::Status status = attention_->Seal(stream_);
      if (status.ok()) status = attention_->Mark(step, stream_);
      client::DirectStep last = *std::move(step_);
      step_.reset();
      if (status.ok()) return attention_->End(std::move(last), said);
      attention_->RollBack(std::move(last)).IgnoreError();
      return status;
    }));
  }
  void RollBack() {
    client::DirectStep& step = Open();
    Raise(Blocking([&] {
      // Blocks are not given away before the work that was begun is done.
      attention_->Mark(step, stream_).IgnoreError();
      client::DirectStep last = *std::move(step_);
      step_.reset();
      return attention_->RollBack(std::move(last));
    }));
  }
  size_t bytes() const { return attention_->device_bytes(); }

 private:
  client::DirectStep& Open() {
    if (!step_) throw StatusException(absl::FailedPreconditionError("no step is open"));
    return *step_;
  }

  std::shared_ptr<client::Pool> pool_;
  std::unique_ptr<client::DirectAttention> attention_;
  std::optional<client::DirectStep> step_;
  void* stream_ = nullptr;  // of the open step
};

client::DirectOptions MakeOptions(const nb::dict& spec) {
  client::DirectOptions options;
  options.pairs = nb::cast<std::vector<std::string>>(spec["pairs"]);
  options.type = options.output_type = ParseType(nb::cast<std::string>(spec["dtype"]));
  options.max_sequences = nb::cast<int>(spec["max_sequences"]);
  options.max_new_tokens = nb::cast<int>(spec["max_new_tokens"]);
  options.max_sequence_tokens = nb::cast<int64_t>(spec["max_sequence_tokens"]);
  options.max_seals = nb::cast<int>(spec["max_seals"]);
  options.prefill_bytes = nb::cast<size_t>(spec["prefill_bytes"]);
  if (!spec["scale"].is_none()) options.scale = nb::cast<float>(spec["scale"]);
  if (!spec["softcap"].is_none()) options.softcap = nb::cast<float>(spec["softcap"]);
  return options;
}

}  // namespace

nb::object OpenDeviceSteps(std::shared_ptr<client::Pool> pool, const client::Model& model,
                           const nb::dict& spec) {
  return nb::cast(new DeviceSteps(std::move(pool), model, MakeOptions(spec)), nb::rv_policy::take_ownership);
}

void BindSteps(nb::module_& m) {
  nb::class_<DeviceSteps>(m, "DeviceSteps")
      .def("begin", &DeviceSteps::Begin, "items"_a, "token_ids"_a, "stream"_a)
      .def("pin", &DeviceSteps::Pin, "items"_a, "stream"_a)
      .def("write", &DeviceSteps::Write, "layer"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a)
      .def("attend", &DeviceSteps::Attend, "layer"_a, "q"_a, "q_stride"_a, "out"_a, "out_stride"_a, "lse"_a)
      .def("write_attend", &DeviceSteps::WriteAttend, "layer"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a,
           "q"_a, "q_stride"_a, "out"_a, "out_stride"_a)
      .def("end", &DeviceSteps::End, "token_ids"_a)
      .def("roll_back", &DeviceSteps::RollBack)
      .def_prop_ro("bytes", &DeviceSteps::bytes);
}

}  // namespace kvtide::python
