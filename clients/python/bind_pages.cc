// An engine's pages to and from the block store: kernels/page_copier.h and clients/cpp/page_load.h for
// Python. Pages go in as addresses (torch's data_ptr()); kvtide/vllm, the only caller, keeps them alive.
// Every call gives up the GIL: a load takes it once, however many pieces it has.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "clients/cpp/page_load.h"
#include "clients/python/bindings.h"
#include "clients/python/open_store.h"
#include "clients/python/paged_device.h"
#include "clients/python/raise.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvtide::python {
namespace {

using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;
using Steps = std::vector<int64_t>;  // first, token, head, dim

std::span<const int32_t> Ids(const Numbers& numbers) { return {numbers.data(), numbers.size()}; }
std::span<std::byte> Memory(const Bytes& bytes) {
  return {reinterpret_cast<std::byte*>(bytes.data()), bytes.size()};
}

// PageCopier with its device.
class Copier {
 public:
  Copier(std::shared_ptr<PagedDevice> device, const PageCopyOptions& options,
         const std::vector<uintptr_t>& layers)
      : device_(std::move(device)), chunk_pages_(options.chunk_pages) {
    std::vector<std::byte*> at;
    for (const uintptr_t layer : layers) at.push_back(At<std::byte>(layer));
    copier_ = Blocking([&] { return device_->MakeCopier(options, at); });
  }
  PageCopier& copier() const { return *copier_; }
  int chunk_pages() const { return chunk_pages_; }

  // Of one piece.
  void CheckPayload(const Bytes& payload, size_t pages, int skip) const {
    const size_t per_chunk = static_cast<size_t>(chunk_pages_);
    const size_t chunks = (static_cast<size_t>(skip) + pages + per_chunk - 1) / per_chunk;
    if (skip < 0 || payload.size() < chunks * copier_->chunk_bytes())
      throw StatusException(
          absl::InvalidArgumentError(absl::StrCat("the payload of ", chunks, " chunks has ", payload.size(),
                                                  " bytes, must have ", chunks * copier_->chunk_bytes())));
  }

 private:
  std::shared_ptr<PagedDevice> device_;  // outlives the copier
  const int chunk_pages_;
  std::unique_ptr<PageCopier> copier_;
};

// A pool's tier of host memory, made fast for a copier, until it is closed.
class TierPin {
 public:
  TierPin(std::shared_ptr<Copier> copier, const OpenStore& store)
      : copier_(std::move(copier)), pool_(store.pool()), tier_(store.store().host_tier()) {
    const auto begin = std::chrono::steady_clock::now();
    Raise(Blocking([&] { return copier_->copier().PinReadOnly(tier_.bytes.data(), tier_.bytes.size()); }));
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  ~TierPin() { Close(); }
  TierPin(const TierPin&) = delete;
  TierPin& operator=(const TierPin&) = delete;

  size_t bytes() const { return tier_.bytes.size(); }
  double seconds() const { return seconds_; }
  void Close() {
    if (copier_ == nullptr) return;
    Blocking([&] { copier_->copier().Unpin(tier_.bytes.data()); });
    tier_ = {};
    copier_.reset();
    pool_.reset();
  }

 private:
  std::shared_ptr<Copier> copier_;
  std::shared_ptr<client::Pool> pool_;
  client::HostTier tier_;
  double seconds_ = 0;
};

PageRows RowsOf(const Steps& steps) {
  if (steps.size() != 4)
    throw StatusException(absl::InvalidArgumentError("rows are (first, token, head, dim) elements"));
  return {steps[0], steps[1], steps[2], steps[3]};
}

}  // namespace

void BindPages(nb::module_& m) {
  nb::class_<Copier>(m, "PageCopier")
      // Pages that travel as they are.
      .def_static(
          "of_bytes",
          [](std::shared_ptr<PagedDevice> device, const std::vector<uintptr_t>& layers, int64_t page_stride,
             int pages, int chunk_pages, size_t piece_bytes, size_t page_bytes) {
            PageCopyOptions options;
            options.page_stride = page_stride;
            options.pages = pages;
            options.chunk_pages = chunk_pages;
            options.piece_bytes = piece_bytes;
            options.page_bytes = page_bytes;
            return std::make_shared<Copier>(std::move(device), options, layers);
          },
          "device"_a, "layers"_a, "page_stride"_a, "pages"_a, "chunk_pages"_a, "piece_bytes"_a,
          "page_bytes"_a)
      // Rows that are coded in `pair` on the way.
      .def_static(
          "of_rows",
          [](std::shared_ptr<PagedDevice> device, const std::vector<uintptr_t>& layers, int64_t page_stride,
             int pages, int chunk_pages, size_t piece_bytes, const std::string& type, int tokens,
             int kv_heads, int head_dim, const Steps& k, const Steps& v, const std::string& pair) {
            PageCopyOptions options;
            options.page_stride = page_stride;
            options.pages = pages;
            options.chunk_pages = chunk_pages;
            options.piece_bytes = piece_bytes;
            options.type = ParseType(type);
            options.tokens = tokens;
            options.kv_heads = kv_heads;
            options.head_dim_k = options.head_dim_v = head_dim;
            options.k = RowsOf(k);
            options.v = RowsOf(v);
            options.pair = Raise(ParseCachePair(pair));
            return std::make_shared<Copier>(std::move(device), options, layers);
          },
          "device"_a, "layers"_a, "page_stride"_a, "pages"_a, "chunk_pages"_a, "piece_bytes"_a, "type"_a,
          "tokens"_a, "kv_heads"_a, "head_dim"_a, "k"_a, "v"_a, "pair"_a)
      .def_prop_ro("chunk_bytes", [](const Copier& c) { return c.copier().chunk_bytes(); })
      .def_prop_ro("bytes", [](const Copier& c) { return c.copier().bytes(); })
      .def(
          "after", [](const Copier& c, uintptr_t event) { Raise(c.copier().After(At<void>(event))); },
          "event"_a)
      .def(
          "read",
          [](const Copier& c, int slot, const Numbers& pages, const Bytes& payload) {
            c.CheckPayload(payload, pages.size(), 0);
            Raise(Blocking([&] { return c.copier().Read(slot, Ids(pages), Memory(payload).data()); }));
          },
          "slot"_a, "pages"_a, "payload"_a.noconvert())
      .def(
          "write",
          [](const Copier& c, int slot, const Bytes& payload, int skip, const Numbers& pages) {
            c.CheckPayload(payload, pages.size(), skip);
            Raise(Blocking([&] { return c.copier().Write(slot, Memory(payload).data(), skip, Ids(pages)); }));
          },
          "slot"_a, "payload"_a.noconvert(), "skip"_a, "pages"_a)
      .def(
          "wait", [](const Copier& c, int slot) { Raise(Blocking([&] { return c.copier().Wait(slot); })); },
          "slot"_a)
      .def(
          "pin",
          [](const Copier& c, const Bytes& memory) {
            Raise(Blocking([&] { return c.copier().Pin(Memory(memory).data(), memory.size()); }));
          },
          "memory"_a.noconvert())
      .def(
          "unpin",
          [](const Copier& c, const Bytes& memory) {
            Blocking([&] { c.copier().Unpin(Memory(memory).data()); });
          },
          "memory"_a.noconvert())
      // None: the store's pool has no tier of host memory that this process reads.
      .def(
          "pin_tier",
          [](std::shared_ptr<Copier> c, const OpenStore& store) -> std::unique_ptr<TierPin> {
            if (store.store().host_tier().empty()) return nullptr;
            return std::make_unique<TierPin>(std::move(c), store);
          },
          "store"_a)
      // (chunks whose pages are written, the first that is lost or -1, the error or None, chunks that were
      // copied from their places)
      .def(
          "load",
          [](const Copier& c, const OpenStore& store, client::LeaseId lease, int64_t chunks, int skip,
             const Numbers& pages, const Bytes& first, const Bytes& second, bool in_place) {
            client::PageLoad load;
            load.lease = lease;
            load.chunks = chunks;
            load.chunk_pages = c.chunk_pages();
            load.skip = skip;
            load.pages = Ids(pages);
            load.buffers[0] = Memory(first);
            load.buffers[1] = Memory(second);
            load.in_place = in_place;
            client::PageLoadReport report;
            const absl::Status status =
                Blocking([&] { return client::LoadPages(store.store(), c.copier(), load, &report); });
            nb::object error = nb::none();
            if (!status.ok())
              error = nb::module_::import_("kvtide.errors")
                          .attr("from_status")(absl::StatusCodeToString(status.code()).c_str(),
                                               std::string(status.message()).c_str());
            return nb::make_tuple(report.chunks, report.lost, error, report.in_place);
          },
          "store"_a, "lease"_a, "chunks"_a, "skip"_a, "pages"_a, "first"_a.noconvert(),
          "second"_a.noconvert(), "in_place"_a = false);
  nb::class_<TierPin>(m, "TierPin")
      .def_prop_ro("bytes", &TierPin::bytes)
      .def_prop_ro("seconds", &TierPin::seconds)  // that it took
      .def("close", &TierPin::Close);
}

}  // namespace kvtide::python
