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

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/read/reader.h"
#include "daemon/cache/read/reading.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/write/sealer.h"
#include "daemon/cache/write/writer.h"

namespace kvtide {

struct StepItem {
  SequenceId sequence = 0;
  int64_t new_tokens = 0;              // at least 1
  std::span<const TokenId> token_ids;  // as in AppendCall; empty: not said, or said later (Step::SayTokens)
};

class Step;

// A batch of sequences of one model, each once.
struct StepCall {
  std::span<const StepItem> items;
  const CallContext* context = nullptr;  // who calls; null = this process, for as long as it takes
  // An open step that this one follows: the engine works on that one still. Sequences that are in both go on
  // where that one ends. It ends first; when it is rolled back, so is this one.
  Step* after = nullptr;
  // The engine has mapped the memory of the first tier: all blocks have to lie there, and it codes those of
  // Step::Seals.
  bool mapped = false;
  size_t most_seals = 0;  // of a mapped step
};

// Sequences that are only read, of one model, each once.
struct PinCall {
  std::span<const SequenceId> sequences;
  const CallContext* context = nullptr;  // as in StepCall
  bool mapped = false;                   // likewise: all blocks have to lie in the first tier
};

class Stepper;

// A block that the engine codes in a step: as Backend::Recode from f16/f16 does. The step's tables show the
// exact block still.
struct StepSeal {
  size_t item = 0;
  int group = 0;
  int64_t block = 0;  // number
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  const BlockLayout* layout = nullptr;  // of the target
};

// A step on its way. Used by one thread at a time. One that is destroyed before its end is rolled back. A
// *pinned* one has no new tokens: it shows sequences as they were when it began, and lets go of them when it
// ends.
class Step {
 public:
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  size_t size() const { return items_.size(); }
  SequenceId sequence(size_t item) const { return batch_.sequences[item]->id; }
  const std::vector<SequencePtr>& sequences() const { return batch_.sequences; }
  const ModelSpec& model() const { return batch_.sequences.front()->model->spec; }
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
  bool mapped() const { return mapped_; }
  bool pinned() const { return pinned_; }
  // Index of the item with this sequence, which is looked for at `likely` first; size(): none.
  size_t Find(SequenceId sequence, size_t likely) const;
  // The tier of the sequence's device.
  int home(size_t item) const { return batch_.sequences[item]->home; }
  // Of a mapped step; they count when it ends.
  std::vector<StepSeal> Seals() const;
  // What full blocks of an item in a group are coded as.
  CachePair PairOf(size_t item, int group) const {
    return items_[item].groups[static_cast<size_t>(group)].coded->pair();
  }
  // What the coded blocks of an item in a group are coded with, and those of its seals; null = nothing.
  const Profile* ProfileOf(size_t item, int group) const {
    return items_[item].groups[static_cast<size_t>(group)].profile.get();
  }
  // What the new tokens of an item are, one for each, as in AppendCall. InvalidArgument for too few or many,
  // and where it was said already that they are others.
  absl::Status SayTokens(size_t item, std::span<const TokenId> token_ids);
  // The first layer that AttendStepLayer has not written; -1: it has written all of them, or there is nothing
  // to write.
  int FirstLayerLeft() const;

 private:
  friend class Stepper;
  // Of a sequence in a layer group.
  struct Seen {
    const TableSnapshot* table = nullptr;
    std::shared_ptr<const Profile> profile;
    const BlockLayout* coded = nullptr;  // what full blocks become
  };
  struct Item {
    int64_t start = 0, end = 0;
    absl::InlinedVector<Seen, 2> groups;
    std::vector<TokenId> token_ids;  // of the new tokens, once said
  };
  explicit Step(Stepper* stepper) : stepper_(stepper) {}

  Stepper* const stepper_;
  WriteBatch batch_;
  std::optional<Reading> reading_;
  std::vector<Item> items_;
  std::vector<bool> written_;  // layers, by AttendLayer
  std::vector<Sealer::Seal> seals_;
  bool open_ = false;
  bool mapped_ = false;
  bool pinned_ = false;
};

class Stepper {
 public:
  Stepper(CacheCore& core, Mover& mover, Sealer& sealer, Writer& writer, Reader& reader)
      : core_(core), mover_(mover), sealer_(sealer), writer_(writer), reader_(reader) {}

  // InvalidArgument for no items, no tokens, a sequence that is there twice, codes at once or is of another
  // model, and for a step that another one follows already; FailedPrecondition where layers have different
  // lengths; else as for an append. Nothing has changed if it fails.
  absl::StatusOr<std::unique_ptr<Step>> Begin(const StepCall& call);
  // A pinned step: what its sequences hold in all layers now, whoever writes to them, moves or closes them
  // later. InvalidArgument for no sequences, one that is there twice, has no tokens, or is of another model;
  // Aborted for one that codes at once and is written; DataLoss, ResourceExhausted as for Begin.
  absl::StatusOr<std::unique_ptr<Step>> Pin(const PinCall& call);
  // Attention over some of the sequences of a pinned step, as the cache's Attend does it. InvalidArgument for
  // others, FailedPrecondition for a step that is not pinned.
  absl::Status AttendPinned(const Step& step, const AttendCall& call);
  // For engines that cannot reach the blocks: writes the rows of one layer and attends, as AppendAttend does.
  // The items are those of the step, in its order, with all new tokens of each. May be repeated. An error
  // leaves the step open.
  absl::Status AttendLayer(Step& step, const AttendCall& call);
  // A pinned step: lets go of what it shows. Else the engine has written all rows of all layers: the new
  // tokens count, and what follows an append (profiles, windows, seals) is done. Aborted if a sequence was
  // closed before that, or the step that it follows was rolled back; FailedPrecondition if that one is still
  // open: then nothing of the step counts.
  absl::Status Commit(Step& step);
  // Nothing of the step counts.
  void Rollback(Step& step);

 private:
  friend class Step;
  absl::Status AddItem(CacheState& state, const StepItem& item, const CallContext& context, const Step* after,
                       Step& step) const;
  absl::Status AddItems(CacheState& state, const StepCall& call, Step& step) const;
  // What lies where nobody can read it comes to where the engine can.
  absl::Status BringIn(CacheLock& lock, const Step& step);
  absl::Status TakeTables(CacheState& state, Step& step) const;
  // Whether all that the tables show lies in the sequences' first tier.
  absl::Status CheckHome(const Step& step) const;
  absl::StatusOr<std::unique_ptr<Step>> TryBegin(const StepCall& call);
  absl::StatusOr<std::unique_ptr<Step>> TryPin(const PinCall& call);
  // `attempt`; once more if some of what an engine with mapped memory reads lies below, when it has come up.
  template <class Attempt>
  absl::StatusOr<std::unique_ptr<Step>> WithAllBroughtUp(bool mapped, std::span<const SequenceId> sequences,
                                                         const CallContext& context, Attempt attempt);
  // Takes everything back, or lets go of what is pinned.
  void Abandon(CacheState& state, Step& step);

  CacheCore& core_;
  Mover& mover_;
  Sealer& sealer_;
  Writer& writer_;
  Reader& reader_;
};

}  // namespace kvtide
