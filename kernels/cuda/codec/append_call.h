// Backend::Append on a GPU: the rows of all pieces of a call, whatever tensors they come from, in one staging
// buffer, read by one kernel; alone, with one wait, or queued before other work of a call.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/second_hand.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// Pieces of one layout on their way to the device; the arguments must outlive it.
class AppendRows {
 public:
  // Of pieces that are checked (check_pieces.h). InvalidArgument for unequal layouts or missing tensors.
  static absl::StatusOr<AppendRows> Make(const AppendArgs& args);

  bool empty() const { return jobs_ == 0; }
  size_t row_bytes() const { return k_bytes_ + v_bytes_; }
  // What Place places, in three arrays.
  size_t staging_bytes() const { return row_bytes() + jobs_ * sizeof(AppendJob); }
  static constexpr size_t kArrays = 3;

  // hand: helps, or null.
  void Place(Workspace& workspace, SecondHand* hand);
  absl::Status Launch(cudaStream_t stream) const;

 private:
  AppendArgs args_;
  size_t jobs_ = 0, k_bytes_ = 0, v_bytes_ = 0;
  int most_tokens_ = 0;
  DataType type_ = DataType::kF32;
  AppendParams params_;
};

// in_place_bytes: up to so many, the kernel reads the rows in pinned memory of the host.
absl::Status AppendCall(const AppendArgs& args, size_t in_place_bytes, Workspace& workspace);

}  // namespace kvtide::cuda
