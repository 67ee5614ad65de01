#include "kernels/cuda/attend/layer_tensors.h"

#include <algorithm>
#include <cstring>

namespace kvtide::cuda {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// That of all views, or f32.
template <class View>
DataType CommonType(std::span<const ItemSlice> slices, View view) {
  const DataType type = slices.empty() ? DataType::kF32 : view(slices[0]);
  const bool same =
      std::all_of(slices.begin(), slices.end(), [&](const ItemSlice& slice) { return view(slice) == type; });
  return same ? type : DataType::kF32;
}

}  // namespace

QueryType QueryTypeOf(DataType type) {
  return type == DataType::kF32   ? QueryType::kF32
         : type == DataType::kF16 ? QueryType::kF16
                                  : QueryType::kBf16;
}

LayerTensors::LayerTensors(const GroupShape& shape, int heads, std::span<const ItemSlice> slices,
                           const AttendLayerArgs& args)
    : heads_(heads),
      query_width_(Size(heads) * Size(shape.head_dim_k)),
      output_width_(Size(heads) * Size(shape.head_dim_v)),
      slices_(slices),
      args_(args),
      query_type_(CommonType(slices, [&](const ItemSlice& slice) { return args.items[slice.item].q.type; })),
      output_type_(
          CommonType(slices, [&](const ItemSlice& slice) { return args.items[slice.item].out.type; })) {
  for (const ItemSlice& slice : slices) queries_ += Size(slice.queries);
}

size_t LayerTensors::LseAt() const {
  return (output_values() * DataTypeBytes(output_type_) + 255) / 256 * 256;
}
size_t LayerTensors::result_bytes() const {
  return LseAt() + queries_ * Size(heads_) * (sizeof(float) + sizeof(RowMark));
}
size_t LayerTensors::staging_bytes() const { return query_bytes() + Size(heads_) * sizeof(float); }

void LayerTensors::PlaceQueries(Workspace& workspace) {
  const auto placed = workspace.Place<std::byte>(query_bytes());
  std::byte* to = placed.host;
  for (const ItemSlice& slice : slices_) {
    const TensorView q = args_.items[slice.item].q;
    const size_t first = Size(slice.first_query) * query_width_, count = Size(slice.queries) * query_width_;
    if (q.type == query_type_) {
      const size_t bytes = DataTypeBytes(q.type);
      std::memcpy(to, static_cast<const std::byte*>(q.data) + first * bytes, count * bytes);
    } else {
      for (size_t i = 0; i < count; i++) reinterpret_cast<float*>(to)[i] = q.At(first + i);
    }
    to += count * DataTypeBytes(query_type_);
  }
  query_ = placed.device;
  if (args_.sinks == nullptr) return;
  const auto sinks = workspace.Place<float>(Size(heads_));
  std::copy_n(args_.sinks, heads_, sinks.host);
  sinks_ = sinks.device;
}

absl::Status LayerTensors::ReserveResults(Workspace& workspace, bool in_place, bool marked) {
  in_place_ = in_place;
  marked_ = marked;
  if (absl::Status status = workspace.results_host.Reserve(result_bytes()); !status.ok()) return status;
  std::byte* results = workspace.results_host.data();
  if (!in_place) {
    if (absl::Status status = workspace.results.Reserve(result_bytes()); !status.ok()) return status;
    results = workspace.results.data();
  }
  output_ = results;
  lse_ = reinterpret_cast<float*>(results + LseAt());
  return absl::OkStatus();
}

absl::Status LayerTensors::Fetch(Workspace& workspace) const {
  if (in_place_) return absl::OkStatus();
  const size_t marks = queries_ * Size(heads_) * sizeof(RowMark);
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(workspace.results_host.data(), output_,
                                              result_bytes() - (marked_ ? 0 : marks), cudaMemcpyDeviceToHost,
                                              workspace.stream()));
  return absl::OkStatus();
}

std::optional<LayerTensors::Row> LayerTensors::FindBeyond(
    const Workspace& workspace, absl::FunctionRef<bool(size_t item, int query)> sees) const {
  const auto* mark = reinterpret_cast<const RowMark*>(workspace.results_host.data() + LseAt() +
                                                      queries_ * Size(heads_) * sizeof(float));
  for (const ItemSlice& slice : slices_)
    for (int query = slice.first_query; query < slice.first_query + slice.queries; query++)
      for (int head = 0; head < heads_; head++, mark++)
        if (*mark == RowMark::kBeyond || (*mark == RowMark::kNothing && sees(slice.item, query)))
          return Row{slice.item, query, head};
  return std::nullopt;
}

void LayerTensors::Deliver(const Workspace& workspace) const {
  const std::byte* out = workspace.results_host.data();
  const auto* lse = reinterpret_cast<const float*>(out + LseAt());
  for (const ItemSlice& slice : slices_) {
    const LayerItem& item = args_.items[slice.item];
    const size_t first = Size(slice.first_query) * output_width_, count = Size(slice.queries) * output_width_;
    if (item.out.type == output_type_) {
      const size_t bytes = DataTypeBytes(output_type_);
      std::memcpy(static_cast<std::byte*>(item.out.data) + first * bytes, out, count * bytes);
    } else {
      for (size_t i = 0; i < count; i++) item.out.Set(first + i, reinterpret_cast<const float*>(out)[i]);
    }
    out += count * DataTypeBytes(output_type_);
    const size_t rows = Size(slice.queries) * Size(heads_);
    if (item.lse != nullptr)
      std::memcpy(item.lse + Size(slice.first_query) * Size(heads_), lse, rows * sizeof(float));
    lse += rows;
  }
}

}  // namespace kvtide::cuda
