#include "tests/clients/cpp/direct_script.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "gtest/gtest.h"
#include "kernels/base/float16.h"

namespace kvtide::testing {
namespace {

using client::MutableTensorRef;
using client::TensorRef;

class HostMemory : public EngineMemory {
 public:
  void Set(float* data, std::span<const float> values) override {
    std::copy(values.begin(), values.end(), data);
  }
  float* Room(size_t count) override {
    // Rows begin at multiples of 16 bytes.
    std::vector<float>& piece = pieces_.emplace_back(count + 4);
    const auto at = reinterpret_cast<uintptr_t>(piece.data());
    return piece.data() + ((at + 15) / 16 * 16 - at) / sizeof(float);
  }
  std::vector<float> Get(const float* data, size_t count) override { return {data, data + count}; }
  void Clear() override { pieces_.clear(); }

 private:
  std::deque<std::vector<float>> pieces_;
};

// Full attention in two shapes.
client::Model DirectModel() {
  client::ModelLayer wide, narrow;
  wide.kv_heads = 2;
  wide.head_dim_k = wide.head_dim_v = 128;
  wide.query_heads = 4;
  narrow.kv_heads = 1;
  narrow.head_dim_k = narrow.head_dim_v = 64;
  narrow.query_heads = 4;
  return {"direct", {wide, narrow, wide}};
}

void Expect(const absl::Status& status) { EXPECT_TRUE(status.ok()) << status; }

size_t KeyWidth(const client::ModelLayer& layer) {
  return static_cast<size_t>(layer.kv_heads * layer.head_dim_k);
}
size_t ValueWidth(const client::ModelLayer& layer) {
  return static_cast<size_t>(layer.kv_heads * layer.head_dim_v);
}
size_t QueryWidth(const client::ModelLayer& layer) {
  return static_cast<size_t>(layer.query_heads * layer.head_dim_k);
}
size_t OutputWidth(const client::ModelLayer& layer) {
  return static_cast<size_t>(layer.query_heads * layer.head_dim_v);
}

// Attention of the query at `position`; rows of the sequence as f32.
void NaiveAttention(const client::ModelLayer& layer, const float* q, const std::vector<float>& k,
                    const std::vector<float>& v, int64_t position, std::vector<float>* out, float* lse) {
  const auto dk = static_cast<size_t>(layer.head_dim_k), dv = static_cast<size_t>(layer.head_dim_v);
  const int group = layer.query_heads / layer.kv_heads;
  out->assign(OutputWidth(layer), 0);
  for (int head = 0; head < layer.query_heads; head++) {
    const auto kv = static_cast<size_t>(head / group);
    std::vector<double> logits;
    double most = -INFINITY, sum = 0;
    for (int64_t t = 0; t <= position; t++) {
      double dot = 0;
      for (size_t i = 0; i < dk; i++)
        dot += static_cast<double>(q[static_cast<size_t>(head) * dk + i]) *
               k[static_cast<size_t>(t) * KeyWidth(layer) + kv * dk + i];
      logits.push_back(dot / std::sqrt(static_cast<double>(dk)));
      most = std::max(most, logits.back());
    }
    std::vector<double> sums(dv);
    for (int64_t t = 0; t <= position; t++) {
      const double weight = std::exp(logits[static_cast<size_t>(t)] - most);
      sum += weight;
      for (size_t i = 0; i < dv; i++)
        sums[i] += weight * v[static_cast<size_t>(t) * ValueWidth(layer) + kv * dv + i];
    }
    for (size_t i = 0; i < dv; i++)
      (*out)[static_cast<size_t>(head) * dv + i] = static_cast<float>(sums[i] / sum);
    lse[head] = static_cast<float>(most + std::log(sum));
  }
}

void AddRounded(const std::vector<float>& from, std::vector<float>* to) {
  for (const float x : from) to->push_back(F16ToF32(F32ToF16(x)));
}

}  // namespace

std::unique_ptr<EngineMemory> MakeHostMemory() { return std::make_unique<HostMemory>(); }

// A step under way.
struct DirectScript::Open {
  client::DirectStep step;
  std::vector<client::StepItem> items;
  std::vector<size_t> of;    // index of the sequence
  std::vector<Rows> given;   // its new rows, by item
  std::vector<Rows> before;  // what its sequences held when it began, as f32
};

DirectScript::DirectScript(Pool& pool, const DirectScriptOptions& options,
                           std::unique_ptr<EngineMemory> memory)
    : pool_(pool),
      options_(options),
      memory_(memory != nullptr ? std::move(memory) : MakeHostMemory()),
      random_(options.seed),
      model_(DirectModel()) {
  client::DirectOptions direct;
  direct.pairs = options.pairs;
  direct.type = direct.output_type = DataType::kF32;
  direct.max_sequences = 4;
  direct.max_new_tokens = 400;
  direct.max_sequence_tokens = 8192;
  direct.max_seals = 3;
  auto made = client::DirectAttention::Make(&pool, model_, direct);
  EXPECT_TRUE(made.ok()) << made.status();
  if (made.ok()) attention_ = *std::move(made);
}

DirectScript::~DirectScript() {
  attention_.reset();
  for (const client::SequenceId id : ids_) Expect(pool_.CloseSequence(id));
}

std::vector<float> DirectScript::Random(int64_t tokens, int heads, int dim, bool keys) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(tokens * heads * dim));
  for (float& x : values) x = normal(random_);
  // Keys have channels with a mean, as models' keys do.
  for (size_t i = 0; keys && i < values.size(); i += 8) values[i] += 2.0f;
  return values;
}

void DirectScript::Create() {
  client::SequenceOptions options;
  options.pair = options_.pairs[static_cast<size_t>(Pick(static_cast<int>(options_.pairs.size())))];
  options.exact_window = ExactWindow{Pick(2), 1 + Pick(2)};
  const auto id = pool_.CreateSequence(model_.name, options);
  ASSERT_TRUE(id.ok()) << id.status();
  ids_.push_back(*id);
  how_.push_back(options);
  Rows& rows = given_.emplace_back();
  rows.k.resize(model_.layers.size());
  rows.v.resize(model_.layers.size());
}

void DirectScript::Extend(Rows& rows, const Rows& by) {
  for (size_t l = 0; l < rows.k.size(); l++) {
    rows.k[l].insert(rows.k[l].end(), by.k[l].begin(), by.k[l].end());
    rows.v[l].insert(rows.v[l].end(), by.v[l].begin(), by.v[l].end());
  }
  rows.tokens += by.tokens;
}

DirectScript::Rows DirectScript::Held(client::SequenceId id, int64_t tokens) {
  Rows rows;
  rows.tokens = tokens;
  rows.k.resize(model_.layers.size());
  rows.v.resize(model_.layers.size());
  if (tokens == 0) return rows;
  std::vector<client::ReadItem> reads;
  for (size_t l = 0; l < model_.layers.size(); l++) {
    const client::ModelLayer& layer = model_.layers[l];
    rows.k[l].resize(static_cast<size_t>(tokens) * KeyWidth(layer));
    rows.v[l].resize(static_cast<size_t>(tokens) * ValueWidth(layer));
    reads.push_back({static_cast<int>(l),
                     MutableTensorRef::F32(rows.k[l], {tokens, layer.kv_heads, layer.head_dim_k}),
                     MutableTensorRef::F32(rows.v[l], {tokens, layer.kv_heads, layer.head_dim_v})});
  }
  Expect(pool_.ReadTokens(id, 0, reads));
  return rows;
}

void DirectScript::Layers(Open& open) {
  for (Rows& rows : open.given) {
    rows.k.resize(model_.layers.size());
    rows.v.resize(model_.layers.size());
  }
  for (size_t l = 0; l < model_.layers.size(); l++) {
    const client::ModelLayer& shape = model_.layers[l];
    const int layer = static_cast<int>(l);
    const std::vector<float> q = Random(open.step.tokens, shape.query_heads, shape.head_dim_k, false),
                             k = Random(open.step.tokens, shape.kv_heads, shape.head_dim_k, true),
                             v = Random(open.step.tokens, shape.kv_heads, shape.head_dim_v, false);
    const auto tokens = static_cast<size_t>(open.step.tokens), heads = static_cast<size_t>(shape.query_heads);
    float* const out_at = memory_->Room(tokens * OutputWidth(shape));
    float* const lse_at = memory_->Room(tokens * heads);
    const auto stride = [](size_t width) { return static_cast<int64_t>(width); };
    const PagedRows keys{memory_->Put(k), stride(KeyWidth(shape))},
        values{memory_->Put(v), stride(ValueWidth(shape))},
        queries{memory_->Put(q), stride(QueryWidth(shape))};
    const MutablePagedRows outputs{out_at, stride(OutputWidth(shape))};
    absl::Status status;
    if (l % 2 == 0) {
      status = attention_->WriteAttend(layer, keys, values, queries, outputs, lse_at, memory_->stream());
    } else {
      status = attention_->Write(layer, keys, values, memory_->stream());
      if (status.ok()) status = attention_->Attend(layer, queries, outputs, lse_at, memory_->stream());
    }
    ASSERT_TRUE(status.ok()) << status;
    const std::vector<float> out = memory_->Get(out_at, tokens * OutputWidth(shape)),
                             lse = memory_->Get(lse_at, tokens * heads);
    answers_.insert(answers_.end(), out.begin(), out.end());
    answers_.insert(answers_.end(), lse.begin(), lse.end());
    size_t row = 0;
    for (size_t i = 0; i < open.items.size(); i++) {
      const auto count = static_cast<size_t>(open.items[i].new_tokens);
      Rows &rows = open.given[i], &held = open.before[i];
      const auto part = [&](const std::vector<float>& all, size_t width) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(row * width);
        return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(count * width));
      };
      rows.k[l] = part(k, KeyWidth(shape));
      rows.v[l] = part(v, ValueWidth(shape));
      rows.tokens = open.items[i].new_tokens;
      std::vector<float> all_k = held.k[l], all_v = held.v[l];
      AddRounded(rows.k[l], &all_k);
      AddRounded(rows.v[l], &all_v);
      double error = 0, norm = 0, worst = 0;
      for (size_t t = 0; t < count; t++) {
        std::vector<float> expected, expected_lse(heads);
        NaiveAttention(shape, q.data() + (row + t) * QueryWidth(shape), all_k, all_v,
                       held.tokens + static_cast<int64_t>(t), &expected, expected_lse.data());
        for (size_t j = 0; j < expected.size(); j++) {
          error += std::pow(expected[j] - out[(row + t) * expected.size() + j], 2);
          norm += std::pow(expected[j], 2);
        }
        for (size_t h = 0; h < heads; h++)
          worst = std::max<double>(worst, std::abs(expected_lse[h] - lse[(row + t) * heads + h]));
      }
      ASSERT_LT(std::sqrt(error / norm), options_.tolerance)
          << "layer " << l << ", " << held.tokens << " tokens";
      ASSERT_LT(worst, options_.tolerance) << "layer " << l << ", " << held.tokens << " tokens";
      row += count;
    }
  }
}

void DirectScript::Steps(int count) {
  if (attention_ == nullptr || ids_.empty()) return;
  std::vector<Open> open(static_cast<size_t>(count));
  const bool takes_back = Pick(4) == 0;
  for (size_t s = 0; s < open.size(); s++) {
    Open& step = open[s];
    for (size_t i = 0; i < ids_.size(); i++) {
      if (i != 0 && Pick(3) == 0) continue;
      step.of.push_back(i);
      step.items.push_back({ids_[i], 1 + Pick(Pick(4) == 0 ? 90 : 2)});
    }
    auto begun = attention_->Begin(step.items, memory_->stream(), s > 0 ? open[s - 1].step.id : 0);
    ASSERT_TRUE(begun.ok()) << begun.status();
    step.step = *std::move(begun);
    step.given.resize(step.items.size());
    // What the step sees: what has ended, as it is held now, and the rows of the step that it follows.
    for (size_t i = 0; i < step.items.size(); i++) {
      const size_t of = step.of[i];
      step.before.push_back(Held(ids_[of], given_[of].tokens));
      if (s == 0) continue;
      const Open& last = open[s - 1];
      const auto there = std::find(last.of.begin(), last.of.end(), of);
      if (there == last.of.end()) continue;
      const Rows& ahead = last.given[static_cast<size_t>(there - last.of.begin())];
      for (size_t l = 0; l < ahead.k.size(); l++) {
        AddRounded(ahead.k[l], &step.before[i].k[l]);
        AddRounded(ahead.v[l], &step.before[i].v[l]);
      }
      step.before[i].tokens += ahead.tokens;
    }
    for (size_t i = 0; i < step.items.size(); i++) ASSERT_EQ(step.step.starts[i], step.before[i].tokens);
    Layers(step);
    if (::testing::Test::HasFatalFailure()) return;
    Expect(attention_->Seal(memory_->stream()));
    Expect(attention_->Mark(step.step, memory_->stream()));
    const auto end = [&](Open& of) {
      Expect(attention_->End(std::move(of.step)));
      for (size_t i = 0; i < of.items.size(); i++) Extend(given_[of.of[i]], of.given[i]);
    };
    // The step before ends while this one is under way.
    if (s > 0) end(open[s - 1]);
    if (s + 1 < open.size()) continue;
    if (takes_back) {
      Expect(attention_->RollBack(std::move(step.step)));
    } else {
      end(step);
    }
  }
  memory_->Clear();
}

void DirectScript::Append(client::SequenceId id, int64_t start, const Rows& rows) {
  std::vector<client::LayerTokens> layers;
  for (size_t l = 0; l < model_.layers.size(); l++) {
    const client::ModelLayer& layer = model_.layers[l];
    layers.push_back({static_cast<int>(l),
                      TensorRef::F32(rows.k[l], {rows.tokens, layer.kv_heads, layer.head_dim_k}),
                      TensorRef::F32(rows.v[l], {rows.tokens, layer.kv_heads, layer.head_dim_v})});
  }
  Expect(pool_.Append(id, start, layers).status());
}

void DirectScript::CheckBytes() {
  Rows one;
  one.tokens = 1;
  for (const client::ModelLayer& layer : model_.layers) {
    one.k.push_back(Random(1, layer.kv_heads, layer.head_dim_k, true));
    one.v.push_back(Random(1, layer.kv_heads, layer.head_dim_v, false));
  }
  for (size_t i = 0; i < ids_.size(); i++) {
    Rows& rows = given_[i];
    const auto twin = pool_.CreateSequence(model_.name, how_[i]);
    ASSERT_TRUE(twin.ok()) << twin.status();
    if (rows.tokens > 0) Append(*twin, 0, rows);
    // What waits to be coded is coded with an append.
    Append(ids_[i], rows.tokens, one);
    Append(*twin, rows.tokens, one);
    Extend(rows, one);
    const Rows here = Held(ids_[i], rows.tokens), there = Held(*twin, rows.tokens);
    for (size_t l = 0; l < here.k.size(); l++) {
      EXPECT_TRUE(here.k[l] == there.k[l]) << "keys of layer " << l << ", sequence " << i;
      EXPECT_TRUE(here.v[l] == there.v[l]) << "values of layer " << l << ", sequence " << i;
    }
    Expect(pool_.CloseSequence(*twin));
  }
}

void DirectScript::Round() {
  if (ids_.empty()) return Create();
  const auto one = static_cast<size_t>(Pick(static_cast<int>(ids_.size())));
  switch (Pick(12)) {
    case 0:
      if (ids_.size() < 4) return Create();
      return Steps(1);
    case 1: {
      if (ids_.size() == 4) {
        Expect(pool_.CloseSequence(ids_[one]));
        ids_.erase(ids_.begin() + static_cast<std::ptrdiff_t>(one));
        how_.erase(how_.begin() + static_cast<std::ptrdiff_t>(one));
        given_.erase(given_.begin() + static_cast<std::ptrdiff_t>(one));
        return;
      }
      const auto fork = pool_.ForkSequence(ids_[one]);
      ASSERT_TRUE(fork.ok()) << fork.status();
      ids_.push_back(*fork);
      how_.push_back(how_[one]);
      given_.push_back(Rows(given_[one]));
      return;
    }
    case 2: {
      // Within the exact blocks.
      Rows& rows = given_[one];
      const int64_t keep = std::max<int64_t>(0, rows.tokens - Pick(20));
      const absl::Status status = pool_.TruncateSequence(ids_[one], keep);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t l = 0; l < rows.k.size(); l++) {
        rows.k[l].resize(static_cast<size_t>(keep) * KeyWidth(model_.layers[l]));
        rows.v[l].resize(static_cast<size_t>(keep) * ValueWidth(model_.layers[l]));
      }
      rows.tokens = keep;
      return;
    }
    case 3: {
      Rows rows;
      rows.tokens = 1 + Pick(100);
      for (const client::ModelLayer& layer : model_.layers) {
        rows.k.push_back(Random(rows.tokens, layer.kv_heads, layer.head_dim_k, true));
        rows.v.push_back(Random(rows.tokens, layer.kv_heads, layer.head_dim_v, false));
      }
      Append(ids_[one], given_[one].tokens, rows);
      Extend(given_[one], rows);
      return;
    }
    default:
      return Steps(1 + Pick(3));
  }
}

std::vector<float> RunDirectScript(Pool& pool, const DirectScriptOptions& options,
                                   std::unique_ptr<EngineMemory> memory) {
  DirectScript script(pool, options, std::move(memory));
  for (int i = 0; i < options.rounds && !::testing::Test::HasFailure(); i++) script.Round();
  if (!::testing::Test::HasFailure()) script.CheckBytes();
  return script.TakeAnswers();
}

namespace {

// An engine over some sequences, whose rows are given.
class MixedEngine {
 public:
  MixedEngine(Pool& pool, EngineMemory& memory, const client::Model& model, std::vector<std::string> pairs,
              std::vector<client::SequenceId> ids, const MixedStepsOptions& options)
      : memory_(memory),
        model_(model),
        ids_(std::move(ids)),
        graphs_(options.graphs),
        together_(pairs.size() != 1) {
    client::DirectOptions direct;
    direct.pairs = std::move(pairs);
    direct.type = direct.output_type = DataType::kF32;
    direct.max_sequences = static_cast<int>(ids_.size());
    direct.max_new_tokens = kMostTokens * direct.max_sequences;
    direct.max_seals = 4 * direct.max_sequences;  // nothing waits, so that all code the same blocks
    direct.graphs = graphs_;
    auto made = client::DirectAttention::Make(&pool, model, direct);
    EXPECT_TRUE(made.ok()) << made.status();
    if (made.ok()) attention_ = *std::move(made);
    for (const client::ModelLayer& layer : model_.layers) {
      const auto tokens = static_cast<size_t>(direct.max_new_tokens);
      layers_.push_back({memory.Room(tokens * QueryWidth(layer)), memory.Room(tokens * KeyWidth(layer)),
                         memory.Room(tokens * ValueWidth(layer)),
                         memory.Room(tokens * (OutputWidth(layer) + kGap)),
                         memory.Room(tokens * static_cast<size_t>(layer.query_heads))});
    }
  }
  static constexpr int kMostTokens = 70;
  static constexpr size_t kGap = 16;
  bool ok() const { return attention_ != nullptr; }

  // Rows [items][layers][q, k, v] of `tokens` tokens each. Outputs and log-sum-exps of the items.
  std::vector<std::vector<float>> Step(int64_t tokens,
                                       std::span<const std::vector<std::vector<float>>* const> rows) {
    std::vector<std::vector<float>> answers(ids_.size());
    std::vector<client::StepItem> items;
    for (const client::SequenceId id : ids_) items.push_back({id, tokens});
    auto step = attention_->Begin(items, memory_.stream());
    EXPECT_TRUE(step.ok()) << step.status();
    if (!step.ok()) return answers;
    for (size_t l = 0; l < model_.layers.size(); l++) {
      std::vector<float> all[3];
      for (const auto* const of : rows)
        for (size_t side = 0; side < 3; side++)
          all[side].insert(all[side].end(), (*of)[3 * l + side].begin(), (*of)[3 * l + side].end());
      memory_.Set(layers_[l].q, all[0]);
      memory_.Set(layers_[l].k, all[1]);
      memory_.Set(layers_[l].v, all[2]);
    }
    const auto work = [&] {
      for (size_t l = 0; l < model_.layers.size(); l++) {
        const client::ModelLayer& layer = model_.layers[l];
        const Layer& at = layers_[l];
        const auto stride = [](size_t width) { return static_cast<int64_t>(width); };
        const PagedRows k{at.k, stride(KeyWidth(layer))}, v{at.v, stride(ValueWidth(layer))},
            q{at.q, stride(QueryWidth(layer))};
        const MutablePagedRows out{at.out, stride(OutputWidth(layer) + kGap)};
        if (together_) {
          Expect(attention_->WriteAttend(static_cast<int>(l), k, v, q, out, at.lse, memory_.stream()));
        } else {
          Expect(attention_->Write(static_cast<int>(l), k, v, memory_.stream()));
          Expect(attention_->Attend(static_cast<int>(l), q, out, at.lse, memory_.stream()));
        }
      }
      Expect(attention_->Seal(memory_.stream()));
    };
    if (graphs_) {
      memory_.Replay(work);
    } else {
      work();
    }
    Expect(attention_->Mark(*step, memory_.stream()));
    Expect(attention_->End(*std::move(step)));
    for (size_t l = 0; l < model_.layers.size(); l++) {
      const client::ModelLayer& layer = model_.layers[l];
      const size_t width = OutputWidth(layer), row = width + kGap;
      const auto heads = static_cast<size_t>(layer.query_heads),
                 count = static_cast<size_t>(tokens) * ids_.size();
      const std::vector<float> out = memory_.Get(layers_[l].out, count * row),
                               lse = memory_.Get(layers_[l].lse, count * heads);
      for (size_t r = 0; r < count; r++) {
        std::vector<float>& to = answers[r / static_cast<size_t>(tokens)];
        const auto add = [&](const std::vector<float>& from, size_t first, size_t values) {
          const auto begin = from.begin() + static_cast<std::ptrdiff_t>(first);
          to.insert(to.end(), begin, begin + static_cast<std::ptrdiff_t>(values));
        };
        add(out, r * row, width);
        add(lse, r * heads, heads);
      }
    }
    return answers;
  }

 private:
  struct Layer {
    float *q, *k, *v, *out, *lse;
  };
  EngineMemory& memory_;
  const client::Model& model_;
  const std::vector<client::SequenceId> ids_;
  const bool graphs_;
  const bool together_;  // rows are written and attended by one call: that of the engine of all pairs
  std::unique_ptr<client::DirectAttention> attention_;
  std::vector<Layer> layers_;
};

}  // namespace

void CheckMixedSteps(Pool& pool, const MixedStepsOptions& options, std::unique_ptr<EngineMemory> memory) {
  if (memory == nullptr) memory = MakeHostMemory();
  const client::Model model = DirectModel();
  Expect(pool.RegisterModel(model));
  std::mt19937 random(options.seed);
  std::normal_distribution<float> normal;
  // Two sequences of each pair, one of which has no mean; and twins of them, which the engines of one pair
  // have. Pairs take turns, so that the rows of each lie between those of others.
  const size_t pairs = options.pairs.size(), count = 2 * pairs;
  std::vector<client::SequenceId> all, twins;
  for (size_t i = 0; i < count; i++) {
    client::SequenceOptions how;
    how.pair = options.pairs[i % pairs];
    how.exact_window = ExactWindow{static_cast<int>(i % 2), 1};
    how.key_centring = i < pairs ? client::KeyCentring::kNone : client::KeyCentring::kFirstBlock;
    for (std::vector<client::SequenceId>* const to : {&all, &twins}) {
      const auto id = pool.CreateSequence(model.name, how);
      ASSERT_TRUE(id.ok()) << id.status();
      to->push_back(*id);
    }
  }
  {
    MixedEngine mixed(pool, *memory, model, options.graphs ? options.pairs : std::vector<std::string>(), all,
                      options);
    std::vector<std::unique_ptr<MixedEngine>> alone;
    MixedStepsOptions plain = options;
    plain.graphs = false;
    for (size_t p = 0; p < pairs; p++)
      alone.push_back(
          std::make_unique<MixedEngine>(pool, *memory, model, std::vector<std::string>{options.pairs[p]},
                                        std::vector<client::SequenceId>{twins[p], twins[p + pairs]}, plain));
    for (int s = 0; s < options.steps && !::testing::Test::HasFailure(); s++) {
      const bool few = options.graphs || s % 3 != 0;
      const int64_t tokens = options.graphs ? 1 : few ? 1 + s % 2 : MixedEngine::kMostTokens;
      std::vector<std::vector<std::vector<float>>> rows(count);
      for (std::vector<std::vector<float>>& of : rows) {
        for (const client::ModelLayer& layer : model.layers)
          for (const size_t width : {QueryWidth(layer), KeyWidth(layer), ValueWidth(layer)}) {
            std::vector<float>& values = of.emplace_back(static_cast<size_t>(tokens) * width);
            for (size_t i = 0; i < values.size(); i++)
              values[i] = normal(random) + (of.size() % 3 == 2 && i % 8 == 0 ? 2.0f : 0.0f);
          }
      }
      std::vector<const std::vector<std::vector<float>>*> given;
      for (const auto& of : rows) given.push_back(&of);
      const std::vector<std::vector<float>> together = mixed.Step(tokens, given);
      for (size_t p = 0; p < pairs && !::testing::Test::HasFailure(); p++) {
        const std::vector<std::vector<float>> expected =
            alone[p]->Step(tokens, std::vector{given[p], given[p + pairs]});
        for (size_t twin = 0; twin < 2; twin++) {
          const std::vector<float>&a = together[p + twin * pairs], &b = expected[twin];
          ASSERT_EQ(a.size(), b.size());
          double error = 0, norm = 0;
          for (size_t i = 0; i < a.size(); i++) {
            error += std::pow(a[i] - b[i], 2);
            norm += std::pow(b[i], 2);
          }
          ASSERT_LE(std::sqrt(error / norm), few ? 0 : 1e-5)
              << options.pairs[p] << (twin == 0 ? "" : ", centred") << ", step " << s;
        }
      }
    }
  }
  memory->Clear();
  // What was coded by the engines has the same bytes.
  for (size_t i = 0; i < count; i++) {
    std::vector<std::vector<float>> held;
    for (const client::SequenceId id : {all[i], twins[i]}) {
      const auto read = pool.ReadTokens(id, {}, 0, 1 + (options.steps - 1) / 2, DataType::kF32);
      ASSERT_TRUE(read.ok()) << read.status();
      std::vector<float>& to = held.emplace_back();
      for (const client::LayerRows& layer : *read)
        for (const std::vector<std::byte>* const bytes : {&layer.k, &layer.v}) {
          const size_t before = to.size();
          to.resize(before + bytes->size() / sizeof(float));
          std::memcpy(to.data() + before, bytes->data(), bytes->size());
        }
    }
    EXPECT_TRUE(held[0] == held[1]) << "sequence " << i;
  }
  for (const std::vector<client::SequenceId>* const ids : {&all, &twins})
    for (const client::SequenceId id : *ids) Expect(pool.CloseSequence(id));
}

}  // namespace kvtide::testing
