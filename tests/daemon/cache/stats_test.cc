// The numbers that operators see: they add up, follow what happens, and return to zero.
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using StatsTest = CacheTest;

TEST_F(StatsTest, BytesAddUpByTierAndPairAndBitsPerValueAreTheTrueOnes) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(128).ok());
  const BlockLayout coded({2, 2, 64, 64}, Pair("turbo4"));
  CacheStats stats = cache_->Stats();
  EXPECT_EQ(stats.tokens, 128u);
  EXPECT_EQ(stats.appended_tokens, 128u);
  EXPECT_EQ(stats.sealed_blocks, 2u);
  EXPECT_EQ(stats.stored_bytes, 2 * coded.block_bytes());
  EXPECT_EQ(stats.f16_equivalent_bytes, 2 * 65536u);
  EXPECT_DOUBLE_EQ(stats.bits_per_value, coded.BitsPerValue());
  EXPECT_EQ(stats.tiers[0].pairs.at("turbo4/turbo4").blocks, 2u);

  ASSERT_TRUE(client.Append(10).ok());
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 1).ok());
  stats = cache_->Stats();
  EXPECT_EQ(stats.tiers[0].pairs.size(), 0u);
  EXPECT_EQ(stats.tiers[1].pairs.at("f16/f16").bytes, 65536u);
  for (const TierStats& tier : stats.tiers) {
    uint64_t bytes = 0, blocks = 0;
    for (const auto& [name, pair] : tier.pairs) {
      bytes += pair.bytes;
      blocks += pair.blocks;
    }
    EXPECT_EQ(bytes, tier.used_bytes);
    EXPECT_EQ(blocks, tier.blocks);
    EXPECT_EQ(tier.used_bytes + tier.free_bytes, tier.capacity_bytes);
    EXPECT_LE(tier.largest_free_extent_bytes, tier.free_bytes);
    EXPECT_EQ(tier.pinned_blocks, 0u);
  }
  EXPECT_EQ(stats.stored_bytes, UsedBytes(stats));
  EXPECT_EQ(stats.moves, 3u);
  EXPECT_EQ(stats.evict_calls, 1u);

  ASSERT_TRUE(client.Close().ok());
  stats = cache_->Stats();
  EXPECT_EQ(stats.sequences, 0u);
  EXPECT_EQ(stats.tokens, 0u);
  EXPECT_EQ(stats.stored_bytes, 0u);
  EXPECT_EQ(stats.bits_per_value, 0.0);
  EXPECT_EQ(stats.sequences_created, 1u);
  EXPECT_EQ(stats.sequences_closed, 1u);
  EXPECT_EQ(stats.tiers[1].largest_free_extent_bytes, stats.tiers[1].capacity_bytes);
}

TEST_F(StatsTest, WhatLeftTheWindowOrWasDroppedIsNotCountedAsHeld) {
  Start();
  SequenceOptions options = WithPair("f16");
  options.allow_drop = true;
  Client client(*cache_, MixedModel(), options, random_);
  ASSERT_TRUE(client.Step(300).ok());
  // One full layer of 300 tokens x (128 + 64) values; two sliding layers of 2 x (64 + 64) from token 192 on.
  EXPECT_EQ(cache_->Stats().f16_equivalent_bytes, 2u * (300 * 192 + 108 * 512));
  ASSERT_TRUE(cache_->Evict({{client.id()}}, kDropTier).ok());
  EXPECT_EQ(cache_->Stats().f16_equivalent_bytes, 0u);
  EXPECT_EQ(cache_->Stats().stored_bytes, 0u);
  EXPECT_EQ(client.info().dropped_blocks, 5u + 2u);
}

TEST_F(StatsTest, ListsGoOnFromAnIdAndMayBeOfOneModel) {
  Start();
  std::vector<Client> clients;
  for (int i = 0; i < 7; i++)
    clients.emplace_back(*cache_, i % 2 == 0 ? SmallModel() : MixedModel(), WithPair("f16"), random_);
  std::vector<SequenceId> seen;
  SequenceList list;
  list.limit = 3;
  for (int page = 0; page < 3; page++) {
    const std::vector<SequenceInfo> infos = cache_->ListSequences(list);
    EXPECT_EQ(infos.size(), page < 2 ? 3u : 1u);
    for (const SequenceInfo& info : infos) seen.push_back(info.id);
    list.after = seen.back();
  }
  EXPECT_TRUE(cache_->ListSequences(list).empty());
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
  EXPECT_EQ(seen.size(), 7u);
  SequenceList small;
  small.model = "small";
  EXPECT_EQ(cache_->ListSequences(small).size(), 4u);
  EXPECT_EQ(cache_->ModelNames(), (std::vector<std::string>{"small", "mixed"}));
}

TEST_F(StatsTest, ListsSayWhatASequenceIs) {
  Start();
  SequenceOptions options = WithPair("q8_0/turbo4", {2, 1});
  options.name_space = "tenant-a";
  Client client(*cache_, SmallModel(), options, random_);
  clock_.Advance(absl::Seconds(3));
  ASSERT_TRUE(client.Append(70).ok());
  Client fork = client.Fork();
  ASSERT_EQ(cache_->ListSequences().size(), 2u);
  const SequenceInfo info = fork.info();
  EXPECT_EQ(info.model_name, "small");
  EXPECT_EQ(info.options.name_space, "tenant-a");
  EXPECT_EQ(info.options.pair, Pair("q8_0/turbo4"));
  EXPECT_EQ(info.forked_from, client.id());
  EXPECT_EQ(info.tokens, 70);
  EXPECT_EQ(info.shared_blocks, 2u);
  EXPECT_EQ(client.info().last_used - client.info().created, absl::Seconds(3));
  EXPECT_EQ(cache_->GetSequence(5).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(cache_->LayerLength(fork.id(), 2).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::testing
