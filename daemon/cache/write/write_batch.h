// An append on its way: reserved (begun), written, committed and finished, or rolled back before it was
// committed. A batch that was begun and is destroyed unfinished stops the process.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/sequence/sequences.h"
#include "kernels/backend.h"
#include "kernels/base/data_type.h"

namespace kvtide {

// A block of a sequence that codes at once: its f16 bytes and those of its coded twin, in the same tier.
struct TwinBlock {
  int64_t index = 0;
  int tier = 0;
  std::byte* exact = nullptr;
  std::byte* coded = nullptr;
};

// New tokens of one layer of one sequence.
struct LayerWrite {
  Sequence* sequence = nullptr;
  int group = 0, layer = 0;  // layer within the group
  int model_layer = 0;
  int64_t start = 0, tokens = 0;
  TensorView k, v;
  std::span<const TokenId> token_ids;  // of the new tokens; empty: not said
  bool repeated = false;               // the layer has these tokens already
  bool follows = false;                // another batch that is still open ends at `start`
  // Of all layers of the group, which have equal lengths; `layer` is 0, and nothing is written by this batch.
  bool whole_group = false;
  uint64_t hash = 0;  // of the rows, as they came; before Commit
  std::vector<TwinBlock> twins;

  int64_t end() const { return start + tokens; }
};

// Tells a call that is repeated from one that writes other values at the same place.
uint64_t HashRows(const LayerWrite& write);

// A batch may *follow* another one that is still open: it reserves what comes behind it. The first one ends
// first; when it is rolled back, so is what follows it.
class WriteBatch {
 public:
  WriteBatch() = default;
  ~WriteBatch();
  WriteBatch(const WriteBatch&) = delete;
  WriteBatch& operator=(const WriteBatch&) = delete;

  // One of the sequences that are written, then new tokens for its layers. Before Begin. `follows`: its
  // tokens come behind those that the batch of Follow writes.
  void AddSequence(const SequencePtr& sequence, bool follows = false) {
    sequences.push_back(sequence);
    follows_.push_back(follows);
  }
  // Before Begin. `previous` is begun, and nothing follows it yet.
  void Follow(WriteBatch& previous);
  // It was begun, and is neither committed nor rolled back.
  bool open() const { return phase_ == Phase::kBegun; }
  // What it follows is still open.
  bool waits() const { return previous_ != nullptr; }
  const WriteBatch* previous() const { return previous_; }
  // Whether it writes to the sequence.
  bool Writes(const Sequence& sequence) const;
  bool followed() const { return next_ != nullptr; }
  LayerWrite& AddWrite(int model_layer, int64_t start, int64_t tokens);
  LayerWrite& AddGroup(int group, int64_t start, int64_t tokens);
  bool empty() const { return writes.empty(); }

  // The layer's length once the batch is committed, of a sequence that it writes one layer of.
  int64_t EndOf(const Sequence& sequence) const;
  // What a backend has to write in this tier; nothing once Writer::WriteBytes has done so.
  std::span<const AppendPiece> PiecesIn(int tier) const {
    return pieces_.empty() ? std::span<const AppendPiece>() : pieces_[static_cast<size_t>(tier)];
  }

  std::vector<SequencePtr> sequences;
  std::vector<LayerWrite> writes;
  const CallContext* context =
      nullptr;          // whose append it is, looked at between rounds; null = it cannot be stopped
  bool settles = true;  // what follows an append (seals, windows) is done when it ends

 private:
  friend class Writer;
  enum class Phase : uint8_t { kNew, kBegun, kCommitted, kEnded };

  bool Follows(const Sequence& sequence) const;

  Phase phase_ = Phase::kNew;
  WriteBatch* previous_ = nullptr;  // that this one follows, while it is open
  WriteBatch* next_ = nullptr;      // that follows this one
  std::vector<bool> follows_;       // by sequence
  std::vector<WriterGuard>
      writers_;  // of sequences, once begun; those that follow have it when `previous_` has ended
  std::vector<Block*> inherited_;                 // blocks that `previous_` fills, and this one goes on with
  std::vector<int64_t> old_tokens_;               // of sequences, before it was committed
  std::vector<WritingBlock> blocks_;              // that it fills
  std::vector<std::vector<AppendPiece>> pieces_;  // by tier
  std::vector<std::pair<GroupTable*, int64_t>> table_ends_;         // before the batch
  std::map<GroupTable*, std::shared_ptr<const Profile>> profiles_;  // seal_at_once: made while writing
};

}  // namespace kvtide
