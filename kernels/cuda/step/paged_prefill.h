// Prefill chunks over an engine's pages: sequences with many query rows take the kernels of prefill/. How the
// work is cut is planned on the host from lengths that the step gives there, once for all layers; where pages
// are, only the device knows: jobs name entries of the step's tables, and each layer makes addresses of them.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/attend/environment.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/tide_head.h"
#include "kernels/cuda/prefill/prefill_rounds.h"
#include "kernels/paged_attention.h"

namespace kvtide::cuda {

// A layer, for the jobs that read its pages.
struct PagedPrefillLayer {
  const std::byte *coded = nullptr, *exact = nullptr;  // what entries of the tables are added to
  const float *mean = nullptr, *gain = nullptr;        // [kv_heads][head_dim_k] of coded keys, or null
  const float* sinks = nullptr;
  const TideHead* heads = nullptr;  // [kv_heads] of calibrated keys, or null
};

class PagedPrefill {
 public:
  // Takes its memory. Nothing is attended here (most_rows() is the largest number) where the device has no
  // kernels for the pair or head dims, or PagedOptions::prefill_bytes is 0.
  absl::Status Create(const PagedOptions& options, const BlockLayout& coded, const BlockLayout& exact,
                      const DeviceImage& image, int processors);
  // Sequences with more rows (queries x heads of a KV head) are attended here, if the step says lengths on
  // the host.
  int most_rows() const { return possible_ ? environment_.most_decode_rows : INT32_MAX; }
  size_t bytes() const { return bytes_; }

  // `coded_entries`, `exact_entries`: the step's tables on the device, of rows of PagedOptions::max_...
  // entries.
  absl::Status Plan(const PagedStep& step, const uint64_t* coded_entries, const uint64_t* exact_entries,
                    cudaStream_t stream);
  bool empty() const { return items_.empty(); }
  absl::Status Attend(const PagedPrefillLayer& layer, PagedRows q, MutablePagedRows out, float* lse,
                      cudaStream_t stream);

 private:
  struct Item {
    int64_t first_token = 0, queries = 0;  // rows of the tensors
    size_t first_row = 0;                  // of the dense copies
  };
  // Arrays that one copy brings to the device; memory of the host is written again when that copy is done.
  struct Upload {
    PinnedBuffer host;
    DeviceBuffer device;
    Event sent;
    bool used = false;
  };

  absl::Status AddItems(const PagedStep& step);
  absl::Status Place(cudaStream_t stream);

  PagedOptions options_;
  BlockLayout coded_, exact_;
  AttendEnvironment environment_;
  const PrefillKernel* kernel_ = nullptr;
  bool possible_ = false;
  size_t bytes_ = 0;
  DeviceBuffer scratch_, queries_, output_, lse_, sinks_, jobs_;
  PageMaps maps_;
  Upload uploads_[2];
  size_t next_upload_ = 0;
  // The step at hand. Plans point to items, items to runs, runs to blocks.
  const uint64_t *coded_entries_ = nullptr, *exact_entries_ = nullptr;
  std::vector<Item> items_;
  std::deque<std::vector<std::byte*>> blocks_;
  std::deque<std::vector<BlockRun>> runs_;
  std::vector<PlanItem> plan_items_;
  AttendPlanArgs batch_;
  std::optional<PrefillRounds> plan_;
  const struct PagedJob* device_jobs_ = nullptr;
  size_t job_count_ = 0;
};

}  // namespace kvtide::cuda
