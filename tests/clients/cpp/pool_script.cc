#include "tests/clients/cpp/pool_script.h"

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "gtest/gtest.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

using client::TensorRef;

constexpr char kConfig[] =
    R"({"device": "cpu", "device_memory": "24MiB", "host_memory": "48MiB", "compute_threads": 1})";

// The model as the cache knows it, for the shadow.
ModelSpec Spec(const client::Model& model) {
  ModelSpec spec;
  spec.name = model.name;
  for (const client::ModelLayer& layer : model.layers) {
    LayerGroupSpec group;
    group.shape = {0, layer.kv_heads, layer.head_dim_k, layer.head_dim_v};
    group.window = layer.window;
    group.heads = layer.query_heads;
    int found = -1;
    for (size_t g = 0; g < spec.groups.size(); g++) {
      LayerGroupSpec other = spec.groups[g];
      other.shape.layers = 0;
      if (other == group) found = static_cast<int>(g);
    }
    if (found < 0) {
      found = static_cast<int>(spec.groups.size());
      spec.groups.push_back(group);
    }
    spec.layers.push_back({found, spec.groups[static_cast<size_t>(found)].shape.layers++});
  }
  return spec;
}

class Script {
 public:
  Script(Pool& pool, const ScriptOptions& options)
      : pool_(pool),
        options_(options),
        random_(options.seed),
        model_(MixedModel("script")),
        spec_(Spec(model_)) {
    Expect(pool.RegisterModel(model_));
  }
  ~Script() {
    if (pinned_) Expect(pool_.EndStep(pinned_->step.id));
    for (const Item& item : items_) Expect(pool_.CloseSequence(item.id));
  }

  void Run() {
    if (::testing::Test::HasFatalFailure()) return;
    const int verb = Pick(options_.moves ? 14 : 12);
    if (items_.empty() || (verb == 0 && items_.size() < 4)) return Create();
    Item& item = items_[static_cast<size_t>(Pick(static_cast<int>(items_.size())))];
    switch (verb) {
      case 0:
      case 1:
      case 2:
      case 3:
        return Engine(item, Pick(4) == 0 ? 1 + Pick(150) : 1 + Pick(3));
      case 4:
        return Append(item, 1 + Pick(100));
      case 5:
      case 6:
        return Attend(item, 1 + Pick(3));
      case 7:
        return Read(item);
      case 8:
        if (items_.size() < 4) return Fork(item);
        return Close(item);
      case 9:
        return Truncate(item);
      case 10:
      case 11:
        if (!options_.steps) return Engine(item, 1);
        if (pinned_ || Pick(4) == 0) return PinOrAttendPinned();
        return Steps(1 + Pick(3));
      case 12: {
        const auto moved = pool_.EvictSequences({{item.id}});
        Expect(moved.status());
        return;
      }
      default: {
        const auto moved = pool_.PrefetchSequences({{item.id}});
        Expect(moved.status());
        return;
      }
    }
  }

  std::vector<float> TakeAnswers() { return std::move(answers_); }

 private:
  struct Item {
    client::SequenceId id = 0;
    ShadowSequence shadow;
  };

  int Pick(int below) { return static_cast<int>(random_() % static_cast<uint32_t>(below)); }
  static void Expect(const absl::Status& status) { EXPECT_TRUE(status.ok()) << status; }
  void Keep(const std::vector<float>& values) {
    answers_.insert(answers_.end(), values.begin(), values.end());
  }
  const client::ModelLayer& layer(size_t l) const { return model_.layers[l]; }

  void Create() {
    const char* const kPairs[] = {"f16/f16", "q8_0/turbo4", "turbo4/turbo3", "q4_0/q8_0"};
    client::SequenceOptions options;
    options.pair = kPairs[Pick(4)];
    options.exact_window = ExactWindow{Pick(2), Pick(3)};
    const auto id = pool_.CreateSequence(model_.name, options);
    ASSERT_TRUE(id.ok()) << id.status();
    items_.push_back({*id, ShadowSequence(spec_, WithPair(options.pair, *options.exact_window))});
  }

  std::vector<float> Rows(int64_t tokens, int heads, int dim, bool keys = false) {
    std::vector<float> rows = RandomRows(random_, static_cast<size_t>(tokens * heads * dim));
    // Keys have channels with a mean, as models' keys do.
    if (keys) {
      for (size_t i = 0; i < rows.size(); i += 8) rows[i] += 2.0f;
    }
    return rows;
  }

  void Engine(Item& item, int64_t tokens) {
    for (size_t l = 0; l < model_.layers.size(); l++) {
      const client::ModelLayer& shape = layer(l);
      const int64_t start = item.shadow.LayerLength(static_cast<int>(l));
      const std::vector<float> q = Rows(tokens, shape.query_heads, shape.head_dim_k);
      const std::vector<float> k = Rows(tokens, shape.kv_heads, shape.head_dim_k, true);
      const std::vector<float> v = Rows(tokens, shape.kv_heads, shape.head_dim_v);
      std::vector<float> out(static_cast<size_t>(tokens * shape.query_heads * shape.head_dim_v));
      std::vector<float> lse(static_cast<size_t>(tokens * shape.query_heads));
      client::AppendAttendItem call;
      call.sequence = item.id;
      call.start_position = start;
      call.q = TensorRef::F32(q, {tokens, shape.query_heads, shape.head_dim_k});
      call.k = TensorRef::F32(k, {tokens, shape.kv_heads, shape.head_dim_k});
      call.v = TensorRef::F32(v, {tokens, shape.kv_heads, shape.head_dim_v});
      call.output = out;
      call.lse = lse;
      const absl::Status status = pool_.AppendAttend(static_cast<int>(l), {&call, 1});
      ASSERT_TRUE(status.ok()) << status;
      item.shadow.Append(static_cast<int>(l), k, v, tokens);
      ExpectClose(item.shadow.Attend(static_cast<int>(l), q, tokens, start), out, lse,
                  "step of " + std::to_string(tokens) + " at " + std::to_string(start) + ", layer " +
                      std::to_string(l));
      item.shadow.Settle();
      Keep(out);
      Keep(lse);
    }
  }

  // A pinned step, and what its sequences were.
  struct Pinned {
    client::Step step;
    std::vector<Item> items;
  };
  // A step under way: its tokens are in shadows of its own.
  struct OpenStep {
    client::Step step;
    std::vector<client::StepItem> items;
    std::vector<size_t> of;  // index into items_
  };

  // Steps that follow each other: all begin, then the layers of all are written, then they end, or one is
  // taken back with what follows it.
  void Steps(int count) {
    std::vector<OpenStep> open;
    std::vector<ShadowSequence> ahead, ended;
    for (const Item& item : items_) ahead.push_back(item.shadow);
    ended = ahead;
    const int rolled_back = Pick(3) == 0 ? Pick(count) : count;
    for (int s = 0; s < count; s++) {
      OpenStep& step = open.emplace_back();
      for (size_t i = 0; i < items_.size(); i++) {
        if (i != 0 && Pick(2) == 0) continue;
        step.of.push_back(i);
        step.items.push_back({items_[i].id, 1 + Pick(Pick(4) == 0 ? 90 : 3)});
      }
      client::StepOptions options;
      if (s > 0) options.after = open[open.size() - 2].step.id;
      options.tables = Pick(2) == 0;
      auto begun = pool_.BeginStep(step.items, options);
      ASSERT_TRUE(begun.ok()) << begun.status();
      step.step = *std::move(begun);
      ASSERT_EQ(step.step.starts.size(), step.items.size());
      if (options.tables) CheckTables(step);
    }
    for (int s = 0; s < count; s++) {
      for (size_t l = 0; l < model_.layers.size(); l++) AttendInStep(open[static_cast<size_t>(s)], l, ahead);
      if (::testing::Test::HasFatalFailure()) return;
      if (s < rolled_back) ended = ahead;
    }
    for (int s = 0; s < count; s++) {
      const uint64_t id = open[static_cast<size_t>(s)].step.id;
      if (s < rolled_back) {
        Expect(pool_.EndStep(id));
      } else if (s == rolled_back) {
        Expect(pool_.RollBackStep(id));
      } else {
        EXPECT_EQ(pool_.EndStep(id).code(), absl::StatusCode::kAborted);
      }
    }
    // All began before any of them had ended: what follows an append came after them.
    for (size_t i = 0; i < items_.size(); i++) {
      items_[i].shadow = ended[i];
      items_[i].shadow.Settle();
    }
  }

  // Tables begin where windows do, end with the last new token, whose blocks are f16, and what was said not
  // to have changed has not.
  void CheckTables(const OpenStep& open) {
    ASSERT_EQ(open.step.tables.size(), open.items.size());
    for (size_t i = 0; i < open.items.size(); i++) {
      const int64_t start = open.step.starts[i], end = start + open.items[i].new_tokens;
      ASSERT_EQ(open.step.tables[i].size(), spec_.groups.size());
      for (size_t g = 0; g < spec_.groups.size(); g++) {
        const client::StepTable& table = open.step.tables[i][g];
        const auto blocks = static_cast<int64_t>(table.blocks.size());
        ASSERT_EQ(table.first_block + blocks, (end + kBlockTokens - 1) / kBlockTokens);
        for (int64_t b = std::max(start / kBlockTokens, table.first_block); b < table.first_block + blocks;
             b++) {
          const client::StepBlock& block = table.blocks[static_cast<size_t>(b - table.first_block)];
          EXPECT_EQ(open.step.kinds[static_cast<size_t>(block.kind)].pair, "f16/f16");
        }
        CheckChanges(open.items[i].sequence, g, table);
      }
    }
  }
  void CheckChanges(client::SequenceId sequence, size_t group, const client::StepTable& table) {
    client::StepTable& last = told_[{sequence, group}];
    for (int64_t b = table.first_block; b < table.first_changed; b++)
      ASSERT_TRUE(table.blocks.at(static_cast<size_t>(b - table.first_block)) ==
                  last.blocks.at(static_cast<size_t>(b - last.first_block)));
    last = table;
  }

  // Pins all sequences, or attends over what was pinned some verbs ago, as it was then.
  void PinOrAttendPinned() {
    if (!pinned_) {
      std::vector<client::SequenceId> ids;
      Pinned pinned;
      for (const Item& item : items_) {
        if (item.shadow.Length() == 0) continue;
        ids.push_back(item.id);
        pinned.items.push_back(item);
      }
      if (ids.empty()) return;
      const bool tables = Pick(2) == 0;
      auto step = pool_.PinStep(ids, tables);
      ASSERT_TRUE(step.ok()) << step.status();
      ASSERT_EQ(step->tables.size(), tables ? ids.size() : 0);
      for (size_t i = 0; i < ids.size(); i++) {
        ASSERT_EQ(step->starts[i], pinned.items[i].shadow.Length());
        for (size_t g = 0; tables && g < spec_.groups.size(); g++)
          CheckChanges(ids[i], g, step->tables[i][g]);
      }
      pinned.step = *std::move(step);
      pinned_ = std::move(pinned);
      return;
    }
    for (const Item& item : pinned_->items) {
      if (std::none_of(items_.begin(), items_.end(), [&](const Item& open) { return open.id == item.id; }))
        continue;  // closed
      for (int l = 0; l < static_cast<int>(model_.layers.size()); l++) AttendPinned(item, l);
    }
    Expect(pool_.EndStep(pinned_->step.id));
    pinned_.reset();
  }
  void AttendPinned(const Item& item, int l) {
    const client::ModelLayer& shape = layer(static_cast<size_t>(l));
    const int64_t tokens = item.shadow.Length(),
                  queries = shape.window > 0 ? 1 : std::min<int64_t>(tokens, 2),
                  first = shape.window > 0 ? tokens : tokens - queries;
    const std::vector<float> q = Rows(queries, shape.query_heads, shape.head_dim_k);
    std::vector<float> out(static_cast<size_t>(queries * shape.query_heads * shape.head_dim_v)),
        lse(static_cast<size_t>(queries * shape.query_heads));
    client::AttendItem call;
    call.sequence = item.id;
    if (shape.window > 0) call.first_query_position = first;
    call.q = TensorRef::F32(q, {queries, shape.query_heads, shape.head_dim_k});
    call.output = out;
    call.lse = lse;
    const absl::Status status = pool_.Attend(l, {&call, 1}, {}, pinned_->step.id);
    ASSERT_TRUE(status.ok()) << status;
    ExpectClose(item.shadow.Attend(l, q, queries, first), out, lse,
                "pinned at " + std::to_string(tokens) + ", layer " + std::to_string(l));
    Keep(out);
    Keep(lse);
  }

  void AttendInStep(OpenStep& open, size_t l, std::vector<ShadowSequence>& shadows) {
    const client::ModelLayer& shape = layer(l);
    std::vector<std::vector<float>> q, k, v, out, lse;
    for (const client::StepItem& item : open.items) {
      q.push_back(Rows(item.new_tokens, shape.query_heads, shape.head_dim_k));
      k.push_back(Rows(item.new_tokens, shape.kv_heads, shape.head_dim_k, true));
      v.push_back(Rows(item.new_tokens, shape.kv_heads, shape.head_dim_v));
      out.emplace_back(static_cast<size_t>(item.new_tokens * shape.query_heads * shape.head_dim_v));
      lse.emplace_back(static_cast<size_t>(item.new_tokens * shape.query_heads));
    }
    std::vector<client::AppendAttendItem> calls(open.items.size());
    for (size_t i = 0; i < calls.size(); i++) {
      const int64_t tokens = open.items[i].new_tokens;
      calls[i].sequence = open.items[i].sequence;
      calls[i].start_position = open.step.starts[i];
      calls[i].q = TensorRef::F32(q[i], {tokens, shape.query_heads, shape.head_dim_k});
      calls[i].k = TensorRef::F32(k[i], {tokens, shape.kv_heads, shape.head_dim_k});
      calls[i].v = TensorRef::F32(v[i], {tokens, shape.kv_heads, shape.head_dim_v});
      calls[i].output = out[i];
      calls[i].lse = lse[i];
    }
    const absl::Status status = pool_.AppendAttend(static_cast<int>(l), calls, {}, open.step.id);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t i = 0; i < calls.size(); i++) {
      ShadowSequence& shadow = shadows[open.of[i]];
      ASSERT_EQ(shadow.LayerLength(static_cast<int>(l)), open.step.starts[i]);
      shadow.Append(static_cast<int>(l), k[i], v[i], open.items[i].new_tokens);
      ExpectClose(shadow.Attend(static_cast<int>(l), q[i], open.items[i].new_tokens, open.step.starts[i]),
                  out[i], lse[i],
                  "layer " + std::to_string(l) + " of a step at " + std::to_string(open.step.starts[i]));
      Keep(out[i]);
      Keep(lse[i]);
    }
  }

  void Append(Item& item, int64_t tokens) {
    std::vector<std::vector<float>> rows;
    std::vector<client::LayerTokens> layers;
    for (size_t l = 0; l < model_.layers.size(); l++) {
      rows.push_back(Rows(tokens, layer(l).kv_heads, layer(l).head_dim_k, true));
      rows.push_back(Rows(tokens, layer(l).kv_heads, layer(l).head_dim_v));
    }
    for (size_t l = 0; l < model_.layers.size(); l++) {
      layers.push_back({static_cast<int>(l),
                        TensorRef::F32(rows[2 * l], {tokens, layer(l).kv_heads, layer(l).head_dim_k}),
                        TensorRef::F32(rows[2 * l + 1], {tokens, layer(l).kv_heads, layer(l).head_dim_v})});
    }
    const auto length = pool_.Append(item.id, item.shadow.Length(), layers);
    ASSERT_TRUE(length.ok()) << length.status();
    for (size_t l = 0; l < model_.layers.size(); l++)
      item.shadow.Append(static_cast<int>(l), rows[2 * l], rows[2 * l + 1], tokens);
    item.shadow.Settle();
    EXPECT_EQ(*length, item.shadow.Length());
    answers_.push_back(static_cast<float>(*length));
  }

  void Attend(Item& item, int64_t queries) {
    const auto l = static_cast<size_t>(Pick(static_cast<int>(model_.layers.size())));
    const client::ModelLayer& shape = layer(l);
    const int64_t tokens = item.shadow.LayerLength(static_cast<int>(l));
    const bool last = shape.window == 0 && tokens >= queries && Pick(2) == 0;
    // In a sliding window only what the next token sees is sure to be there.
    const int64_t first = shape.window > 0 ? tokens : std::max<int64_t>(0, tokens - queries);
    const std::vector<float> q = Rows(queries, shape.query_heads, shape.head_dim_k);
    const std::vector<float> sinks = RandomRows(random_, static_cast<size_t>(shape.query_heads));
    std::vector<float> out(static_cast<size_t>(queries * shape.query_heads * shape.head_dim_v));
    std::vector<float> lse(static_cast<size_t>(queries * shape.query_heads));
    client::AttendItem call;
    call.sequence = item.id;
    if (!last) call.first_query_position = first;
    call.q = TensorRef::F32(q, {queries, shape.query_heads, shape.head_dim_k});
    call.output = out;
    call.lse = lse;
    client::AttentionOptions options;
    if (Pick(2) == 0) options.sinks = sinks;
    const absl::Status status = pool_.Attend(static_cast<int>(l), {&call, 1}, options);
    ASSERT_TRUE(status.ok()) << status;
    ExpectClose(item.shadow.Attend(static_cast<int>(l), q, queries, first, true, 0,
                                   options.sinks.empty() ? nullptr : sinks.data()),
                out, lse, "attention over " + std::to_string(tokens) + " tokens, layer " + std::to_string(l));
    Keep(out);
    Keep(lse);
  }

  void Read(Item& item) {
    const int64_t length = item.shadow.Length();
    int64_t first = 0;
    for (size_t l = 0; l < model_.layers.size(); l++)
      first = std::max(first, item.shadow.FirstLiveToken(static_cast<int>(l)));
    if (first >= length) return;
    first += Pick(static_cast<int>(length - first));
    const int64_t tokens = 1 + Pick(static_cast<int>(length - first));
    std::vector<std::vector<float>> rows;
    std::vector<client::ReadItem> reads;
    for (size_t l = 0; l < model_.layers.size(); l++) {
      rows.emplace_back(static_cast<size_t>(tokens * layer(l).kv_heads * layer(l).head_dim_k));
      rows.emplace_back(static_cast<size_t>(tokens * layer(l).kv_heads * layer(l).head_dim_v));
    }
    for (size_t l = 0; l < model_.layers.size(); l++) {
      reads.push_back(
          {static_cast<int>(l),
           client::MutableTensorRef::F32(rows[2 * l], {tokens, layer(l).kv_heads, layer(l).head_dim_k}),
           client::MutableTensorRef::F32(rows[2 * l + 1], {tokens, layer(l).kv_heads, layer(l).head_dim_v})});
    }
    const absl::Status status = pool_.ReadTokens(item.id, first, reads);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t l = 0; l < model_.layers.size(); l++) {
      const std::vector<float> k = item.shadow.Keys(static_cast<int>(l), first, tokens);
      const std::vector<float> v = item.shadow.Values(static_cast<int>(l), first, tokens);
      ASSERT_EQ(rows[2 * l].size(), k.size());
      for (size_t i = 0; i < k.size(); i++) ASSERT_NEAR(rows[2 * l][i], k[i], 2e-2) << "key " << i;
      for (size_t i = 0; i < v.size(); i++) ASSERT_NEAR(rows[2 * l + 1][i], v[i], 2e-2) << "value " << i;
      Keep(rows[2 * l]);
      Keep(rows[2 * l + 1]);
    }
  }

  void Fork(Item& item) {
    const auto id = pool_.ForkSequence(item.id);
    ASSERT_TRUE(id.ok()) << id.status();
    items_.push_back({*id, item.shadow});
  }

  void Close(Item& item) {
    Expect(pool_.CloseSequence(item.id));
    std::swap(item, items_.back());
    items_.pop_back();
  }

  void Truncate(Item& item) {
    const int64_t length = item.shadow.Length();
    // A little, so that windows have not moved on.
    const int64_t keep = std::max<int64_t>(0, length - Pick(20));
    const absl::Status status = pool_.TruncateSequence(item.id, keep);
    answers_.push_back(static_cast<float>(status.raw_code()));
    if (status.ok()) {
      item.shadow.Truncate(keep);
    } else {
      EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange) << status;
    }
  }

  Pool& pool_;
  const ScriptOptions options_;
  std::mt19937 random_;
  const client::Model model_;
  const ModelSpec spec_;
  std::vector<Item> items_;
  std::vector<float> answers_;
  std::map<std::pair<client::SequenceId, size_t>, client::StepTable> told_;
  std::optional<Pinned> pinned_;
};

}  // namespace

std::unique_ptr<Pool> Ways::Open(const std::string& way, client::PoolOptions options) {
  options.embedded_config = kConfig;
  options.client.session = way == "grpc_session";
  const std::string address =
      way == "embedded" ? way : (way == "shared_memory" ? "shm:" : "") + daemon().address();
  auto pool = Pool::Connect(address, options);
  EXPECT_TRUE(pool.ok()) << way << ": " << pool.status();
  return pool.ok() ? std::move(pool).value() : nullptr;
}

e2e::TestDaemon& Ways::daemon() {
  if (daemon_ == nullptr) {
    daemon_ = e2e::TestDaemon::Start(
        {"--device", "cpu", "--device-memory", "24MiB", "--host-memory", "48MiB", "--host-sharing"}, 1);
  }
  return *daemon_;
}

client::Model MixedModel(const std::string& name) {
  client::ModelLayer full, sliding;
  full.kv_heads = 2;
  full.head_dim_k = full.head_dim_v = 64;
  full.query_heads = 4;
  sliding.kv_heads = 1;
  sliding.head_dim_k = 128;
  sliding.head_dim_v = 64;
  sliding.query_heads = 4;
  sliding.window = 100;
  return {name, {sliding, full, sliding}};
}

std::vector<float> RunScript(Pool& pool, const ScriptOptions& options) {
  Script script(pool, options);
  for (int i = 0; i < options.verbs && !::testing::Test::HasFailure(); i++) script.Run();
  return script.TakeAnswers();
}

}  // namespace kvtide::testing
