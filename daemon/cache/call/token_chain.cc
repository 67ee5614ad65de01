#include "daemon/cache/call/token_chain.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/format/block_layout.h"

namespace kvtide {
namespace {

BlockKey Next(uint64_t seed, const std::vector<BlockKey>& keys, const TokenId* ids) {
  struct {
    BlockKey before;
    std::array<TokenId, kBlockTokens> ids;
  } text;
  static_assert(sizeof text == sizeof(BlockKey) + kBlockTokens * sizeof(TokenId));
  text.before = keys.empty() ? BlockKey{} : keys.back();
  std::memcpy(text.ids.data(), ids, sizeof text.ids);
  const XXH128_hash_t hash = XXH3_128bits_withSeed(&text, sizeof text, seed);
  return {hash.low64, hash.high64};
}

}  // namespace

TokenChain::TokenChain(uint64_t seed, std::vector<BlockKey> keys)
    : seed_(seed), tokens_(static_cast<int64_t>(keys.size()) * kBlockTokens), keys_(std::move(keys)) {}

TokenChain::TokenChain(uint64_t seed, std::vector<BlockKey> keys, std::span<const TokenId> rest)
    : TokenChain(seed, std::move(keys)) {
  Add(tokens_, rest);
}

std::vector<BlockKey> TokenChain::Keys(uint64_t seed, std::span<const TokenId> ids) {
  std::vector<BlockKey> keys;
  keys.reserve(ids.size() / kBlockTokens);
  for (size_t at = 0; at + kBlockTokens <= ids.size(); at += kBlockTokens)
    keys.push_back(Next(seed, keys, ids.data() + at));
  return keys;
}

std::span<const TokenId> TokenChain::rest() const {
  return std::span<const TokenId>(kept_).last(static_cast<size_t>(tokens_ % kBlockTokens));
}

absl::Status TokenChain::Check(int64_t start, std::span<const TokenId> ids) const {
  const int64_t from = std::max(start, kept_from());
  const int64_t to = std::min(start + static_cast<int64_t>(ids.size()), tokens_);
  for (int64_t at = from; at < to; at++) {
    const TokenId known = kept_[static_cast<size_t>(at - kept_from())],
                  id = ids[static_cast<size_t>(at - start)];
    if (known != id)
      return absl::InvalidArgumentError(absl::StrCat(
          "token ", at, " has the id ", id, ", but came with the id ", known, " in another layer or call"));
  }
  return absl::OkStatus();
}

void TokenChain::Add(int64_t start, std::span<const TokenId> ids) {
  if (start > tokens_ || start + static_cast<int64_t>(ids.size()) <= tokens_) return;
  ids = ids.subspan(static_cast<size_t>(tokens_ - start));
  kept_.insert(kept_.end(), ids.begin(), ids.end());
  tokens_ += static_cast<int64_t>(ids.size());
  while (blocks() < tokens_ / kBlockTokens)
    keys_.push_back(
        Next(seed_, keys_,
             kept_.data() + (blocks() * kBlockTokens - (tokens_ - static_cast<int64_t>(kept_.size())))));
  const int64_t keep_from = std::max<int64_t>(0, blocks() - kKeptBlocks) * kBlockTokens;
  // Not with every token: to move the rest costs as much as it does.
  if (keep_from >= kept_from() + kKeptBlocks * kBlockTokens)
    kept_.erase(kept_.begin(), kept_.begin() + (keep_from - kept_from()));
  // A long prompt that came at once does not leave its room behind.
  if (kept_.capacity() > 4 * kKeptBlocks * kBlockTokens) kept_.shrink_to_fit();
}

void TokenChain::Cut(int64_t tokens, const BlockKey& last) {
  if (tokens >= tokens_) return;
  const int64_t from = kept_from();
  if (tokens >= from) {
    kept_.resize(static_cast<size_t>(tokens - from));
    tokens_ = tokens;
  } else {
    kept_.clear();
    tokens_ = tokens / kBlockTokens * kBlockTokens;
  }
  const int64_t blocks = tokens_ / kBlockTokens;
  if (blocks > forgotten_ || blocks == 0) {
    forgotten_ = std::min(forgotten_, blocks);
    keys_.resize(static_cast<size_t>(blocks - forgotten_));
  } else {
    forgotten_ = blocks - 1;
    keys_.assign(1, last);
  }
}

void TokenChain::Forget(int64_t blocks) {
  const int64_t from = std::min(blocks, this->blocks() - 1);
  if (from <= forgotten_) return;
  keys_.erase(keys_.begin(), keys_.begin() + (from - forgotten_));
  forgotten_ = from;
  if (keys_.capacity() > 2 * keys_.size() + kKeptBlocks) keys_.shrink_to_fit();
}

}  // namespace kvtide
