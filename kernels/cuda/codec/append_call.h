// Backend::Append on a GPU: the rows of all pieces of a call, whatever tensors they come from, in one staging
// buffer, read by one kernel; alone, with one wait, or queued before other work of a call.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/second_hand.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/copy_in.h"
#include "kernels/cuda/device/pinned_ranges.h"
#include "kernels/cuda/device/workspace.h"

namespace kvtide::cuda {

// Pieces of one layout on their way to the device; the arguments must outlive it.
class AppendRows {
 public:
  // Of pieces that are checked (check_pieces.h). InvalidArgument for unequal layouts or missing tensors.
  static absl::StatusOr<AppendRows> Make(const AppendArgs& args);

  bool empty() const { return jobs_ == 0; }
  size_t row_bytes() const { return k_bytes_ + v_bytes_; }
  // For calls in place, before anything is placed: leaves rows where the caller has them, if the ranges reach
  // all of them and they are worth it.
  void UsePinned(const PinnedRanges& ranges);
  // What Place places, in three arrays; and pieces that it adds.
  size_t staging_bytes() const { return (pinned_ ? 0 : row_bytes()) + jobs_ * sizeof(AppendJob); }
  static constexpr size_t kArrays = 3;
  size_t copies_in() const { return 2 * jobs_; }

  // hand: helps, or null. Rows that stay where they are get device memory, and a piece for each side of a
  // job.
  absl::Status Place(Workspace& workspace, SecondHand* hand, CopiesIn* copies);
  absl::Status Launch(cudaStream_t stream) const;

 private:
  AppendArgs args_;
  size_t jobs_ = 0, k_bytes_ = 0, v_bytes_ = 0;
  int most_tokens_ = 0;
  bool pinned_ = false;
  DataType type_ = DataType::kF32;
  AppendParams params_;
};

// in_place_bytes: up to so many, the kernel reads the rows in pinned memory of the host.
absl::Status AppendCall(const AppendArgs& args, size_t in_place_bytes, Workspace& workspace);

}  // namespace kvtide::cuda
