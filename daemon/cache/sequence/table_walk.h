// A walk over the blocks of some sequences in slices, between which the mutex may be given up and the tables
// may change: it goes on at the block number where it was.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "daemon/cache/sequence/sequences.h"

namespace kvtide {

class TableWalk {
 public:
  // `sequences` is borrowed.
  explicit TableWalk(const std::vector<SequencePtr>& sequences) : sequences_(sequences) {}

  // Shows up to `count` more blocks; false when it has shown the last one. Under the mutex; `visit` must not
  // change tables.
  template <class F>
  bool Next(size_t count, F visit) {
    size_t left = count;
    while (left > 0 && sequence_ < sequences_.size()) {
      const std::vector<GroupTable>& groups = sequences_[sequence_]->groups;
      if (group_ == groups.size()) {
        sequence_++;
        group_ = 0;
        continue;
      }
      if (Show(groups[group_], &left, visit)) continue;
      group_++;
      next_ = 0;
      twins_ = false;
    }
    return sequence_ < sequences_.size();
  }

 private:
  // False when the table is through.
  template <class F>
  bool Show(const GroupTable& table, size_t* left, F visit) {
    if (!twins_) {
      for (next_ = std::max(next_, table.first_block()); *left > 0 && next_ < table.end_block(); next_++) {
        visit(table.at(next_));
        --*left;
      }
      if (*left == 0) return true;
      twins_ = true;
      next_ = std::numeric_limits<int64_t>::min();
    }
    for (auto twin = table.staging.lower_bound(next_); twin != table.staging.end(); ++twin) {
      if (*left == 0) return true;
      visit(twin->second);
      --*left;
      next_ = twin->first + 1;
    }
    return false;
  }

  const std::vector<SequencePtr>& sequences_;
  size_t sequence_ = 0, group_ = 0;
  int64_t next_ = 0;    // block number in the group
  bool twins_ = false;  // in its staging map
};

}  // namespace kvtide
