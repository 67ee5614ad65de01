// Steps, for engines that attend over the pool's blocks themselves. A step reserves room for new tokens of
// many sequences in all their layers, copies shared tails, and pins what the engine will read; the engine
// then writes rows and attends layer by layer without asking anybody, and the end of the step publishes the
// tokens or takes everything back.
//
// Between begin and end the step is the writer of its sequences: appends and cuts of others are Aborted,
// reads and forks see the tokens from before. Blocks that the step shows keep their bytes and places; moves
// may copy them meanwhile, blocks that are written do not move.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/cache_core.h"
#include "daemon/cache/call_context.h"
#include "daemon/cache/mover.h"
#include "daemon/cache/reading.h"
#include "daemon/cache/writer.h"

namespace kvtide {

struct StepItem {
  SequenceId sequence = 0;
  int64_t new_tokens = 0;  // at least 1
};

// A batch of sequences of one model, each once.
struct StepCall {
  std::span<const StepItem> items;
  const CallContext* context = nullptr;  // who calls; null = this process, for as long as it takes
};

class Stepper;

// A step on its way. Used by one thread at a time. One that is destroyed before its end is rolled back.
class Step {
 public:
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  size_t size() const { return items_.size(); }
  // The first new token of an item; all layers of its sequence have as many before it.
  int64_t start(size_t item) const { return items_[item].start; }
  int64_t end(size_t item) const { return items_[item].end; }
  // The blocks of an item in a layer group, from the first that its window keeps to the one of the last new
  // token. Those of new tokens are exact (f16), lie where the engine may write, and hold nothing yet from
  // start(item) on.
  std::span<const SnapshotRun> Runs(size_t item, int group) const;
  // Names what Runs shows: while it stays the same from step to step, so do the runs, and an engine keeps its
  // copy of the table.
  uint64_t Serial(size_t item, int group) const;

 private:
  friend class Stepper;
  struct Item {
    int64_t start = 0, end = 0;
    std::vector<const TableSnapshot*> tables;  // by layer group
  };
  explicit Step(Stepper* stepper) : stepper_(stepper) {}

  Stepper* const stepper_;
  WriteBatch batch_;
  std::optional<Reading> reading_;
  std::vector<Item> items_;
  bool open_ = false;
};

class Stepper {
 public:
  Stepper(CacheCore& core, Mover& mover, Writer& writer) : core_(core), mover_(mover), writer_(writer) {}

  // InvalidArgument for no items, no tokens, a sequence that is there twice, codes at once or is of another
  // model; FailedPrecondition where layers have different lengths; else as for an append. Nothing has changed
  // if it fails.
  absl::StatusOr<std::unique_ptr<Step>> Begin(const StepCall& call);
  // The engine has written all rows of all layers: the new tokens count, and what follows an append
  // (profiles, windows, seals) is done. Aborted if a sequence was closed before that: then nothing of the
  // step counts.
  absl::Status Commit(Step& step);
  // Nothing of the step counts.
  void Rollback(Step& step);

 private:
  absl::Status AddItem(CacheState& state, const StepItem& item, const CallContext& context, Step& step) const;
  // What lies where nobody can read it comes to where the engine can.
  absl::Status BringIn(CacheLock& lock, const Step& step);
  absl::Status TakeTables(CacheState& state, Step& step) const;

  CacheCore& core_;
  Mover& mover_;
  Writer& writer_;
};

}  // namespace kvtide
