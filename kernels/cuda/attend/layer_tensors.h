// Queries and results of one layer and batch of items on their way between the caller's memory and the
// device, in the caller's element types: one copy each way at most, converted by kernels only. Results that
// kernels write into memory of the host are taken item by item, as they come. Of large calls a second thread
// copies some items. Tensors that lie in memory which is registered with the driver are not copied by the
// host at all: a kernel fetches queries from there, and results are written there.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/second_hand.h"
#include "kernels/cuda/attend/attend_plan.h"
#include "kernels/cuda/device/copy_in.h"
#include "kernels/cuda/device/pinned_ranges.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// Queries [first_query, first_query + queries) of an item.
struct ItemSlice {
  size_t item = 0;
  int first_query = 0, queries = 0;
};

QueryType QueryTypeOf(DataType type);

// Where the host looks for the mark of a row that the device has not written yet.
inline constexpr RowMark kPendingMark{0xff};

// Rows of all slices stand one behind the other. Types are those of all items, f32 where items differ.
class LayerTensors {
 public:
  LayerTensors(const GroupShape& shape, int heads, std::span<const ItemSlice> slices,
               const AttendLayerArgs& args, SecondHand* hand);

  size_t queries() const { return queries_; }  // query tokens of all slices
  DataType query_type() const { return query_type_; }
  DataType output_type() const { return output_type_; }
  size_t query_values() const { return queries_ * query_width_; }
  size_t output_values() const { return queries_ * output_width_; }
  size_t query_bytes() const { return query_values() * DataTypeBytes(query_type_); }
  size_t result_bytes() const;

  // For calls in place whose results have marks, before anything is placed: leaves queries, results or both
  // where the caller has them, if the ranges reach all of them and they are worth it.
  void UsePinned(const PinnedRanges& ranges);

  // What PlaceQueries places, for Workspace::Begin, in kArrays arrays; and pieces that it adds.
  static constexpr size_t kArrays = 3;
  size_t staging_bytes() const;
  size_t copies_in() const { return slices_.size() + 1; }
  // Queries that stay where they are get device memory, and a piece for each item.
  absl::Status PlaceQueries(Workspace& workspace, CopiesIn* copies);
  // Queues what brings them to the device, if kernels are not to read them where they were placed.
  absl::Status SendQueries(Workspace& workspace);
  const void* query() const { return query_; }
  const float* sinks() const { return sinks_; }  // null = none

  // Memory for results: of the host in place, else of the device with a copy to come. marked: kernels write
  // marks() too.
  absl::Status ReserveResults(Workspace& workspace, bool in_place, bool marked);
  void* output() const { return output_; }
  // Where the output of each query token goes, in device memory; null = one behind the other in output().
  void* const* output_rows() const { return output_rows_; }
  float* lse() const { return lse_; }
  RowMark* marks() const { return reinterpret_cast<RowMark*>(lse_ + queries_ * static_cast<size_t>(heads_)); }
  // Queues the copy back.
  absl::Status Fetch(Workspace& workspace) const;
  // Waits for the results and gives them to the caller, up to the first row whose logits were beyond f32, if
  // there is one. sees: whether a query sees a token. The device has done all that was queued, unless this
  // fails or finds a row.
  struct Row {
    size_t item = 0;
    int query = 0, head = 0;
  };
  absl::StatusOr<std::optional<Row>> Take(Workspace& workspace,
                                          absl::FunctionRef<bool(size_t item, int query)> sees) const;

 private:
  const std::byte* QueriesOf(const ItemSlice& slice) const;
  std::byte* OutputOf(const ItemSlice& slice) const;
  size_t SentQueriesAt() const;
  size_t LseAt() const;
  RowMark* HostMarks(const Workspace& workspace) const;
  absl::Status WaitFor(RowMark* mark, const Workspace& workspace) const;
  absl::StatusOr<std::optional<Row>> TakeSlice(size_t index, const Workspace& workspace,
                                               absl::FunctionRef<bool(size_t item, int query)> sees) const;
  void CopyQueries(Workspace& workspace);
  void DeliverLse(size_t index, const Workspace& workspace) const;
  void Deliver(size_t index, const Workspace& workspace) const;
  void ForEachSlice(size_t bytes, absl::FunctionRef<void(size_t index)> body) const;

  const int heads_;
  const size_t query_width_, output_width_;
  const std::span<const ItemSlice> slices_;
  const AttendLayerArgs& args_;
  SecondHand* const hand_;
  std::vector<size_t> first_queries_;  // of all slices, where each begins
  size_t queries_ = 0;
  DataType query_type_ = DataType::kF32, output_type_ = DataType::kF32;
  const void* query_ = nullptr;
  const float* sinks_ = nullptr;
  void* output_ = nullptr;
  void* const* output_rows_ = nullptr;
  float* lse_ = nullptr;
  bool in_place_ = false, marked_ = false;
  bool pinned_queries_ = false, pinned_results_ = false;
};

}  // namespace kvtide::cuda
