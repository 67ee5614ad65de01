// For engines that attend by themselves over a pool that is mapped into their process (Pool on the direct
// way, or an embedded one): they write rows, attend and seal on their own stream, and talk to the daemon
// twice a step.
//
//   auto attention = kvtide::client::DirectAttention::Make(pool, model, options);
//   auto step = attention->Begin(items, stream);             // BeginStep; tables to the device; the plan
//   for (each layer) {
//     // New rows into the blocks; each token sees its sequence up to itself. Or Write, then Attend.
//     attention->WriteAttend(layer, k, v, q, out, lse, stream);
//   }
//   attention->Seal(stream);                                 // codes the blocks that BeginStep named
//   attention->Mark(*step, stream);                          // after the last work of the step
//   attention->End(*std::move(step));                        // waits for the mark; EndStep
//
// New tokens of item i are rows [sum of new_tokens before, + new_tokens) of q, k, v and out. A step may begin
// with `after`, an open one, before that one has ended: the host works on the next step while the GPU works
// on this one. What the layers call and Seal can be captured in a CUDA graph, once for each number of
// items and new tokens; Begin is called before each replay. Streams are cudaStream_t on CUDA, and ignored on
// the CPU. kernels/paged_attention.h says what is computed.
//
// A step names all blocks that it reads; until it ends they are neither moved nor reused. Sequences of a step
// may differ in their pairs: each pair has kernels, tables and launches of its own, which leave the rows of
// the others alone, so a sequence gets the bits that a step of its pair alone gives it. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cpp/pool.h"
#include "kernels/direct_device.h"

namespace kvtide::client {

struct DirectOptions {
  // Of the sequences, "turbo4/turbo4"; those of a step may have any of them. Empty: as they come, which takes
  // memory in the step that brings a new one. Steps that replay a graph need them named, as it launches what
  // was known when it was captured.
  std::vector<std::string> pairs;
  DataType type = DataType::kBf16;         // of q, k and v
  DataType output_type = DataType::kBf16;  // of out
  // Instead of what the model's layers say: factor of q.k, soft-cap of the logits (0 = none).
  std::optional<float> scale, softcap;
  // Bounds of every step.
  int max_sequences = 64;
  int max_new_tokens = 0;              // of all sequences of a step; 0 = max_sequences
  int64_t max_sequence_tokens = 8192;  // of a sequence, the new ones included
  // Blocks that a step seals, in each layer group, at most; what waits comes in the next one. 0 =
  // max_sequences.
  int max_seals = 0;
  // Every step launches what each pair needs, and the encoders of max_seals blocks of it, whether they are
  // needed or not: steps that replay a graph.
  bool graphs = false;
  // Memory for decoded pages of prefill chunks (PagedOptions); steps of at least 2 new tokens of a sequence
  // use it.
  size_t prefill_bytes = 0;
};

// Queries at the end of the first `tokens` of a sequence, each of which sees those up to its own; 0 = of all
// that the sequence has.
struct PinnedItem {
  SequenceId sequence = 0;
  int64_t queries = 1;
  int64_t tokens = 0;
};

// A step on its way. One that is destroyed before its end stays open until the pool is closed.
struct DirectStep {
  uint64_t id = 0;
  std::vector<int64_t> starts;  // of the items: the first new token, or query
  int64_t tokens = 0;           // new ones of all items
  int seals = 0;                // blocks that Seal codes, of all groups
  std::unique_ptr<StreamMark> mark;
  bool marked = false;
};

class DirectAttention {
 public:
  // `pool` is borrowed. `model` is registered. FailedPrecondition for a pool that is not mapped or has no
  // direct device; InvalidArgument for options and shapes without kernels; ResourceExhausted when memory is
  // short.
  static absl::StatusOr<std::unique_ptr<DirectAttention>> Make(Pool* pool, const Model& model,
                                                               const DirectOptions& options);
  // Waits for the work of marked steps.
  ~DirectAttention();
  DirectAttention(const DirectAttention&) = delete;
  DirectAttention& operator=(const DirectAttention&) = delete;

  // Errors of Client::BeginStep; InvalidArgument for what is beyond the options, of a pair that they do not
  // name or that has no kernels;
  // Unimplemented for sequences with a sliding window that keep coded blocks behind exact first ones
  // (exact_window.first_blocks must be 0). The daemon's step is rolled back after an error of ours.
  absl::StatusOr<DirectStep> Begin(std::span<const StepItem> items, void* stream, uint64_t after = 0);
  // Sequences as they are now, for attention alone (Client::PinStep): rows of q and out are the items'
  // queries, Attend, Mark and End follow. Graphs that are replayed over it were captured over a pinned step.
  // Errors of Client::PinStep, and those of Begin; OutOfRange for queries that see tokens which have left a
  // sliding window.
  absl::StatusOr<DirectStep> Pin(std::span<const PinnedItem> items, void* stream);
  // FailedPrecondition in a pinned step.
  absl::Status Write(int layer, PagedRows k, PagedRows v, void* stream);
  absl::Status Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void* stream);
  // Both: to the bit the same, and sooner.
  absl::Status WriteAttend(int layer, PagedRows k, PagedRows v, PagedRows q, MutablePagedRows out, float* lse,
                           void* stream);
  absl::Status Seal(void* stream);
  absl::Status Mark(DirectStep& step, void* stream);
  // `tokens`: of items whose token ids were not known before. FailedPrecondition for a step without a mark.
  absl::Status End(DirectStep step, std::span<const StepTokens> tokens = {});
  // Waits for the mark, if there is one.
  absl::Status RollBack(DirectStep step);

  // Memory on the device beside the pool, of all pairs so far.
  size_t device_bytes() const;

 private:
  class Impl;
  explicit DirectAttention(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvtide::client

namespace kvtide {
using client::DirectAttention;
}  // namespace kvtide
