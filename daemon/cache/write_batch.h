// An append on its way: reserved (begun), written, committed and finished, or rolled back before it was
// committed. A batch that was begun and is destroyed unfinished stops the process.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "daemon/cache/block_guards.h"
#include "daemon/cache/call_context.h"
#include "daemon/cache/sequences.h"
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
  bool repeated = false;  // the layer has these tokens already
  uint64_t hash = 0;      // of the rows, as they came; before Commit
  std::vector<TwinBlock> twins;

  int64_t end() const { return start + tokens; }
};

// Tells a call that is repeated from one that writes other values at the same place.
uint64_t HashRows(const LayerWrite& write);

class WriteBatch {
 public:
  WriteBatch() = default;
  ~WriteBatch();
  WriteBatch(const WriteBatch&) = delete;
  WriteBatch& operator=(const WriteBatch&) = delete;

  // One of the sequences that are written, then new tokens for its layers. Before Begin.
  void AddSequence(const SequencePtr& sequence) { sequences.push_back(sequence); }
  LayerWrite& AddWrite(int model_layer, int64_t start, int64_t tokens);
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
      nullptr;  // whose append it is, looked at between rounds; null = it cannot be stopped

 private:
  friend class Writer;
  enum class Phase : uint8_t { kNew, kBegun, kCommitted, kEnded };

  Phase phase_ = Phase::kNew;
  std::vector<WriterGuard> writers_;                                // of sequences, once begun
  std::vector<int64_t> old_tokens_;                                 // of sequences
  std::vector<WritingBlock> blocks_;                                // that it fills
  std::vector<std::vector<AppendPiece>> pieces_;                    // by tier
  std::vector<std::pair<GroupTable*, int64_t>> table_ends_;         // before the batch
  std::map<GroupTable*, std::shared_ptr<const Profile>> profiles_;  // seal_at_once: made while writing
};

}  // namespace kvtide
