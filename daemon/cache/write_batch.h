// An append on its way: reserved (begun), written, committed, then finished or rolled back. A batch that was
// begun and is destroyed unfinished stops the process.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/cache/block_guards.h"
#include "daemon/cache/sequences.h"
#include "kernels/base/data_type.h"

namespace kvtide {

// One block that a write goes to: its f16 block and, with seal_at_once, the coded twin in the same tier.
struct WriteTarget {
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
  uint64_t hash = 0;      // of the rows, as they came
  LayerProgress before;
  std::vector<WriteTarget> targets;
};

// Tells a call that is repeated from one that writes other values at the same place.
uint64_t HashRows(const LayerWrite& write);

class WriteBatch {
 public:
  WriteBatch() = default;
  ~WriteBatch();
  WriteBatch(const WriteBatch&) = delete;
  WriteBatch& operator=(const WriteBatch&) = delete;

  // New tokens for one layer; the sequence becomes one of the batch's. Before Begin.
  LayerWrite& Add(const SequencePtr& sequence, int model_layer, int64_t start, int64_t tokens);
  bool Has(const Sequence& sequence) const;
  bool empty() const { return writes.empty(); }

  std::vector<SequencePtr> sequences;
  std::vector<LayerWrite> writes;

 private:
  friend class Writer;
  enum class Phase : uint8_t { kNew, kBegun, kCommitted, kEnded };

  Phase phase_ = Phase::kNew;
  std::vector<WriterGuard> writers_;                                // of sequences, once begun
  std::vector<int64_t> old_tokens_;                                 // of sequences
  std::vector<WritingBlock> blocks_;                                // that it fills
  std::vector<std::pair<GroupTable*, int64_t>> table_ends_;         // before the batch
  std::map<GroupTable*, std::shared_ptr<const Profile>> profiles_;  // seal_at_once: made while writing
};

}  // namespace kvtide
