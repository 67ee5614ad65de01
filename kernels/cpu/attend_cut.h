// What a plan of the CPU backend is: the items with their runs, the frames that their queries are turned
// into, and the cut of the work into tasks. It depends on the arguments of the plan alone, never on the
// number of threads or on the other items of a batch, and so do results; nothing in it depends on the layer.
//
// Rows of an item are cut into chunks. The chunks of a light item (decoding) are cut by blocks too, so that a
// few rows over a long context keep every thread busy; their attention states lie in buffers of the plan and
// are merged when all are there. An item with many rows (prefill) has chunks enough: each goes over its
// blocks alone, in pieces, and writes its rows itself, so that memory does not grow with the work.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attend_args.h"
#include "kernels/backend.h"

namespace kvtide {

// Rows of a chunk: the state of 256 rows of 128 dims stays in the L2 cache, and a page is decoded once for
// all of them.
constexpr int kChunkRows = 256;

// The queries of one item in the frame of one (K type, profile).
struct QueryFrame {
  int item = 0;
  CacheType type{};
  const Profile* profile = nullptr;  // null for types that ignore it
  int dim = 0;                       // stored dim of K
  // Light items: place of [kv_heads][rows][dim] and of [kv_heads][rows] in the plan's buffers.
  size_t q = 0, bias = 0;
};

// Some rows of one KV head of one item.
struct RowChunk {
  int item = 0, kv_head = 0, first_row = 0, rows = 0;
  bool alone = false;  // goes over all its tasks itself
  size_t first_task = 0, end_task = 0;
};

// Blocks of one run that a chunk looks at.
struct AttendTask {
  size_t run = 0, frame = 0, chunk = 0;
  int64_t first_block = 0, end_block = 0;
  size_t state = 0;  // of a light item: first row of its states in the plan's buffers
};

class AttendCut : public AttendPlan {
 public:
  // The plan of these items; `args` is checked. If the blocks are not kept, the spans of runs have to live as
  // long as the cut. Memory of an earlier use is used again.
  void Make(const AttendPlanArgs& args, AttendShape shape, bool keep_blocks);
  // True if Make(args, ..., true) would change nothing.
  bool Equals(const AttendPlanArgs& args) const;

  struct Item {
    int queries = 0;
    int64_t first_query_position = 0;
    size_t first_run = 0, end_run = 0, first_frame = 0, end_frame = 0;
  };
  // A step of the first phase of a layer: rows of a frame, over all KV heads, that are turned together.
  struct Turn {
    size_t frame = 0;
    int64_t first_row = 0, end_row = 0;
  };

  const AttendShape& shape() const { return shape_; }
  int group() const { return group_; }  // query heads per KV head
  const std::vector<Item>& items() const { return items_; }
  const std::vector<BlockRun>& runs() const { return runs_; }
  const std::vector<QueryFrame>& frames() const { return frames_; }
  const std::vector<RowChunk>& chunks() const { return chunks_; }
  const std::vector<AttendTask>& tasks() const { return tasks_; }
  const std::vector<Turn>& turns() const { return turns_; }
  const std::vector<size_t>& alone() const { return alone_; }  // chunks, the longest first
  const std::vector<size_t>& light_chunks() const { return light_chunks_; }
  const std::vector<size_t>& light_tasks() const { return light_tasks_; }
  int64_t light_rows() const { return light_rows_; }
  int64_t light_pages() const { return light_pages_; }  // of 8 rows

  int64_t RowsOf(int item) const {
    return static_cast<int64_t>(items_[static_cast<size_t>(item)].queries) * group_;
  }
  // Positions that a row of an item sees, runs aside.
  PositionRange Visible(int item, int64_t row) const {
    return VisiblePositions(items_[static_cast<size_t>(item)].first_query_position + row / group_, causal_,
                            window_);
  }
  // Blocks that fit a piece of bounded work for this many rows: 10 ms with vectors, and so the time after
  // which a cancellation is seen.
  int64_t BlocksPerPiece(int rows) const;

  // Buffers of a layer's work on light items: one layer at a time.
  std::vector<float> q, bias, out, lse;

 private:
  void AddItem(size_t index);
  void AddChunk(RowChunk chunk, int64_t step);
  size_t FrameOf(int item, const BlockRun& run, bool light);

  AttendShape shape_;
  bool causal_ = true;
  int64_t window_ = 0;
  int group_ = 1;
  std::vector<std::byte*> blocks_;
  std::vector<Item> items_;
  std::vector<BlockRun> runs_;
  std::vector<QueryFrame> frames_;
  std::vector<RowChunk> chunks_;
  std::vector<AttendTask> tasks_;
  std::vector<Turn> turns_;
  std::vector<size_t> alone_, light_chunks_, light_tasks_;
  int64_t light_rows_ = 0, light_pages_ = 0;
  size_t states_ = 0, q_values_ = 0, bias_values_ = 0;
};

}  // namespace kvtide
