// Priorities of sequences: who makes way first among a tenant's own blocks, and who comes up first.
#include "daemon/cache/tier/priority.h"

#include <utility>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using PriorityCacheTest = CacheTest;
constexpr size_t kBlock = 65536;  // an f16 block of SmallModel

SequenceOptions Of(Priority priority) {
  SequenceOptions options = WithPair("f16");
  options.priority = priority;
  return options;
}

TEST(PriorityTest, NamesAreStandardWords) {
  for (const Priority priority : kAllPriorities) EXPECT_EQ(*ParsePriority(NameOf(priority)), priority);
  EXPECT_EQ(ParsePriority("urgent").status().message(),
            "priority \"urgent\" is unknown; use low, normal or high");
}

TEST(PriorityTest, HigherOnesComeFirstInTheirTenantsPlaces) {
  using Item = std::pair<char, Priority>;  // tenant
  std::vector<Item> items = {{'a', Priority::kLow},    {'b', Priority::kNormal}, {'a', Priority::kHigh},
                             {'b', Priority::kNormal}, {'a', Priority::kHigh},   {'b', Priority::kHigh}};
  HigherFirst(
      std::span(items), [](const Item& item) { return item.first; },
      [](const Item& item) { return item.second; });
  EXPECT_EQ(items, (std::vector<Item>{{'a', Priority::kHigh},
                                      {'b', Priority::kHigh},
                                      {'a', Priority::kHigh},
                                      {'b', Priority::kNormal},
                                      {'a', Priority::kLow},
                                      {'b', Priority::kNormal}}));
}

TEST_F(PriorityCacheTest, UnderPressureLowerPrioritiesGoFirst) {
  Start(12 * kBlock, 40 * kBlock);
  Client high(*cache_, SmallModel(), Of(Priority::kHigh), random_),
      normal(*cache_, SmallModel(), Of(Priority::kNormal), random_),
      low(*cache_, SmallModel(), Of(Priority::kLow), random_);
  for (Client* client : {&high, &normal, &low}) ASSERT_TRUE(client->Append(4 * 64).ok());
  EXPECT_EQ(cache_->Stats().tiers[0].high_priority_blocks, 4u);
  EXPECT_EQ(cache_->Stats().tiers[0].low_priority_blocks, 4u);
  Client next(*cache_, SmallModel(), Of(Priority::kNormal), random_);
  ASSERT_TRUE(next.Append(3 * 64).ok());
  EXPECT_EQ(low.info().blocks_by_tier[1], 3u) << "it was used last";
  EXPECT_EQ(normal.info().blocks_by_tier[1], 0u);
  ASSERT_TRUE(next.Append(3 * 64).ok());
  EXPECT_EQ(low.info().blocks_by_tier[1], 4u);
  EXPECT_EQ(normal.info().blocks_by_tier[1], 2u);
  EXPECT_EQ(high.info().blocks_by_tier[1], 0u) << "the oldest of all";
  // Another one from now on.
  ASSERT_TRUE(cache_->SetPriority({{high.id()}}, Priority::kLow).ok());
  ASSERT_TRUE(cache_->SetPriority({{normal.id()}}, Priority::kHigh).ok());
  EXPECT_EQ(high.info().options.priority, Priority::kLow);
  ASSERT_TRUE(next.Append(64).ok());
  EXPECT_EQ(high.info().blocks_by_tier[1], 1u);
  EXPECT_EQ(normal.info().blocks_by_tier[1], 2u);
  for (Client* client : {&high, &normal, &low, &next}) client->CheckAllLayers();
  cache_->CheckInvariants();
  IsError(cache_->SetPriority({{high.id(), SequenceId{12345}}}, Priority::kHigh), absl::StatusCode::kNotFound,
          "sequence 12345");
  EXPECT_EQ(high.info().options.priority, Priority::kLow) << "all of them or none";
}

TEST_F(PriorityCacheTest, SharedBlocksGoByTheHighest) {
  Start(12 * kBlock, 40 * kBlock);
  Client parent(*cache_, SmallModel(), Of(Priority::kLow), random_);
  ASSERT_TRUE(parent.Append(4 * 64).ok());
  Client fork = parent.Fork();
  EXPECT_EQ(fork.info().options.priority, Priority::kLow) << "it is inherited";
  Client other(*cache_, SmallModel(), Of(Priority::kNormal), random_);
  ASSERT_TRUE(other.Append(4 * 64).ok());
  ASSERT_TRUE(cache_->SetPriority({{fork.id()}}, Priority::kHigh).ok());
  Client next(*cache_, SmallModel(), Of(Priority::kNormal), random_);
  ASSERT_TRUE(next.Append(6 * 64).ok());
  EXPECT_EQ(parent.info().blocks_by_tier[1], 0u);
  EXPECT_EQ(other.info().blocks_by_tier[1], 2u);
  // Nobody has them as high any more.
  ASSERT_TRUE(cache_->SetPriority({{fork.id()}}, Priority::kNormal).ok());
  ASSERT_TRUE(cache_->SetPriority({{other.id(), next.id()}}, Priority::kHigh).ok());
  ASSERT_TRUE(next.Append(64).ok());
  EXPECT_EQ(parent.info().blocks_by_tier[1], 1u);
  cache_->CheckInvariants();
}

TEST_F(PriorityCacheTest, HigherPrioritiesComeUpFirst) {
  options_.limits.promote_below = 0.5;
  Start(8 * kBlock, 40 * kBlock);
  Client low(*cache_, SmallModel(), Of(Priority::kLow), random_),
      high(*cache_, SmallModel(), Of(Priority::kHigh), random_);
  for (Client* client : {&low, &high}) {
    ASSERT_TRUE(client->Append(4 * 64).ok());
    ASSERT_TRUE(cache_->Evict({{client->id()}}, 1).ok());
  }
  for (Client* client : {&low, &high}) ASSERT_TRUE(client->CheckAttention(0).ok());
  cache_->RunMovesOnce();
  EXPECT_EQ(high.info().blocks_by_tier[0], 4u);
  EXPECT_EQ(low.info().blocks_by_tier[0], 0u) << "no room is left for it";
}

// Who calls everything important takes nothing from others by it.
TEST_F(PriorityCacheTest, ATenantsPrioritiesCountAmongItsOwnBlocks) {
  Start(12 * kBlock, 40 * kBlock);
  const Identity acme_identity{"acme", false}, other_identity{"other", false};
  CallContext acme, other;
  acme.identity = &acme_identity;
  other.identity = &other_identity;
  const auto make = [&](const CallContext& context, Priority priority, int64_t blocks) {
    const ModelId model = cache_->RegisterModel(SmallModel(), context).value();
    const SequenceId id = cache_->CreateSequence(model, Of(priority), context).value();
    std::vector<NewRows> rows;
    std::vector<LayerKv> layers;
    for (int layer = 0; layer < 2; layer++) rows.emplace_back(SmallModel(), layer, blocks * 64, random_);
    for (const NewRows& row : rows) layers.push_back(row.Kv());
    AppendCall call;
    call.sequence = id;
    call.tokens = blocks * 64;
    call.layers = layers;
    call.context = &context;
    EXPECT_TRUE(cache_->Append(call).ok());
    return id;
  };
  const auto parked = [&](SequenceId id, const CallContext& context) {
    return cache_->GetSequence(id, context)->blocks_by_tier[1];
  };
  const SequenceId precious = make(acme, Priority::kHigh, 3), theirs = make(other, Priority::kNormal, 3),
                   spare = make(acme, Priority::kLow, 3), more = make(other, Priority::kNormal, 3);
  // Acme's are the oldest, so it is its turn: the first ones to go are its least important ones.
  make(other, Priority::kHigh, 3);
  EXPECT_EQ(parked(spare, acme), 3u);
  EXPECT_EQ(parked(theirs, other) + parked(more, other) + parked(precious, acme), 0u);
  // That turn is over: the next one is the other tenant's, then acme's, whatever it calls them.
  make(acme, Priority::kHigh, 3);
  EXPECT_EQ(parked(theirs, other), 3u);
  make(acme, Priority::kHigh, 3);
  EXPECT_EQ(parked(precious, acme), 3u);
  EXPECT_EQ(parked(more, other), 0u);
  cache_->CheckInvariants();
}

}  // namespace
}  // namespace kvtide::testing
