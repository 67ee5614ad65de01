// A sequence: the block tables of its layer groups and the lengths of its layers. Guarded by the cache's
// mutex. A running writer has `writer` set and is the only one that changes tables and lengths; its calls
// hold the sequence by shared_ptr, so that closing it meanwhile is harmless.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/block/block_table.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/call/sequence_options.h"
#include "daemon/cache/call/token_chain.h"

namespace kvtide {

struct LayerProgress {
  int64_t tokens = 0;
  // Where the last append began, and the hash of its rows: they recognise its repetition.
  int64_t last_start = -1;
  uint64_t last_hash = 0;
};

// A block holds tokens of all layers of the group; each layer sees its own length of it.
struct GroupTable {
  const BlockLayout* exact = nullptr;
  const BlockLayout* coded = nullptr;  // of the sequence's pair; == exact when that is f16/f16
  const Ladder* ladder = nullptr;      // what coded blocks may be recoded as; null: nothing
  int64_t window = 0;
  std::unique_ptr<BlockTable> blocks;
  // seal_at_once only: the f16 twin of each coded block that is not full in all layers, by block number.
  std::map<int64_t, Block*> staging;
  int64_t sealed = 0;    // blocks below are coded or stay exact for good (the first exact ones)
  int64_t deferred = 0;  // blocks from `sealed` to here found no room to be coded after the last append
  ProfileOptions profile_options;
  std::shared_ptr<const Profile> calibrated;  // the model's, where the sequence uses it
  std::shared_ptr<const Profile> profile;     // for blocks coded from now on; null = none (yet)
  std::vector<bool> profiled;                 // seal_at_once only: layers that the profile has

  bool coding() const { return coded != exact; }
  // Full blocks are stored so: as the pair says, or on a rung below it.
  bool IsCoded(const Block& block) const {
    return block.layout() == coded || (ladder != nullptr && ladder->Has(block.layout()));
  }
  int64_t first_block() const { return blocks->first(); }
  int64_t end_block() const { return blocks->end(); }
  Block* at(int64_t index) const { return blocks->at(index); }
  // Every entry, twins after the table; `f` must not change the table.
  template <class F>
  void ForEachBlock(F f) const {
    blocks->ForEach(f);
    for (const auto& [index, block] : staging) f(block);
  }

  const LayerProgress& layer(int index) const { return layers_[static_cast<size_t>(index)]; }
  size_t layers() const { return layers_.size(); }
  void SetLayers(size_t layers) {
    layers_.assign(layers, {});
    min_tokens_ = 0;
    at_min_ = layers;
  }
  void SetLayer(int index, LayerProgress progress) {
    LayerProgress& layer = layers_[static_cast<size_t>(index)];
    const int64_t before = std::exchange(layer, progress).tokens;
    if (progress.tokens == min_tokens_ && before != min_tokens_) at_min_++;
    if (before == min_tokens_ && progress.tokens != min_tokens_) at_min_--;
    if (progress.tokens < min_tokens_ || at_min_ == 0) FindMin();
  }
  void SetAllLayers(LayerProgress progress) {
    layers_.assign(layers_.size(), progress);
    min_tokens_ = progress.tokens;
    at_min_ = layers_.size();
  }
  int64_t MinTokens() const { return min_tokens_; }
  int64_t MaxTokens() const {
    int64_t tokens = 0;
    for (const LayerProgress& layer : layers_) tokens = std::max(tokens, layer.tokens);
    return tokens;
  }

 private:
  void FindMin() {
    min_tokens_ = layers_.front().tokens;
    for (const LayerProgress& layer : layers_) min_tokens_ = std::min(min_tokens_, layer.tokens);
    at_min_ =
        static_cast<size_t>(std::count_if(layers_.begin(), layers_.end(), [&](const LayerProgress& layer) {
          return layer.tokens == min_tokens_;
        }));
  }

  std::vector<LayerProgress> layers_;
  // The smallest length and how many layers have it, so that a step of many layers looks at all of them once.
  int64_t min_tokens_ = 0;
  size_t at_min_ = 0;
};

// What its coded blocks may be recoded as, beside what the pair says.
inline std::span<const BlockLayout* const> RungsBelow(const GroupTable& table) {
  if (table.ladder == nullptr) return {};
  return std::span(table.ladder->rungs).subspan(1);
}

// What would be there after a restart.
struct Durable {
  std::vector<Place*> places;  // that the manifest names: kept
  int64_t tokens = 0;
  uint64_t changes = 0;  // Sequence::changes when it was taken
  bool exists = false;
};

// A model as sequences have it: as it was registered, or with a profile that was installed later. All those
// of a name and a tenant are one family, alike but for their profiles, and serve calls together.
struct ModelState {
  ModelId id = 0;
  ModelId family = 0;     // id of the first of them
  uint64_t revision = 0;  // 0 = as registered; else counts the profiles that were installed
  ModelSpec spec;
  std::string tenant;                                      // who has registered it
  uint64_t hash = 0;                                       // HashModel(spec)
  std::vector<std::shared_ptr<const Profile>> calibrated;  // by group; null = no means
};

struct PrefixSpace;
using PrefixSpacePtr = std::shared_ptr<PrefixSpace>;

struct Sequence {
  SequenceId id = 0;
  std::shared_ptr<const ModelState> model;
  SequenceOptions options;
  uint64_t name_space_hash = 0;
  std::shared_ptr<TenantAccount> account;  // of options.name_space
  SequenceId forked_from = 0;
  int home = 0;       // device of the first tier; never changes, forks inherit it
  bool empty = true;  // nothing was ever appended
  std::vector<GroupTable> groups;
  const void* writer = nullptr;  // the append or truncation that runs; null = none
  int readers = 0;               // reads that run
  bool closed = false;
  uint64_t changes = 0;     // appends, cuts, and other priorities
  bool persisting = false;  // a call makes it durable
  Durable durable;
  SequenceRecency recency;
  // Known token ids, from the first one on, and where its sealed blocks are found by them (prefix_index.h).
  std::optional<TokenChain> chain;
  PrefixSpacePtr prefixes;                             // null: no chain
  int64_t found_blocks = 0;                            // the index has seen those below
  int64_t reused_tokens = 0;                           // that it began with
  uint64_t counted_tokens = 0, counted_f16_bytes = 0;  // what Sequences has added to its totals
  absl::Time created, last_used;
  absl::Time last_attended = absl::InfinitePast();
  int64_t recent_steps = 0;  // with an attention, up to the last one, without a pause
  absl::Time pinned_until = absl::InfinitePast();

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

// Says whose bytes the block holds, and which profile they are coded with.
inline void Stamp(BlockStore& store, Block* block, const Sequence& sequence, int group, int64_t index,
                  std::shared_ptr<const Profile> profile = nullptr) {
  BlockKind kind = *block->kind;
  kind.model_hash = sequence.model->hash;
  kind.name_space_hash = sequence.name_space_hash;
  kind.account = sequence.account;
  kind.group = group;
  const GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  kind.ladder = table.ladder != nullptr && table.ladder->Has(kind.layout) ? table.ladder : nullptr;
  kind.profile = std::move(profile);
  store.SetKind(block, kind);
  block->sequence = sequence.id;
  block->index = static_cast<int32_t>(index);
  Charge(block->place, block->account());
}

}  // namespace kvtide
