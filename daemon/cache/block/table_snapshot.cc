#include "daemon/cache/block/table_snapshot.h"

#include <algorithm>

#include "daemon/cache/block/block_store.h"
#include "kernels/base/check.h"

namespace kvtide {

ChunkPicture::ChunkPicture(BlockStore* store, const Chunk& chunk) : store_(store) {
  for (int slot = 0; slot < kChunkBlocks; slot++) {
    const Block* block = chunk.blocks[static_cast<size_t>(slot)];
    if (block == nullptr) continue;
    const int tier = block->place != nullptr ? block->place->tier : kDropped;
    if (runs_.empty() || runs_.back().first + runs_.back().count != slot ||
        runs_.back().layout != block->layout() || runs_.back().profile != block->profile() ||
        runs_.back().tier != tier)
      runs_.push_back({slot, 0, block->layout(), block->profile(), tier});
    runs_.back().count++;
    places_[static_cast<size_t>(slot)] = block->place;
    if (block->place != nullptr) block->place->pictures++;
  }
  store_->CountTableBytes(static_cast<int64_t>(sizeof *this + runs_.capacity() * sizeof(Run)));
}

ChunkPicture::~ChunkPicture() {
  for (Place* place : places_)
    if (place != nullptr) store_->LeavePicture(place);
  store_->CountTableBytes(-static_cast<int64_t>(sizeof *this + runs_.capacity() * sizeof(Run)));
}

namespace {

// The runs count as if they were there: they come with the first reader.
int64_t SnapshotBytes(int64_t blocks, size_t pictures) {
  return static_cast<int64_t>(sizeof(TableSnapshot)) + blocks * static_cast<int64_t>(sizeof(std::byte*)) +
         static_cast<int64_t>(pictures * (sizeof(std::shared_ptr<const ChunkPicture>) + sizeof(SnapshotRun)));
}

}  // namespace

TableSnapshot::TableSnapshot(BlockStore* store, int64_t first_block, int64_t end_block,
                             std::vector<std::shared_ptr<const ChunkPicture>> pictures)
    : store_(store),
      serial_(store->NextSnapshotSerial()),
      first_block_(first_block),
      end_block_(end_block),
      pictures_(std::move(pictures)) {
  store_->CountTableBytes(SnapshotBytes(end_block_ - first_block_, pictures_.size()));
}

TableSnapshot::~TableSnapshot() {
  store_->CountTableBytes(-SnapshotBytes(end_block_ - first_block_, pictures_.size()));
}

std::span<const SnapshotRun> TableSnapshot::runs() const {
  absl::call_once(once_, [this] {
    blocks_.reserve(static_cast<size_t>(end_block_ - first_block_));
    for (const auto& picture : pictures_)
      for (const ChunkPicture::Run& run : picture->runs()) {
        const int64_t at = first_block_ + static_cast<int64_t>(blocks_.size());
        const bool same = !runs_.empty() && runs_.back().layout == run.layout &&
                          runs_.back().profile == run.profile && runs_.back().tier == run.tier;
        if (!same) runs_.push_back({run.layout, run.profile, run.tier, at, {}});
        for (int slot = run.first; slot < run.first + run.count; slot++) {
          const Place* place = picture->place(slot);
          blocks_.push_back(place != nullptr ? store_->Data(*place) : nullptr);
        }
      }
    KVTIDE_CHECK(first_block_ + static_cast<int64_t>(blocks_.size()) == end_block_);
    for (size_t r = 0; r < runs_.size(); r++) {
      const int64_t end = r + 1 < runs_.size() ? runs_[r + 1].first_block : end_block_;
      runs_[r].blocks = std::span<std::byte* const>(blocks_).subspan(
          static_cast<size_t>(runs_[r].first_block - first_block_),
          static_cast<size_t>(end - runs_[r].first_block));
    }
  });
  return runs_;
}

std::span<const SnapshotRun> TableSnapshot::RunsOf(int64_t begin, int64_t end) const {
  const std::span<const SnapshotRun> all = runs();
  const auto from = std::partition_point(all.begin(), all.end(),
                                         [&](const SnapshotRun& run) { return run.end_block() <= begin; });
  const auto to =
      std::partition_point(from, all.end(), [&](const SnapshotRun& run) { return run.first_block < end; });
  return all.subspan(static_cast<size_t>(from - all.begin()), static_cast<size_t>(to - from));
}

}  // namespace kvtide
