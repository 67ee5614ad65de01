// What the thread for I/O has to move, as another one has planned it: a list of what is wanted and of what
// makes its room, and a list of idle blocks. A batch of each is done in turn, so that what is wanted waits
// for no idle block, however slow the disk is. Guarded by the cache's mutex.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "daemon/cache/tier/tier_policy.h"

namespace kvtide {

class IoBacklog {
 public:
  // Takes a plan's moves that read or write I/O, in their order: up to the last one that goes up they are
  // wanted, as what goes down before it makes its room. A list that is not done takes nothing, and the next
  // plan has those blocks again: so none is in a list twice.
  void Take(std::span<const Move> plan);
  // Nothing is left to begin or to end.
  bool empty() const { return lists_[0].moves.empty() && lists_[1].moves.empty(); }
  // The next batch of the list whose turn it is, of at most `most` moves, at least one; empty: none is left.
  // Its list is not done before Done.
  std::vector<Move> Next(size_t most);
  // The batch that Next gave last has ended.
  void Done();

 private:
  struct List {
    std::vector<Move> moves;
    size_t next = 0;  // that has not begun
  };
  std::array<List, 2> lists_;  // wanted, idle
  size_t turn_ = 0;
  List* running_ = nullptr;
};

}  // namespace kvtide
