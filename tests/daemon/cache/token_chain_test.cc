// Hashes of token ids: one for each full block, over everything before it; the same however the ids came;
// cuts go on where the ids are still known, and end the chain where they are not.
#include "daemon/cache/call/token_chain.h"

#include <random>

#include "gtest/gtest.h"
#include "kernels/format/page_order.h"

namespace kvtide {
namespace {

std::vector<TokenId> Ids(uint32_t seed, size_t count) {
  std::mt19937 random(seed);
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = random();
  return ids;
}

TEST(TokenChain, AHashStandsForAllTokensUpToItsBlock) {
  const std::vector<TokenId> ids = Ids(1, 640);
  const std::vector<BlockKey> keys = TokenChain::Keys(5, ids);
  ASSERT_EQ(keys.size(), 10u);
  EXPECT_EQ(TokenChain::Keys(5, std::span(ids).first(639)).size(), 9u);
  for (const size_t changed : {size_t{0}, size_t{63}, size_t{64}, size_t{639}}) {
    std::vector<TokenId> others = ids;
    others[changed]++;
    const std::vector<BlockKey> other = TokenChain::Keys(5, others);
    for (size_t b = 0; b < keys.size(); b++) EXPECT_EQ(other[b] == keys[b], b < changed / kBlockTokens) << b;
  }
  const std::vector<BlockKey> elsewhere = TokenChain::Keys(6, ids);
  for (size_t b = 0; b < keys.size(); b++) EXPECT_FALSE(elsewhere[b] == keys[b]);
}

// What is on disks and between processes: a change of the method has to be seen.
TEST(TokenChain, TheHashOfTheseTokensIsThis) {
  std::vector<TokenId> ids(64);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<TokenId>(i);
  const BlockKey key = TokenChain::Keys(42, ids).front();
  EXPECT_EQ(key.low, 0x3107cfc997dda485u);
  EXPECT_EQ(key.high, 0x5a52cd4bbfe4353bu);
}

TEST(TokenChain, ItDoesNotMatterHowIdsCome) {
  std::mt19937 random(3);
  for (int round = 0; round < 100; round++) {
    const std::vector<TokenId> ids = Ids(random(), random() % 1500);
    TokenChain chain(9);
    size_t at = 0;
    while (at < ids.size()) {
      const size_t count = std::min<size_t>(ids.size() - at, 1 + random() % 200);
      // Some come again, as with every layer of a model.
      const size_t again = std::min<size_t>(at, random() % 3 == 0 ? random() % 100 : 0);
      const std::span<const TokenId> part = std::span(ids).subspan(at - again, count + again);
      ASSERT_TRUE(chain.Check(static_cast<int64_t>(at - again), part).ok());
      chain.Add(static_cast<int64_t>(at - again), part);
      at += count;
      ASSERT_EQ(chain.tokens(), static_cast<int64_t>(at));
    }
    EXPECT_EQ(chain.keys(), TokenChain::Keys(9, ids));
    ASSERT_EQ(chain.rest().size(), ids.size() % kBlockTokens);
    EXPECT_TRUE(std::equal(chain.rest().begin(), chain.rest().end(),
                           ids.end() - static_cast<ptrdiff_t>(chain.rest().size())));
    // As a restart has it.
    TokenChain copy(9, chain.keys(), chain.rest());
    const std::vector<TokenId> more = Ids(7, 100);
    copy.Add(copy.tokens(), more);
    chain.Add(chain.tokens(), more);
    EXPECT_EQ(copy.keys(), chain.keys());
  }
}

TEST(TokenChain, WhatBeginsBehindTheKnownIdsIsLeftOut) {
  const std::vector<TokenId> ids = Ids(1, 300);
  TokenChain chain(1);
  chain.Add(64, ids);
  EXPECT_EQ(chain.tokens(), 0);
  chain.Add(0, std::span(ids).first(100));
  chain.Add(101, ids);
  EXPECT_EQ(chain.tokens(), 100);
}

TEST(TokenChain, OtherIdsAtAKnownPositionAreAnError) {
  const std::vector<TokenId> ids = Ids(1, 100);
  TokenChain chain(1);
  chain.Add(0, ids);
  std::vector<TokenId> others = ids;
  others[70]++;
  EXPECT_EQ(chain.Check(0, others).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(chain.Check(71, std::span(others).subspan(71)).ok());
  EXPECT_TRUE(chain.Check(100, others).ok());
}

TEST(TokenChain, CutsGoOnWhereTheIdsAreKnown) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; round++) {
    std::vector<TokenId> ids = Ids(random(), 1 + random() % 1200);
    TokenChain chain(2);
    chain.Add(0, ids);
    const size_t cut = random() % (ids.size() + 1);
    chain.Cut(static_cast<int64_t>(cut));
    ids.resize(cut);
    const bool known = chain.tokens() == static_cast<int64_t>(cut);
    if (!known) {
      EXPECT_EQ(chain.tokens(), static_cast<int64_t>(cut) / kBlockTokens * kBlockTokens);
    }
    EXPECT_EQ(chain.keys(), TokenChain::Keys(2, ids));
    const std::vector<TokenId> more = Ids(random(), 200);
    chain.Add(static_cast<int64_t>(cut), more);
    ids.insert(ids.end(), more.begin(), more.end());
    if (known) {
      EXPECT_EQ(chain.keys(), TokenChain::Keys(2, ids));
    } else {
      EXPECT_EQ(chain.blocks(), static_cast<int64_t>(cut) / kBlockTokens);
    }
  }
  // One that forgets hashes goes on in the same way.
  for (int round = 0; round < 300; round++) {
    std::vector<TokenId> ids = Ids(random(), 1 + random() % 1200);
    TokenChain whole(2), brief(2);
    whole.Add(0, ids);
    brief.Add(0, ids);
    brief.Forget(static_cast<int64_t>(random() % 25));
    EXPECT_EQ(brief.blocks(), whole.blocks());
    if (random() % 2 == 0) {
      const auto cut = static_cast<int64_t>(random() % (ids.size() + 1));
      const int64_t blocks = cut / kBlockTokens;
      brief.Cut(cut, blocks > 0 ? whole.key(blocks - 1) : BlockKey{});
      whole.Cut(cut);
    }
    const std::vector<TokenId> more = Ids(random(), 300);
    whole.Add(whole.tokens(), more);
    brief.Add(brief.tokens(), more);
    ASSERT_EQ(brief.tokens(), whole.tokens());
    ASSERT_EQ(brief.blocks(), whole.blocks());
    for (int64_t block = brief.forgotten(); block < brief.blocks(); block++)
      EXPECT_EQ(brief.key(block), whole.key(block)) << block;
    brief.Forget(brief.blocks());
    EXPECT_EQ(brief.forgotten(), std::max<int64_t>(0, brief.blocks() - 1));
  }
  // The last blocks are always known.
  TokenChain chain(2);
  const std::vector<TokenId> ids = Ids(1, 10'000);
  for (size_t at = 0; at < ids.size(); at += 10)
    chain.Add(static_cast<int64_t>(at), std::span(ids).subspan(at, 10));
  chain.Cut(10'000 - TokenChain::kKeptBlocks * kBlockTokens + 5);
  EXPECT_EQ(chain.tokens(), 10'000 - TokenChain::kKeptBlocks * kBlockTokens + 5);
}

}  // namespace
}  // namespace kvtide
