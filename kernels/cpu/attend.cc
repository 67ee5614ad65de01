#include "kernels/cpu/attend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/attend_args.h"
#include "kernels/attention_state.h"
#include "kernels/base/status.h"
#include "kernels/cpu/attend_cut.h"

namespace kvtide {
namespace {

constexpr int kRowsOfFewKernel = 16;  // more rows are worth decoding a page to f32 tiles

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// States of the rows of a chunk that goes over its blocks alone, and what its pieces need.
struct ChunkScratch {
  struct Turned {
    size_t frame = 0;
    std::vector<float> q, bias;
  };
  std::vector<Turned> turned;
  std::vector<float> piece, piece_lse, part, part_lse, whole, whole_lse;
};

// One layer of a cut.
class LayerRun {
 public:
  LayerRun(AttendCut& cut, const AttendLayerArgs& args, const PageKernels& kernels)
      : cut_(cut),
        args_(args),
        kernels_(kernels),
        group_(cut.shape().group),
        dim_v_(StoredDim(group_.head_dim_v)) {}

  absl::Status Run(ThreadPool& pool) {
    // Rows are turned and merged in about a microsecond each, pages take a few: waking a thread for less
    // costs more.
    constexpr int64_t kFewRows = 64, kFewPages = 32;
    const bool few_rows = cut_.light_rows() <= kFewRows;
    const size_t alone = cut_.alone().size();
    ForEach(pool, few_rows, cut_.turns().size(), [&](size_t i) { Turn(cut_.turns()[i]); });
    ForEach(pool, alone == 0 && cut_.light_pages() <= kFewPages, alone + cut_.light_tasks().size(),
            [&](size_t i) {
              i < alone ? RunAlone(cut_.alone()[i]) : RunTask(cut_.tasks()[cut_.light_tasks()[i - alone]]);
            });
    ForEach(pool, few_rows, cut_.light_chunks().size(),
            [&](size_t i) { Merge(cut_.chunks()[cut_.light_chunks()[i]]); });
    if (stopped_.load(std::memory_order_relaxed)) return absl::CancelledError("attention was cancelled");
    return CheckOverflow();
  }

 private:
  template <class F>
  void ForEach(ThreadPool& pool, bool on_this_thread, size_t count, F body) {
    const auto step = [&](int64_t i) {
      if (!Stop()) body(Size(i));
    };
    if (!on_this_thread) return pool.ParallelFor(static_cast<int64_t>(count), step);
    for (size_t i = 0; i < count; i++) step(static_cast<int64_t>(i));
  }

  bool Stop() {
    if (!IsCancelled(args_.cancellation)) return false;
    stopped_.store(true, std::memory_order_relaxed);
    return true;
  }

  // One row of an item and KV head, as the caller gave it, into a frame.
  void TurnRow(const QueryFrame& frame, int kv_head, int64_t row, float* target, float* bias) const {
    const int group = cut_.group();
    const int64_t head = static_cast<int64_t>(kv_head) * group + row % group;
    const size_t first =
        Size((row / group * cut_.shape().heads + head) * static_cast<int64_t>(group_.head_dim_k));
    const int dim = group_.head_dim_k;
    kernels_.widen(args_.items[Size(frame.item)].q, first, Size(dim), target);
    std::fill(target + dim, target + frame.dim, 0.0f);
    if (Info(frame.type).calibrated) {
      *bias = kernels_.turn_query(frame.type, frame.profile->key(args_.layer, kv_head), frame.dim, target);
      return;
    }
    if (frame.profile != nullptr) {
      const HeadProfile& profile = frame.profile->key(args_.layer, kv_head);
      float sum = 0;
      for (size_t d = 0; d < profile.mean.size(); d++) sum += target[d] * profile.mean[d];
      *bias = sum;
      for (size_t d = 0; d < profile.gain.size(); d++) target[d] /= profile.gain[d];
    }
    kernels_.rotate(frame.type, false, target, frame.dim);
  }

  // Rows = (KV head, query, head of the group) of a light item's frame.
  void Turn(const AttendCut::Turn& turn) {
    const QueryFrame& frame = cut_.frames()[turn.frame];
    const int64_t rows = cut_.RowsOf(frame.item);
    for (int64_t row = turn.first_row; row < turn.end_row; row++)
      TurnRow(frame, static_cast<int>(row / rows), row % rows,
              cut_.q.data() + frame.q + Size(row * frame.dim),
              frame.profile == nullptr ? nullptr : cut_.bias.data() + frame.bias + Size(row));
  }

  // Blocks [first, end) of a run for the rows of a chunk; q and bias begin with the chunk's first row.
  void RunBlocks(const RowChunk& chunk, const BlockRun& run, int64_t first, int64_t end, const float* q,
                 const float* bias, float* out, float* lse) const {
    int64_t begins[kChunkRows], ends[kChunkRows];
    for (int r = 0; r < chunk.rows; r++) {
      const PositionRange seen = cut_.Visible(chunk.item, chunk.first_row + r);
      begins[r] = seen.begin;
      ends[r] = seen.end;
    }
    const int64_t skipped = first * kBlockTokens;
    const PageSegment segment =
        MakePageSegment(*run.layout, args_.layer, chunk.kv_head,
                        run.profile == nullptr ? nullptr : &run.profile->key(args_.layer, chunk.kv_head),
                        run.blocks.subspan(Size(first), Size(end - first)), run.first_position + skipped,
                        std::min(run.tokens, end * kBlockTokens) - skipped);
    QueryRows rows;
    rows.rows = chunk.rows;
    rows.q = q;
    rows.bias = bias;
    rows.begin = begins;
    rows.end = ends;
    rows.scale = args_.scale;
    rows.softcap = args_.softcap;
    (chunk.rows > kRowsOfFewKernel ? kernels_.attend_many : kernels_.attend)(segment, rows, out, lse);
  }

  void RunTask(const AttendTask& task) {
    const RowChunk& chunk = cut_.chunks()[task.chunk];
    const QueryFrame& frame = cut_.frames()[task.frame];
    const size_t first_row = Size(chunk.kv_head * cut_.RowsOf(chunk.item) + chunk.first_row);
    RunBlocks(chunk, cut_.runs()[task.run], task.first_block, task.end_block,
              cut_.q.data() + frame.q + first_row * Size(frame.dim),
              frame.profile == nullptr ? nullptr : cut_.bias.data() + frame.bias + first_row,
              cut_.out.data() + task.state * Size(dim_v_), cut_.lse.data() + task.state);
  }

  // States of equal V types merge in their own frame, which is left once per type and row.
  void Merge(const RowChunk& chunk) {
    std::vector<float> part(Size(dim_v_)), whole(Size(dim_v_));
    for (int r = 0; r < chunk.rows; r++) {
      float part_lse = -INFINITY, whole_lse = -INFINITY;
      std::fill(whole.begin(), whole.end(), 0.0f);
      for (size_t t = chunk.first_task; t < chunk.end_task; t++) {
        const size_t state = cut_.tasks()[t].state + Size(r);
        MergeAttentionState(part.data(), &part_lse, cut_.out.data() + state * Size(dim_v_), cut_.lse[state],
                            dim_v_);
        if (!LeavesFrame(chunk, t)) continue;
        AddPart(cut_.tasks()[t], part.data(), &part_lse, whole.data(), &whole_lse);
      }
      Finish(chunk, r, whole.data(), whole_lse);
    }
  }

  // True if the next task of the chunk has V in another frame, or there is none.
  bool LeavesFrame(const RowChunk& chunk, size_t task) const {
    const auto type = [&](size_t t) { return cut_.runs()[cut_.tasks()[t].run].layout->pair().v; };
    return task + 1 == chunk.end_task || type(task + 1) != type(task);
  }
  void AddPart(const AttendTask& task, float* part, float* part_lse, float* whole, float* whole_lse) const {
    if (*part_lse != -INFINITY) kernels_.rotate(cut_.runs()[task.run].layout->pair().v, true, part, dim_v_);
    MergeAttentionState(whole, whole_lse, part, *part_lse, dim_v_);
    *part_lse = -INFINITY;
  }

  const ChunkScratch::Turned& TurnChunk(const RowChunk& chunk, size_t frame_index, ChunkScratch& scratch) {
    for (const ChunkScratch::Turned& turned : scratch.turned)
      if (turned.frame == frame_index) return turned;
    const QueryFrame& frame = cut_.frames()[frame_index];
    ChunkScratch::Turned& turned = scratch.turned.emplace_back();
    turned.frame = frame_index;
    turned.q.resize(Size(chunk.rows) * Size(frame.dim));
    if (frame.profile != nullptr) turned.bias.resize(Size(chunk.rows));
    for (int r = 0; r < chunk.rows; r++)
      TurnRow(frame, chunk.kv_head, chunk.first_row + r, turned.q.data() + Size(r) * Size(frame.dim),
              frame.profile == nullptr ? nullptr : turned.bias.data() + r);
    return turned;
  }

  void RunAlone(size_t index) {
    const RowChunk& chunk = cut_.chunks()[index];
    const size_t rows = Size(chunk.rows), dim = Size(dim_v_);
    ChunkScratch scratch;
    scratch.piece.resize(rows * dim);
    scratch.piece_lse.resize(rows);
    scratch.part.resize(rows * dim);
    scratch.part_lse.assign(rows, -INFINITY);
    scratch.whole.resize(rows * dim);
    scratch.whole_lse.assign(rows, -INFINITY);
    const int64_t step = cut_.BlocksPerPiece(chunk.rows);
    for (size_t t = chunk.first_task; t < chunk.end_task; t++) {
      const AttendTask& task = cut_.tasks()[t];
      const ChunkScratch::Turned& turned = TurnChunk(chunk, task.frame, scratch);
      for (int64_t b = task.first_block; b < task.end_block; b += step) {
        if (Stop()) return;
        RunBlocks(chunk, cut_.runs()[task.run], b, std::min(b + step, task.end_block), turned.q.data(),
                  turned.bias.empty() ? nullptr : turned.bias.data(), scratch.piece.data(),
                  scratch.piece_lse.data());
        for (size_t r = 0; r < rows; r++)
          MergeAttentionState(scratch.part.data() + r * dim, &scratch.part_lse[r],
                              scratch.piece.data() + r * dim, scratch.piece_lse[r], dim_v_);
      }
      if (!LeavesFrame(chunk, t)) continue;
      for (size_t r = 0; r < rows; r++)
        AddPart(task, scratch.part.data() + r * dim, &scratch.part_lse[r], scratch.whole.data() + r * dim,
                &scratch.whole_lse[r]);
    }
    for (size_t r = 0; r < rows; r++)
      Finish(chunk, static_cast<int>(r), scratch.whole.data() + r * dim, scratch.whole_lse[r]);
  }

  // Adds the sink and writes a row in the caller's type.
  void Finish(const RowChunk& chunk, int chunk_row, float* whole, float lse) {
    static constexpr float kZeros[512] = {};
    const int row = chunk.first_row + chunk_row, group = cut_.group();
    const int head = chunk.kv_head * group + row % group;
    if (std::isnan(lse) || lse == INFINITY || (lse == -INFINITY && SeesAToken(chunk.item, row)))
      NoteOverflow(chunk.item, row / group, head);
    if (args_.sinks != nullptr) MergeAttentionState(whole, &lse, kZeros, args_.sinks[head], dim_v_);
    const size_t out_row = Size(row / group) * Size(cut_.shape().heads) + Size(head);
    const LayerItem& item = args_.items[Size(chunk.item)];
    kernels_.narrow(whole, Size(group_.head_dim_v), item.out, out_row * Size(group_.head_dim_v));
    if (item.lse != nullptr) item.lse[out_row] = lse;
  }

  bool SeesAToken(int item, int64_t row) const {
    const PositionRange seen = cut_.Visible(item, row);
    for (size_t r = cut_.items()[Size(item)].first_run; r < cut_.items()[Size(item)].end_run; r++) {
      const BlockRun& run = cut_.runs()[r];
      if (std::max(seen.begin, run.first_position) < std::min(seen.end, run.first_position + run.tokens))
        return true;
    }
    return false;
  }

  // The first one in the order of the items is reported.
  void NoteOverflow(int item, int query, int head) {
    const uint64_t rows = Size(query) * Size(cut_.shape().heads) + Size(head);  // below 2^30
    const uint64_t mine = static_cast<uint64_t>(item) << 32 | rows;
    uint64_t first = overflow_.load(std::memory_order_relaxed);
    while (mine < first && !overflow_.compare_exchange_weak(first, mine, std::memory_order_relaxed)) {
    }
  }
  absl::Status CheckOverflow() const {
    const uint64_t first = overflow_.load(std::memory_order_relaxed);
    if (first == ~uint64_t{0}) return absl::OkStatus();
    const uint64_t row = first & 0xffffffffu, heads = Size(cut_.shape().heads);
    return absl::InternalError(absl::StrCat("item ", first >> 32, ", query ", row / heads, ", head ",
                                            row % heads, ": its logits do not fit f32 with scale ",
                                            args_.scale, "; use smaller queries or a smaller scale"));
  }

  AttendCut& cut_;
  const AttendLayerArgs& args_;
  const PageKernels& kernels_;
  const GroupShape group_;
  const int dim_v_;
  std::atomic<bool> stopped_{false};
  std::atomic<uint64_t> overflow_{~uint64_t{0}};  // item << 32 | query * heads + head
};

}  // namespace

absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttendOnCpu(const AttendPlanArgs& args,
                                                            std::unique_ptr<AttendPlan> previous) {
  KVTIDE_ASSIGN_OR_RETURN(AttendShape shape, CheckAttendPlan(args));
  if (previous == nullptr) previous = std::make_unique<AttendCut>();
  auto& cut = static_cast<AttendCut&>(*previous);
  if (!cut.Equals(args)) cut.Make(args, std::move(shape), true);
  return previous;
}

absl::Status AttendLayerOnCpu(AttendPlan& plan, const AttendLayerArgs& args, const PageKernels& kernels,
                              ThreadPool& pool) {
  auto& cut = static_cast<AttendCut&>(plan);
  KVTIDE_RETURN_IF_ERROR(CheckAttendLayer(args, cut.shape()));
  if (args.items.empty()) return absl::OkStatus();
  return LayerRun(cut, args, kernels).Run(pool);
}

absl::Status AttendOnCpu(const AttendArgs& args, const PageKernels& kernels, ThreadPool& pool) {
  KVTIDE_ASSIGN_OR_RETURN(AttendShape shape, CheckAttendArgs(args));
  if (args.items.empty()) return absl::OkStatus();
  std::vector<PlanItem> planned;
  std::vector<LayerItem> tensors;
  for (const AttendItem& item : args.items) {
    planned.push_back({item.runs, item.queries, item.first_query_position});
    tensors.push_back({{item.q, DataType::kF32}, {item.out, DataType::kF32}, item.lse});
  }
  AttendCut cut;
  cut.Make({args.heads, args.causal, args.window, planned}, std::move(shape), false);
  AttendLayerArgs layer;
  layer.layer = args.layer;
  layer.scale = args.scale;
  layer.softcap = args.softcap;
  layer.sinks = args.sinks;
  layer.items = tensors;
  layer.cancellation = args.cancellation;
  return LayerRun(cut, layer, kernels).Run(pool);
}

}  // namespace kvtide
