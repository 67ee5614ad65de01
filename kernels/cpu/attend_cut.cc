#include "kernels/cpu/attend_cut.h"

#include <algorithm>
#include <utility>

namespace kvtide {
namespace {

// Blocks of a task of up to kFewRows rows: 2,048 tokens, about 250 KiB of 4-bit codes, long against starting
// a task.
constexpr int64_t kTaskBlocksFewRows = 32;
constexpr int kFewRows = 64;
// Multiplications of a piece.
constexpr int64_t kPieceWork = int64_t{1} << 28;
// Rows times KV heads from which an item's chunks are enough for all threads.
constexpr int64_t kAloneRows = 16 * kChunkRows;
constexpr int64_t kRowsPerTurn = 32;

size_t Size(int64_t n) { return static_cast<size_t>(n); }

bool SameRun(const BlockRun& a, const BlockRun& b) {
  return a.layout == b.layout && a.profile == b.profile && a.first_position == b.first_position &&
         a.tokens == b.tokens && std::ranges::equal(a.blocks, b.blocks);
}

}  // namespace

bool AttendCut::Equals(const AttendPlanArgs& args) const {
  if (args.heads != shape_.heads || args.causal != causal_ || args.window != window_ ||
      args.items.size() != items_.size())
    return false;
  for (size_t i = 0; i < items_.size(); i++) {
    const PlanItem& item = args.items[i];
    if (item.queries != items_[i].queries || item.first_query_position != items_[i].first_query_position ||
        item.runs.size() != items_[i].end_run - items_[i].first_run ||
        !std::equal(item.runs.begin(), item.runs.end(),
                    runs_.begin() + static_cast<std::ptrdiff_t>(items_[i].first_run), SameRun))
      return false;
  }
  return true;
}

void AttendCut::Make(const AttendPlanArgs& args, AttendShape shape, bool keep_blocks) {
  shape_ = std::move(shape);
  causal_ = args.causal;
  window_ = args.window;
  group_ = args.items.empty() ? 1 : shape_.heads / shape_.group.kv_heads;
  blocks_.clear();
  items_.clear();
  runs_.clear();
  frames_.clear();
  chunks_.clear();
  tasks_.clear();
  turns_.clear();
  alone_.clear();
  light_chunks_.clear();
  light_tasks_.clear();
  light_rows_ = light_pages_ = 0;
  states_ = q_values_ = bias_values_ = 0;
  for (const PlanItem& item : args.items) {
    Item kept{item.queries, item.first_query_position, runs_.size(), 0, 0, 0};
    runs_.insert(runs_.end(), item.runs.begin(), item.runs.end());
    kept.end_run = runs_.size();
    items_.push_back(kept);
  }
  if (keep_blocks) {
    for (const BlockRun& run : runs_) blocks_.insert(blocks_.end(), run.blocks.begin(), run.blocks.end());
    size_t at = 0;
    for (BlockRun& run : runs_) {
      run.blocks = std::span<std::byte* const>(blocks_).subspan(at, run.blocks.size());
      at += run.blocks.size();
    }
  }
  for (size_t i = 0; i < items_.size(); i++) AddItem(i);
  std::sort(alone_.begin(), alone_.end(), [&](size_t a, size_t b) {
    const auto work = [&](size_t c) {
      int64_t blocks = 0;
      for (size_t t = chunks_[c].first_task; t < chunks_[c].end_task; t++)
        blocks += tasks_[t].end_block - tasks_[t].first_block;
      return blocks * chunks_[c].rows;
    };
    const int64_t of_a = work(a), of_b = work(b);
    return of_a != of_b ? of_a > of_b : a < b;
  });
  q.resize(q_values_);
  bias.resize(bias_values_);
  out.resize(states_ * Size(StoredDim(shape_.group.head_dim_v)));
  lse.resize(states_);
}

int64_t AttendCut::BlocksPerPiece(int rows) const {
  const int64_t block = int64_t{kBlockTokens} * rows *
                        (StoredDim(shape_.group.head_dim_k) + StoredDim(shape_.group.head_dim_v));
  return std::max<int64_t>(1, kPieceWork / block);
}

size_t AttendCut::FrameOf(int item, const BlockRun& run, bool light) {
  // Keys that were coded before RoPE are rebuilt as they were, and so they meet queries as they are.
  const CacheType stored = run.layout->pair().k;
  const bool rebuilt = Info(stored).calibrated && run.profile->keys_turned_back();
  const CacheType type = rebuilt ? ExactPair().k : stored;
  const Profile* profile = Info(type).storage == Storage::kCodes ? run.profile : nullptr;
  for (size_t f = items_[Size(item)].first_frame; f < frames_.size(); f++)
    if (frames_[f].type == type && frames_[f].profile == profile) return f;
  QueryFrame frame{item, type, profile, run.layout->k().stored_dim, q_values_, bias_values_};
  const int64_t rows = RowsOf(item) * shape_.group.kv_heads;
  if (light) {
    q_values_ += Size(rows * frame.dim);
    if (profile != nullptr) bias_values_ += Size(rows);
    for (int64_t row = 0; row < rows; row += kRowsPerTurn)
      turns_.push_back({frames_.size(), row, std::min(row + kRowsPerTurn, rows)});
  }
  frames_.push_back(frame);
  return frames_.size() - 1;
}

void AttendCut::AddItem(size_t index) {
  const int item = static_cast<int>(index);
  const int64_t rows = RowsOf(item);
  const bool alone = rows * shape_.group.kv_heads >= kAloneRows;
  items_[index].first_frame = frames_.size();
  for (int kv_head = 0; kv_head < shape_.group.kv_heads; kv_head++)
    for (int64_t row = 0; row < rows; row += kChunkRows) {
      RowChunk chunk;
      chunk.item = item;
      chunk.kv_head = kv_head;
      chunk.first_row = static_cast<int>(row);
      chunk.rows = static_cast<int>(std::min<int64_t>(kChunkRows, rows - row));
      chunk.alone = alone;
      AddChunk(chunk, alone              ? kMostPosition
                      : rows <= kFewRows ? kTaskBlocksFewRows
                                         : BlocksPerPiece(chunk.rows));
    }
  items_[index].end_frame = frames_.size();
}

void AttendCut::AddChunk(RowChunk chunk, int64_t step) {
  const int64_t begin = Visible(chunk.item, chunk.first_row).begin,
                end = Visible(chunk.item, chunk.first_row + chunk.rows - 1).end;
  chunk.first_task = tasks_.size();
  const Item& item = items_[Size(chunk.item)];
  for (size_t r = item.first_run; r < item.end_run; r++) {
    const BlockRun& run = runs_[r];
    const int64_t first_token = std::max<int64_t>(0, begin - run.first_position),
                  end_token = std::min(run.tokens, end - run.first_position);
    if (first_token >= end_token) continue;
    const int64_t first = first_token / kBlockTokens, last = (end_token + kBlockTokens - 1) / kBlockTokens;
    // Cuts lie at multiples of the step in the run, wherever a window begins.
    for (int64_t b = first; b < last;) {
      const int64_t e = step >= last ? last : std::min(last, (b / step + 1) * step);
      tasks_.push_back({r, FrameOf(chunk.item, run, !chunk.alone), chunks_.size(), b, e, states_});
      if (!chunk.alone) {
        states_ += Size(chunk.rows);
        light_tasks_.push_back(tasks_.size() - 1);
        light_pages_ += (e - b) * ((chunk.rows + 7) / 8);
      }
      b = e;
    }
  }
  chunk.end_task = tasks_.size();
  if (chunk.alone) {
    alone_.push_back(chunks_.size());
  } else {
    light_chunks_.push_back(chunks_.size());
    light_rows_ += chunk.rows;
  }
  chunks_.push_back(chunk);
}

}  // namespace kvtide
