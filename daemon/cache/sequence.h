// A sequence: the block tables of its layer groups and the lengths of its layers. Guarded by the cache's
// mutex. A running writer has `writer` set and is the only one that changes tables and lengths; its calls
// hold the sequence by shared_ptr, so that closing it meanwhile is harmless.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/block.h"
#include "daemon/cache/model.h"
#include "daemon/cache/sequence_options.h"

namespace kvtide {

struct LayerProgress {
  int64_t tokens = 0;
  int64_t last_start = -1;  // where the last append began; recognises its repetition
};

// Table entries of block numbers first_block, first_block + 1, ... A block holds tokens of all layers of the
// group; each layer sees its own length of it.
struct GroupTable {
  const BlockLayout* exact = nullptr;
  const BlockLayout* coded = nullptr;  // of the sequence's pair; == exact when that is f16/f16
  int64_t window = 0;
  int64_t first_block = 0;
  std::deque<Block*> blocks;
  // seal_at_once only: the f16 twin of each coded block that is not full in all layers, by block number.
  std::map<int64_t, Block*> staging;
  std::vector<LayerProgress> layers;
  int64_t sealed = 0;  // blocks below are coded or stay exact for good (the first exact ones)
  ProfileOptions profile_options;
  std::shared_ptr<const Profile> profile;  // for blocks coded from now on; null = none (yet)
  std::vector<bool> profiled;              // seal_at_once only: layers that the profile has

  bool coding() const { return coded != exact; }
  int64_t end_block() const { return first_block + static_cast<int64_t>(blocks.size()); }
  // Every entry, twins after the table; `f` must not change the table.
  template <class F>
  void ForEachBlock(F f) const {
    for (Block* block : blocks) f(block);
    for (const auto& [index, block] : staging) f(block);
  }
  Block*& at(int64_t index) { return blocks[static_cast<size_t>(index - first_block)]; }
  Block* at(int64_t index) const { return blocks[static_cast<size_t>(index - first_block)]; }
  int64_t MinTokens() const {
    int64_t tokens = layers.front().tokens;
    for (const LayerProgress& layer : layers) tokens = std::min(tokens, layer.tokens);
    return tokens;
  }
  int64_t MaxTokens() const {
    int64_t tokens = 0;
    for (const LayerProgress& layer : layers) tokens = std::max(tokens, layer.tokens);
    return tokens;
  }
};

struct ModelState {
  ModelId id = 0;
  ModelSpec spec;
};

struct Sequence {
  SequenceId id = 0;
  std::shared_ptr<const ModelState> model;
  SequenceOptions options;
  SequenceId forked_from = 0;
  int home = 0;       // device of the first tier; never changes, forks inherit it
  bool empty = true;  // nothing was ever appended
  std::vector<GroupTable> groups;
  bool writer = false;  // an append or truncation runs
  int readers = 0;      // attends that run
  bool closed = false;
  absl::Time created, last_used;

  bool keeper() const { return !options.allow_drop; }
  int64_t MinTokens() const {
    int64_t tokens = groups.front().MinTokens();
    for (const GroupTable& group : groups) tokens = std::min(tokens, group.MinTokens());
    return tokens;
  }
  int64_t MaxTokens() const {
    int64_t tokens = 0;
    for (const GroupTable& group : groups) tokens = std::max(tokens, group.MaxTokens());
    return tokens;
  }
};

// Says whose bytes the block holds.
inline void Stamp(Block& block, const Sequence& sequence, int group, int64_t index, absl::Time now) {
  block.stamp = {sequence.model->id, sequence.id, std::hash<std::string>{}(sequence.options.name_space),
                 group, index};
  block.last_touched = now;
}

}  // namespace kvtide
