// The chunks that have a block: as a rule one, none when it is only cached, many after forks that went
// different ways. One word; what is more than one chunk lies elsewhere.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "daemon/cache/block/chunk.h"
#include "kernels/base/check.h"

namespace kvtide {

class ChunkList {
 public:
  ChunkList() = default;
  ChunkList(ChunkList&& other) noexcept : one_(std::exchange(other.one_, nullptr)) {}
  ChunkList& operator=(ChunkList&& other) noexcept {
    std::swap(one_, other.one_);
    return *this;
  }
  ~ChunkList() {
    if (HasMany()) delete &many();
  }

  bool empty() const { return one_ == nullptr; }
  size_t size() const { return HasMany() ? many().size() : empty() ? 0 : 1; }
  Chunk* const* begin() const { return HasMany() ? many().data() : &one_; }
  Chunk* const* end() const { return begin() + size(); }
  Chunk* front() const { return *begin(); }

  void Add(Chunk* chunk) {
    if (empty()) {
      one_ = chunk;
    } else if (HasMany()) {
      many().push_back(chunk);
    } else {
      SetMany(new std::vector<Chunk*>{one_, chunk});
    }
  }
  // It must be there.
  void Remove(Chunk* chunk) {
    if (!HasMany()) {
      KVTIDE_CHECK(one_ == chunk);
      one_ = nullptr;
      return;
    }
    std::vector<Chunk*>& chunks = many();
    const auto found = std::find(chunks.begin(), chunks.end(), chunk);
    KVTIDE_CHECK(found != chunks.end());
    chunks.erase(found);
    if (chunks.size() > 1) return;
    Chunk* const last = chunks.front();
    delete &chunks;
    one_ = last;
  }

 private:
  // Chunks and vectors have even addresses: an odd one is that of the vector, plus one.
  bool HasMany() const { return (reinterpret_cast<uintptr_t>(one_) & 1) != 0; }
  std::vector<Chunk*>& many() const {
    return *reinterpret_cast<std::vector<Chunk*>*>(reinterpret_cast<uintptr_t>(one_) - 1);
  }
  void SetMany(std::vector<Chunk*>* chunks) {
    one_ = reinterpret_cast<Chunk*>(reinterpret_cast<uintptr_t>(chunks) + 1);
  }

  Chunk* one_ = nullptr;  // null: none
};

}  // namespace kvtide
