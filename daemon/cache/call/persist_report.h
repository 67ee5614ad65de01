// What a call that makes sequences durable has done, and what a start has found.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvtide {

struct PersistReport {
  uint64_t sequences = 0;
  uint64_t blocks = 0;  // that were written; those that lay there already are not counted
  uint64_t bytes = 0;
  int64_t tokens = 0;  // of the sequences, that are durable now
};

struct RestoreReport {
  uint64_t sequences = 0, blocks = 0, bytes = 0;
  int64_t tokens = 0;
  uint64_t namespaces = 0, keyed_blocks = 0;  // of the block store
  uint64_t prefix_blocks = 0;                 // of sequences that were closed
  std::vector<std::string> lost;  // one line for each sequence that was durable and is not there, and why
};

}  // namespace kvtide
