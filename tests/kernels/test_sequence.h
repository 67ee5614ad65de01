// A TestSequence is a sequence of runs for tests of backends: random K and V rows, encoded by the definition
// of the format into host blocks, with a copy of every block in the backend's memory. Both sides are given
// out as BlockRuns, so that a backend and the reference attend over the same bytes.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace kvtide::testing {

// Copies between host and backend memory, waiting for the end.
void CopyAndWait(Backend& backend, std::byte* target, const std::byte* source, size_t bytes,
                 CopyDirection direction);

// Blocks in a backend's memory, freed with the object.
class BackendBlocks {
 public:
  BackendBlocks(Backend& backend, const BlockLayout& layout, int count);
  std::byte* block(int i) const { return slab_->data() + static_cast<size_t>(i) * layout_.block_bytes(); }
  void Write(int i, const std::vector<std::byte>& bytes);
  std::vector<std::byte> Read(int i) const;

 private:
  Backend& backend_;
  BlockLayout layout_;
  std::unique_ptr<Slab> slab_;
};

// Fills one row of a token: side, token, head, values.
using RowFill = std::function<void(Side side, int64_t token, int head, std::vector<float>& row)>;

// Standard normal rows, K with a few large channels, as models have.
RowFill GaussianRows(uint32_t seed);

class TestSequence {
 public:
  TestSequence(Backend& backend, const GroupShape& shape) : backend_(backend), shape_(shape) {}

  // Appends a run. A run that is not the last should have whole blocks, or positions are skipped.
  void AddRun(const std::string& pair, int64_t tokens, const RowFill& fill, const Profile* profile = nullptr);

  int64_t tokens() const { return tokens_; }
  const GroupShape& shape() const { return shape_; }
  std::vector<BlockRun> host_runs() const { return Runs(true); }
  std::vector<BlockRun> device_runs() const { return Runs(false); }

 private:
  struct Run {
    BlockLayout layout;
    const Profile* profile = nullptr;
    int64_t first_position = 0, tokens = 0;
    std::deque<std::vector<std::byte>> bytes;
    std::unique_ptr<BackendBlocks> blocks;
    std::vector<std::byte*> host, device;
  };
  std::vector<BlockRun> Runs(bool host) const;

  Backend& backend_;
  const GroupShape shape_;
  std::deque<Run> runs_;
  int64_t tokens_ = 0;
};

// A profile of random means and gains.
Profile RandomProfile(const GroupShape& shape, uint32_t seed);

}  // namespace kvtide::testing
