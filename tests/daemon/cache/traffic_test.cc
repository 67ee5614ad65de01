// What a watcher of the traffic is shown: rows of every call that went well, at their positions, of the
// model's own tenant, and nothing else.
#include "daemon/cache/call/traffic.h"

#include <map>

#include "daemon/cache/stepper.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

class Recorder : public TrafficWatcher {
 public:
  struct Seen {
    ModelId family;
    int layer;
    int64_t key_position, keys, query_position, queries;
    float first_key, first_query;
  };
  bool active() const override { return active_; }
  int64_t Wants(ModelId, int, absl::Duration took) override {
    asked++;
    EXPECT_GE(took, absl::ZeroDuration());
    return wanted;
  }
  void See(ModelId family, int layer, std::span<const TrafficRows> rows, int64_t tokens) override {
    EXPECT_EQ(tokens, wanted);
    for (const TrafficRows& one : rows)
      seen.push_back({family, layer, one.key_position, one.keys, one.query_position, one.queries,
                      one.keys > 0 ? one.k.At(0) : 0, one.queries > 0 ? one.q.At(0) : 0});
  }
  bool active_ = true;
  int64_t wanted = 3;
  int asked = 0;
  std::vector<Seen> seen;
};

class TrafficTest : public CacheTest {
 protected:
  void Start() {
    options_.traffic = &recorder_;
    CacheTest::Start();
  }
  Recorder recorder_;
};

TEST_F(TrafficTest, EveryWayToBringRowsIsSeen) {
  Start();
  const ModelSpec model = SmallModel();
  const ModelId id = Register(model);
  const SequenceId sequence = cache_->CreateSequence(id, WithPair("turbo4")).value();
  // Append: keys of each layer.
  const NewRows first(model, 0, 70, random_), second(model, 1, 70, random_);
  const LayerKv layers[] = {first.Kv(), second.Kv()};
  ASSERT_TRUE(cache_->Append({.sequence = sequence, .tokens = 70, .layers = layers}).ok());
  ASSERT_EQ(recorder_.seen.size(), 2u);
  EXPECT_EQ(recorder_.seen[1].family, id);
  EXPECT_EQ(recorder_.seen[1].layer, 1);
  EXPECT_EQ(recorder_.seen[1].key_position, 0);
  EXPECT_EQ(recorder_.seen[1].keys, 70);
  EXPECT_EQ(recorder_.seen[1].queries, 0);
  EXPECT_EQ(recorder_.seen[1].first_key, second.k[0]);
  // Attend: queries.
  LayerCall attend(model, 1, sequence, 2, 68, random_);
  ASSERT_TRUE(cache_->Attend(attend.call()).ok());
  ASSERT_EQ(recorder_.seen.size(), 3u);
  EXPECT_EQ(recorder_.seen[2].keys, 0);
  EXPECT_EQ(recorder_.seen[2].query_position, 68);
  EXPECT_EQ(recorder_.seen[2].queries, 2);
  EXPECT_EQ(recorder_.seen[2].first_query, attend.q[0]);
  // AppendAttend: both.
  for (int layer = 0; layer < 2; layer++) {
    LayerCall both(model, layer, sequence, 5, 70, random_);
    const NewRows rows(model, layer, 5, random_);
    both.Append(rows);
    ASSERT_TRUE(cache_->AppendAttend(both.call()).ok());
    EXPECT_EQ(recorder_.seen.back().layer, layer);
    EXPECT_EQ(recorder_.seen.back().key_position, 70);
    EXPECT_EQ(recorder_.seen.back().keys, 5);
    EXPECT_EQ(recorder_.seen.back().first_key, rows.k[0]);
    EXPECT_EQ(recorder_.seen.back().first_query, both.q[0]);
  }
  // A layer of a step.
  const StepItem item{sequence, 1, {}};
  auto step = cache_->BeginStep({.items = {&item, 1}});
  ASSERT_TRUE(step.ok());
  for (int layer = 0; layer < 2; layer++) {
    LayerCall both(model, layer, sequence, 1, 75, random_);
    const NewRows rows(model, layer, 1, random_);
    both.Append(rows);
    ASSERT_TRUE(cache_->AttendStepLayer(**step, both.call()).ok());
    EXPECT_EQ(recorder_.seen.back().key_position, 75);
    EXPECT_EQ(recorder_.seen.back().first_key, rows.k[0]);
  }
  ASSERT_TRUE(cache_->EndStep(*std::move(step)).ok());
  EXPECT_EQ(recorder_.seen.size(), 7u);
  // Queries over a pinned step.
  auto pinned = cache_->PinStep({.sequences = {&sequence, 1}});
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  LayerCall over(model, 1, sequence, 1, 75, random_);
  ASSERT_TRUE(cache_->AttendPinned(**pinned, over.call()).ok());
  ASSERT_EQ(recorder_.seen.size(), 8u);
  EXPECT_EQ(recorder_.seen.back().keys, 0);
  EXPECT_EQ(recorder_.seen.back().first_query, over.q[0]);
}

TEST_F(TrafficTest, NothingElseIs) {
  Start();
  const ModelSpec model = SmallModel();
  const ModelId id = Register(model);
  Client client(*cache_, model, WithPair("turbo4"), random_);
  ASSERT_TRUE(client.Step(10).ok());
  recorder_.seen.clear();
  // A call that fails.
  LayerCall bad(model, 0, client.id(), 1, 10, random_);
  NewRows rows(model, 0, 1, random_);
  rows.k[3] = NAN;
  bad.Append(rows);
  EXPECT_FALSE(cache_->AppendAttend(bad.call()).ok());
  NewRows later(model, 0, 1, random_);
  const LayerKv layers[] = {later.Kv()};
  EXPECT_FALSE(
      cache_->Append({.sequence = client.id(), .start_position = 99, .tokens = 1, .layers = layers}).ok());
  EXPECT_TRUE(recorder_.seen.empty());
  // A sequence that an admin has made of its model for another tenant.
  SequenceOptions other = WithPair("turbo4");
  other.name_space = "acme";
  const SequenceId foreign = cache_->CreateSequence(id, other).value();
  LayerCall call(model, 0, foreign, 1, 0, random_);
  call.Append(rows = NewRows(model, 0, 1, random_));
  ASSERT_TRUE(cache_->AppendAttend(call.call()).ok());
  EXPECT_TRUE(recorder_.seen.empty());
  // Nobody watches, or nothing is wanted.
  recorder_.asked = 0;
  recorder_.wanted = 0;
  ASSERT_TRUE(client.Step(1).ok());
  EXPECT_EQ(recorder_.asked, 2);
  recorder_.active_ = false;
  ASSERT_TRUE(client.Step(1).ok());
  EXPECT_EQ(recorder_.asked, 2);
  EXPECT_TRUE(recorder_.seen.empty());
}

}  // namespace
}  // namespace kvtide::testing
