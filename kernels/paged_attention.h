// Attention over pages that an engine manages itself (its own block tables, its own memory), on the engine's
// stream: the ground of attention backends of inference servers. One object serves one layer group; the CPU
// and CUDA implement it (kernels/cpu/cpu_paged_attention.h, kernels/cuda/cuda_paged_attention.h).
//
// A *page* is one layer of one block of 64 tokens: `kv_heads` records of BlockLayout, one layer. There are
//   coded pages  in the pair of the options, in the engine's pool: full blocks, sealed;
//   exact pages  in f16/f16, in side memory of the engine: the blocks that a running sequence still fills,
//                and the first and last blocks, which it attends in f16 although their coded pages exist
//                already (deferred quantisation: others who hit the same prefix read the coded pages).
// A page is named by a number: the page's bytes begin at base + number * stride, with a base for each layer.
// Pages of a *pool* (PagedOptions::pool) lie inside blocks of all layers of a group, coded and exact ones
// side by side, at any multiple of kPoolUnit bytes: what their numbers count. Exact pages from `exact_pages`
// on are *scratch*: they are shared by all layers and hold blocks of a prefill chunk that are sealed before
// the layer ends.
//
// The blocks of a sequence are [0, coded_first) exact, [coded_first, coded_first + coded_count) coded and the
// rest exact, up to the last, which may be partly filled. The tokens of this step stand at the end of the
// sequence, in exact pages. A block is coded from the step after its seal on: a sequence that shares a block
// which another one fills in the same step (a prefix hit among the requests of one step) names the other's
// exact page.
//
//   auto attention = Make...PagedAttention(options, layers);
//   attention->Plan(step, stream);                    // once a step
//   for (each layer) {
//     // This step's rows into their exact pages; then each token sees the sequence up to itself.
//     // The same as Write and then Attend.
//     attention->WriteAttend(layer, k, v, q, out, lse, stream);
//     attention->Seal(layer, stream);  // full blocks: exact page -> coded page
//   }
// Where no seal of the step reads a scratch page, SealLayers after the last layer (or before the next Plan)
// does the same for all layers at once; a block is attended in f16 or coded whatever the order.
//
// All arrays and tensors lie in the backend's memory. On CUDA, calls only put work on `stream` (a
// cudaStream_t): nothing waits, nothing is copied from the host but what Plan says, and every verb can be
// captured in a CUDA graph. A graph may hold the whole step, or the verbs of the layers alone with Plan
// called before each replay. What was captured serves every later step with the same `sequences`,
// `tokens` and `most_queries` (padding makes them equal), and arrays and tensors at the same addresses; with
// the same `seals` too, if it seals.
//
// Values: rows of K and V are stored in f16. What is beyond f16 becomes +-65504, what is no number becomes 0;
// both are counted (ChangedValues). Sums are f32. A row that sees nothing gets output 0 and log-sum-exp -inf.
// Logits beyond f32 (finite values, huge scale) are not told apart here: such a row is no number.
//
// Not thread-safe: one step at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"

namespace kvtide {

inline constexpr int kMostPagedSequences = 4096;
inline constexpr size_t kPoolUnit = 128;

struct PagedOptions {
  GroupShape shape;  // of a page: layers = 1
  // Of coded pages; any pair whose page can be sealed from f16. Calibrated keys are those that are coded
  // after RoPE: nothing depends on where a page stands then.
  CachePair pair;
  int heads = 0;                    // query heads, a multiple of the KV heads
  float scale = 0;                  // of q.k; usually 1/sqrt(head_dim_k)
  float softcap = 0;                // 0 = none; else logit = softcap * tanh(logit / softcap)
  int64_t window = 0;               // 0 = all; else a token at position p sees only positions > p - window
  DataType type = DataType::kBf16;  // of q, k and v
  DataType output_type = DataType::kBf16;  // of out
  // Bounds of every step. The memory of the object grows with them (bytes()).
  int max_sequences = 0;     // 1..4096
  int max_tokens = 0;        // of a step, all sequences together
  int max_coded_blocks = 0;  // of a sequence: columns that are read of its row of the coded table
  int max_exact_blocks = 0;  // of a sequence, those of a prefill chunk included
  int max_seals = 0;         // of a step
  // Bytes from a page to the next; 0 = pages lie side by side. Multiples of 128.
  size_t coded_stride = 0, exact_stride = 0;
  // Numbers count kPoolUnit bytes: both strides are that, whatever was given.
  bool pool = false;
  // Profiles that sequences may have each for itself, instead of PagedLayer's; the first one is 0 and 1. 0 =
  // none, and so it must be where keys are calibrated.
  int max_profiles = 0;
  int exact_pages = 0;           // of each layer; numbers from here on are scratch pages
  std::byte* scratch = nullptr;  // page `exact_pages`; null: there are none
  // Memory for decoded pages of prefill chunks (CUDA, where steps give lengths on the host), beside f32
  // copies of their queries and results; at least 1 MiB, or 0: chunks are attended by the kernels for few
  // rows.
  size_t prefill_bytes = size_t{256} << 20;
};

// What differs from layer to layer.
struct PagedLayer {
  std::byte* coded = nullptr;    // page 0, at a multiple of 128
  std::byte* exact = nullptr;    // page 0, likewise
  const float* sinks = nullptr;  // [heads] an extra logit that takes part with value 0, or null
  // Profile of coded keys (kernels/format/profile.h), or null = 0 and 1. Copied when the object is made.
  const float* k_mean = nullptr;  // [kv_heads][head_dim_k]
  const float* k_gain = nullptr;  // same
  // Heads of calibrated keys, [kv_heads], in host memory: centre, transform and widths, and no frequencies of
  // RoPE. Copied when the object is made. Other types ignore it, and calibrated ones take no k_mean or
  // k_gain.
  const HeadProfile* keys = nullptr;
};

// What differs from step to step. Arrays are the engine's and stay unchanged until the step's work is done.
struct PagedStep {
  // Known to the host: bounds of what the arrays say.
  int sequences = 0;     // rows of the arrays; padding is allowed (no new tokens)
  int tokens = 0;        // rows of the tensors; padding stands at the end
  int most_queries = 0;  // new tokens of one sequence, at most
  // Sequences are only read, and their queries (rows of q and out, as of new tokens) may stand before the end
  // of their coded blocks: `lengths` may end in one of those. Write is FailedPrecondition then. What such a
  // step captures in a graph serves other steps, too; what others capture does not serve such a step.
  bool among_coded = false;
  // Entries of `seal_pages` that are looked at; 0: there is nothing to seal. On CUDA each costs its encoding,
  // whether it counts or not: what a graph leaves room for should be little (a block may be sealed later,
  // while its exact page stays).
  int seals = 0;

  // New tokens of sequence s are rows [query_start[s], query_start[s + 1]) of q, k, v and out; ascending, the
  // first is 0. Rows of no sequence, and those of sequences of length 0, are padding: neither read nor
  // written. So objects for other pairs can share a step: each one has the lengths of its own sequences.
  const int32_t* query_start = nullptr;  // [sequences + 1]
  const int32_t* lengths = nullptr;      // [sequences] tokens, the new ones included; 0 = padding
  // Of the coded blocks. With a sliding window, coded_first must be 0 where coded_count is not.
  const int32_t* coded_first = nullptr;  // [sequences]
  const int32_t* coded_count = nullptr;  // [sequences]
  // Coded page of block b of sequence s: coded_table[s * coded_row + b]. Read for the coded blocks only, and
  // with a sliding window only for those that a new token sees.
  const int32_t* coded_table = nullptr;
  int64_t coded_row = 0;
  // Exact pages of sequence s, in the order of their blocks and without the coded ones:
  // exact_table[s * exact_row + i], i < ceil(lengths[s] / 64) - coded_count[s]. With a sliding window, blocks
  // that no new token sees are not read.
  const int32_t* exact_table = nullptr;
  int64_t exact_row = 0;
  // Where Write puts a row: 64 * exact page + token in the page, or -1 = nowhere. Null: every new token of a
  // sequence goes where exact_table has its block.
  const int32_t* write_slots = nullptr;  // [tokens]
  // Blocks that are full after this step and whose coded page is not written yet.
  const int32_t* seal_pages = nullptr;  // [seals][2] exact page, coded page; a negative exact page = none
  const int32_t* seal_count = nullptr;  // [1] how many of them count, or null = all
  // With max_profiles: which one each sequence's coded keys have, and each seal gives; null = the first one.
  const int32_t* profiles = nullptr;       // [sequences]
  const int32_t* seal_profiles = nullptr;  // [seals]

  // Copies in host memory, or null. Prefill chunks are attended by other kernels where these are given (CUDA:
  // several times faster); they are looked at during Plan only. Such a step cannot be captured.
  const int32_t* host_query_start = nullptr;
  const int32_t* host_lengths = nullptr;
  const int32_t* host_coded_first = nullptr;
  const int32_t* host_coded_count = nullptr;
};

// Rows of a tensor [tokens][heads][head_dim], heads side by side: `stride` elements from a token to the next,
// so that parts of a fused projection need no copy. Rows begin at multiples of 16 bytes.
struct PagedRows {
  const void* data = nullptr;
  int64_t stride = 0;
};
struct MutablePagedRows {
  void* data = nullptr;
  int64_t stride = 0;
};

class PagedAttention {
 public:
  virtual ~PagedAttention() = default;

  // InvalidArgument for a step beyond the options. The step's host fields are copied.
  virtual absl::Status Plan(const PagedStep& step, void* stream) = 0;
  // `layer`: index into the layers of the factory. InvalidArgument for an index or rows that do not fit,
  // FailedPrecondition before the first Plan.
  virtual absl::Status Write(int layer, PagedRows k, PagedRows v, void* stream) = 0;
  // lse: [tokens][heads], natural log; null = not wanted.
  virtual absl::Status Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void* stream) = 0;
  // Write, then Attend: to the bit the same, sooner (on CUDA rows are written beside the preparation of
  // queries, and the first kernel begins while the stream's last one ends). Errors of both, before anything
  // is done.
  virtual absl::Status WriteAttend(int layer, PagedRows k, PagedRows v, PagedRows q, MutablePagedRows out,
                                   float* lse, void* stream) = 0;
  // The bytes of Backend::Recode from f16/f16 to the pair.
  virtual absl::Status Seal(int layer, void* stream) = 0;
  virtual absl::Status SealLayers(void* stream) = 0;

  // Makes profile `index` of max_profiles of these, in host memory: [layers][kv_heads][head_dim_k] each, null
  // = 0 and 1. No work that reads the former one may be under way but on `stream`. InvalidArgument for the
  // first one and beyond the last.
  virtual absl::Status SetProfile(int index, const float* k_mean, const float* k_gain, void* stream) = 0;

  // How many values Write has changed since the object was made; waits for `stream`.
  virtual absl::StatusOr<uint64_t> ChangedValues(void* stream) = 0;
  // Memory that the object holds in the backend, without the engine's pages.
  virtual size_t bytes() const = 0;
};

// What every implementation checks, and how many bytes the engine gives a page. InvalidArgument says what to
// change.
// `alignment`: of the first pages; host memory of engines begins at multiples of 64 only.
absl::Status CheckPagedOptions(const PagedOptions& options, std::span<const PagedLayer> layers,
                               size_t alignment = 128);
// What layers, which are checked, say about calibrated keys, as a profile of so many layers. InvalidArgument
// for transforms that do not fit the shape and type of keys, or that cannot be inverted.
absl::StatusOr<Profile> MakePagedKeyProfile(const PagedOptions& options, std::span<const PagedLayer> layers);
absl::Status CheckPagedStep(const PagedStep& step, const PagedOptions& options);
absl::Status CheckPagedProfile(int index, const PagedOptions& options);
absl::Status CheckPagedRows(PagedRows rows, DataType type, int heads, int head_dim, const char* name);
// Rows that Write and Attend get; `step` is the planned one. FailedPrecondition where it is only read.
absl::Status CheckPagedWritten(PagedRows k, PagedRows v, const PagedStep& step, const PagedOptions& options);
absl::Status CheckPagedAttended(PagedRows q, MutablePagedRows out, const PagedOptions& options);
inline BlockLayout CodedPage(const PagedOptions& options) { return BlockLayout(options.shape, options.pair); }
inline BlockLayout ExactPage(const PagedOptions& options) { return BlockLayout(options.shape, ExactPair()); }

}  // namespace kvtide
