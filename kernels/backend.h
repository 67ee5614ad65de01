// A Backend computes on the blocks of one kind of memory: it allocates slabs there, writes new tokens,
// recodes blocks, attends over blocks where they lie and copies them to and from host memory. It knows no
// sequence, table or policy: it gets pointers, layouts and counts, and every tier's blocks are attended by
// that tier's backend.
//
// Calls may come from several threads at once; the caller (daemon/cache) holds pins, so that no block is
// written while it is read. Calls return when their work is done, except StartCopy. Tensors of a call (q, k,
// v, out) are in host memory. Errors: InvalidArgument for an unsupported shape or pair and for arguments that
// do not fit together (attend_args.h), ResourceExhausted when memory is short, Internal for the device.
//
// Attention computes logits in f32. Where those of a query leave f32 (finite values, but a dot product, its
// product with the scale or the result beyond 1e38 in magnitude), the call says Internal and names item,
// query and head: such a query never gets the answer of one that sees nothing. A soft-cap bounds what would
// overflow; a logit of -infinity beside finite ones counts for nothing, as it should.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/cancellation.h"
#include "kernels/base/data_type.h"
#include "kernels/base/tickets.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/profile.h"
#include "kernels/slab_handle.h"

namespace kvtide {

// Owned raw memory of a backend; freed on destruction. data() may be a device pointer: only the backend
// dereferences it.
class Slab {
 public:
  virtual ~Slab() = default;
  virtual std::byte* data() const = 0;
  virtual size_t bytes() const = 0;
  // For another process of this host to map it. FailedPrecondition where that cannot be.
  virtual absl::StatusOr<SlabHandle> Share() const;
};

// Consecutive blocks of one sequence and layer group that share layout and profile.
struct BlockRun {
  const BlockLayout* layout = nullptr;
  const Profile* profile = nullptr;    // null: neither mean nor gain
  std::span<std::byte* const> blocks;  // start of each block, in order
  int64_t first_position = 0;          // position of the first token of blocks[0] in the sequence
  int64_t tokens = 0;                  // tokens that count; the last block may be partly filled
};

// Writes rows for tokens [first_token, first_token + tokens) of one f16 block.
struct AppendPiece {
  const BlockLayout* layout = nullptr;  // of pair f16/f16
  std::byte* block = nullptr;
  int layer = 0;        // within the layer group
  int first_token = 0;  // 0..63
  int tokens = 0;
  size_t source_row = 0;  // first row of k and v
  TensorView k, v;        // this piece's tensors where it has its own; without data: those of AppendArgs
};
// Pieces of several sequences may stand in one call, which writes them together. Their layouts are equal.
struct AppendArgs {
  TensorView k;                         // [rows][kv_heads][head_dim_k], finite and within f16
  TensorView v;                         // [rows][kv_heads][head_dim_v]
  std::span<const AppendPiece> pieces;  // of any layouts: a call may write all layers of a model
};
// The tensors that a piece is taken from.
inline TensorView KeysOf(const AppendArgs& args, const AppendPiece& piece) {
  return piece.k.data != nullptr ? piece.k : args.k;
}
inline TensorView ValuesOf(const AppendArgs& args, const AppendPiece& piece) {
  return piece.v.data != nullptr ? piece.v : args.v;
}

// Re-encodes one layer range of a block from one layout to another: seals (f16 to the pair), or to fewer
// bits. Tokens from `tokens` on are encoded as zeros. A side whose type and profile stay the same keeps its
// bytes if all 64 tokens count. Deterministic: the same bytes on every backend.
struct RecodePiece {
  const BlockLayout* from = nullptr;
  const std::byte* source = nullptr;
  const BlockLayout* to = nullptr;
  std::byte* target = nullptr;
  const Profile* from_profile = nullptr;
  const Profile* to_profile = nullptr;
  int first_layer = 0, layers = 0;
  int tokens = kBlockTokens;
  int64_t position = 0;  // of the block's first token in its sequence; calibrated types need it
};

// Attention of one sequence's new queries over runs of blocks, one layer.
struct AttendItem {
  std::span<const BlockRun> runs;  // ascending positions
  const float* q = nullptr;        // [queries][heads][head_dim_k], unrotated
  int queries = 0;
  int64_t first_query_position = 0;  // query i stands at first_query_position + i
  float* out = nullptr;              // [queries][heads][head_dim_v]
  float* lse = nullptr;  // [queries][heads], natural log; -inf and output 0 where nothing is visible
};
struct AttendArgs {
  int layer = 0;       // within the layer group
  int heads = 0;       // query heads, a multiple of the KV heads
  float scale = 0;     // of q.k, finite; usually 1/sqrt(head_dim)
  bool causal = true;  // query at position p sees tokens at positions <= p
  int64_t window = 0;  // 0 = all; else only positions > p - window
  float softcap = 0;   // 0 = none; else logit = softcap * tanh(logit / softcap)
  const float* sinks =
      nullptr;  // [heads] extra logit per head that takes part in softmax with value 0; null = none
  std::span<const AttendItem> items;
  const Cancellation* cancellation = nullptr;  // looked at between tiles of work
};

// The same in two steps, for callers that attend over equal tables again and again: layer after layer of a
// decode step, and step after step. What does not depend on the layer is planned once; the plan keeps what it
// needs (block pointers, shares, on a GPU their copies in device memory), so the runs' spans may go after
// PlanAttend, while layouts, profiles and the blocks themselves stay the caller's until its last Attend.
struct PlanItem {
  std::span<const BlockRun> runs;  // ascending positions
  int queries = 0;
  int64_t first_query_position = 0;
};
struct AttendPlanArgs {
  int heads = 0;
  bool causal = true;
  int64_t window = 0;
  std::span<const PlanItem> items;
};
class AttendPlan {
 public:
  virtual ~AttendPlan() = default;
  // What it keeps in a device's memory, beside the slabs.
  virtual size_t device_bytes() const { return 0; }
};
// One layer over a plan: queries and results of each of its items, in host memory and in the caller's type.
struct LayerItem {
  TensorView q;           // [queries][heads][head_dim_k], unrotated, finite
  MutableTensorView out;  // [queries][heads][head_dim_v]
  float* lse = nullptr;   // [queries][heads]; null = not wanted
};
struct AttendLayerArgs {
  int layer = 0;  // within the layer group
  float scale = 0;
  float softcap = 0;
  const float* sinks = nullptr;
  std::span<const LayerItem> items;  // as many as the plan has
  const Cancellation* cancellation =
      nullptr;  // looked at between tiles of work: then Cancelled, results undefined
  // Rows that are written before anything is attended, as by Append and with tensors of their own, but
  // without waiting in between where the backend can queue one after the other. A call that fails may have
  // written them.
  std::span<const AppendPiece> append;
  // Work of the caller's own that ends before the call does: called once, on the calling thread, while a
  // device computes or before a CPU does; not at all if the call fails before. The call fails with its error.
  // It may be what checks the values of q and of rows to append: until then NaN and infinities may be there,
  // which spoil nothing but results.
  const std::function<absl::Status()>* meanwhile = nullptr;
};

// Decodes one layer of a block to f32 rows in host memory, [64][kv_heads][head_dim]; either pointer may be
// null.
struct DecodeArgs {
  const BlockLayout* layout = nullptr;
  const Profile* profile = nullptr;
  const std::byte* block = nullptr;
  int layer = 0;
  float* k = nullptr;
  float* v = nullptr;
  int64_t position = 0;  // as in RecodePiece
};

// Decodes one layer of some tokens of a run to rows in host memory, in the caller's type (rounded to nearest;
// f16 rows hold at most +-65504).
struct DecodePiece {
  const BlockRun* run = nullptr;
  int layer = 0;
  int64_t first_token = 0, tokens = 0;  // within the run
  MutableTensorView k;                  // [tokens][kv_heads][head_dim_k]; null = not wanted
  MutableTensorView v;                  // [tokens][kv_heads][head_dim_v]; null = not wanted
  size_t k_stride = 0, v_stride = 0;    // elements from one token to the next; 0 = dense
};

struct CopyPiece {
  std::byte* target = nullptr;
  const std::byte* source = nullptr;
  size_t bytes = 0;
};
enum class CopyDirection : uint8_t { kFromHost, kToHost, kInside };
using CopyTicket = TicketBook::Ticket;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // "cpu", "cuda:0"
  // OK if blocks of this layout can be appended, recoded and attended here, else InvalidArgument with what is
  // supported.
  virtual absl::Status CheckSupport(const BlockLayout& layout) const = 0;
  virtual absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) = 0;
  virtual absl::Status Append(const AppendArgs& args) = 0;
  virtual absl::Status Recode(std::span<const RecodePiece> pieces) = 0;
  virtual absl::Status Attend(const AttendArgs& args) = 0;
  // A plan for any layer of the items' layer group. `previous`, which may be null, is a plan of this backend
  // that the caller no longer needs: its memory is used again, and what is equal in both is not sent again.
  virtual absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                                 std::unique_ptr<AttendPlan> previous);
  // One call at a time for a plan; calls on different plans run side by side.
  virtual absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args);
  virtual absl::Status Decode(const DecodeArgs& args) = 0;
  // Rows of any number of pieces. Looks at the cancellation between blocks: then Cancelled, rows undefined.
  virtual absl::Status DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation);
  // Starts copies between this backend's memory and host memory; they run beside attention. Poll says true
  // when done. Until then source and target stay pinned by the caller. A ticket is polled until it is done or
  // failed.
  virtual absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces,
                                               CopyDirection direction) = 0;
  virtual absl::StatusOr<bool> Poll(CopyTicket ticket) = 0;
  // One piece, copied when this returns; from any number of threads. Where this backend's memory is host
  // memory the caller's thread copies, else it waits for StartCopy.
  virtual absl::Status CopyNow(const CopyPiece& piece, CopyDirection direction);
};

}  // namespace kvtide
