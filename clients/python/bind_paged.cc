// Attention over pages that an engine manages: kernels/paged_attention.h and exact_pages.h for Python.
// Tensors and pages go in as addresses (torch's data_ptr()), so that any memory of any device serves without
// a copy; kvtide/vllm, the only caller, keeps them alive. Every call gives up the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/python/bindings.h"
#include "clients/python/exact_pages.h"
#include "clients/python/paged_device.h"
#include "clients/python/raise.h"
#include "kernels/paged_attention.h"
#include "kernels/paged_library.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvtide::python {
namespace {

using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::device::cpu>;
template <class T, int kDims>
using Array = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// PagedAttention with its step.
class Paged {
 public:
  PagedOptions options;
  std::vector<PagedLayer> layers;
  PagedStep step;

  void Make(std::shared_ptr<PagedDevice> device) {
    const nb::gil_scoped_release release;
    attention_ = device->Make(options, layers);
    device_ = std::move(device);
    for (PagedLayer& layer : layers) layer.keys = nullptr;  // were copied
    keys_.clear();
  }
  // Of the last layer.
  void TransformKeys(const Array<float, 2>& centres, const Array<float, 3>& transforms,
                     const Array<uint8_t, 3>& widths) {
    const size_t heads = centres.shape(0), dim = centres.shape(1);
    if (layers.empty()) throw StatusException(absl::FailedPreconditionError("add a layer first"));
    if (heads != static_cast<size_t>(options.shape.kv_heads) || transforms.shape(0) != heads ||
        widths.shape(0) != heads || transforms.shape(1) != dim || transforms.shape(2) != dim)
      throw StatusException(
          absl::InvalidArgumentError("centres are [kv_heads][head_dim], transforms have another head_dim, "
                                     "widths are [kv_heads][types][groups]"));
    const size_t own_widths = widths.shape(1) * widths.shape(2);
    std::vector<HeadProfile>& keys = keys_.emplace_back(heads);
    for (size_t h = 0; h < heads; h++) {
      keys[h].centre.assign(centres.data() + h * dim, centres.data() + (h + 1) * dim);
      keys[h].transform.assign(transforms.data() + h * dim * dim, transforms.data() + (h + 1) * dim * dim);
      keys[h].widths.assign(widths.data() + h * own_widths, widths.data() + (h + 1) * own_widths);
    }
    layers.back().keys = keys.data();
  }
  PagedAttention& attention() const {
    if (attention_ == nullptr) throw StatusException(absl::FailedPreconditionError("call make() first"));
    return *attention_;
  }

 private:
  std::deque<std::vector<HeadProfile>> keys_;  // that layers name, until there is the attention
  std::shared_ptr<PagedDevice> device_;        // outlives the attention
  std::unique_ptr<PagedAttention> attention_;
};

nb::ndarray<nb::numpy, int32_t> View(std::span<int32_t> values, std::vector<size_t> shape, nb::handle owner) {
  return {values.data(), shape.size(), shape.data(), owner};
}

}  // namespace

void BindPaged(nb::module_& m) {
  m.def("paged_page_bytes", [](const std::string& pair, int kv_heads, int head_dim_k, int head_dim_v) {
    const GroupShape shape{1, kv_heads, head_dim_k, head_dim_v};
    Raise(CheckGroupShape(shape));
    return BlockLayout(shape, Raise(ParseCachePair(pair))).block_bytes();
  });
  m.def("paged_library_error", [](const std::string& library) {
    return std::string(
        LoadPagedLibrary(library.empty() ? std::string(kCudaPagedLibrary) : library).status().message());
  });

  nb::class_<PagedDevice>(m, "PagedDevice")
      .def(nb::init<const std::string&, int, const std::string&>(), "device"_a, "threads"_a = 0,
           "library"_a = "");

  nb::class_<Paged>(m, "Paged")
      .def(nb::init<>())
      .def(
          "shape",
          [](Paged& p, const std::string& pair, int kv_heads, int head_dim_k, int head_dim_v, int heads) {
            p.options.shape = {1, kv_heads, head_dim_k, head_dim_v};
            p.options.pair = Raise(ParseCachePair(pair));
            p.options.heads = heads;
          },
          "pair"_a, "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a, "heads"_a)
      .def(
          "attend_as",
          [](Paged& p, float scale, float softcap, int64_t window, const std::string& type,
             const std::string& output_type) {
            p.options.scale = scale;
            p.options.softcap = softcap;
            p.options.window = window;
            p.options.type = ParseType(type);
            p.options.output_type = ParseType(output_type);
          },
          "scale"_a, "softcap"_a, "window"_a, "type"_a, "output_type"_a)
      .def(
          "bounds",
          [](Paged& p, int sequences, int tokens, int coded_blocks, int exact_blocks, int seals) {
            p.options.max_sequences = sequences;
            p.options.max_tokens = tokens;
            p.options.max_coded_blocks = coded_blocks;
            p.options.max_exact_blocks = exact_blocks;
            p.options.max_seals = seals;
          },
          "sequences"_a, "tokens"_a, "coded_blocks"_a, "exact_blocks"_a, "seals"_a)
      .def(
          "pages",
          [](Paged& p, size_t coded_stride, size_t exact_stride, int exact_pages, uintptr_t scratch) {
            p.options.coded_stride = coded_stride;
            p.options.exact_stride = exact_stride;
            p.options.exact_pages = exact_pages;
            p.options.scratch = At<std::byte>(scratch);
          },
          "coded_stride"_a, "exact_stride"_a, "exact_pages"_a, "scratch"_a)
      .def(
          "add_layer",
          [](Paged& p, uintptr_t coded, uintptr_t exact, uintptr_t sinks, uintptr_t mean, uintptr_t gain) {
            p.layers.push_back({At<std::byte>(coded), At<std::byte>(exact), At<const float>(sinks),
                                At<const float>(mean), At<const float>(gain), nullptr});
          },
          "coded"_a, "exact"_a, "sinks"_a = 0, "mean"_a = 0, "gain"_a = 0)
      // Calibrated keys of the layer that was added last, coded after RoPE: [kv_heads][head_dim],
      // [kv_heads][head_dim][head_dim], channel by coefficient, and [kv_heads][types][groups of 8].
      .def("transform_keys", &Paged::TransformKeys, "centres"_a, "transforms"_a, "widths"_a)
      .def("make", &Paged::Make, "device"_a)
      // Addresses of the arrays that every step is described by.
      .def(
          "tables",
          [](Paged& p, uintptr_t query_start, uintptr_t lengths, uintptr_t coded_first, uintptr_t coded_count,
             uintptr_t coded_table, int64_t coded_row, uintptr_t exact_table, int64_t exact_row,
             uintptr_t write_slots, uintptr_t seal_pages, uintptr_t seal_count) {
            p.step.query_start = At<const int32_t>(query_start);
            p.step.lengths = At<const int32_t>(lengths);
            p.step.coded_first = At<const int32_t>(coded_first);
            p.step.coded_count = At<const int32_t>(coded_count);
            p.step.coded_table = At<const int32_t>(coded_table);
            p.step.coded_row = coded_row;
            p.step.exact_table = At<const int32_t>(exact_table);
            p.step.exact_row = exact_row;
            p.step.write_slots = At<const int32_t>(write_slots);
            p.step.seal_pages = At<const int32_t>(seal_pages);
            p.step.seal_count = At<const int32_t>(seal_count);
          },
          "query_start"_a, "lengths"_a, "coded_first"_a, "coded_count"_a, "coded_table"_a, "coded_row"_a,
          "exact_table"_a, "exact_row"_a, "write_slots"_a, "seal_pages"_a, "seal_count"_a)
      .def(
          "host_tables",
          [](Paged& p, uintptr_t query_start, uintptr_t lengths, uintptr_t coded_first,
             uintptr_t coded_count) {
            p.step.host_query_start = At<const int32_t>(query_start);
            p.step.host_lengths = At<const int32_t>(lengths);
            p.step.host_coded_first = At<const int32_t>(coded_first);
            p.step.host_coded_count = At<const int32_t>(coded_count);
          },
          "query_start"_a, "lengths"_a, "coded_first"_a, "coded_count"_a)
      .def(
          "plan",
          [](Paged& p, int sequences, int tokens, int most_queries, int seals, uintptr_t stream) {
            PagedStep step = p.step;
            step.sequences = sequences;
            step.tokens = tokens;
            step.most_queries = most_queries;
            step.seals = seals;
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.Plan(step, At<void>(stream)));
          },
          "sequences"_a, "tokens"_a, "most_queries"_a, "seals"_a, "stream"_a = 0)
      .def(
          "write",
          [](Paged& p, int layer, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride,
             uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.Write(layer, {At<void>(k), k_stride}, {At<void>(v), v_stride}, At<void>(stream)));
          },
          "layer"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a, "stream"_a = 0)
      .def(
          "attend",
          [](Paged& p, int layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride,
             uintptr_t lse, uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.Attend(layer, {At<void>(q), q_stride}, {At<void>(out), out_stride},
                                   At<float>(lse), At<void>(stream)));
          },
          "layer"_a, "q"_a, "q_stride"_a, "out"_a, "out_stride"_a, "lse"_a = 0, "stream"_a = 0)
      .def(
          "write_attend",
          [](Paged& p, int layer, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t q,
             int64_t q_stride, uintptr_t out, int64_t out_stride, uintptr_t lse, uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.WriteAttend(layer, {At<void>(k), k_stride}, {At<void>(v), v_stride},
                                        {At<void>(q), q_stride}, {At<void>(out), out_stride}, At<float>(lse),
                                        At<void>(stream)));
          },
          "layer"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a, "q"_a, "q_stride"_a, "out"_a, "out_stride"_a,
          "lse"_a = 0, "stream"_a = 0)
      .def(
          "seal",
          [](Paged& p, int layer, uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.Seal(layer, At<void>(stream)));
          },
          "layer"_a, "stream"_a = 0)
      .def(
          "seal_layers",
          [](Paged& p, uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            Raise(attention.SealLayers(At<void>(stream)));
          },
          "stream"_a = 0)
      .def(
          "changed_values",
          [](Paged& p, uintptr_t stream) {
            PagedAttention& attention = p.attention();
            const nb::gil_scoped_release release;
            return Raise(attention.ChangedValues(At<void>(stream)));
          },
          "stream"_a = 0)
      .def_prop_ro("bytes", [](const Paged& p) { return p.attention().bytes(); });

  nb::class_<ExactPages>(m, "ExactPages")
      .def(
          "__init__",
          [](ExactPages* self, int pages, int slots, int first_blocks, int last_blocks, int64_t sliding,
             int max_sequences, int max_tokens, int rewritten, bool blocks_stay) {
            ExactPagesOptions options;
            options.blocks_stay = blocks_stay;
            options.pages = pages;
            options.window = {first_blocks, last_blocks};
            options.sliding = sliding;
            options.max_sequences = max_sequences;
            options.max_tokens = max_tokens;
            options.rewritten = rewritten;
            options.slots = slots > 0 ? slots : options.AllSlots();
            new (self) ExactPages(Raise(ExactPages::Make(options)));
          },
          "pages"_a, "slots"_a, "first_blocks"_a, "last_blocks"_a, "sliding"_a, "max_sequences"_a,
          "max_tokens"_a, "rewritten"_a, "blocks_stay"_a = false)
      .def(
          "step",
          [](ExactPages& self, const Numbers& query_start, const Numbers& lengths, const Table& table) {
            // Strides of a table without rows, or with one column, say nothing.
            const bool side_by_side = table.shape(0) == 0 || table.shape(1) <= 1 || table.stride(1) == 1;
            if (!side_by_side || table.shape(0) < lengths.size())
              throw StatusException(
                  absl::InvalidArgumentError("the table has a row of consecutive numbers for each length"));
            const int64_t row = table.shape(0) > 1 ? table.stride(0) : static_cast<int64_t>(table.shape(1));
            const size_t size =
                table.shape(0) == 0 ? 0 : (table.shape(0) - 1) * static_cast<size_t>(row) + table.shape(1);
            const nb::gil_scoped_release release;
            Raise(self.Step({query_start.data(), query_start.size()}, {lengths.data(), lengths.size()},
                            {table.data(), size}, row, static_cast<int64_t>(table.shape(1))));
          },
          "query_start"_a, "lengths"_a, "table"_a)
      .def(
          "forget",
          [](ExactPages& self, const Numbers& pages) {
            Raise(self.Forget({pages.data(), pages.size()}));
          },
          "pages"_a)
      .def_prop_ro("slots", [](const ExactPages& self) { return self.options().slots; })
      .def_prop_ro("least_slots", [](const ExactPages& self) { return self.options().LeastSlots(); })
      .def_prop_ro("all_slots", [](const ExactPages& self) { return self.options().AllSlots(); })
      .def_prop_ro("scratch", [](const ExactPages& self) { return self.options().Scratch(); })
      .def_prop_ro("exact_row", [](const ExactPages& self) { return self.options().ExactRow(); })
      .def_prop_ro("max_seals", [](const ExactPages& self) { return self.options().MaxSeals(); })
      .def_prop_ro("most_queries", [](const ExactPages& self) { return self.most_queries(); })
      .def("counts",
           [](const ExactPages& self) {
             nb::dict out;
             out["steps"] = self.counts().steps;
             out["seals"] = self.counts().seals;
             out["exact_blocks"] = self.counts().exact_blocks;
             out["coded_blocks"] = self.counts().coded_blocks;
             out["lost_copies"] = self.counts().lost_copies;
             return out;
           })
      // The memory of the tables, which stays where it is: NumPy views.
      .def("tables", [](nb::handle_t<ExactPages> self) {
        ExactPages& pages = nb::cast<ExactPages&>(self);
        const auto sequences = static_cast<size_t>(pages.options().max_sequences);
        nb::dict out;
        out["coded_first"] = View(pages.coded_first(), {sequences}, self);
        out["coded_count"] = View(pages.coded_count(), {sequences}, self);
        out["exact_table"] =
            View(pages.exact_table(), {sequences, static_cast<size_t>(pages.options().ExactRow())}, self);
        out["write_slots"] = View(pages.write_slots(), {pages.write_slots().size()}, self);
        out["seal_pages"] =
            View(pages.seal_pages(), {static_cast<size_t>(pages.options().MaxSeals()), 2}, self);
        out["seal_count"] = View(pages.seal_count(), {1}, self);
        return out;
      });

  // The numbers that memory is sized by before the pages are known.
  m.def(
      "exact_pages_sizes",
      [](int first_blocks, int last_blocks, int max_sequences, int max_tokens, int rewritten,
         bool blocks_stay) {
        ExactPagesOptions options;
        options.blocks_stay = blocks_stay;
        options.window = {first_blocks, last_blocks};
        options.max_sequences = max_sequences;
        options.max_tokens = max_tokens;
        options.rewritten = rewritten;
        nb::dict out;
        out["least_slots"] = options.LeastSlots();
        out["all_slots"] = options.AllSlots();
        out["scratch"] = options.Scratch();
        return out;
      },
      "first_blocks"_a, "last_blocks"_a, "max_sequences"_a, "max_tokens"_a, "rewritten"_a,
      "blocks_stay"_a = false);
}

}  // namespace kvtide::python
