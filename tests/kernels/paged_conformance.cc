#include "tests/kernels/paged_conformance.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "kernels/cpu/reference.h"
#include "kernels/format/page_codec.h"
#include "tests/format/test_tide.h"

namespace kvtide::testing {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// What one engine is about; sizes are small, numbers of pages scarce.
struct Engine {
  const char* pair = "turbo4/turbo4";  // calibrated keys get random transforms of keys after RoPE
  int head_dim = 64, kv_heads = 2, heads = 4;
  int first_blocks = 1, last_blocks = 1;
  int64_t window = 0;
  float softcap = 0;
  bool sinks = false, profile = false;
  DataType type = DataType::kBf16, output_type = DataType::kF32;
  int layers = 2;
  int sequences = 5;
  int most_new = 200;  // tokens of a prefill chunk
  int queries = 0;     // > 0: every step has so many tokens for each sequence
  bool host_arrays = false;
  double tolerance = 1e-3;
  bool seal_together = false;  // all layers at the end, where no scratch page is sealed
  bool reads = false;          // after each step, queries anywhere in the sequences
};

struct Sequence {
  std::vector<float> k, v;  // [layers][tokens][...] appended as one row of all layers per token
  int64_t length = 0;
  std::map<int64_t, int32_t> exact;  // block -> exact page
  std::vector<int32_t> coded;        // of full blocks
  size_t sealed = 0;                 // of them, before the step at hand
  int64_t prefix = 0;                // blocks that were another sequence's
};

class MiniEngine {
 public:
  MiniEngine(const Engine& engine, PagedWorld& world, uint32_t seed)
      : engine_(engine), world_(world), rng_(seed), sequences_(Size(engine.sequences)) {
    options_.shape = {1, engine.kv_heads, engine.head_dim, engine.head_dim};
    options_.pair = *ParseCachePair(engine.pair);
    options_.heads = engine.heads;
    options_.scale = 1.0f / std::sqrt(static_cast<float>(engine.head_dim));
    options_.softcap = engine.softcap;
    options_.window = engine.window;
    options_.type = engine.type;
    options_.output_type = engine.output_type;
    options_.max_sequences = engine.sequences + 1;  // one row of padding
    options_.max_tokens = engine.sequences * std::max(engine.most_new, engine.queries) + 3;
    options_.max_coded_blocks = kMostBlocks;
    options_.max_exact_blocks = kMostBlocks;
    options_.max_seals = engine.sequences * (std::max(engine.most_new, engine.queries) / kBlockTokens + 2);
    coded_ = CodedPage(options_);
    exact_ = ExactPage(options_);
    coded_pages_ = engine.sequences * kMostBlocks;
    exact_pages_ = engine.sequences * (engine.first_blocks + engine.last_blocks + 4);
    scratch_pages_ = engine.sequences * (engine.most_new / kBlockTokens + 2);
    options_.exact_pages = exact_pages_;
    options_.scratch = world.Allocate(exact_.block_bytes() * Size(scratch_pages_));
    Poison(options_.scratch, exact_.block_bytes() * Size(scratch_pages_));
    for (int p = coded_pages_; p-- > 0;) free_coded_.push_back(p);
    for (int p = exact_pages_; p-- > 0;) free_exact_.push_back(p);
    for (int l = 0; l < engine.layers; l++) AddLayer();
    tokens_ = options_.max_tokens;
    k_ = Tensor(engine.kv_heads);
    v_ = Tensor(engine.kv_heads);
    q_ = Tensor(engine.heads);
    out_bytes_ = Size(tokens_) * Size(row_ * DataTypeBytesOf(engine.output_type));
    out_ = world.Allocate(out_bytes_ * Size(engine.layers));
    lse_ = world.Allocate(Size(tokens_) * Size(engine.heads) * sizeof(float) * Size(engine.layers));
    AllocateArrays();
    auto made = world.Make(options_, layers_);
    EXPECT_TRUE(made.ok()) << made.status();
    keys_.clear();  // was copied
    if (made.ok()) attention_ = std::move(made).value();
  }

  bool ok() const { return attention_ != nullptr; }

  // One step of some of the sequences; everything is checked.
  void Step() {
    std::vector<int> order(sequences_.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
    std::shuffle(order.begin(), order.end(), rng_);
    if (engine_.queries == 0 && Chance(0.3)) order.resize(1 + Random(static_cast<int>(order.size())));
    Begin(order);
    SetArrays();
    FillTensors();
    Compute();
    if (::testing::Test::HasFailure()) return;
    Fetch();
    CheckRows();
    CheckOutputs();
    CheckSeals();
    End();
    if (engine_.reads && !::testing::Test::HasFailure()) Read(order);
  }
  uint64_t changed() {
    const auto count = attention_->ChangedValues(nullptr);
    EXPECT_TRUE(count.ok()) << count.status();
    return count.value_or(~uint64_t{0});
  }

 private:
  static constexpr int kMostBlocks = 12;
  struct Part {  // of a step
    int sequence;
    int64_t first_position, tokens;
    int64_t coded_first, coded_count;
    std::vector<int32_t> exact;  // pages of the exact blocks in order
    std::vector<int64_t> exact_blocks;
  };
  struct SealOf {
    int sequence;
    int64_t block;
    int32_t exact, coded;
  };

  static int64_t DataTypeBytesOf(DataType type) { return static_cast<int64_t>(DataTypeBytes(type)); }
  int Random(int below) { return static_cast<int>(rng_() % static_cast<uint32_t>(below)); }
  bool Chance(double p) { return std::uniform_real_distribution<double>(0, 1)(rng_) < p; }

  void Poison(std::byte* memory, size_t bytes) {
    const std::vector<uint8_t> poison(bytes, 0xff);  // NaN in every type
    world_.Upload(poison.data(), memory, bytes);
  }
  void AddLayer() {
    PagedLayer layer;
    layer.coded = world_.Allocate(coded_.block_bytes() * Size(coded_pages_));
    layer.exact = world_.Allocate(exact_.block_bytes() * Size(exact_pages_));
    Poison(layer.coded, coded_.block_bytes() * Size(coded_pages_));
    Poison(layer.exact, exact_.block_bytes() * Size(exact_pages_));
    std::normal_distribution<float> normal;
    const auto floats = [&](size_t count, float size, float offset) {
      std::vector<float> values(count);
      for (float& x : values) x = offset + size * std::clamp(normal(rng_), -1.5f, 1.5f);
      std::byte* const memory = world_.Allocate(count * sizeof(float));
      world_.Upload(values.data(), memory, count * sizeof(float));
      return std::pair(values, reinterpret_cast<const float*>(memory));
    };
    if (engine_.sinks) std::tie(sinks_.emplace_back(), layer.sinks) = floats(Size(engine_.heads), 1, 0);
    Profile profile;
    profile.shape = options_.shape;
    const bool has_profile = engine_.profile && layers_.empty();  // of the first layer alone
    if (has_profile) {
      const size_t dim = Size(engine_.head_dim), values = Size(engine_.kv_heads) * dim;
      std::vector<float> mean, gain;
      std::tie(mean, layer.k_mean) = floats(values, 0.3f, 0.1f);
      std::tie(gain, layer.k_gain) = floats(values, 0.3f, 1);
      for (int h = 0; h < engine_.kv_heads; h++) {
        const auto at = static_cast<ptrdiff_t>(Size(h) * dim),
                   end = static_cast<ptrdiff_t>(Size(h + 1) * dim);
        profile.k.push_back(
            {{mean.begin() + at, mean.begin() + end}, {gain.begin() + at, gain.begin() + end}, {}, {}});
      }
      profile.v.resize(profile.k.size());
    }
    if (Info(options_.pair.k).calibrated) {
      profile = test::AfterRope(test::TideProfile(options_.shape, 31 * layers_.size() + rng_() % 1000));
      keys_.push_back(profile.k);
      layer.keys = keys_.back().data();
    }
    profiles_.push_back(std::move(profile));
    layers_.push_back(layer);
  }

  // [tokens][wider] of a fused projection: heads in the middle of a row.
  struct Rows {
    std::byte* memory = nullptr;
    int64_t stride = 0, offset = 0, width = 0;
    size_t layer_bytes = 0;
    std::vector<std::byte> host;
  };
  Rows Tensor(int heads) {
    Rows rows;
    rows.width = int64_t{heads} * engine_.head_dim;
    rows.stride = rows.width + 32;
    rows.offset = 16;
    rows.layer_bytes = Size(tokens_ * rows.stride) * DataTypeBytes(engine_.type);
    rows.memory = world_.Allocate(rows.layer_bytes * Size(engine_.layers));
    rows.host.resize(rows.layer_bytes * Size(engine_.layers));
    return rows;
  }
  MutableTensorView View(Rows& rows, int layer, int64_t token) const {
    return {rows.host.data() + Size(layer) * rows.layer_bytes +
                Size(token * rows.stride + rows.offset) * DataTypeBytes(engine_.type),
            engine_.type};
  }
  std::byte* Data(const Rows& rows, int layer) const {
    return rows.memory + Size(layer) * rows.layer_bytes + Size(rows.offset) * DataTypeBytes(engine_.type);
  }

  struct Array {
    std::byte* memory = nullptr;
    std::vector<int32_t> host;
    const int32_t* data() const { return reinterpret_cast<const int32_t*>(memory); }
  };
  Array MakeArray(int64_t count) {
    return {world_.Allocate(Size(count) * sizeof(int32_t)), std::vector<int32_t>(Size(count))};
  }
  void Send(Array& array) {
    world_.Upload(array.host.data(), array.memory, array.host.size() * sizeof(int32_t));
  }
  void AllocateArrays() {
    const int64_t rows = options_.max_sequences;
    query_start_ = MakeArray(rows + 1);
    for (Array* array : {&lengths_, &coded_first_, &coded_count_}) *array = MakeArray(rows);
    coded_table_ = MakeArray(rows * kCodedRow);
    exact_table_ = MakeArray(rows * kExactRow);
    slots_ = MakeArray(tokens_);
    seals_ = MakeArray(2 * options_.max_seals);
    seal_count_ = MakeArray(1);
  }

  int32_t Take(std::vector<int32_t>& free) {
    EXPECT_FALSE(free.empty());
    if (free.empty()) return 0;
    const size_t i = Size(Random(static_cast<int>(free.size())));
    std::swap(free[i], free.back());
    const int32_t page = free.back();
    free.pop_back();
    return page;
  }
  void Release(Sequence& sequence) {
    for (const auto& [block, page] : sequence.exact) free_exact_.push_back(page);
    for (size_t b = Size(sequence.prefix); b < sequence.coded.size(); b++)
      free_coded_.push_back(sequence.coded[b]);
    for (size_t b = 0; b < Size(sequence.prefix); b++) shared_.erase(shared_.find(sequence.coded[b]));
    sequence = {};
  }
  bool IsShared(const Sequence& sequence) const {
    return std::any_of(sequence.coded.begin(), sequence.coded.end(),
                       [&](int32_t page) { return shared_.count(page) > 0; });
  }
  int FirstBlocks(const Sequence& sequence) const {
    return engine_.window > 0 || sequence.prefix > 0 ? 0 : engine_.first_blocks;
  }

  // Which blocks of those before block `full` are read coded.
  void SetCoded(const Sequence& sequence, int64_t full, Part* part) const {
    part->coded_first = FirstBlocks(sequence);
    part->coded_count =
        std::max<int64_t>(0, std::max(sequence.prefix, full - engine_.last_blocks) - part->coded_first);
    if (part->coded_count == 0) part->coded_first = 0;
  }

  // Tables of the step, with pages for the new tokens.
  void Begin(const std::vector<int>& order) {
    parts_.clear();
    seal_list_.clear();
    int32_t next_scratch = exact_pages_;
    for (const int index : order) {
      Sequence& sequence = sequences_[Size(index)];
      const int64_t most = int64_t{kMostBlocks} * kBlockTokens - 1;
      if (sequence.length + 1 + engine_.queries > most || (Chance(0.05) && sequence.length > 0)) {
        if (IsShared(sequence)) continue;  // others stand on it
        Release(sequence);
      }
      if (sequence.length == 0 && Chance(0.5)) Adopt(sequence, index);
      int64_t tokens = engine_.queries > 0 ? engine_.queries
                       : Chance(0.4)       ? 1
                       : Chance(0.4)       ? 2 + Random(6)
                                           : 1 + Random(engine_.most_new);
      tokens = std::min(tokens, most - sequence.length);
      if (tokens <= 0) continue;
      Part part{index, sequence.length, tokens, 0, 0, {}, {}};
      const int64_t full = sequence.length / kBlockTokens, end = sequence.length + tokens,
                    new_full = end / kBlockTokens, blocks = (end + kBlockTokens - 1) / kBlockTokens;
      SetCoded(sequence, full, &part);
      for (int64_t b = 0; b < blocks; b++) {
        if (b >= part.coded_first && b < part.coded_first + part.coded_count) continue;
        if (sequence.exact.count(b) == 0) {
          const bool stays = b < FirstBlocks(sequence) || b >= new_full - engine_.last_blocks;
          const bool scratch = !stays && part.tokens > 1;
          sequence.exact[b] = scratch ? next_scratch++ : Take(free_exact_);
        }
        part.exact.push_back(sequence.exact[b]);
        part.exact_blocks.push_back(b);
      }
      for (int64_t b = full; b < new_full; b++) {
        sequence.coded.push_back(Take(free_coded_));
        seal_list_.push_back({index, b, sequence.exact[b], sequence.coded.back()});
      }
      parts_.push_back(std::move(part));
    }
    EXPECT_LE(next_scratch - exact_pages_, scratch_pages_);
  }
  // A prefix of another sequence's coded blocks.
  void Adopt(Sequence& sequence, int index) {
    const int from = Random(static_cast<int>(sequences_.size()));
    const Sequence& other = sequences_[Size(from)];
    if (from == index || other.sealed == 0) return;  // blocks of this step are coded from the next on
    sequence.prefix = 1 + Random(static_cast<int>(other.sealed));
    sequence.sealed = Size(sequence.prefix);
    sequence.length = sequence.prefix * kBlockTokens;
    sequence.coded.assign(other.coded.begin(), other.coded.begin() + sequence.prefix);
    shared_.insert(sequence.coded.begin(), sequence.coded.end());
    const size_t values = Size(sequence.length * row_of(engine_.kv_heads) * engine_.layers);
    sequence.k.assign(other.k.begin(), other.k.begin() + static_cast<ptrdiff_t>(values));
    sequence.v.assign(other.v.begin(), other.v.begin() + static_cast<ptrdiff_t>(values));
  }
  int64_t row_of(int heads) const { return int64_t{heads} * engine_.head_dim; }

  void SetArrays(bool writes = true) {
    for (Array* array : {&query_start_, &lengths_, &coded_first_, &coded_count_})
      std::fill(array->host.begin(), array->host.end(), 0);
    for (Array* array : {&coded_table_, &exact_table_})  // what is not said is not read
      std::fill(array->host.begin(), array->host.end(), -1000000);
    std::fill(slots_.host.begin(), slots_.host.end(), -1);
    int32_t token = 0;
    for (size_t s = 0; s < parts_.size(); s++) {
      const Part& part = parts_[s];
      const Sequence& sequence = sequences_[Size(part.sequence)];
      query_start_.host[s] = token;
      lengths_.host[s] = static_cast<int32_t>(part.first_position + part.tokens);
      coded_first_.host[s] = static_cast<int32_t>(part.coded_first);
      coded_count_.host[s] = static_cast<int32_t>(part.coded_count);
      for (int64_t b = part.coded_first; b < part.coded_first + part.coded_count; b++)
        coded_table_.host[s * kCodedRow + Size(b)] = sequence.coded[Size(b)];
      for (size_t i = 0; i < part.exact.size(); i++) exact_table_.host[s * kExactRow + i] = part.exact[i];
      for (int64_t t = 0; t < part.tokens; t++, token++) {
        if (!writes) continue;
        const int64_t position = part.first_position + t;
        slots_.host[Size(token)] = static_cast<int32_t>(
            sequence.exact.at(position / kBlockTokens) * kBlockTokens + position % kBlockTokens);
      }
    }
    for (size_t s = parts_.size(); s < query_start_.host.size(); s++) query_start_.host[s] = token;
    std::fill(seals_.host.begin(), seals_.host.end(), -1000000);
    size_t at = 0;
    for (const SealOf& seal : seal_list_) {
      if (Chance(0.2) && at + 2 * (seal_list_.size() + 1) < seals_.host.size()) at += 2;  // one that is none
      seals_.host[at++] = seal.exact;
      seals_.host[at++] = seal.coded;
    }
    seal_count_.host[0] = static_cast<int32_t>(at / 2);
    for (Array* array : {&query_start_, &lengths_, &coded_first_, &coded_count_, &coded_table_, &exact_table_,
                         &slots_, &seals_, &seal_count_})
      Send(*array);

    const bool fixed = world_.replays();
    step_ = {};
    step_.sequences = fixed ? options_.max_sequences : static_cast<int>(parts_.size()) + Random(2);
    step_.tokens = fixed ? tokens_ : token + Random(4);
    step_.most_queries = 0;
    for (const Part& part : parts_)
      step_.most_queries = std::max(step_.most_queries, static_cast<int>(part.tokens));
    if (fixed) step_.most_queries = engine_.queries;
    step_.seals = fixed || Chance(0.5) ? options_.max_seals : seal_count_.host[0];
    step_.among_coded = !writes;
    step_.query_start = query_start_.data();
    step_.lengths = lengths_.data();
    step_.coded_first = coded_first_.data();
    step_.coded_count = coded_count_.data();
    step_.coded_table = coded_table_.data();
    step_.coded_row = kCodedRow;
    step_.exact_table = exact_table_.data();
    step_.exact_row = kExactRow;
    // Rows go where the exact table has their blocks, said or not.
    if (fixed ? engine_.kv_heads % 2 == 0 : Chance(0.5)) step_.write_slots = slots_.data();
    step_.seal_pages = seals_.data();
    step_.seal_count = seal_count_.data();
    if (engine_.host_arrays) {
      step_.host_query_start = query_start_.host.data();
      step_.host_lengths = lengths_.host.data();
      step_.host_coded_first = coded_first_.host.data();
      step_.host_coded_count = coded_count_.host.data();
    }
  }

  // New random rows, rounded to the type; K has a mean, as keys have.
  void FillTensors() {
    std::normal_distribution<float> normal;
    for (Rows* rows : {&k_, &v_, &q_}) std::memset(rows->host.data(), 0xff, rows->host.size());
    int64_t token = 0;
    for (const Part& part : parts_) {
      Sequence& sequence = sequences_[Size(part.sequence)];
      for (int64_t t = 0; t < part.tokens; t++, token++)
        for (int l = 0; l < engine_.layers; l++) {
          for (const auto& [rows, mean] : {std::pair{&k_, 0.5f}, std::pair{&v_, 0.0f}}) {
            const MutableTensorView view = View(*rows, l, token);
            auto& shadow = rows == &k_ ? sequence.k : sequence.v;
            for (int64_t i = 0; i < rows->width; i++) {
              view.Set(Size(i), normal(rng_) + mean);
              shadow.push_back(F16ToF32(F32ToF16(TensorView{view.data, view.type}.At(Size(i)))));
            }
          }
          const MutableTensorView q = View(q_, l, token);
          for (int64_t i = 0; i < q_.width; i++) q.Set(Size(i), normal(rng_));
        }
      sequence.length += part.tokens;
    }
    for (Rows* rows : {&k_, &v_, &q_}) world_.Upload(rows->host.data(), rows->memory, rows->host.size());
    Poison(out_, out_bytes_ * Size(engine_.layers));
    Poison(lse_, Size(tokens_) * Size(engine_.heads) * sizeof(float) * Size(engine_.layers));
  }

  void Compute() {
    const bool scratch_sealed = std::any_of(seal_list_.begin(), seal_list_.end(),
                                            [&](const SealOf& seal) { return seal.exact >= exact_pages_; });
    const bool together = engine_.seal_together && !scratch_sealed;
    const auto plan = [&](void* stream) { return attention_->Plan(step_, stream); };
    const auto layers = [&](void* stream) {
      absl::Status status;
      for (int l = 0; l < engine_.layers && status.ok(); l++) {
        const PagedRows k{Data(k_, l), k_.stride}, v{Data(v_, l), v_.stride}, q{Data(q_, l), q_.stride};
        const MutablePagedRows out{out_ + Size(l) * out_bytes_, row_};
        float* const lse = reinterpret_cast<float*>(lse_) + Size(l) * Size(tokens_) * Size(engine_.heads);
        if ((l + steps_) % 2 == 0) {
          status.Update(attention_->WriteAttend(l, k, v, q, out, lse, stream));
        } else {
          status.Update(attention_->Write(l, k, v, stream));
          status.Update(attention_->Attend(l, q, out, lse, stream));
        }
        if (!together) status.Update(attention_->Seal(l, stream));
      }
      if (together) status.Update(attention_->SealLayers(stream));
      return status;
    };
    const absl::Status status = world_.Run(plan, layers);
    ASSERT_TRUE(status.ok()) << status;
    steps_++;
  }

  // A step that writes nothing: queries at the end of some of the tokens of each sequence.
  void Read(const std::vector<int>& order) {
    parts_.clear();
    seal_list_.clear();
    for (const int index : order) {
      const Sequence& sequence = sequences_[Size(index)];
      if (sequence.length == 0) continue;
      const int64_t end = 1 + Random(static_cast<int>(sequence.length)),
                    queries = std::min<int64_t>(end, 1 + Random(Chance(0.5) ? 4 : engine_.most_new));
      Part part{index, end - queries, queries, 0, 0, {}, {}};
      SetCoded(sequence, sequence.length / kBlockTokens, &part);
      const int64_t blocks = (end + kBlockTokens - 1) / kBlockTokens;
      const int64_t before = part.coded_first;
      part.coded_count = std::max<int64_t>(0, std::min(part.coded_count, blocks - before));
      if (part.coded_count == 0) part.coded_first = 0;
      // With a sliding window, what no query sees may be gone.
      const int64_t seen = std::max<int64_t>(0, part.first_position - engine_.window + 1);
      bool kept = true;
      for (int64_t b = 0; b < blocks; b++) {
        if (b >= part.coded_first && b < part.coded_first + part.coded_count) continue;
        const auto page = sequence.exact.find(b);
        kept = kept && (page != sequence.exact.end() || (engine_.window > 0 && b < seen / kBlockTokens));
        part.exact.push_back(page == sequence.exact.end() ? -1000000 : page->second);
        part.exact_blocks.push_back(b);
      }
      if (kept) parts_.push_back(std::move(part));
    }
    SetArrays(/*writes=*/false);
    std::normal_distribution<float> normal;
    for (int l = 0; l < engine_.layers; l++) {
      int64_t token = 0;
      for (const Part& part : parts_)
        for (int64_t t = 0; t < part.tokens; t++, token++)
          for (int64_t i = 0; i < q_.width; i++) View(q_, l, token).Set(Size(i), normal(rng_));
    }
    world_.Upload(q_.host.data(), q_.memory, q_.host.size());
    Poison(out_, out_bytes_ * Size(engine_.layers));
    Poison(lse_, Size(tokens_) * Size(engine_.heads) * sizeof(float) * Size(engine_.layers));
    const absl::Status status = world_.Run(
        [&](void* stream) { return attention_->Plan(step_, stream); },
        [&](void* stream) {
          absl::Status all;
          for (int l = 0; l < engine_.layers && all.ok(); l++)
            all.Update(attention_->Attend(
                l, {Data(q_, l), q_.stride}, {out_ + Size(l) * out_bytes_, row_},
                reinterpret_cast<float*>(lse_) + Size(l) * Size(tokens_) * Size(engine_.heads), stream));
          return all;
        });
    ASSERT_TRUE(status.ok()) << status;
    CheckOutputs();
  }

  // Copies of all pages in host memory.
  void Fetch() {
    host_coded_.resize(layers_.size());
    host_exact_.resize(layers_.size());
    for (size_t l = 0; l < layers_.size(); l++) {
      host_coded_[l].resize(coded_.block_bytes() * Size(coded_pages_));
      host_exact_[l].resize(exact_.block_bytes() * Size(exact_pages_));
      world_.Download(layers_[l].coded, host_coded_[l].data(), host_coded_[l].size());
      world_.Download(layers_[l].exact, host_exact_[l].data(), host_exact_[l].size());
    }
  }
  // Rows of a block of a sequence in the shadow: [64][head_dim] of one head, zeros behind the end.
  std::vector<float> ShadowRows(const std::vector<float>& shadow, const Sequence& sequence, size_t layer,
                                int head, int64_t block) const {
    const int64_t dim = engine_.head_dim, width = row_of(engine_.kv_heads);
    std::vector<float> rows(Size(kBlockTokens * dim));
    for (int64_t t = 0; t < kBlockTokens && block * kBlockTokens + t < sequence.length; t++) {
      const int64_t token = block * kBlockTokens + t;
      const auto* from =
          shadow.data() + Size((token * engine_.layers + static_cast<int64_t>(layer)) * width + head * dim);
      std::copy(from, from + dim, rows.data() + Size(t * dim));
    }
    return rows;
  }
  int TokensOf(const Sequence& sequence, int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kBlockTokens, sequence.length - block * kBlockTokens));
  }

  // Exact pages (those that live longer than a layer) hold the rows that were written.
  void CheckRows() {
    for (const Part& part : parts_) {
      const Sequence& sequence = sequences_[Size(part.sequence)];
      for (size_t i = 0; i < part.exact.size(); i++) {
        if (part.exact[i] >= exact_pages_) continue;
        const int64_t block = part.exact_blocks[i];
        for (size_t l = 0; l < layers_.size(); l++)
          for (int h = 0; h < engine_.kv_heads; h++) {
            const std::byte* const record = host_exact_[l].data() +
                                            exact_.block_bytes() * Size(part.exact[i]) +
                                            exact_.RecordOffset(0, h);
            for (const bool key : {true, false}) {
              std::vector<float> rows(Size(kBlockTokens * engine_.head_dim));
              DecodeHalf(ExactPair().k, key ? Side::kKey : Side::kValue, key ? exact_.k() : exact_.v(),
                         nullptr, key ? record : record + exact_.v_codes(), rows.data());
              const std::vector<float> wanted =
                  ShadowRows(key ? sequence.k : sequence.v, sequence, l, h, block);
              const size_t count = Size(TokensOf(sequence, block)) * Size(engine_.head_dim);
              ASSERT_TRUE(
                  std::equal(wanted.begin(), wanted.begin() + static_cast<ptrdiff_t>(count), rows.begin()))
                  << "sequence " << part.sequence << " block " << block << " layer " << l << " head " << h;
            }
          }
      }
    }
  }

  // Pages as Attend has seen them: exact ones from the shadow (scratch pages hold another layer by now).
  std::vector<std::byte> ExactBlock(const Sequence& sequence, size_t layer, int64_t block) const {
    std::vector<std::byte> page(exact_.block_bytes());
    for (int h = 0; h < engine_.kv_heads; h++) {
      std::byte* const record = page.data() + exact_.RecordOffset(0, h);
      for (const bool key : {true, false})
        EncodeHalf(ExactPair().k, key ? Side::kKey : Side::kValue, key ? exact_.k() : exact_.v(), nullptr,
                   ShadowRows(key ? sequence.k : sequence.v, sequence, layer, h, block).data(),
                   TokensOf(sequence, block), key ? record : record + exact_.v_codes());
    }
    return page;
  }

  void CheckOutputs() {
    std::vector<std::byte> outs(out_bytes_ * layers_.size());
    std::vector<float> lses(Size(tokens_) * Size(engine_.heads) * layers_.size());
    world_.Download(out_, outs.data(), outs.size());
    world_.Download(lse_, lses.data(), lses.size() * sizeof(float));
    for (size_t l = 0; l < layers_.size(); l++) {
      int64_t token = 0;
      for (const Part& part : parts_) {
        CheckPart(part, l, token, {outs.data() + l * out_bytes_, engine_.output_type},
                  lses.data() + l * Size(tokens_) * Size(engine_.heads));
        if (::testing::Test::HasFailure()) return;
        token += part.tokens;
      }
      for (size_t i = Size(token) * Size(engine_.heads); i < Size(tokens_) * Size(engine_.heads); i++)
        ASSERT_TRUE(std::isnan(lses[l * Size(tokens_) * Size(engine_.heads) + i])) << "padding was written";
    }
  }
  void CheckPart(const Part& part, size_t layer, int64_t token, TensorView out, const float* lse) {
    const Sequence& sequence = sequences_[Size(part.sequence)];
    std::vector<std::vector<std::byte>> exact;
    std::vector<std::byte*> first, middle, last;
    for (const int64_t block : part.exact_blocks) {
      exact.push_back(ExactBlock(sequence, layer, block));
      (part.coded_count > 0 && block < part.coded_first ? first : last).push_back(exact.back().data());
    }
    for (int64_t b = part.coded_first; b < part.coded_first + part.coded_count; b++)
      middle.push_back(host_coded_[layer].data() + coded_.block_bytes() * Size(sequence.coded[Size(b)]));
    const int64_t last_begin = (part.coded_first + part.coded_count) * kBlockTokens,
                  length = part.first_position + part.tokens;
    const Profile* profile = profiles_[layer].k.empty() ? nullptr : &profiles_[layer];
    std::vector<BlockRun> runs;
    if (!first.empty()) runs.push_back({&exact_, nullptr, first, 0, part.coded_first * kBlockTokens});
    if (!middle.empty())
      runs.push_back({&coded_, profile, middle, part.coded_first * kBlockTokens,
                      std::min(part.coded_count * kBlockTokens, length - part.coded_first * kBlockTokens)});
    if (length > last_begin) runs.push_back({&exact_, nullptr, last, last_begin, length - last_begin});
    std::vector<float> q(Size(part.tokens * row_)), wanted(q.size());
    std::vector<float> wanted_lse(Size(part.tokens) * Size(engine_.heads));
    for (int64_t t = 0; t < part.tokens; t++) {
      const MutableTensorView view = View(q_, static_cast<int>(layer), token + t);
      for (int64_t i = 0; i < row_; i++) q[Size(t * row_ + i)] = TensorView{view.data, view.type}.At(Size(i));
    }
    AttendItem item;
    item.runs = runs;
    item.q = q.data();
    item.queries = static_cast<int>(part.tokens);
    item.first_query_position = part.first_position;
    item.out = wanted.data();
    item.lse = wanted_lse.data();
    AttendArgs args;
    args.heads = engine_.heads;
    args.scale = options_.scale;
    args.window = engine_.window;
    args.softcap = engine_.softcap;
    args.sinks = engine_.sinks ? sinks_[layer].data() : nullptr;
    args.items = {&item, 1};
    const absl::Status status = ReferenceAttend(args);
    ASSERT_TRUE(status.ok()) << status;
    const double rounding = engine_.output_type == DataType::kF32   ? 0
                            : engine_.output_type == DataType::kF16 ? 1e-3
                                                                    : 8e-3;
    for (int64_t t = 0; t < part.tokens; t++)
      for (int h = 0; h < engine_.heads; h++) {
        double distance = 0, size = 0;
        for (int d = 0; d < engine_.head_dim; d++) {
          const int64_t at = int64_t{h} * engine_.head_dim + d;
          const double got = out.At(Size((token + t) * row_ + at)), want = wanted[Size(t * row_ + at)];
          distance += (got - want) * (got - want);
          size += want * want;
        }
        ASSERT_LE(std::sqrt(distance), (engine_.tolerance + rounding) * std::sqrt(size) + 1e-7)
            << "sequence " << part.sequence << " token " << t << " of " << part.tokens << " at "
            << part.first_position << " head " << h << " layer " << layer << " coded " << part.coded_first
            << "+" << part.coded_count;
        const double got = lse[Size(token + t) * Size(engine_.heads) + Size(h)],
                     want = wanted_lse[Size(t) * Size(engine_.heads) + Size(h)];
        ASSERT_LE(std::abs(got - want), 2 * engine_.tolerance + 2e-5 * std::abs(want))
            << "lse of sequence " << part.sequence << " token " << t << " head " << h << " layer " << layer;
      }
  }

  // Sealed pages have the bytes of the definition.
  void CheckSeals() {
    for (const SealOf& seal : seal_list_) {
      const Sequence& sequence = sequences_[Size(seal.sequence)];
      for (size_t l = 0; l < layers_.size(); l++)
        for (int h = 0; h < engine_.kv_heads; h++) {
          const std::byte* const record =
              host_coded_[l].data() + coded_.block_bytes() * Size(seal.coded) + coded_.RecordOffset(0, h);
          const HeadProfile* profile = profiles_[l].k.empty() ? nullptr : &profiles_[l].k[Size(h)];
          std::vector<std::byte> wanted(coded_.record_bytes());
          EncodeHalf(coded_.pair().k, Side::kKey, coded_.k(), profile, seal.block * kBlockTokens,
                     ShadowRows(sequence.k, sequence, l, h, seal.block).data(), kBlockTokens, wanted.data());
          EncodeHalf(coded_.pair().v, Side::kValue, coded_.v(), nullptr,
                     ShadowRows(sequence.v, sequence, l, h, seal.block).data(), kBlockTokens,
                     wanted.data() + coded_.v_codes());
          for (const auto& [begin, bytes] : {std::pair{size_t{0}, coded_.k().code_bytes},
                                             std::pair{coded_.v_codes(), coded_.v().code_bytes}})
            ASSERT_EQ(std::memcmp(wanted.data() + begin, record + begin, bytes), 0)
                << "codes of sequence " << seal.sequence << " block " << seal.block << " layer " << l
                << " head " << h << (begin == 0 ? " K" : " V");
          for (const auto& [half, begin] :
               {std::pair{coded_.k(), coded_.k_scales()}, std::pair{coded_.v(), coded_.v_scales()}})
            ASSERT_EQ(std::memcmp(wanted.data() + begin, record + begin,
                                  std::min(half.scale_bytes, Size(half.groups) * kBlockTokens * 2)),
                      0)
                << "scales of sequence " << seal.sequence << " block " << seal.block << " layer " << l;
        }
    }
  }

  // Exact pages of blocks that have left the window are free again.
  void End() {
    for (const Part& part : parts_) {
      Sequence& sequence = sequences_[Size(part.sequence)];
      const int64_t full = sequence.length / kBlockTokens;
      sequence.sealed = sequence.coded.size();
      for (auto it = sequence.exact.begin(); it != sequence.exact.end();) {
        const bool stays = it->first < FirstBlocks(sequence) || it->first >= full - engine_.last_blocks;
        if (!stays && it->second < exact_pages_) free_exact_.push_back(it->second);
        EXPECT_TRUE(!stays || it->second < exact_pages_);
        it = stays ? std::next(it) : sequence.exact.erase(it);
      }
    }
  }

  static constexpr int64_t kCodedRow = kMostBlocks + 1, kExactRow = kMostBlocks + 2;
  const Engine engine_;
  PagedWorld& world_;
  std::mt19937 rng_;
  std::vector<Sequence> sequences_;
  const int64_t row_ = row_of(engine_.heads);
  PagedOptions options_;
  BlockLayout coded_, exact_;
  int coded_pages_ = 0, exact_pages_ = 0, scratch_pages_ = 0;
  std::vector<int32_t> free_coded_, free_exact_;
  std::multiset<int32_t> shared_;  // coded pages that prefixes of others name
  std::vector<PagedLayer> layers_;
  std::vector<std::vector<float>> sinks_;
  std::vector<Profile> profiles_;
  std::deque<std::vector<HeadProfile>> keys_;  // that layers name
  int64_t tokens_ = 0;
  Rows k_, v_, q_;
  size_t out_bytes_ = 0;
  std::byte *out_ = nullptr, *lse_ = nullptr;
  Array query_start_, lengths_, coded_first_, coded_count_, coded_table_, exact_table_, slots_, seals_,
      seal_count_;
  std::unique_ptr<PagedAttention> attention_;
  PagedStep step_;
  int steps_ = 0;
  std::vector<Part> parts_;
  std::vector<SealOf> seal_list_;
  std::vector<std::vector<std::byte>> host_coded_, host_exact_;
};

// Random steps of an engine, unless the world replays and the engine's steps differ in bounds.
void RunSteps(const PagedWorldCase& world_case, const Engine& engine, int steps, uint32_t seed) {
  const std::unique_ptr<PagedWorld> world = world_case.make();
  if (world->replays() && engine.queries == 0) GTEST_SKIP() << "steps of unequal bounds are not recorded";
  MiniEngine mini(engine, *world, seed);
  ASSERT_TRUE(mini.ok());
  for (int i = 0; i < steps && !::testing::Test::HasFailure(); i++) {
    SCOPED_TRACE(::testing::Message() << "step " << i << " of seed " << seed);
    mini.Step();
  }
  if (!::testing::Test::HasFailure()) {
    EXPECT_EQ(mini.changed(), 0u);
  }
}

TEST_P(PagedConformance, RandomStepsGiveTheReferencesAttention) {
  for (uint32_t seed = 1; seed <= 2 && !HasFailure(); seed++) RunSteps(GetParam(), Engine{}, 20, seed);
}
TEST_P(PagedConformance, TypesPairsAndHeadDims) {
  Engine engine;
  engine.pair = "q8_0/turbo3";
  engine.head_dim = 128;
  engine.type = DataType::kF16;
  engine.output_type = DataType::kF16;
  RunSteps(GetParam(), engine, 12, 4);
  engine.pair = "turbo2/turbo2";
  engine.type = engine.output_type = DataType::kF32;
  RunSteps(GetParam(), engine, 8, 5);
  engine.pair = "f16/f16";
  engine.head_dim = 256;
  engine.output_type = DataType::kBf16;
  RunSteps(GetParam(), engine, 8, 6);
}
TEST_P(PagedConformance, ManyQueryHeads) {
  Engine engine;
  for (const int heads : {6, 14, 32, 80}) {  // 3, 7, 16 and 40 for each KV head
    engine.heads = heads;
    engine.most_new = 90;
    RunSteps(GetParam(), engine, 6, static_cast<uint32_t>(heads));
  }
}
TEST_P(PagedConformance, SlidingWindows) {
  Engine engine;
  for (const int64_t window : {1, 50, 64, 130, 300}) {
    engine.window = window;
    RunSteps(GetParam(), engine, 12, static_cast<uint32_t>(window));
  }
}
TEST_P(PagedConformance, SinksSoftcapsAndProfiles) {
  Engine engine;
  engine.sinks = engine.profile = true;
  engine.pair = "turbo4/turbo2";
  engine.head_dim = 128;
  RunSteps(GetParam(), engine, 12, 7);
  engine.softcap = 5;
  engine.sinks = false;
  RunSteps(GetParam(), engine, 12, 8);
}
TEST_P(PagedConformance, WithoutExactWindows) {
  Engine engine;
  engine.first_blocks = engine.last_blocks = 0;
  RunSteps(GetParam(), engine, 15, 9);
}
TEST_P(PagedConformance, SealsOfAllLayersTogether) {
  Engine engine;
  engine.seal_together = true;
  engine.most_new = 60;
  engine.layers = 3;
  RunSteps(GetParam(), engine, 20, 10);
}
TEST_P(PagedConformance, ChunksWithLengthsOnTheHost) {
  Engine engine;
  engine.host_arrays = true;
  engine.tolerance = 3e-3;  // other kernels, with queries and weights in f16
  engine.most_new = 300;
  engine.heads = 8;
  RunSteps(GetParam(), engine, 15, 11);
  engine.head_dim = 128;
  engine.window = 100;
  engine.sinks = engine.profile = true;
  engine.output_type = DataType::kBf16;
  RunSteps(GetParam(), engine, 12, 12);
}
// Steps of queries alone, before, among and behind the coded blocks.
TEST_P(PagedConformance, QueriesAmongCodedBlocks) {
  if (GetParam().make()->replays()) GTEST_SKIP() << "steps of unequal bounds are not recorded";
  Engine engine;
  engine.reads = true;
  engine.most_new = 150;
  for (const int heads : {4, 14, 80}) {
    engine.heads = heads;
    RunSteps(GetParam(), engine, 12, static_cast<uint32_t>(100 + heads));
  }
  engine.heads = 8;
  engine.first_blocks = 2;
  engine.profile = engine.sinks = true;
  engine.pair = "q8_0/turbo4";
  engine.host_arrays = true;
  engine.tolerance = 3e-3;  // steps that write have prefills
  RunSteps(GetParam(), engine, 12, 101);
  engine.window = 130;
  RunSteps(GetParam(), engine, 12, 102);
}
// Steps with equal bounds: worlds that replay record the first one.
TEST_P(PagedConformance, EqualStepsOfOneToken) {
  Engine engine;
  engine.queries = 1;
  RunSteps(GetParam(), engine, 100, 13);
  // As many units as a large GPU has multiprocessors: rows are written beside queries.
  engine.sequences = 12;
  engine.kv_heads = 8;
  engine.heads = 16;
  RunSteps(GetParam(), engine, 40, 15);
  engine.sequences = 20;
  engine.pair = "f16/f16";
  RunSteps(GetParam(), engine, 20, 16);
}
TEST_P(PagedConformance, EqualStepsOfSeveralTokens) {
  Engine engine;
  engine.queries = 5;
  engine.window = 150;
  engine.seal_together = true;
  RunSteps(GetParam(), engine, 80, 14);
}

// Keys that are coded after RoPE, with the transforms of their layer's heads.
constexpr const char* kCalibratedPairs[] = {"tide4/turbo4", "tide3/turbo3", "tide2/turbo2", "tide1/turbo2"};

TEST_P(PagedConformance, CalibratedKeys) {
  Engine engine;
  engine.layers = 3;
  for (const char* pair : kCalibratedPairs)
    for (const int dim : {64, 128})
      for (const int heads : {2, 16, 32}) {  // 1, 8 and 16 for each KV head
        SCOPED_TRACE(::testing::Message() << pair << " d " << dim << " heads " << heads);
        engine.pair = pair;
        engine.head_dim = dim;
        engine.heads = heads;
        engine.most_new = 90;
        RunSteps(GetParam(), engine, 5, static_cast<uint32_t>(200 + dim + heads));
      }
}
TEST_P(PagedConformance, CalibratedKeysWithSinksSoftcapsAndWindows) {
  Engine engine;
  engine.pair = "tide3/turbo3";
  engine.heads = 16;
  engine.sinks = true;
  engine.seal_together = true;
  engine.type = engine.output_type = DataType::kF16;
  RunSteps(GetParam(), engine, 10, 210);
  engine.head_dim = 128;
  engine.window = 130;
  engine.pair = "tide2/turbo2";
  RunSteps(GetParam(), engine, 10, 211);
  engine.window = 0;
  engine.softcap = 5;
  engine.first_blocks = engine.last_blocks = 0;
  engine.output_type = DataType::kBf16;
  RunSteps(GetParam(), engine, 10, 212);
}
TEST_P(PagedConformance, CalibratedKeysInChunksWithLengthsOnTheHost) {
  Engine engine;
  engine.host_arrays = true;
  engine.tolerance = 3e-3;
  engine.most_new = 300;
  engine.heads = 8;
  engine.pair = "tide3/turbo3";
  engine.head_dim = 128;
  RunSteps(GetParam(), engine, 12, 213);
  engine.pair = "tide2/turbo2";
  engine.head_dim = 64;
  engine.window = 100;
  engine.sinks = true;
  RunSteps(GetParam(), engine, 10, 214);
}
TEST_P(PagedConformance, CalibratedKeysAreReadAmongCodedBlocks) {
  if (GetParam().make()->replays()) GTEST_SKIP() << "steps of unequal bounds are not recorded";
  Engine engine;
  engine.reads = true;
  engine.most_new = 150;
  engine.first_blocks = 2;
  for (const int heads : {4, 16, 32}) {
    engine.heads = heads;
    engine.pair = heads == 16 ? "tide2/turbo2" : "tide3/turbo3";
    engine.head_dim = heads == 4 ? 64 : 128;
    RunSteps(GetParam(), engine, 8, static_cast<uint32_t>(220 + heads));
  }
}
TEST_P(PagedConformance, CalibratedKeysInEqualSteps) {
  Engine engine;
  for (const char* pair : {"tide3/turbo3", "tide2/turbo2"})
    for (const int dim : {64, 128}) {
      engine.pair = pair;
      engine.head_dim = dim;
      engine.queries = 1;
      engine.heads = dim == 64 ? 16 : 32;
      RunSteps(GetParam(), engine, 70, static_cast<uint32_t>(230 + dim));
      engine.queries = 5;
      engine.heads = 8;
      RunSteps(GetParam(), engine, 20, static_cast<uint32_t>(231 + dim));
    }
  // As many units as a large GPU has multiprocessors.
  engine.queries = 1;
  engine.sequences = 12;
  engine.kv_heads = 8;
  engine.heads = 64;
  RunSteps(GetParam(), engine, 20, 235);
}
// Little of everything, for tools that make it slow.
TEST_P(PagedConformance, CalibratedKeysInAFewSteps) {
  Engine engine;
  engine.sequences = 2;
  engine.layers = 2;
  engine.queries = 40;
  engine.heads = 16;
  for (const int dim : {64, 128}) {
    engine.pair = dim == 64 ? "tide2/turbo2" : "tide3/turbo3";
    engine.head_dim = dim;
    engine.host_arrays = dim == 128 && !GetParam().make()->replays();
    engine.tolerance = 3e-3;
    RunSteps(GetParam(), engine, 8, 240);
  }
}
TEST_P(PagedConformance, CalibratedKeysNeedTransformsThatFit) {
  const std::unique_ptr<PagedWorld> world = GetParam().make();
  PagedOptions options;
  options.shape = {1, 2, 64, 64};
  options.pair = *ParseCachePair("tide3/turbo3");
  options.heads = 2;
  options.scale = 0.125f;
  options.max_sequences = options.max_tokens = 1;
  options.max_coded_blocks = options.max_exact_blocks = options.exact_pages = 1;
  PagedLayer layer;
  layer.exact = world->Allocate(ExactPage(options).block_bytes());
  layer.coded = world->Allocate(CodedPage(options).block_bytes());
  const auto refused = [&](const std::vector<HeadProfile>& keys) {
    layer.keys = keys.empty() ? nullptr : keys.data();
    const absl::Status status = world->Make(options, {&layer, 1}).status();
    EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  const Profile before = test::TideProfile(options.shape, 3), after = test::AfterRope(before);
  EXPECT_EQ(refused(after.k), "");
  EXPECT_NE(refused({}).find("kvtide calibrate --keys after-rope"), std::string::npos);
  EXPECT_NE(refused(before.k).find("before RoPE"), std::string::npos);
  EXPECT_NE(refused(test::AfterRope(test::TideProfile({1, 2, 128, 128}, 3)).k).find("another model"),
            std::string::npos);
  std::vector<HeadProfile> keys = after.k;
  keys[1].widths.resize(keys[1].widths.size() - 1);
  EXPECT_NE(refused(keys).find("layer 0, head 1"), std::string::npos);
  keys = after.k;
  keys[1].transform[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(refused(keys).find("in a transform"), std::string::npos);
  keys = after.k;
  options.pair = *ParseCachePair("tide1/turbo2");
  keys[0].widths.resize(keys[0].widths.size() / kTideTypes * kLeastTideTypes);
  EXPECT_NE(refused(keys).find("older than the type"), std::string::npos);
  options.max_profiles = 2;
  EXPECT_NE(refused(after.k).find("max_profiles"), std::string::npos);
}

// What f16 does not hold is changed, and counted.
TEST_P(PagedConformance, CountsWhatItChanges) {
  const std::unique_ptr<PagedWorld> world = GetParam().make();
  if (world->replays()) GTEST_SKIP() << "one step";
  PagedOptions options;
  options.shape = {1, 1, 64, 64};
  options.pair = *ParseCachePair("turbo4/turbo4");
  options.heads = 1;
  options.scale = 0.125f;
  options.type = options.output_type = DataType::kF32;
  options.max_sequences = 1;
  options.max_tokens = 2;
  options.max_exact_blocks = options.exact_pages = 1;
  const BlockLayout exact = ExactPage(options);
  PagedLayer layer;
  layer.exact = world->Allocate(exact.block_bytes());
  std::vector<std::byte> page(exact.block_bytes());
  world->Upload(page.data(), layer.exact, page.size());
  auto attention = world->Make(options, {&layer, 1});
  ASSERT_TRUE(attention.ok()) << attention.status();
  std::vector<float> k(128, 0.5f), v(128, 1);
  k[3] = std::numeric_limits<float>::quiet_NaN();
  k[70] = 1e9f;
  v[5] = -std::numeric_limits<float>::infinity();
  v[6] = 65500;  // rounds to 65504
  std::byte* const memory = world->Allocate(4 * 512 + 64);
  world->Upload(k.data(), memory, 512);
  world->Upload(v.data(), memory + 512, 512);
  const int32_t numbers[] = {0, 2, /*length*/ 2, /*coded*/ 0, 0, /*exact page*/ 0, /*slots*/ 10, 11};
  std::byte* const arrays = memory + 2048;
  world->Upload(numbers, arrays, sizeof numbers);
  const auto* const at = reinterpret_cast<const int32_t*>(arrays);
  PagedStep step;
  step.sequences = 1;
  step.tokens = step.most_queries = 2;
  step.query_start = at;
  step.lengths = at + 2;
  step.coded_first = at + 3;
  step.coded_count = at + 4;
  step.exact_table = at + 5;
  step.exact_row = 1;
  step.write_slots = at + 6;
  const absl::Status status =
      world->Run([&](void* stream) { return (*attention)->Plan(step, stream); },
                 [&](void* stream) {
                   return (*attention)->Write(0, {memory, 64}, {memory + 512, 64}, stream);
                 });
  ASSERT_TRUE(status.ok()) << status;
  const auto changed = (*attention)->ChangedValues(nullptr);
  ASSERT_TRUE(changed.ok()) << changed.status();
  EXPECT_EQ(*changed, 3u);
  world->Download(layer.exact, page.data(), page.size());
  std::vector<float> rows(64 * 64);
  DecodeHalf(ExactPair().k, Side::kKey, exact.k(), nullptr, page.data(), rows.data());
  EXPECT_EQ(rows[10 * 64 + 3], 0);
  EXPECT_EQ(rows[11 * 64 + 6], 65504);
  DecodeHalf(ExactPair().v, Side::kValue, exact.v(), nullptr, page.data() + exact.v_codes(), rows.data());
  EXPECT_EQ(rows[10 * 64 + 5], -65504);
  EXPECT_EQ(rows[10 * 64 + 6], 65504);
}

// Rows of a sequence of length 0 belong to another object, which attends them over the same tensors.
TEST_P(PagedConformance, RowsOfSequencesWithoutLengthAreLeftAlone) {
  const std::unique_ptr<PagedWorld> world = GetParam().make();
  if (world->replays()) GTEST_SKIP() << "one step";
  PagedOptions options;
  options.shape = {1, 1, 64, 64};
  options.pair = *ParseCachePair("turbo4/turbo4");
  options.heads = 2;
  options.scale = 0.125f;
  options.type = options.output_type = DataType::kF32;
  options.max_sequences = options.max_exact_blocks = options.exact_pages = 3;
  options.max_tokens = 4;
  options.max_coded_blocks = 2;
  const BlockLayout exact = ExactPage(options), coded = CodedPage(options);
  PagedLayer layer;
  layer.exact = world->Allocate(3 * exact.block_bytes());
  layer.coded = world->Allocate(coded.block_bytes());
  const std::vector<std::byte> poison(3 * exact.block_bytes() + coded.block_bytes(), std::byte{0xff});
  world->Upload(poison.data(), layer.exact, 3 * exact.block_bytes());
  world->Upload(poison.data(), layer.coded, coded.block_bytes());
  auto attention = world->Make(options, {&layer, 1});
  ASSERT_TRUE(attention.ok()) << attention.status();
  // Rows: two of a sequence without length, one of a sequence of one token, one of another without length.
  std::vector<float> k(4 * 64, std::numeric_limits<float>::quiet_NaN()), v = k, q(4 * 128, NAN);
  for (size_t i = 0; i < 64; i++) {
    k[2 * 64 + i] = 0.5f;
    v[2 * 64 + i] = static_cast<float>(i);
    q[2 * 128 + i] = q[2 * 128 + 64 + i] = 1;
  }
  constexpr size_t kStride = 256;  // of out: rows have gaps between them
  const std::vector<float> untouched(4 * kStride + 8, 7);
  std::byte* const memory = world->Allocate(16384);
  world->Upload(k.data(), memory, 1024);
  world->Upload(v.data(), memory + 1024, 1024);
  world->Upload(q.data(), memory + 2048, 2048);
  std::byte *const out = memory + 4096, *const lse = out + 4 * kStride * sizeof(float);
  world->Upload(untouched.data(), out, untouched.size() * sizeof(float));
  const int32_t numbers[] = {0,
                             2,
                             3,
                             4,
                             /*lengths*/ 0,
                             1,
                             0,
                             /*coded first*/ 0,
                             0,
                             0,
                             /*coded count*/ 0,
                             0,
                             0,
                             /*exact pages*/ 0,
                             1,
                             2,
                             /*coded*/ 0,
                             0,
                             0};
  std::byte* const arrays = memory + 12288;
  world->Upload(numbers, arrays, sizeof numbers);
  const auto* const at = reinterpret_cast<const int32_t*>(arrays);
  PagedStep step;
  step.sequences = 3;
  step.tokens = 4;
  step.most_queries = 2;
  step.query_start = at;
  step.lengths = at + 4;
  step.coded_first = at + 7;
  step.coded_count = at + 10;
  step.exact_table = at + 13;
  step.coded_table = at + 16;
  step.exact_row = step.coded_row = 1;
  const absl::Status status = world->Run(
      [&](void* stream) { return (*attention)->Plan(step, stream); },
      [&](void* stream) -> absl::Status {
        const absl::Status written = (*attention)->Write(0, {memory, 64}, {memory + 1024, 64}, stream);
        if (!written.ok()) return written;
        return (*attention)
            ->Attend(0, {memory + 2048, 128}, {out, kStride}, reinterpret_cast<float*>(lse), stream);
      });
  ASSERT_TRUE(status.ok()) << status;
  const auto changed = (*attention)->ChangedValues(nullptr);
  ASSERT_TRUE(changed.ok()) << changed.status();
  EXPECT_EQ(*changed, 0u) << "rows of others were looked at";
  std::vector<float> outputs(untouched.size());
  world->Download(out, outputs.data(), outputs.size() * sizeof(float));
  for (size_t i = 0; i < 4 * kStride; i++) {
    const bool own = i / kStride == 2 && i % kStride < 128;
    ASSERT_NEAR(outputs[i], own ? static_cast<float>(i % 64) : 7.0f, own ? 1e-3 : 0) << i;
  }
  for (size_t row = 0; row < 4; row++)
    for (size_t h = 0; h < 2; h++)
      EXPECT_NEAR(outputs[4 * kStride + 2 * row + h], row == 2 ? 4.0f : 7.0f, 1e-5) << "row " << row;
  std::vector<std::byte> pages(3 * exact.block_bytes());
  world->Download(layer.exact, pages.data(), pages.size());
  for (const size_t page : {size_t{0}, size_t{2}})
    EXPECT_TRUE(std::all_of(pages.begin() + static_cast<std::ptrdiff_t>(page * exact.block_bytes()),
                            pages.begin() + static_cast<std::ptrdiff_t>((page + 1) * exact.block_bytes()),
                            [](std::byte byte) { return byte == std::byte{0xff}; }))
        << "page " << page;
}

TEST_P(PagedConformance, RefusesWhatDoesNotFit) {
  const std::unique_ptr<PagedWorld> world = GetParam().make();
  PagedOptions options;
  options.shape = {1, 1, 64, 64};
  options.pair = *ParseCachePair("turbo4/turbo4");
  options.heads = 1;
  options.scale = 0.125f;
  options.max_sequences = options.max_tokens = 1;
  options.max_exact_blocks = options.exact_pages = 1;
  PagedLayer layer;
  layer.exact = world->Allocate(ExactPage(options).block_bytes());
  EXPECT_EQ(world->Make(options, {}).status().code(), absl::StatusCode::kInvalidArgument);
  auto made = world->Make(options, {&layer, 1});
  ASSERT_TRUE(made.ok()) << made.status();
  PagedAttention& attention = **made;
  const PagedRows rows{layer.exact, 64};
  EXPECT_EQ(attention.Write(0, rows, rows, nullptr).code(), absl::StatusCode::kFailedPrecondition);
  PagedStep step;
  step.sequences = 2;
  EXPECT_EQ(attention.Plan(step, nullptr).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(attention.Plan(PagedStep{}, nullptr).ok());  // nothing to do is no error
  EXPECT_TRUE(attention.Write(0, rows, rows, nullptr).ok());
  EXPECT_EQ(attention.Write(1, rows, rows, nullptr).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(attention.Attend(0, {layer.exact, 8}, {layer.exact, 64}, nullptr, nullptr).code(),
            absl::StatusCode::kInvalidArgument);
  const MutablePagedRows out{layer.exact, 64};
  EXPECT_TRUE(attention.WriteAttend(0, rows, rows, rows, out, nullptr, nullptr).ok());
  for (const auto& [k, q] : {std::pair{PagedRows{layer.exact, 8}, rows}, std::pair{rows, PagedRows{}}})
    EXPECT_EQ(attention.WriteAttend(0, k, rows, q, out, nullptr, nullptr).code(),
              absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(attention.Seal(0, nullptr).ok());
  EXPECT_TRUE(attention.SealLayers(nullptr).ok());
}

}  // namespace

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PagedConformance);

}  // namespace kvtide::testing
