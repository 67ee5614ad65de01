// What the cache tells of calls: every verb once, with its keys in the order of their tokens.
#include <string>
#include <vector>

#include "tests/daemon/cache/token_client.h"

namespace kvtide::testing {
namespace {

class Listener : public TraceSink {
 public:
  void Record(const TraceEvent& event) override {
    events.push_back(event);
    keys.emplace_back(event.keys.begin(), event.keys.end());
  }
  // The verbs since the last time.
  std::vector<TraceVerb> Take() {
    std::vector<TraceVerb> verbs;
    for (; seen < events.size(); seen++) verbs.push_back(events[seen].verb);
    return verbs;
  }
  std::vector<TraceEvent> events;
  std::vector<std::vector<BlockKey>> keys;
  size_t seen = 0;
};

class TraceEventsTest : public CacheTest {
 protected:
  TraceEventsTest() { options_.trace = &listener_; }
  void TearDown() override {
    if (cache_ != nullptr) {
      for (const NamespaceInfo& space : cache_->ListNamespaces())
        EXPECT_TRUE(cache_->DeleteNamespace(space.id).ok());
      for (const std::string& model : cache_->ModelNames()) EXPECT_TRUE(cache_->UnregisterModel(model).ok());
    }
    CacheTest::TearDown();
  }
  Listener listener_;
};

using Verbs = std::vector<TraceVerb>;

TEST_F(TraceEventsTest, OfTheBlockStore) {
  Start();
  NamespaceSpec spec;
  spec.model = "test";
  spec.block_tokens = 16;
  spec.opaque = OpaqueContent{1000, "test"};
  const NamespaceId space = cache_->OpenNamespace(spec, Persistence::kNone)->id;
  const std::vector<std::string_view> names = {"a", "b", "c"}, more = {"a", "b", "c", "d"};
  std::vector<std::byte> payload(4000);
  StoreCall store;
  store.name_space = space;
  store.keys = names;
  store.form = BlockPayload::kBytes;
  store.payload = std::span(payload).first(3000);
  ASSERT_TRUE(cache_->StoreBlocks(store).ok());
  EXPECT_EQ(listener_.Take(), Verbs{TraceVerb::kStore});
  EXPECT_EQ(listener_.events[0].block_tokens, 16u);
  EXPECT_EQ(listener_.events[0].block_bytes, 1000u);
  EXPECT_EQ(listener_.events[0].time, options_.clock());
  LookupCall lookup;
  lookup.name_space = space;
  lookup.keys = more;
  lookup.lease = absl::Seconds(5);
  lookup.peek = true;
  ASSERT_TRUE(cache_->LookupBlocks(lookup).ok());
  EXPECT_EQ(listener_.Take(), Verbs{}) << "a peek is no use";
  lookup.peek = false;
  const absl::StatusOr<LookupReport> found = cache_->LookupBlocks(lookup);
  ASSERT_TRUE(found.ok()) << found.status();
  LoadCall load;
  load.lease = found->lease;
  load.first = 1;
  load.blocks = 2;
  load.form = BlockPayload::kBytes;
  load.payload = std::span(payload).first(2000);
  ASSERT_TRUE(cache_->LoadBlocks(load).ok());
  EXPECT_EQ(listener_.Take(), (Verbs{TraceVerb::kLookup, TraceVerb::kLoad}));
  EXPECT_EQ(listener_.events[1].there, 3u);
  ASSERT_EQ(listener_.keys[1].size(), 4u);
  EXPECT_EQ(std::vector(listener_.keys[1].begin(), listener_.keys[1].begin() + 3), listener_.keys[0]);
  EXPECT_EQ(listener_.keys[2], std::vector(listener_.keys[0].begin() + 1, listener_.keys[0].end()));
  for (const TraceEvent& event : listener_.events) EXPECT_EQ(event.name_space, space);
  EXPECT_TRUE(cache_->ReleaseLease(found->lease));
}

TEST_F(TraceEventsTest, OfPrefixes) {
  Start();
  const SequenceOptions options = WithPair("q8_0/turbo4");  // the first block and the last two are exact
  const Tokens tokens = SomeTokens(1, 64 * 6);
  TokenClient first(*cache_, SmallModel(), options);
  ASSERT_TRUE(first.Append(tokens).ok());
  ASSERT_TRUE(first.Append(SomeTokens(2, 64)).ok());
  EXPECT_EQ(listener_.Take(), (Verbs{TraceVerb::kSeal, TraceVerb::kSeal}));
  EXPECT_EQ(listener_.keys[0].size(), 4u);
  EXPECT_EQ(listener_.keys[1].size(), 1u);
  EXPECT_EQ(listener_.events[0].block_tokens, 64u);
  EXPECT_GT(listener_.events[0].block_bytes, 0u);
  ASSERT_TRUE(first.Close().ok());
  TokenClient second(*cache_, SmallModel(), options);
  ASSERT_EQ(*second.Begin(tokens + SomeTokens(3, 70)), 64 * 5) << "what the first one has sealed of them";
  const Verbs verbs = listener_.Take();
  ASSERT_GE(verbs.size(), 2u);
  EXPECT_EQ(verbs[0], TraceVerb::kLookup);
  EXPECT_EQ(verbs[1], TraceVerb::kBegin);
  EXPECT_EQ(listener_.events[2].there, 5u);
  EXPECT_EQ(listener_.keys[2].size(), 7u);
  EXPECT_EQ(std::vector(listener_.keys[2].begin(), listener_.keys[2].begin() + 4), listener_.keys[0]);
  EXPECT_EQ(listener_.keys[3].size(), 5u);
  for (const TraceEvent& event : listener_.events)
    EXPECT_EQ(event.name_space, listener_.events[0].name_space);
  ASSERT_TRUE(second.Close().ok());
}

}  // namespace
}  // namespace kvtide::testing
