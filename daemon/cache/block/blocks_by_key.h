// Blocks found by key and layer group. Such a table is large and a lookup of a prefix asks it hundreds of
// times for what no cache of the processor has: an entry has 8 bytes, 32 bits of the hash and the number of
// the block, whose own key decides; whoever asks for many fetches entries and blocks ahead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/container/flat_hash_set.h"
#include "daemon/cache/block/block_store.h"

namespace kvtide {

class BlocksByKey {
 public:
  explicit BlocksByKey(const BlockStore* store) : blocks_(0, Hash{}, Equal{store}), store_(store) {}

  size_t size() const { return blocks_.size(); }
  bool empty() const { return blocks_.empty(); }
  // Null if it is not there.
  Block* Find(const BlockKey& key, int group = 0) const {
    const auto found = blocks_.find(Name{TagOf(key, group), group, &key});
    return found != blocks_.end() ? store_->At(found->slot) : nullptr;
  }
  bool contains(const BlockKey& key) const { return Find(key) != nullptr; }
  // Find() of the same soon: fetches where its entry would be, or, when that was fetched, the block.
  void FetchEntry(const BlockKey& key, int group) const {
    blocks_.prefetch(Name{TagOf(key, group), group, &key});
  }
  void FetchBlock(const BlockKey& key, int group) const {
    const auto found = blocks_.find(TagOf(key, group));
    if (found != blocks_.end()) Fetch(store_->At(found->slot));
  }
  // By Block::key and its group; it must not be there.
  void Insert(const Block& block) { blocks_.insert(EntryOf(block)); }
  // Returns whether it was there.
  bool Erase(const Block& block) { return blocks_.erase(EntryOf(block)) > 0; }
  void clear() { blocks_.clear(); }

  // In no order that a second run would have.
  template <class F>
  void ForEach(F f) const {
    for (const Entry& entry : blocks_) f(store_->At(entry.slot));
  }

 private:
  enum class Tag : uint32_t {};
  struct Entry {
    Tag tag;
    uint32_t slot;
  };
  struct Name {
    Tag tag;
    int group;
    const BlockKey* key;
  };
  struct Hash {
    using is_transparent = void;
    // The table takes the lowest bits for one purpose and the others for another.
    size_t operator()(Tag tag) const { return static_cast<size_t>(tag) * size_t{0x9e3779b97f4a7c15}; }
    size_t operator()(const Entry& entry) const { return (*this)(entry.tag); }
    size_t operator()(const Name& name) const { return (*this)(name.tag); }
  };
  struct Equal {
    using is_transparent = void;
    const BlockStore* store;
    bool operator()(const Entry& a, const Entry& b) const { return a.slot == b.slot; }
    bool operator()(const Entry& a, Tag tag) const { return a.tag == tag; }
    bool operator()(const Entry& a, const Name& name) const {
      if (a.tag != name.tag) return false;
      const Block& block = *store->At(a.slot);
      return block.key == *name.key && block.group() == name.group;
    }
  };

  // Keys are hashes already.
  static Tag TagOf(const BlockKey& key, int group) {
    return static_cast<Tag>(static_cast<uint32_t>(key.low >> 32) +
                            static_cast<uint32_t>(group) * 0x9e3779b9u);
  }
  Entry EntryOf(const Block& block) const { return {TagOf(block.key, block.group()), SlotOf(block.id)}; }
  static void Fetch(const Block* block) {
    __builtin_prefetch(block);
    __builtin_prefetch(reinterpret_cast<const std::byte*>(block) + 64);
  }

  absl::flat_hash_set<Entry, Hash, Equal> blocks_;
  const BlockStore* store_;
};

}  // namespace kvtide
