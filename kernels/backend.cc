// What backends can do without code of their own: a plan keeps its items and each layer is one Attend; rows
// of tokens are taken out of whole blocks.
#include "kernels/backend.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/attend_args.h"
#include "kernels/base/backoff.h"
#include "kernels/base/status.h"
#include "kernels/check_pieces.h"
#include "kernels/store_row.h"

namespace kvtide {
namespace {

struct KeptItem {
  std::vector<std::byte*> blocks;  // of all runs
  std::vector<BlockRun> runs;
  int queries = 0;
  int64_t first_query_position = 0;
};

class KeptPlan : public AttendPlan {
 public:
  KeptPlan(const AttendPlanArgs& args, AttendShape checked)
      : shape(std::move(checked)), causal(args.causal), window(args.window), items(args.items.size()) {
    for (size_t i = 0; i < items.size(); i++) {
      const PlanItem& from = args.items[i];
      KeptItem& to = items[i];
      to.queries = from.queries;
      to.first_query_position = from.first_query_position;
      for (const BlockRun& run : from.runs)
        to.blocks.insert(to.blocks.end(), run.blocks.begin(), run.blocks.end());
      size_t at = 0;
      for (BlockRun run : from.runs) {
        run.blocks = std::span<std::byte* const>(to.blocks).subspan(at, run.blocks.size());
        at += run.blocks.size();
        to.runs.push_back(run);
      }
    }
  }

  const AttendShape shape;
  const bool causal;
  const int64_t window;
  std::vector<KeptItem> items;
};

// f32 copies of one item's tensors where the caller has another type.
struct Widened {
  std::vector<float> q, out, lse;
};

}  // namespace

absl::StatusOr<SlabHandle> Slab::Share() const {
  return absl::FailedPreconditionError("this memory cannot be mapped by other processes");
}

absl::Status Backend::CopyNow(const CopyPiece& piece, CopyDirection direction) {
  KVTIDE_ASSIGN_OR_RETURN(const CopyTicket ticket, StartCopy({&piece, 1}, direction));
  Backoff backoff;
  while (true) {
    KVTIDE_ASSIGN_OR_RETURN(const bool done, Poll(ticket));
    if (done) return absl::OkStatus();
    backoff.Wait();
  }
}

absl::StatusOr<std::unique_ptr<AttendPlan>> Backend::PlanAttend(const AttendPlanArgs& args,
                                                                std::unique_ptr<AttendPlan>) {
  KVTIDE_ASSIGN_OR_RETURN(AttendShape shape, CheckAttendPlan(args));
  return std::make_unique<KeptPlan>(args, std::move(shape));
}

absl::Status Backend::AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) {
  auto& kept = static_cast<KeptPlan&>(plan);
  KVTIDE_RETURN_IF_ERROR(CheckAttendLayer(args, kept.shape));
  KVTIDE_RETURN_IF_ERROR(RunMeanwhile(args));
  KVTIDE_RETURN_IF_ERROR(AppendFirst(*this, args));
  const GroupShape& group = kept.shape.group;
  const auto dim_k = static_cast<size_t>(group.head_dim_k), dim_v = static_cast<size_t>(group.head_dim_v);
  std::vector<AttendItem> items(kept.items.size());
  std::vector<Widened> widened(kept.items.size());
  for (size_t i = 0; i < items.size(); i++) {
    const LayerItem& from = args.items[i];
    AttendItem& to = items[i];
    to.runs = kept.items[i].runs;
    to.queries = kept.items[i].queries;
    to.first_query_position = kept.items[i].first_query_position;
    const size_t rows = static_cast<size_t>(to.queries) * static_cast<size_t>(kept.shape.heads);
    to.q = static_cast<const float*>(from.q.data);
    if (from.q.type != DataType::kF32) {
      widened[i].q.resize(rows * dim_k);
      for (size_t j = 0; j < widened[i].q.size(); j++) widened[i].q[j] = from.q.At(j);
      to.q = widened[i].q.data();
    }
    to.out = static_cast<float*>(from.out.data);
    if (from.out.type != DataType::kF32) {
      widened[i].out.resize(rows * dim_v);
      to.out = widened[i].out.data();
    }
    to.lse = from.lse;
    if (from.lse == nullptr) {
      widened[i].lse.resize(rows);
      to.lse = widened[i].lse.data();
    }
  }
  AttendArgs all;
  all.layer = args.layer;
  all.heads = kept.shape.heads;
  all.scale = args.scale;
  all.causal = kept.causal;
  all.window = kept.window;
  all.softcap = args.softcap;
  all.sinks = args.sinks;
  all.items = items;
  all.cancellation = args.cancellation;
  KVTIDE_RETURN_IF_ERROR(Attend(all));
  for (size_t i = 0; i < items.size(); i++)
    if (args.items[i].out.type != DataType::kF32)
      for (size_t j = 0; j < widened[i].out.size(); j++) args.items[i].out.Set(j, widened[i].out[j]);
  return absl::OkStatus();
}

absl::Status Backend::DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation) {
  for (const DecodePiece& piece : pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
  std::vector<float> k, v;
  for (const DecodePiece& piece : pieces) {
    const BlockLayout& layout = *piece.run->layout;
    const auto heads = static_cast<size_t>(layout.shape().kv_heads);
    const size_t k_width = heads * static_cast<size_t>(layout.shape().head_dim_k),
                 v_width = heads * static_cast<size_t>(layout.shape().head_dim_v);
    k.resize(kBlockTokens * k_width);
    v.resize(kBlockTokens * v_width);
    for (int64_t done = 0; done < piece.tokens;) {
      if (IsCancelled(cancellation)) return absl::CancelledError("decode: cancelled");
      const int64_t token = piece.first_token + done, first = token % kBlockTokens;
      const int64_t count = std::min(kBlockTokens - first, piece.tokens - done);
      DecodeArgs args;
      args.layout = &layout;
      args.profile = piece.run->profile;
      args.block = piece.run->blocks[static_cast<size_t>(token / kBlockTokens)];
      args.position = piece.run->first_position + token / kBlockTokens * kBlockTokens;
      args.layer = piece.layer;
      args.k = piece.k.data == nullptr ? nullptr : k.data();
      args.v = piece.v.data == nullptr ? nullptr : v.data();
      KVTIDE_RETURN_IF_ERROR(Decode(args));
      for (int64_t t = 0; t < count; t++) {
        StoreRow(k.data() + static_cast<size_t>(first + t) * k_width, k_width, piece.k,
                 static_cast<size_t>(done + t) * (piece.k_stride == 0 ? k_width : piece.k_stride));
        StoreRow(v.data() + static_cast<size_t>(first + t) * v_width, v_width, piece.v,
                 static_cast<size_t>(done + t) * (piece.v_stride == 0 ? v_width : piece.v_stride));
      }
      done += count;
    }
  }
  return absl::OkStatus();
}

}  // namespace kvtide
