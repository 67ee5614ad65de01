// The token ids of a sequence, as far as they are known: one hash for each full block, over the ids in it and
// the hash of the block before, so that a hash stands for all tokens up to the end of its block. XXH3 of 128
// bits, seeded with the hash of what the ids are unique in (prefix_index.h); equal in every process.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/tier/block_id.h"

namespace kvtide {

using TokenId = uint32_t;

class TokenChain {
 public:
  // Full blocks whose ids are kept, so that a cut inside of them goes on.
  static constexpr int64_t kKeptBlocks = 4;

  explicit TokenChain(uint64_t seed) : seed_(seed) {}
  // Of a sequence that begins with these full blocks.
  TokenChain(uint64_t seed, std::vector<BlockKey> keys);
  // The same, with the ids of what follows them.
  TokenChain(uint64_t seed, std::vector<BlockKey> keys, std::span<const TokenId> rest);

  // The hashes of the full blocks of `ids`, from the first one on.
  static std::vector<BlockKey> Keys(uint64_t seed, std::span<const TokenId> ids);

  int64_t tokens() const { return tokens_; }  // that are known, from the first one on
  int64_t blocks() const { return forgotten_ + static_cast<int64_t>(keys_.size()); }  // full ones
  // The hashes of blocks from forgotten() on; those before them are known elsewhere (Forget).
  const std::vector<BlockKey>& keys() const { return keys_; }
  int64_t forgotten() const { return forgotten_; }
  const BlockKey& key(int64_t block) const { return keys_[static_cast<size_t>(block - forgotten_)]; }
  // The known ids behind the last full block.
  std::span<const TokenId> rest() const;

  // InvalidArgument where ids contradict what is known of the same positions.
  absl::Status Check(int64_t start, std::span<const TokenId> ids) const;
  // Ids of the positions from `start` on. What begins behind the known ones is of no use and left out.
  void Add(int64_t start, std::span<const TokenId> ids);
  // The first `tokens` stay. After a cut inside of a block whose ids are not kept any more only the blocks
  // before it are known. `last`: the hash of the last full block that stays, if that was forgotten.
  void Cut(int64_t tokens, const BlockKey& last = {});
  // The hashes of the first `blocks` are kept elsewhere from now on; that of the last block stays here.
  void Forget(int64_t blocks);

 private:
  int64_t kept_from() const { return tokens_ - static_cast<int64_t>(kept_.size()); }

  uint64_t seed_;
  int64_t tokens_ = 0;
  int64_t forgotten_ = 0;  // blocks
  std::vector<BlockKey> keys_;
  std::vector<TokenId> kept_;  // the last ids; they begin at a block
};

}  // namespace kvtide
