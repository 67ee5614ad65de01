// Keys of blocks that were dropped not long ago, before anybody had asked for them: the ghost queue of
// S3-FIFO (s3_fifo_policy.h). It remembers as many drops as the cache has blocks, in four bytes each: sets of
// four places, in each the part of a key that does not say the set, and when it was dropped; the oldest of a
// set makes way. One key in some eight thousand is taken for another one, which costs a place that it did not
// earn.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "daemon/cache/tier/block_id.h"

namespace kvtide {

class GhostKeys {
 public:
  // `remember` false: nothing, ever.
  explicit GhostKeys(bool remember = false) : sets_(remember ? kFewest : 0) {}

  // A drop, in a cache of so many blocks.
  void Add(const BlockKey& key, size_t blocks);
  // Whether the key is remembered; it is not any more then.
  bool Take(const BlockKey& key);
  size_t bytes() const { return sets_.size() * sizeof(Set); }

 private:
  static constexpr size_t kWays = 4, kFewest = 64;  // places of a set; sets, a power of two
  // Time passes in steps: so many are as long as the table has places.
  static constexpr size_t kSteps = 1024;
  struct Place {
    uint16_t tag = 0;  // 0: free
    uint16_t step = 0;
  };
  using Set = std::array<Place, kWays>;

  size_t places() const { return sets_.size() * kWays; }
  uint16_t Now() const { return static_cast<uint16_t>(drops_ * kSteps / places()); }
  // Keys are hashes: one half says the set, the other one the tag.
  Set& SetOf(const BlockKey& key) { return sets_[key.low & (sets_.size() - 1)]; }
  static uint16_t TagOf(const BlockKey& key) { return static_cast<uint16_t>(key.high | 1); }
  // How many steps ago.
  uint16_t Age(const Place& place) const { return static_cast<uint16_t>(Now() - place.step); }

  std::vector<Set> sets_;
  uint64_t drops_ = 0;
  size_t blocks_ = 0;
};

}  // namespace kvtide
