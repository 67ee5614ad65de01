// Numbered objects that are made and let go all the time: a number of 32 bits stands for a pointer, and an
// object costs its own bytes. They never move. An object that was given back keeps its value until it is
// taken again, and its memory until the end.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/base/check.h"

namespace kvtide {

constexpr uint32_t kNoSlot = 0xffffffffu;

template <class T>
class Slots {
 public:
  // A slot that nobody has.
  uint32_t Take() {
    if (!unused_.empty()) {
      const uint32_t slot = unused_.back();
      unused_.pop_back();
      return slot;
    }
    KVTIDE_CHECK(size_ < kNoSlot, size_, " slots are taken");
    if (size_ % kPiece == 0) pieces_.push_back(std::make_unique<Piece>());
    return size_++;
  }
  void Give(uint32_t slot) { unused_.push_back(slot); }

  T& operator[](uint32_t slot) const { return (*pieces_[slot / kPiece])[slot % kPiece]; }
  // All that were ever taken have smaller numbers.
  uint32_t size() const { return size_; }

 private:
  static constexpr uint32_t kPiece = 256;
  using Piece = std::array<T, kPiece>;

  std::vector<std::unique_ptr<Piece>> pieces_;
  std::vector<uint32_t> unused_;
  uint32_t size_ = 0;
};

}  // namespace kvtide
