#include "kernels/cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/attend_args.h"
#include "kernels/attention_state.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Rows of one task: the state of 256 rows of 128 dims stays in the L2 cache, and a page is decoded once for
// all of them.
constexpr int kTaskRows = 256;
// Blocks of one task. Few rows: 2,048 tokens, about 250 KiB of 4-bit codes, long against starting a task.
constexpr int64_t kTaskBlocksFewRows = 32, kTaskBlocks = 512;
constexpr int kFewRows = 64;
constexpr int kRowsOfFewKernel = 16;  // more rows are worth decoding a page to f32 tiles

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// The queries of one item in the frame of one (K type, profile).
struct Frame {
  const AttendItem* item = nullptr;
  CacheType type{};
  const Profile* profile = nullptr;  // null for types that ignore it
  int dim = 0;                       // stored dim of K
  std::vector<float> q;              // [kv_heads][queries * group][dim]
  std::vector<float> bias;           // [kv_heads][queries * group], empty = none
};

struct Task {
  const BlockRun* run = nullptr;
  int frame = 0;
  int64_t first_block = 0, end_block = 0;
  size_t state = 0;  // first row of its states in Work::out and Work::lse
};

// All tasks of some rows of one KV head of one item.
struct RowChunk {
  int item = 0, kv_head = 0, first_row = 0, rows = 0;
  size_t first_task = 0, end_task = 0;
};

class Work {
 public:
  Work(const AttendArgs& args, const GroupShape& shape, const PageKernels& kernels)
      : args_(args), kernels_(kernels), shape_(shape), group_(args.heads / shape.kv_heads) {
    for (size_t i = 0; i < args.items.size(); i++) AddItem(static_cast<int>(i));
    const size_t dim = Size(StoredDim(shape.head_dim_v));
    out_.resize(states_ * dim);
    lse_.resize(states_);
  }

  void Run(ThreadPool& pool) {
    constexpr int64_t kRowsPerStep = 32;
    std::vector<std::pair<int, int64_t>> steps;
    for (size_t f = 0; f < frames_.size(); f++)
      for (int64_t row = 0; row < Rows(*frames_[f].item) * shape_.kv_heads; row += kRowsPerStep)
        steps.emplace_back(static_cast<int>(f), row);
    // Rows are turned and merged in about a microsecond each, pages take a few: waking a thread for less
    // costs more.
    constexpr int64_t kAloneRows = 64, kAlonePages = 32;
    int64_t rows = 0, pages = 0;
    for (const RowChunk& chunk : chunks_) rows += chunk.rows;
    for (size_t t = 0; t < tasks_.size(); t++)
      pages += (tasks_[t].end_block - tasks_[t].first_block) * ((chunks_[chunk_of_task_[t]].rows + 7) / 8);
    const auto run = [&](bool alone, size_t count, absl::FunctionRef<void(int64_t)> body) {
      if (!alone) return pool.ParallelFor(static_cast<int64_t>(count), body);
      for (size_t i = 0; i < count; i++) body(static_cast<int64_t>(i));
    };
    run(rows <= kAloneRows, steps.size(), [&](int64_t i) {
      Frame& frame = frames_[Size(steps[Size(i)].first)];
      const int64_t first = steps[Size(i)].second;
      const int64_t end = std::min(first + kRowsPerStep, Rows(*frame.item) * shape_.kv_heads);
      for (int64_t row = first; row < end; row++) TurnQuery(frame, row);
    });
    run(pages <= kAlonePages, tasks_.size(), [&](int64_t i) { RunTask(Size(i)); });
    run(rows <= kAloneRows, chunks_.size(), [&](int64_t i) { Merge(chunks_[Size(i)]); });
  }

 private:
  int64_t Rows(const AttendItem& item) const { return static_cast<int64_t>(item.queries) * group_; }

  PositionRange Visible(const AttendItem& item, int64_t query) const {
    return VisiblePositions(item.first_query_position + query, args_.causal, args_.window);
  }

  int FrameOf(const AttendItem& item, const BlockRun& run) {
    const CacheType type = run.layout->pair().k;
    const bool coded = Info(type).storage == Storage::kCodes;
    const Profile* profile = coded ? run.profile : nullptr;
    for (size_t f = 0; f < frames_.size(); f++)
      if (frames_[f].item == &item && frames_[f].type == type && frames_[f].profile == profile)
        return static_cast<int>(f);
    Frame frame;
    frame.item = &item;
    frame.type = type;
    frame.profile = profile;
    frame.dim = run.layout->k().stored_dim;
    const size_t rows = Size(Rows(item) * shape_.kv_heads);
    frame.q.resize(rows * Size(frame.dim));
    if (profile != nullptr) frame.bias.resize(rows);
    frames_.push_back(std::move(frame));
    return static_cast<int>(frames_.size()) - 1;
  }

  void AddItem(int index) {
    const AttendItem& item = args_.items[Size(index)];
    const int64_t rows = Rows(item);
    const int64_t step = rows <= kFewRows ? kTaskBlocksFewRows : kTaskBlocks;
    for (int kv_head = 0; kv_head < shape_.kv_heads; kv_head++)
      for (int64_t row = 0; row < rows; row += kTaskRows) {
        RowChunk chunk{index,
                       kv_head,
                       static_cast<int>(row),
                       static_cast<int>(std::min<int64_t>(kTaskRows, rows - row)),
                       tasks_.size(),
                       0};
        const int64_t begin = Visible(item, row / group_).begin;
        const int64_t end = Visible(item, (row + chunk.rows - 1) / group_).end;
        for (const BlockRun& run : item.runs) {
          for (int64_t b = 0; b < BlocksOf(run); b += step) {
            const int64_t e = std::min(b + step, BlocksOf(run));
            if (run.first_position + b * kBlockTokens >= end ||
                run.first_position + e * kBlockTokens <= begin)
              continue;
            tasks_.push_back({&run, FrameOf(item, run), b, e, states_});
            chunk_of_task_.push_back(chunks_.size());
            states_ += Size(chunk.rows);
          }
        }
        chunk.end_task = tasks_.size();
        chunks_.push_back(chunk);
      }
  }

  // Row = (KV head, query, head of the group) of the frame.
  void TurnQuery(Frame& frame, int64_t row) const {
    const AttendItem& item = *frame.item;
    const int64_t kv_head = row / Rows(item), query = row % Rows(item) / group_, member = row % group_;
    const float* source = item.q + (query * args_.heads + kv_head * group_ + member) * shape_.head_dim_k;
    float* target = frame.q.data() + row * frame.dim;
    std::fill(std::copy_n(source, shape_.head_dim_k, target), target + frame.dim, 0.0f);
    if (frame.profile != nullptr) {
      const HeadProfile& head = frame.profile->key(args_.layer, static_cast<int>(kv_head));
      float bias = 0;
      for (size_t d = 0; d < head.mean.size(); d++) bias += source[d] * head.mean[d];
      frame.bias[Size(row)] = bias;
      for (size_t d = 0; d < head.gain.size(); d++) target[d] /= head.gain[d];
    }
    kernels_.rotate(frame.type, false, target, frame.dim);
  }

  void RunTask(size_t index) {
    const Task& task = tasks_[index];
    const RowChunk& chunk = chunks_[chunk_of_task_[index]];
    const Frame& frame = frames_[Size(task.frame)];
    const AttendItem& item = *frame.item;
    int64_t begin[kTaskRows], end[kTaskRows];
    for (int r = 0; r < chunk.rows; r++) {
      const PositionRange seen = Visible(item, (chunk.first_row + r) / group_);
      begin[r] = seen.begin;
      end[r] = seen.end;
    }
    const int64_t skipped = task.first_block * kBlockTokens;
    const PageSegment segment = MakePageSegment(
        *task.run->layout, args_.layer, chunk.kv_head,
        task.run->blocks.subspan(Size(task.first_block), Size(task.end_block - task.first_block)),
        task.run->first_position + skipped,
        std::min(task.run->tokens, task.end_block * kBlockTokens) - skipped);
    const size_t first_row = Size(chunk.kv_head * Rows(item) + chunk.first_row);
    QueryRows rows;
    rows.rows = chunk.rows;
    rows.q = frame.q.data() + first_row * Size(frame.dim);
    rows.bias = frame.bias.empty() ? nullptr : frame.bias.data() + first_row;
    rows.begin = begin;
    rows.end = end;
    rows.scale = args_.scale;
    rows.softcap = args_.softcap;
    const auto attend = chunk.rows > kRowsOfFewKernel ? kernels_.attend_many : kernels_.attend;
    attend(segment, rows, out_.data() + task.state * Size(StoredDim(shape_.head_dim_v)),
           lse_.data() + task.state);
  }

  // States of equal V types merge in their own frame, which is left once per type and row.
  void Merge(const RowChunk& chunk) const {
    const AttendItem& item = args_.items[Size(chunk.item)];
    const int dim = StoredDim(shape_.head_dim_v);
    std::vector<float> part(Size(dim)), whole(Size(dim));
    const std::vector<float> zeros(Size(dim));
    for (int r = 0; r < chunk.rows; r++) {
      float part_lse = -INFINITY, whole_lse = -INFINITY;
      std::fill(whole.begin(), whole.end(), 0.0f);
      for (size_t t = chunk.first_task; t < chunk.end_task; t++) {
        const size_t state = tasks_[t].state + Size(r);
        const CacheType type = tasks_[t].run->layout->pair().v;
        MergeAttentionState(part.data(), &part_lse, out_.data() + state * Size(dim), lse_[state], dim);
        if (t + 1 < chunk.end_task && tasks_[t + 1].run->layout->pair().v == type) continue;
        if (part_lse != -INFINITY) kernels_.rotate(type, true, part.data(), dim);
        MergeAttentionState(whole.data(), &whole_lse, part.data(), part_lse, dim);
        part_lse = -INFINITY;
      }
      const int row = chunk.first_row + r, head = chunk.kv_head * group_ + row % group_;
      if (args_.sinks != nullptr)
        MergeAttentionState(whole.data(), &whole_lse, zeros.data(), args_.sinks[head], dim);
      const size_t out_row = Size(row / group_) * Size(args_.heads) + Size(head);
      std::copy_n(whole.data(), shape_.head_dim_v, item.out + out_row * Size(shape_.head_dim_v));
      item.lse[out_row] = whole_lse;
    }
  }

  const AttendArgs& args_;
  const PageKernels& kernels_;
  const GroupShape shape_;
  const int group_;  // query heads per KV head
  std::vector<Frame> frames_;
  std::vector<Task> tasks_;
  std::vector<size_t> chunk_of_task_;
  std::vector<RowChunk> chunks_;
  size_t states_ = 0;
  std::vector<float> out_, lse_;
};

}  // namespace

absl::Status AttendOnCpu(const AttendArgs& args, const PageKernels& kernels, ThreadPool& pool) {
  KVTIDE_ASSIGN_OR_RETURN(const AttendShape shape, CheckAttendArgs(args));
  if (args.items.empty()) return absl::OkStatus();
  Work work(args, shape.group, kernels);
  work.Run(pool);
  return absl::OkStatus();
}

}  // namespace kvtide
