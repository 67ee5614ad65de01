#include "daemon/cache/block/block_table.h"

#include <utility>

#include "kernels/base/check.h"

namespace kvtide {

void TableFamily::DropSnapshots() {
  while (!with_snapshot_.empty()) with_snapshot_.back()->DropSnapshot();
}

BlockTable::BlockTable(BlockStore* store, bool keeper)
    : store_(store), keeper_(keeper), family_(std::make_shared<TableFamily>()) {}

std::unique_ptr<BlockTable> BlockTable::Fork() const {
  auto fork = std::make_unique<BlockTable>(store_, keeper_);
  fork->family_ = family_;
  fork->chunks_ = chunks_;
  fork->first_chunk_ = first_chunk_;
  fork->first_ = first_;
  fork->end_ = end_;
  for (Chunk* chunk : chunks_) store_->AddOwner(chunk, keeper_);
  return fork;
}

Chunk& BlockTable::Own(int64_t index) {
  DropSnapshot();
  Chunk*& chunk = chunks_[ChunkOf(index)];
  if (chunk->owners > 1) {
    Chunk* copy = store_->NewChunk(family_.get(), keeper_);
    for (int slot = 0; slot < kChunkBlocks; slot++)
      if (Block* block = chunk->blocks[static_cast<size_t>(slot)]; block != nullptr)
        store_->Enter(block, copy, slot);
    store_->RemoveOwner(std::exchange(chunk, copy), keeper_);
  }
  chunk->picture.reset();
  return *chunk;
}

void BlockTable::DropSnapshot() {
  if (snapshot_ == nullptr) return;
  std::vector<BlockTable*>& kept = family_->with_snapshot_;
  kept[family_slot_] = kept.back();
  kept[family_slot_]->family_slot_ = family_slot_;
  kept.pop_back();
  snapshot_.reset();
}

void BlockTable::PushBack(Block* block, const RecencyPtr& record) {
  if (empty()) first_chunk_ = end_ / kChunkBlocks;
  if (ChunkOf(end_) == chunks_.size()) chunks_.push_back(store_->NewChunk(family_.get(), keeper_));
  store_->Enter(block, &Own(end_), static_cast<int>(end_ % kChunkBlocks));
  store_->Join(block, record);
  end_++;
}

void BlockTable::Replace(int64_t index, Block* block, const RecencyPtr& record) {
  Chunk& chunk = Own(index);
  const int slot = static_cast<int>(index % kChunkBlocks);
  store_->Leave(&chunk, slot);
  store_->Enter(block, &chunk, slot);
  store_->Join(block, record);
}

void BlockTable::PopBack() {
  KVTIDE_CHECK(!empty());
  store_->Leave(&Own(end_ - 1), static_cast<int>((end_ - 1) % kChunkBlocks));
  end_--;
  if (chunks_.back()->count > 0) return;
  store_->RemoveOwner(chunks_.back(), keeper_);
  chunks_.pop_back();
}

void BlockTable::PopFront() {
  KVTIDE_CHECK(!empty());
  store_->Leave(&Own(first_), static_cast<int>(first_ % kChunkBlocks));
  first_++;
  if (chunks_.front()->count > 0) return;
  store_->RemoveOwner(chunks_.front(), keeper_);
  chunks_.erase(chunks_.begin());
  first_chunk_++;
}

void BlockTable::Clear() {
  DropSnapshot();
  for (Chunk* chunk : chunks_) store_->RemoveOwner(chunk, keeper_);
  chunks_.clear();
  first_chunk_ = first_ = end_ = 0;
}

void BlockTable::StartAt(int64_t index) {
  KVTIDE_CHECK(empty() && chunks_.empty());
  first_ = end_ = index;
}

void BlockTable::MakeStale(int64_t index) {
  Chunk* chunk = chunks_[ChunkOf(index)];
  chunk->picture.reset();
  family_->DropSnapshots();
}

const std::shared_ptr<const TableSnapshot>& BlockTable::Snapshot() {
  if (snapshot_ != nullptr) return snapshot_;
  std::vector<std::shared_ptr<const ChunkPicture>> pictures;
  pictures.reserve(chunks_.size());
  for (Chunk* chunk : chunks_) {
    if (chunk->picture == nullptr) chunk->picture = std::make_shared<const ChunkPicture>(store_, *chunk);
    pictures.push_back(chunk->picture);
  }
  snapshot_ = std::make_shared<const TableSnapshot>(store_, first_, end_, std::move(pictures));
  family_slot_ = family_->with_snapshot_.size();
  family_->with_snapshot_.push_back(this);
  return snapshot_;
}

}  // namespace kvtide
