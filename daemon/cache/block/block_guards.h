// What a call relies on while the cache's mutex is free. All are made, moved and destroyed under the mutex.
#pragma once

#include <utility>

#include "daemon/cache/block/block_store.h"
#include "kernels/base/check.h"

namespace kvtide {

// The block's record stays, whatever happens to its sequences.
class HeldBlock {
 public:
  HeldBlock() = default;
  HeldBlock(BlockStore& store, Block* block) : store_(&store), block_(block) { store.Hold(block); }
  HeldBlock(HeldBlock&& other) noexcept
      : store_(other.store_), block_(std::exchange(other.block_, nullptr)) {}
  HeldBlock& operator=(HeldBlock&& other) noexcept {
    std::swap(store_, other.store_);
    std::swap(block_, other.block_);
    return *this;
  }
  ~HeldBlock() {
    if (block_ != nullptr) store_->Unhold(block_);
  }

  Block* get() const { return block_; }
  Block* operator->() const { return block_; }
  explicit operator bool() const { return block_ != nullptr; }

 private:
  BlockStore* store_ = nullptr;
  Block* block_ = nullptr;
};

// A block that this call fills: nobody else writes, moves or drops it. One that is in no table when the guard
// goes is freed.
class WritingBlock {
 public:
  WritingBlock() = default;
  WritingBlock(BlockStore& store, Block* block) : held_(store, block) {
    KVTIDE_CHECK(!block->writing && !block->moving, "block ", block->id, " is busy");
    block->writing = true;
  }
  WritingBlock(WritingBlock&&) = default;
  WritingBlock& operator=(WritingBlock&&) = default;
  ~WritingBlock() {
    if (held_) held_->writing = false;
  }

  Block* get() const { return held_.get(); }
  Block* operator->() const { return held_.get(); }
  explicit operator bool() const { return static_cast<bool>(held_); }

 private:
  HeldBlock held_;
};

// The place's bytes stay where they are, whatever happens to its block.
class PinnedPlace {
 public:
  PinnedPlace() = default;
  PinnedPlace(BlockStore& store, Place* place) : store_(&store), place_(place) { store.Pin(place); }
  PinnedPlace(PinnedPlace&& other) noexcept
      : store_(other.store_), place_(std::exchange(other.place_, nullptr)) {}
  PinnedPlace& operator=(PinnedPlace&& other) noexcept {
    std::swap(store_, other.store_);
    std::swap(place_, other.place_);
    return *this;
  }
  ~PinnedPlace() {
    if (place_ != nullptr) store_->Unpin(place_);
  }

  Place* get() const { return place_; }
  Place* operator->() const { return place_; }

 private:
  BlockStore* store_ = nullptr;
  Place* place_ = nullptr;
};

}  // namespace kvtide
