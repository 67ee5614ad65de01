#include "kernels/cuda/attend/layer_tensors.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "kernels/base/mutex.h"
#include "kernels/base/status.h"
#include "kernels/cuda/device/copy_in.h"

namespace kvtide::cuda {
namespace {

// Queries of up to so many bytes are read in place: every run of an item reads its queries. Fewer bytes of
// results are copied sooner than told where to go.
constexpr size_t kFew = 64 << 10;

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Of a table with a pointer for each query token; whole vectors.
size_t PlaceBytes(size_t queries) { return (queries + 1) / 2 * 2 * sizeof(std::byte*); }

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
                           const AttendLayerArgs& args, SecondHand* hand)
    : heads_(heads),
      query_width_(Size(heads) * Size(shape.head_dim_k)),
      output_width_(Size(heads) * Size(shape.head_dim_v)),
      slices_(slices),
      args_(args),
      hand_(hand),
      query_type_(CommonType(slices, [&](const ItemSlice& slice) { return args.items[slice.item].q.type; })),
      output_type_(
          CommonType(slices, [&](const ItemSlice& slice) { return args.items[slice.item].out.type; })) {
  first_queries_.reserve(slices.size());
  for (const ItemSlice& slice : slices) {
    first_queries_.push_back(queries_);
    queries_ += Size(slice.queries);
  }
}

// bytes: of all slices.
void LayerTensors::ForEachSlice(size_t bytes, absl::FunctionRef<void(size_t index)> body) const {
  constexpr size_t kShared = 64 << 10;  // worth a second thread
  if (hand_ != nullptr && bytes >= kShared) return hand_->Share(slices_.size(), body);
  for (size_t i = 0; i < slices_.size(); i++) body(i);
}

const std::byte* LayerTensors::QueriesOf(const ItemSlice& slice) const {
  const TensorView q = args_.items[slice.item].q;
  return static_cast<const std::byte*>(q.data) +
         Size(slice.first_query) * query_width_ * DataTypeBytes(q.type);
}
std::byte* LayerTensors::OutputOf(const ItemSlice& slice) const {
  const MutableTensorView out = args_.items[slice.item].out;
  return static_cast<std::byte*>(out.data) +
         Size(slice.first_query) * output_width_ * DataTypeBytes(out.type);
}

void LayerTensors::UsePinned(const PinnedRanges& ranges) {
  if (ranges.empty()) return;
  const auto all = [&](auto reaches) { return std::all_of(slices_.begin(), slices_.end(), reaches); };
  // Every row begins at a multiple of 16 bytes if the first one does and they have such a width.
  pinned_queries_ = query_bytes() > kFew && all([&](const ItemSlice& slice) {
                      return args_.items[slice.item].q.type == query_type_ &&
                             ranges.Reaches(QueriesOf(slice),
                                            Size(slice.queries) * query_width_ * DataTypeBytes(query_type_));
                    });
  const size_t row_bytes = output_width_ * DataTypeBytes(output_type_);
  pinned_results_ = queries_ * row_bytes > kFew && row_bytes % 16 == 0 && all([&](const ItemSlice& slice) {
                      return args_.items[slice.item].out.type == output_type_ &&
                             ranges.Reaches(OutputOf(slice), Size(slice.queries) * row_bytes);
                    });
}

size_t LayerTensors::LseAt() const {
  if (pinned_results_) return 0;
  return (output_values() * DataTypeBytes(output_type_) + 255) / 256 * 256;
}
size_t LayerTensors::result_bytes() const {
  return LseAt() + queries_ * Size(heads_) * (sizeof(float) + sizeof(RowMark));
}
size_t LayerTensors::staging_bytes() const {
  return (pinned_queries_ ? 0 : query_bytes()) + SentQueriesAt() + Size(heads_) * sizeof(float);
}
// Behind the table of places of results.
size_t LayerTensors::SentQueriesAt() const { return pinned_results_ ? PlaceBytes(queries_) : 0; }

absl::Status LayerTensors::PlaceQueries(Workspace& workspace, CopiesIn* copies) {
  const size_t queries = workspace.in_place() && query_bytes() > kFew ? query_bytes() : 0;
  KVTIDE_RETURN_IF_ERROR(workspace.sent_queries.Reserve(SentQueriesAt() + queries));
  std::byte* device = workspace.sent_queries.data();
  if (pinned_results_) {
    const auto places = workspace.Place<std::byte*>(PlaceBytes(queries_) / sizeof(std::byte*));
    for (size_t i = 0; i < slices_.size(); i++)
      for (size_t query = 0; query < Size(slices_[i].queries); query++)
        places.host[first_queries_[i] + query] =
            OutputOf(slices_[i]) + query * output_width_ * DataTypeBytes(output_type_);
    copies->Add(places.device, device, SentQueriesAt());
    output_rows_ = reinterpret_cast<void* const*>(device);
    device += SentQueriesAt();
  }
  if (pinned_queries_) {
    query_ = device;
    for (const ItemSlice& slice : slices_) {
      const size_t bytes = Size(slice.queries) * query_width_ * DataTypeBytes(query_type_);
      copies->Add(QueriesOf(slice), device, bytes);
      device += bytes;
    }
  } else {
    CopyQueries(workspace);
  }
  if (args_.sinks == nullptr) return absl::OkStatus();
  const auto sinks = workspace.Place<float>(Size(heads_));
  std::copy_n(args_.sinks, heads_, sinks.host);
  sinks_ = sinks.device;
  return absl::OkStatus();
}

void LayerTensors::CopyQueries(Workspace& workspace) {
  const auto placed = workspace.Place<std::byte>(query_bytes());
  query_ = placed.device;
  ForEachSlice(query_bytes(), [&](size_t index) {
    const ItemSlice& slice = slices_[index];
    const TensorView q = args_.items[slice.item].q;
    const size_t first = Size(slice.first_query) * query_width_, count = Size(slice.queries) * query_width_;
    std::byte* const to = placed.host + first_queries_[index] * query_width_ * DataTypeBytes(query_type_);
    if (q.type == query_type_) {
      std::memcpy(to, QueriesOf(slice), count * DataTypeBytes(q.type));
    } else {
      for (size_t i = 0; i < count; i++) reinterpret_cast<float*>(to)[i] = q.At(first + i);
    }
  });
}

absl::Status LayerTensors::SendQueries(Workspace& workspace) {
  if (pinned_queries_) return absl::OkStatus();
  if (!workspace.in_place()) return workspace.Send();
  if (query_bytes() <= kFew) return absl::OkStatus();
  std::byte* const to = workspace.sent_queries.data() + SentQueriesAt();
  KVTIDE_CUDA_RETURN_IF_ERROR(LaunchCopyIn(query_, to, query_bytes(), workspace.stream()));
  query_ = to;
  return absl::OkStatus();
}

RowMark* LayerTensors::HostMarks(const Workspace& workspace) const {
  return reinterpret_cast<RowMark*>(workspace.results_host.data() + LseAt() +
                                    queries_ * Size(heads_) * sizeof(float));
}

absl::Status LayerTensors::ReserveResults(Workspace& workspace, bool in_place, bool marked) {
  in_place_ = in_place;
  marked_ = marked;
  if (absl::Status status = workspace.results_host.Reserve(result_bytes()); !status.ok()) return status;
  std::byte* results = workspace.results_host.data();
  if (!in_place) {
    if (absl::Status status = workspace.results.Reserve(result_bytes()); !status.ok()) return status;
    results = workspace.results.data();
  } else if (marked) {
    std::fill_n(HostMarks(workspace), queries_ * Size(heads_), kPendingMark);
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

absl::StatusOr<std::optional<LayerTensors::Row>> LayerTensors::Take(
    Workspace& workspace, absl::FunctionRef<bool(size_t item, int query)> sees) const {
  if (in_place_ && marked_) {
    // The first row; the others come within some microseconds.
    if (queries_ > 0) KVTIDE_RETURN_IF_ERROR(WaitFor(HostMarks(workspace), workspace));
  } else {
    KVTIDE_RETURN_IF_ERROR(workspace.Finish());
  }
  Mutex mutex;
  absl::Status failed;
  std::optional<Row> first;
  size_t first_slice = slices_.size();
  ForEachSlice(result_bytes(), [&](size_t index) {
    const absl::StatusOr<std::optional<Row>> row = TakeSlice(index, workspace, sees);
    if (row.ok() && !row->has_value()) return;
    const MutexLock lock(mutex);
    failed.Update(row.status());
    if (!row.ok() || index > first_slice) return;
    first = *row;
    first_slice = index;
  });
  KVTIDE_RETURN_IF_ERROR(failed);
  if (first.has_value()) return first;
  // All rows are there; the kernel that wrote them ends.
  if (in_place_) KVTIDE_RETURN_IF_ERROR(workspace.Finish());
  return std::nullopt;
}

absl::StatusOr<std::optional<LayerTensors::Row>> LayerTensors::TakeSlice(
    size_t index, const Workspace& workspace, absl::FunctionRef<bool(size_t item, int query)> sees) const {
  const ItemSlice& slice = slices_[index];
  if (marked_) {
    RowMark* mark = HostMarks(workspace) + first_queries_[index] * Size(heads_);
    for (int query = slice.first_query; query < slice.first_query + slice.queries; query++)
      for (int head = 0; head < heads_; head++, mark++) {
        if (in_place_) KVTIDE_RETURN_IF_ERROR(WaitFor(mark, workspace));
        if (*mark == RowMark::kBeyond || (*mark == RowMark::kNothing && sees(slice.item, query)))
          return Row{slice.item, query, head};
      }
  }
  Deliver(index, workspace);
  return std::nullopt;
}

// Until the device has written a mark, which it does when the row is complete.
absl::Status LayerTensors::WaitFor(RowMark* mark, const Workspace& workspace) const {
  constexpr int kLooks = 1024;  // at the mark, between looks at the device
  const std::atomic_ref<RowMark> seen(*mark);
  for (bool done = false;;) {
    for (int look = 0; look < kLooks; look++) {
      if (seen.load(std::memory_order_acquire) != kPendingMark) return absl::OkStatus();
      std::this_thread::yield();
    }
    if (done) return absl::InternalError("the device is done, but not all results are there");
    KVTIDE_RETURN_IF_ERROR(workspace.Look(&done));
  }
}

void LayerTensors::Deliver(size_t index, const Workspace& workspace) const {
  const ItemSlice& slice = slices_[index];
  const LayerItem& item = args_.items[slice.item];
  const size_t value_bytes = DataTypeBytes(output_type_), first_query = first_queries_[index];
  if (pinned_results_) return DeliverLse(index, workspace);
  const std::byte* const from = workspace.results_host.data() + first_query * output_width_ * value_bytes;
  const size_t first = Size(slice.first_query) * output_width_, count = Size(slice.queries) * output_width_;
  if (item.out.type == output_type_) {
    std::memcpy(static_cast<std::byte*>(item.out.data) + first * value_bytes, from, count * value_bytes);
  } else {
    for (size_t i = 0; i < count; i++) item.out.Set(first + i, reinterpret_cast<const float*>(from)[i]);
  }
  DeliverLse(index, workspace);
}

void LayerTensors::DeliverLse(size_t index, const Workspace& workspace) const {
  const ItemSlice& slice = slices_[index];
  const LayerItem& item = args_.items[slice.item];
  if (item.lse == nullptr) return;
  const size_t first_query = first_queries_[index];
  const auto* const lse = reinterpret_cast<const float*>(workspace.results_host.data() + LseAt());
  std::memcpy(item.lse + Size(slice.first_query) * Size(heads_), lse + first_query * Size(heads_),
              Size(slice.queries) * Size(heads_) * sizeof(float));
}

}  // namespace kvtide::cuda
