// The block store. Payloads are dense arrays of the caller; every call that may block gives up the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <string_view>
#include <utility>

#include "clients/cpp/block_store.h"
#include "clients/cpp/pool.h"
#include "clients/python/arrays.h"
#include "clients/python/bindings.h"
#include "clients/python/open_store.h"
#include "clients/python/raise.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvtide::python {
namespace {

std::vector<std::string_view> Views(const std::vector<nb::bytes>& keys) {
  std::vector<std::string_view> views;
  views.reserve(keys.size());
  for (const nb::bytes& key : keys) views.emplace_back(key.c_str(), key.size());
  return views;
}

struct Payload {
  client::BlockForm form = client::BlockForm::kBytes;
  client::PageLayout layout;
};

// Bytes (uint8) are blocks as they rest, everything else is rows.
template <class Array>
Payload FormOf(const Array& array, const nb::dict& layout) {
  Payload payload;
  const nb::dlpack::dtype type = array.dtype();
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt) && type.bits == 8 && type.lanes == 1)
    return payload;
  payload.form = client::BlockForm::kTensors;
  client::PageLayout& to = payload.layout;
  to.type = ElementType(type);
  for (const auto& [name, value] : layout) {
    const auto key = nb::cast<std::string>(name);
    if (key == "heads_first") {
      to.heads_first = nb::cast<bool>(value);
      continue;
    }
    const std::pair<const char*, int64_t*> strides[] = {
        {"block_stride", &to.block_stride},     {"layer_stride", &to.layer_stride},
        {"value_offset", &to.value_offset},     {"token_stride_k", &to.token_stride_k},
        {"token_stride_v", &to.token_stride_v}, {"head_stride_k", &to.head_stride_k},
        {"head_stride_v", &to.head_stride_v}};
    for (const auto& [stride, field] : strides)
      if (key == stride) *field = nb::cast<int64_t>(value);
  }
  return payload;
}

}  // namespace

nb::object OpenBlockStore(std::shared_ptr<client::Pool> pool, const nb::dict& from) {
  client::NamespaceSpec spec;
  spec.model = nb::cast<std::string>(from["model"]);
  spec.block_tokens = nb::cast<int>(from["block_tokens"]);
  spec.salt = nb::cast<std::string>(from["salt"]);
  spec.persist_all = nb::cast<bool>(from["persist_all"]);
  if (from.contains("priority"))
    spec.priority = static_cast<client::Priority>(nb::cast<int>(from["priority"]));
  if (from.contains("degrade")) spec.degrade = nb::cast<std::vector<std::string>>(from["degrade"]);
  if (from.contains("block_bytes")) {
    spec.content =
        client::OpaqueBlocks{nb::cast<int64_t>(from["block_bytes"]), nb::cast<std::string>(from["encoding"])};
  } else {
    spec.content = client::TensorBlocks{nb::cast<int>(from["layers"]), nb::cast<int>(from["kv_heads"]),
                                        nb::cast<int>(from["head_dim_k"]), nb::cast<int>(from["head_dim_v"]),
                                        nb::cast<std::string>(from["pair"])};
  }
  auto store = Raise(Blocking([&] { return client::BlockStore::Open(*pool, spec); }));
  return nb::cast(std::make_unique<OpenStore>(std::move(pool), std::move(store)));
}

void BindBlocks(nb::module_& m) {
  nb::class_<OpenStore>(m, "BlockStore")
      .def_prop_ro("namespace_id", [](const OpenStore& handle) { return handle.store().namespace_id(); })
      .def_prop_ro("block_bytes", [](const OpenStore& handle) { return handle.store().block_bytes(); })
      .def_prop_ro("pair", [](const OpenStore& handle) { return handle.store().pair(); })
      .def_prop_ro("existed", [](const OpenStore& handle) { return handle.store().existed(); })
      .def_prop_ro("codec_versions",
                   [](const OpenStore& handle) {
                     return nb::make_tuple(handle.store().codec_version_k(),
                                           handle.store().codec_version_v());
                   })
      .def("store",
           [](const OpenStore& handle, const std::vector<nb::bytes>& keys, const AnyArray& array,
              const nb::dict& layout, int priority) {
             const std::vector<std::string_view> views = Views(keys);
             const Payload payload = FormOf(array, layout);
             const std::span<const std::byte> bytes(static_cast<const std::byte*>(array.data()),
                                                    array.nbytes());
             const client::StoreBlocksResult result = Raise(Blocking([&] {
               return handle.store().Store(views, bytes, payload.form, payload.layout,
                                           static_cast<client::Priority>(priority));
             }));
             return nb::make_tuple(result.stored, result.present, result.left_out, result.problem);
           })
      .def("lookup",
           [](const OpenStore& handle, const std::vector<nb::bytes>& keys, double lease_seconds, bool peek) {
             const std::vector<std::string_view> views = Views(keys);
             const client::LookupBlocksResult result =
                 Raise(Blocking([&] { return handle.store().Lookup(views, lease_seconds, peek); }));
             nb::list tiers;
             for (const auto& [tier, blocks] : result.tiers) tiers.append(nb::make_tuple(tier, blocks));
             return nb::make_tuple(result.hits, nb::tuple(tiers), result.lease, result.lease_seconds,
                                   nb::tuple(nb::cast(result.degraded)));
           })
      .def(
          "load",
          [](const OpenStore& handle, client::LeaseId lease, int64_t first, int64_t count,
             const AnyWritableArray& array, const nb::dict& layout) {
            const Payload payload = FormOf(array, layout);
            const std::span<std::byte> bytes(static_cast<std::byte*>(array.data()), array.nbytes());
            std::vector<int64_t> lost;
            Raise(Blocking([&] {
              return handle.store().Load(lease, first, count, bytes, payload.form, payload.layout, &lost);
            }));
            return lost;
          },
          nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg())
      .def_prop_ro("host_tier_bytes",
                   [](const OpenStore& handle) { return handle.store().host_tier().bytes.size(); })
      .def("load_in_place",
           [](const OpenStore& handle, client::LeaseId lease, int64_t first, int64_t count) {
             return Raise(Blocking([&] { return handle.store().LoadInPlace(lease, first, count); }));
           })
      .def("give_back",
           [](const OpenStore& handle, const std::vector<uint64_t>& places) {
             Raise(Blocking([&] { return handle.store().GiveBack(places); }));
           })
      .def("release",
           [](const OpenStore& handle, client::LeaseId lease) {
             return Raise(Blocking([&] { return handle.store().Release(lease); }));
           })
      .def("persist",
           [](const OpenStore& handle) {
             const client::PersistNamespaceResult result =
                 Raise(Blocking([&] { return handle.store().Persist(); }));
             return nb::make_tuple(result.blocks, result.bytes, result.durable_blocks);
           })
      .def("delete",
           [](const OpenStore& handle) { return Raise(Blocking([&] { return handle.store().Delete(); })); });
  // Keeps the tier mapped.
  nb::class_<client::BlocksInPlace>(m, "BlocksInPlace")
      .def_prop_ro("addresses",  // 0: elsewhere
                   [](const client::BlocksInPlace& loaded) {
                     std::vector<uintptr_t> addresses;
                     for (const std::byte* const block : loaded.blocks)
                       addresses.push_back(reinterpret_cast<uintptr_t>(block));
                     return addresses;
                   })
      .def_prop_ro("lost", [](const client::BlocksInPlace& loaded) { return loaded.lost; })
      .def_prop_ro("places", [](const client::BlocksInPlace& loaded) { return loaded.places; });
}

}  // namespace kvtide::python
