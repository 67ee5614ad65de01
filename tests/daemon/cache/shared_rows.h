// Rows of floats, by token, in blocks of kBlockTokens that copies share until one of them changes a block: a
// naive model is copied at every fork and before every call, and hardly ever changed all over. Of one thread
// with all its copies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/format/page_order.h"

namespace kvtide::testing {

class SharedRows {
 public:
  explicit SharedRows(size_t row = 0) : row_(row) {}

  int64_t tokens() const { return tokens_; }
  // The rows of a token and those behind it in its block.
  const float* At(int64_t token) const {
    return Block(token)->data() + static_cast<size_t>(token % kBlockTokens) * row_;
  }
  // The same, to be changed here alone.
  float* Change(int64_t token) {
    BlockPtr& block = blocks_[static_cast<size_t>(token / kBlockTokens)];
    if (block.use_count() > 1) block = std::make_shared<std::vector<float>>(*block);
    return block->data() + static_cast<size_t>(token % kBlockTokens) * row_;
  }
  // Makes room for new rows, which are not set.
  void Grow(int64_t tokens) {
    tokens_ += tokens;
    while (static_cast<int64_t>(blocks_.size()) * kBlockTokens < tokens_)
      blocks_.push_back(std::make_shared<std::vector<float>>(static_cast<size_t>(kBlockTokens) * row_));
  }
  void Truncate(int64_t tokens) {
    tokens_ = std::min(tokens_, tokens);
    blocks_.resize(static_cast<size_t>((tokens_ + kBlockTokens - 1) / kBlockTokens));
  }
  // Rows of tokens [first, first + tokens).
  std::vector<float> Read(int64_t first, int64_t tokens) const {
    std::vector<float> rows;
    rows.reserve(static_cast<size_t>(tokens) * row_);
    for (int64_t begin = first, end; begin < first + tokens; begin = end) {
      end = BlockEnd(begin, first + tokens);
      rows.insert(rows.end(), At(begin), At(begin) + static_cast<size_t>(end - begin) * row_);
    }
    return rows;
  }
  std::vector<const float*> Blocks() const {
    std::vector<const float*> blocks;
    for (const BlockPtr& block : blocks_) blocks.push_back(block->data());
    return blocks;
  }
  // The first token behind the token's block, or `end`.
  static int64_t BlockEnd(int64_t token, int64_t end) {
    return std::min(end, (token / kBlockTokens + 1) * kBlockTokens);
  }

 private:
  using BlockPtr = std::shared_ptr<std::vector<float>>;
  const BlockPtr& Block(int64_t token) const { return blocks_[static_cast<size_t>(token / kBlockTokens)]; }

  size_t row_;
  int64_t tokens_ = 0;
  std::vector<BlockPtr> blocks_;
};

}  // namespace kvtide::testing
