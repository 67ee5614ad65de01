#include "clients/cpp/direct_attention.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/cpp/client_impl.h"
#include "clients/cpp/convert.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Sequences whose tables are looked at again only when they change.
constexpr size_t kMostKnown = 1 << 16;

// A part of the arrays of a step.
template <class T>
struct Part {
  size_t offset = 0;  // bytes
  size_t count = 0;
  T* In(std::byte* base) const { return reinterpret_cast<T*>(base + offset); }
  const T* In(const std::byte* base) const { return reinterpret_cast<const T*>(base + offset); }
  StepArrays::Range Range(size_t first, size_t entries) const {
    return {offset + first * sizeof(T), entries * sizeof(T)};
  }
};

}  // namespace

class DirectAttention::Impl {
 public:
  Impl(Pool* pool, const DirectOptions& options)
      : pool_(pool), client_(pool->impl_.get()), device_(pool->impl_->direct.get()), options_(options) {}

  absl::Status Create(const Model& model);
  absl::StatusOr<DirectStep> Begin(std::span<const StepItem> items, void* stream, uint64_t after);
  absl::StatusOr<DirectStep> Pin(std::span<const PinnedItem> items, void* stream);
  // Whether the step at hand takes rows.
  absl::Status CheckWrites() const {
    if (!pinned_) return absl::OkStatus();
    return absl::FailedPreconditionError("the step at hand is pinned: it takes no rows (Begin one)");
  }
  // Calls run(attention, layer within it) for each pair of the step.
  template <class Function>
  absl::Status ForLayer(int layer, Function run) {
    if (layer < 0 || Size(layer) >= layers_.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " of ", layers_.size()));
    const auto& [group, index] = layers_[Size(layer)];
    bool any = false;
    for (PairKernels& of : groups_[group].pairs) {
      if (!of.used) continue;
      any = true;
      KVTIDE_RETURN_IF_ERROR(run(*of.attention, index));
    }
    if (!any) return absl::FailedPreconditionError("no step is planned: call Begin first");
    return absl::OkStatus();
  }
  absl::Status Seal(void* stream) {
    for (Group& group : groups_)
      for (PairKernels& of : group.pairs)
        if (of.used) KVTIDE_RETURN_IF_ERROR(of.attention->SealLayers(stream));
    return absl::OkStatus();
  }
  DirectDevice& device() const { return *device_; }
  Pool& pool() const { return *pool_; }
  size_t device_bytes() const {
    size_t sum = array_bytes_;
    for (const Group& group : groups_)
      for (const PairKernels& of : group.pairs) sum += of.attention->bytes();
    return sum;
  }
  // Marks that may still have work before them.
  void Retire(std::unique_ptr<StreamMark> mark) { spare_marks_.push_back(std::move(mark)); }

 private:
  // What is asked of a sequence: attention of its last `rows` tokens, new ones or queries, of `tokens`; 0 =
  // of all that it has or will have.
  struct Asked {
    SequenceId sequence = 0;
    int64_t rows = 0, tokens = 0;
  };
  // What stands in a row of the device's tables.
  struct Row {
    SequenceId sequence = 0;
    uint64_t version = 0;  // StepTable::version
  };
  // What is known of a sequence's table in a group.
  struct Known {
    uint64_t version = 0;  // StepTable::version
    int32_t coded_first = 0, coded_count = 0;
    size_t pair = 0;  // index into Group::pairs
  };
  // The sequences of one pair in a group. Those of other pairs have length 0 in its arrays: it leaves their
  // rows alone.
  struct PairKernels {
    CachePair pair;
    PagedOptions options;
    std::unique_ptr<PagedAttention> attention;
    Part<int32_t> lengths, coded_first, coded_count, profiles, seal_count, seal_profiles, seal_pages;
    std::vector<int32_t> host_lengths, host_first, host_count;
    // Profiles on the device: 0 = none, then by their hash, the one that was used longest ago goes.
    struct Slot {
      uint64_t hash = 0, used = 0;
    };
    std::vector<Slot> slots;
    bool used = false;  // in the step at hand
    int32_t seals = 0;  // likewise
    // From the first of its arrays to the last.
    StepArrays::Range arrays() const {
      return {lengths.offset, seal_pages.offset + seal_pages.count * sizeof(int32_t) - lengths.offset};
    }
  };
  struct Group {
    GroupShape shape;
    int64_t window = 0;
    PagedOptions options;                    // of all pairs
    Part<int32_t> coded_table, exact_table;  // [max_sequences][blocks_]
    std::vector<Row> rows;
    std::map<SequenceId, Known> known;
    std::vector<PairKernels> pairs;
  };

  template <class T>
  Part<T> Take(size_t count) {
    const Part<T> part{bytes_, count};
    bytes_ = (bytes_ + count * sizeof(T) + 127) / 128 * 128;
    return part;
  }
  void MakeGroup(const v1::LayerGroup& told, const Model& model);
  // The kernels of a pair in a group, made if there are none yet. Then the arrays are too small (MakeArrays).
  absl::StatusOr<size_t> FindPair(Group& group, CachePair pair);
  // Of all that was taken so far. Tables have to be sent again.
  absl::Status MakeArrays();
  absl::Status CheckBounds(std::span<const Asked> items) const;
  absl::StatusOr<DirectStep> Run(std::span<const Asked> items, v1::SessionRequest* message, void* stream);
  absl::Status Look(std::span<const Asked> items, const StepView& view);
  absl::Status Fill(std::span<const Asked> items, const StepView& view, void* stream);
  absl::Status FillRow(size_t g, size_t item, const Asked& of, const StepView& view, std::byte* host,
                       std::vector<StepArrays::Range>* ranges);
  absl::Status FillSeals(size_t g, std::span<const Asked> items, const StepView& view, std::byte* host);
  absl::Status Plan(std::span<const Asked> items, void* stream);
  absl::Status Classify(const StepTable& table, Group& group, Known* known);
  absl::StatusOr<bool> IsCoded(int kind, CachePair pair);
  absl::StatusOr<int32_t> ProfileSlot(Group& group, PairKernels& of, const StepView& view, size_t item,
                                      size_t g, void* stream);
  const StepTable& TableOf(const StepView& view, size_t item, size_t g) const {
    return *view.tables[item * groups_.size() + g];
  }

  Pool* const pool_;
  Client::Impl* const client_;
  DirectDevice* const device_;
  DirectOptions options_;
  std::vector<CachePair> named_;  // DirectOptions::pairs
  const PoolSlab* slab_ = nullptr;
  std::vector<Group> groups_;
  std::vector<std::pair<size_t, int>> layers_;  // of the model: group, and layer within it
  struct Kind {
    bool here = false, exact = false;
    CachePair pair;
  };
  std::vector<Kind> kinds_;
  size_t bytes_ = 0;        // of the arrays
  size_t array_bytes_ = 0;  // of all that were made
  int64_t blocks_ = 0;      // of a sequence, at most
  Part<int32_t> query_start_;
  std::vector<std::unique_ptr<StepArrays>> arrays_;  // the last ones; work under way may read those before
  std::vector<int32_t> host_query_start_ = {0};
  std::vector<std::unique_ptr<StreamMark>> spare_marks_;
  uint64_t steps_ = 0;
  bool pinned_ = false;       // the step at hand
  bool among_coded_ = false;  // likewise: some query stands before the end of its sequence's coded blocks
};

absl::Status DirectAttention::Impl::Create(const Model& model) {
  const std::span<const PoolSlab> pool = client_->carrier->pool();
  if (device_ == nullptr || pool.empty())
    return absl::FailedPreconditionError(
        absl::StrCat("this pool is not mapped (way: ", WayName(pool_->way()),
                     "); connect to direct:unix:/path, or embedded, with PoolOptions::direct_device"));
  if (pool.size() > 1)
    return absl::FailedPreconditionError(
        "the pool lies on several devices of this engine; name one (a kvtided for each device, or its UUID)");
  slab_ = &pool[0];
  if (slab_->bytes / kPoolUnit > INT32_MAX)
    return absl::InvalidArgumentError(
        absl::StrCat("a pool of ", slab_->bytes, " bytes; the most is 256 GiB"));
  for (const std::string& name : options_.pairs) {
    auto pair = ParseCachePair(name);
    if (!pair.ok()) return Annotate(pair.status(), "DirectOptions::pairs");
    named_.push_back(*pair);
  }
  if (options_.graphs && named_.empty())
    return absl::InvalidArgumentError(
        "steps that replay a graph launch the kernels of pairs that were known before: name them in "
        "DirectOptions::pairs");
  if (options_.max_new_tokens == 0) options_.max_new_tokens = options_.max_sequences;
  if (options_.max_seals == 0) options_.max_seals = options_.max_sequences;
  if (options_.max_sequences < 1 || options_.max_new_tokens < options_.max_sequences ||
      options_.max_seals < 1 || options_.max_sequence_tokens < 1)
    return absl::InvalidArgumentError(
        "bounds of steps are positive, and max_new_tokens is at least max_sequences");
  blocks_ = DivideUp(options_.max_sequence_tokens, int64_t{kBlockTokens});

  v1::SessionRequest message;
  ToProto(model, message.mutable_register_model()->mutable_model());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_->carrier->Call(&message, &answer));
  layers_.resize(model.layers.size());
  query_start_ = Take<int32_t>(Size(options_.max_sequences) + 1);
  for (const v1::LayerGroup& group : answer.register_model().groups()) MakeGroup(group, model);
  for (Group& group : groups_)
    for (const CachePair pair : named_) KVTIDE_RETURN_IF_ERROR(FindPair(group, pair).status());
  return MakeArrays();
}

void DirectAttention::Impl::MakeGroup(const v1::LayerGroup& told, const Model& model) {
  Group& group = groups_.emplace_back();
  group.shape = {told.layers_size(), told.kv_heads(), told.head_dim_k(), told.head_dim_v()};
  group.window = told.window();
  const ModelLayer& like = model.layers.at(Size(told.layers(0)));
  PagedOptions& paged = group.options;
  paged.shape = {1, told.kv_heads(), told.head_dim_k(), told.head_dim_v()};
  paged.pool = true;
  paged.heads = like.query_heads;
  paged.scale = options_.scale.value_or(
      like.scale != 0 ? like.scale : 1 / std::sqrt(static_cast<float>(told.head_dim_k())));
  paged.softcap = options_.softcap.value_or(like.softcap);
  paged.window = told.window();
  paged.type = options_.type;
  paged.output_type = options_.output_type;
  paged.max_sequences = options_.max_sequences;
  paged.max_tokens = options_.max_new_tokens;
  paged.max_exact_blocks = static_cast<int>(blocks_);
  paged.exact_pages = static_cast<int>(slab_->bytes / kPoolUnit);
  paged.prefill_bytes = options_.prefill_bytes;
  for (int l = 0; l < told.layers_size(); l++) layers_.at(Size(told.layers(l))) = {groups_.size() - 1, l};
  const size_t sequences = Size(options_.max_sequences);
  group.coded_table = Take<int32_t>(sequences * Size(blocks_));
  group.exact_table = Take<int32_t>(sequences * Size(blocks_));
  group.rows.resize(sequences);
}

absl::StatusOr<size_t> DirectAttention::Impl::FindPair(Group& group, CachePair pair) {
  for (size_t i = 0; i < group.pairs.size(); i++)
    if (group.pairs[i].pair == pair) return i;
  if (!named_.empty() && std::find(named_.begin(), named_.end(), pair) == named_.end())
    return absl::InvalidArgumentError(
        absl::StrCat("the sequence is coded as ", PairName(pair), ", this object was made for ",
                     absl::StrJoin(options_.pairs, ", "), "; name it in DirectOptions::pairs"));
  PairKernels of;
  of.pair = pair;
  of.options = group.options;
  PagedOptions& paged = of.options;
  paged.pair = pair;
  const bool coding = !(pair == ExactPair());
  paged.max_coded_blocks = coding ? static_cast<int>(blocks_) : 0;
  paged.max_seals = coding ? options_.max_seals : 0;
  // Steps that follow each other, and blocks that are sealed meanwhile, each with another profile.
  paged.max_profiles = Info(pair.k).storage == Storage::kCodes ? 1 + 3 * options_.max_sequences : 0;
  const BlockLayout coded(group.shape, pair), exact(group.shape, ExactPair());
  std::vector<PagedLayer> layers;
  for (int l = 0; l < group.shape.layers; l++) {
    PagedLayer& layer = layers.emplace_back();
    layer.coded = slab_->data + coded.RecordOffset(l, 0);
    layer.exact = slab_->data + exact.RecordOffset(l, 0);
  }
  auto attention = device_->MakeAttention(paged, layers);
  if (!attention.ok())
    return Annotate(attention.status(),
                    absl::StrCat("layer group ", &group - groups_.data(), ", ", PairName(pair)));
  of.attention = *std::move(attention);
  const size_t sequences = Size(options_.max_sequences), seals = Size(options_.max_seals);
  of.lengths = Take<int32_t>(sequences);
  of.coded_first = Take<int32_t>(sequences);
  of.coded_count = Take<int32_t>(sequences);
  of.profiles = Take<int32_t>(sequences);
  of.seal_count = Take<int32_t>(1);
  of.seal_profiles = Take<int32_t>(seals);
  of.seal_pages = Take<int32_t>(2 * seals);
  of.slots.resize(Size(std::max(1, paged.max_profiles)));
  group.pairs.push_back(std::move(of));
  return group.pairs.size() - 1;
}

absl::Status DirectAttention::Impl::MakeArrays() {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<StepArrays> made, device_->MakeArrays(bytes_));
  arrays_.push_back(std::move(made));
  array_bytes_ += bytes_;
  for (Group& group : groups_) std::fill(group.rows.begin(), group.rows.end(), Row{});
  return absl::OkStatus();
}

// Whether blocks of this kind are coded, in a sequence of this pair.
absl::StatusOr<bool> DirectAttention::Impl::IsCoded(int kind, CachePair pair) {
  if (Size(kind) >= kinds_.size()) {
    kinds_.clear();
    for (const BlockKind& known : client_->step_tables.kinds()) {
      KVTIDE_ASSIGN_OR_RETURN(const CachePair of, ParseCachePair(known.pair));
      kinds_.push_back({known.tier == slab_->tier && known.device == slab_->device, of == ExactPair(), of});
    }
  }
  const Kind& of = kinds_.at(Size(kind));
  if (of.here && (of.exact || of.pair == pair)) return !of.exact;
  if (of.here)
    return absl::UnimplementedError(absl::StrCat("blocks are coded as ", PairName(of.pair),
                                                 " in a sequence of ", PairName(pair),
                                                 "; the direct way reads one pair of each sequence"));
  const BlockKind there = client_->step_tables.kinds().at(Size(kind));
  return absl::FailedPreconditionError(
      absl::StrCat("blocks lie in tier ", there.tier, " on ", there.device, ", this engine has mapped ",
                   slab_->tier, " on ", slab_->device, "; create the sequence with device ", slab_->device));
}

// Where the coded blocks stand: exact ones, coded ones, exact ones.
absl::Status DirectAttention::Impl::Classify(const StepTable& table, Group& group, Known* known) {
  KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, ParseCachePair(table.pair));
  KVTIDE_ASSIGN_OR_RETURN(known->pair, FindPair(group, pair));
  int64_t at = 0;
  const auto count = static_cast<int64_t>(table.blocks.size());
  const auto skip = [&](bool coded) -> absl::Status {
    int last = -1;
    for (; at < count; at++) {
      const int kind = table.blocks[Size(at)].kind;
      if (kind != last) {
        KVTIDE_ASSIGN_OR_RETURN(const bool is, IsCoded(kind, pair));
        if (is != coded) break;
        last = kind;
      }
    }
    return absl::OkStatus();
  };
  KVTIDE_RETURN_IF_ERROR(skip(false));
  const int64_t first = table.first_block + at;
  KVTIDE_RETURN_IF_ERROR(skip(true));
  const int64_t end = table.first_block + at;
  KVTIDE_RETURN_IF_ERROR(skip(false));
  if (at != count)
    return absl::UnimplementedError(
        "exact blocks stand between coded ones (their seals have failed); the direct way does not "
        "read such a sequence: evict and prefetch it, or append to it");
  if (table.first_block + count > blocks_)
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", table.first_block + count,
                                                   " blocks, max_sequence_tokens is ",
                                                   options_.max_sequence_tokens));
  known->coded_first = static_cast<int32_t>(first == end ? 0 : first);
  known->coded_count = static_cast<int32_t>(end - first);
  if (group.window > 0 && end > first) {
    if (first > table.first_block)
      return absl::UnimplementedError(
          "a sequence with a sliding window keeps exact blocks before coded ones; create it with "
          "exact_window.first_blocks 0");
    known->coded_first = 0;  // what is before the window is not read
    known->coded_count = static_cast<int32_t>(end);
  }
  return absl::OkStatus();
}

// Looks at tables that have changed, and makes what their pairs need.
absl::Status DirectAttention::Impl::Look(std::span<const Asked> items, const StepView& view) {
  const size_t bytes = bytes_;
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    if (group.known.size() > kMostKnown) group.known.clear();
    for (size_t i = 0; i < items.size(); i++) {
      const StepTable& table = TableOf(view, i, g);
      Known& known = group.known[items[i].sequence];
      if (known.version == table.version) continue;
      known.version = 0;
      if (const absl::Status status = Classify(table, group, &known); !status.ok())
        return Annotate(status, absl::StrCat("items[", i, "]"));
      known.version = table.version;
    }
  }
  return bytes == bytes_ ? absl::OkStatus() : MakeArrays();
}

absl::Status DirectAttention::Impl::FillRow(size_t g, size_t item, const Asked& of, const StepView& view,
                                            std::byte* host, std::vector<StepArrays::Range>* ranges) {
  Group& group = groups_[g];
  const StepTable& table = TableOf(view, item, g);
  const auto end = table.first_block + static_cast<int64_t>(table.blocks.size());
  const Known& known = group.known.at(of.sequence);
  PairKernels& kernels = group.pairs[known.pair];
  const int64_t held = view.starts[item] + (pinned_ ? 0 : of.rows), tokens = of.tokens > 0 ? of.tokens : held;
  if (tokens > held || of.rows > tokens)
    return absl::InvalidArgumentError(
        absl::StrCat(of.rows, " queries at the end of ", tokens, " tokens, the sequence has ", held));
  if (pinned_ && group.window > 0) {
    const int64_t seen = std::max<int64_t>(0, tokens - of.rows - group.window + 1);
    if (seen / kBlockTokens < table.first_block)
      return absl::OutOfRangeError(absl::StrCat("the query at ", tokens - of.rows, " sees tokens from ", seen,
                                                " on, but those before ", table.first_block * kBlockTokens,
                                                " have left the sliding window; ask later positions"));
  }
  // Of the coded blocks, those that the queries see.
  int32_t count = known.coded_count;
  if (count > 0 && pinned_) {
    const int64_t coded_end =
        std::min(known.coded_first + int64_t{count}, DivideUp(tokens, int64_t{kBlockTokens}));
    count = static_cast<int32_t>(std::max<int64_t>(0, coded_end - known.coded_first));
    among_coded_ |= count > 0 && tokens - of.rows < coded_end * kBlockTokens;
  }
  kernels.host_lengths[item] = static_cast<int32_t>(tokens);
  kernels.host_first[item] = count == 0 ? 0 : known.coded_first;
  kernels.host_count[item] = count;
  Row& row = group.rows[item];
  if (row.sequence == of.sequence && row.version == known.version) return absl::OkStatus();
  row = {of.sequence, known.version};
  const size_t first = item * Size(blocks_);
  int32_t* const coded = group.coded_table.In(host) + first;
  int32_t* const exact = group.exact_table.In(host) + first;
  const int64_t coded_end = known.coded_first + known.coded_count;
  for (int64_t b = table.first_block; b < end; b++) {
    const StepBlock& block = table.blocks[Size(b - table.first_block)];
    const auto page = static_cast<int32_t>(block.offset / kPoolUnit);
    if (b >= known.coded_first && b < coded_end) {
      coded[b] = page;
    } else {
      exact[b < known.coded_first ? b : b - known.coded_count] = page;
    }
  }
  if (known.coded_count > 0)
    ranges->push_back(group.coded_table.Range(first + Size(known.coded_first), Size(known.coded_count)));
  ranges->push_back(group.exact_table.Range(first, Size(end - known.coded_count)));
  return absl::OkStatus();
}

absl::StatusOr<int32_t> DirectAttention::Impl::ProfileSlot(Group& group, PairKernels& of,
                                                           const StepView& view, size_t item, size_t g,
                                                           void* stream) {
  const uint64_t hash = TableOf(view, item, g).profile;
  if (hash == 0 || of.options.max_profiles == 0) return 0;
  size_t oldest = 1;
  for (size_t i = 1; i < of.slots.size(); i++) {
    if (of.slots[i].hash == hash) {
      of.slots[i].used = steps_;
      return static_cast<int32_t>(i);
    }
    if (of.slots[i].used < of.slots[oldest].used) oldest = i;
  }
  v1::SessionRequest message;
  v1::GetStepProfileRequest& request = *message.mutable_get_step_profile();
  request.set_step_id(view.id);
  request.set_item(static_cast<int32_t>(item));
  request.set_group(static_cast<int32_t>(g));
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_->carrier->Call(&message, &answer));
  const v1::GetStepProfileResponse& profile = answer.get_step_profile();
  const int64_t values = int64_t{group.shape.layers} * group.shape.kv_heads * group.shape.head_dim_k;
  const auto wrong = [values](int size) { return size != 0 && size != values; };
  if (profile.profile() != hash || wrong(profile.mean_size()) || wrong(profile.gain_size()))
    return absl::InternalError("the profile that kvtided sent is another one");
  KVTIDE_RETURN_IF_ERROR(of.attention->SetProfile(
      static_cast<int>(oldest), profile.mean_size() == 0 ? nullptr : profile.mean().data(),
      profile.gain_size() == 0 ? nullptr : profile.gain().data(), stream));
  of.slots[oldest] = {hash, steps_};
  return static_cast<int32_t>(oldest);
}

absl::Status DirectAttention::Impl::FillSeals(size_t g, std::span<const Asked> items, const StepView& view,
                                              std::byte* host) {
  Group& group = groups_[g];
  for (const v1::StepSeal& seal : view.seals) {
    if (Size(seal.group()) != g) continue;
    const auto item = Size(seal.item());
    PairKernels* const of =
        item < items.size() ? &group.pairs[group.known.at(items[item].sequence).pair] : nullptr;
    if (of == nullptr || seal.pair() != PairName(of->pair) || of->seals >= options_.max_seals)
      return absl::InternalError("kvtided asks for a seal that it was not told of");
    of->seal_pages.In(host)[2 * of->seals] = static_cast<int32_t>(seal.source_offset() / kPoolUnit);
    of->seal_pages.In(host)[2 * of->seals + 1] = static_cast<int32_t>(seal.target_offset() / kPoolUnit);
    of->seal_profiles.In(host)[of->seals++] = of->profiles.In(host)[item];
  }
  return absl::OkStatus();
}

// The arrays of the step, on the device.
absl::Status DirectAttention::Impl::Fill(std::span<const Asked> items, const StepView& view, void* stream) {
  KVTIDE_RETURN_IF_ERROR(Look(items, view));
  among_coded_ = pinned_ && options_.graphs;
  KVTIDE_ASSIGN_OR_RETURN(std::byte* const host, arrays_.back()->Host());
  std::vector<StepArrays::Range> ranges;
  int32_t* const query_start = query_start_.In(host);
  query_start[0] = 0;
  for (size_t i = 0; i < items.size(); i++)
    query_start[i + 1] = query_start[i] + static_cast<int32_t>(items[i].rows);
  host_query_start_.assign(query_start, query_start + items.size() + 1);
  ranges.push_back({query_start_.offset, (items.size() + 1) * sizeof(int32_t)});
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    for (PairKernels& of : group.pairs) {
      of.used = options_.graphs;
      of.seals = 0;
      for (std::vector<int32_t>* const values : {&of.host_lengths, &of.host_first, &of.host_count})
        values->assign(items.size(), 0);
      std::fill_n(of.profiles.In(host), items.size(), 0);
    }
    for (size_t i = 0; i < items.size(); i++) {
      PairKernels& of = group.pairs[group.known.at(items[i].sequence).pair];
      of.used = true;
      if (const absl::Status status = FillRow(g, i, items[i], view, host, &ranges); !status.ok())
        return Annotate(status, absl::StrCat("items[", i, "]"));
      KVTIDE_ASSIGN_OR_RETURN(of.profiles.In(host)[i], ProfileSlot(group, of, view, i, g, stream));
    }
    KVTIDE_RETURN_IF_ERROR(FillSeals(g, items, view, host));
    for (PairKernels& of : group.pairs) {
      if (!of.used) continue;
      std::copy(of.host_lengths.begin(), of.host_lengths.end(), of.lengths.In(host));
      std::copy(of.host_first.begin(), of.host_first.end(), of.coded_first.In(host));
      std::copy(of.host_count.begin(), of.host_count.end(), of.coded_count.In(host));
      *of.seal_count.In(host) = of.seals;
      // What lies side by side and is always new goes in one piece.
      ranges.push_back(of.arrays());
    }
  }
  return arrays_.back()->Upload(ranges, stream);
}

// Of all pairs of the step, after Fill.
absl::Status DirectAttention::Impl::Plan(std::span<const Asked> items, void* stream) {
  int64_t most = 0;
  for (const Asked& item : items) most = std::max(most, item.rows);
  const std::byte* const device = arrays_.back()->device();
  for (Group& group : groups_) {
    for (PairKernels& of : group.pairs) {
      if (!of.used) continue;
      PagedStep step;
      step.sequences = static_cast<int>(items.size());
      step.tokens = host_query_start_.back();
      step.most_queries = static_cast<int>(most);
      step.among_coded = among_coded_;
      step.seals = of.options.max_seals == 0 ? 0 : options_.graphs ? options_.max_seals : of.seals;
      step.query_start = query_start_.In(device);
      step.lengths = of.lengths.In(device);
      step.coded_first = of.coded_first.In(device);
      step.coded_count = of.coded_count.In(device);
      step.coded_table = group.coded_table.In(device);
      step.coded_row = step.exact_row = blocks_;
      step.exact_table = group.exact_table.In(device);
      step.seal_pages = of.seal_pages.In(device);
      step.seal_count = of.seal_count.In(device);
      step.profiles = of.profiles.In(device);
      step.seal_profiles = of.seal_profiles.In(device);
      if (most > 1 && options_.prefill_bytes > 0) {
        step.host_query_start = host_query_start_.data();
        step.host_lengths = of.host_lengths.data();
        step.host_coded_first = of.host_first.data();
        step.host_coded_count = of.host_count.data();
      }
      KVTIDE_RETURN_IF_ERROR(of.attention->Plan(step, stream));
    }
  }
  return absl::OkStatus();
}

absl::Status DirectAttention::Impl::CheckBounds(std::span<const Asked> items) const {
  int64_t tokens = 0;
  for (const Asked& item : items) tokens += std::max<int64_t>(0, item.rows);
  if (items.size() <= Size(options_.max_sequences) && tokens <= options_.max_new_tokens)
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("a step of ", items.size(), " sequences and ", tokens,
                                                 " new tokens; made for ", options_.max_sequences, " and ",
                                                 options_.max_new_tokens));
}

absl::StatusOr<DirectStep> DirectAttention::Impl::Begin(std::span<const StepItem> items, void* stream,
                                                        uint64_t after) {
  std::vector<Asked> asked;
  for (const StepItem& item : items) asked.push_back({item.sequence, item.new_tokens, 0});
  v1::SessionRequest message;
  v1::BeginStepRequest& request = RequestStep(items, after, &message);
  request.set_mapped(true);
  request.set_most_seals(options_.max_seals);
  return Run(asked, &message, stream);
}

absl::StatusOr<DirectStep> DirectAttention::Impl::Pin(std::span<const PinnedItem> items, void* stream) {
  std::vector<Asked> asked;
  std::vector<SequenceId> sequences;
  for (const PinnedItem& item : items) {
    if (item.queries < 1 || item.tokens < 0)
      return absl::InvalidArgumentError(absl::StrCat("items[", asked.size(), "]: ", item.queries,
                                                     " queries at the end of ", item.tokens, " tokens"));
    asked.push_back({item.sequence, item.queries, item.tokens});
    sequences.push_back(item.sequence);
  }
  v1::SessionRequest message;
  RequestPin(sequences, &message).set_mapped(true);
  return Run(asked, &message, stream);
}

// Sends what begins a step, and brings it to the device.
absl::StatusOr<DirectStep> DirectAttention::Impl::Run(std::span<const Asked> items,
                                                      v1::SessionRequest* message, void* stream) {
  KVTIDE_RETURN_IF_ERROR(CheckBounds(items));
  KVTIDE_ASSIGN_OR_RETURN(StepView view, client_->step_tables.Begin(client_->carrier.get(), message));
  pinned_ = message->has_pin_step();
  steps_++;
  absl::Status status = Fill(items, view, stream);
  if (status.ok()) status = Plan(items, stream);
  for (size_t i = 0; i < items.size() && pinned_; i++)
    view.starts[i] = (items[i].tokens > 0 ? items[i].tokens : view.starts[i]) - items[i].rows;
  const int64_t tokens = host_query_start_.back();
  DirectStep begun{view.id, view.starts, tokens, static_cast<int>(view.seals.size()), nullptr, false};
  if (status.ok() && spare_marks_.empty()) {
    absl::StatusOr<std::unique_ptr<StreamMark>> mark = device_->MakeMark();
    status = mark.status();
    if (mark.ok()) spare_marks_.push_back(*std::move(mark));
  }
  if (!status.ok()) {
    // What stands on the device is not known any more.
    for (Group& group : groups_) {
      std::fill(group.rows.begin(), group.rows.end(), Row{});
      for (PairKernels& of : group.pairs) of.used = false;
    }
    pool_->RollBackStep(view.id).IgnoreError();
    return status;
  }
  begun.mark = std::move(spare_marks_.back());
  spare_marks_.pop_back();
  return begun;
}

DirectAttention::DirectAttention(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DirectAttention::~DirectAttention() = default;

absl::StatusOr<std::unique_ptr<DirectAttention>> DirectAttention::Make(Pool* pool, const Model& model,
                                                                       const DirectOptions& options) {
  auto impl = std::make_unique<Impl>(pool, options);
  KVTIDE_RETURN_IF_ERROR(impl->Create(model));
  return std::unique_ptr<DirectAttention>(new DirectAttention(std::move(impl)));
}

absl::StatusOr<DirectStep> DirectAttention::Begin(std::span<const StepItem> items, void* stream,
                                                  uint64_t after) {
  return impl_->Begin(items, stream, after);
}

absl::StatusOr<DirectStep> DirectAttention::Pin(std::span<const PinnedItem> items, void* stream) {
  return impl_->Pin(items, stream);
}

absl::Status DirectAttention::Write(int layer, PagedRows k, PagedRows v, void* stream) {
  KVTIDE_RETURN_IF_ERROR(impl_->CheckWrites());
  return impl_->ForLayer(
      layer, [&](PagedAttention& attention, int at) { return attention.Write(at, k, v, stream); });
}

absl::Status DirectAttention::Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void* stream) {
  return impl_->ForLayer(
      layer, [&](PagedAttention& attention, int at) { return attention.Attend(at, q, out, lse, stream); });
}

absl::Status DirectAttention::WriteAttend(int layer, PagedRows k, PagedRows v, PagedRows q,
                                          MutablePagedRows out, float* lse, void* stream) {
  KVTIDE_RETURN_IF_ERROR(impl_->CheckWrites());
  return impl_->ForLayer(layer, [&](PagedAttention& attention, int at) {
    return attention.WriteAttend(at, k, v, q, out, lse, stream);
  });
}

absl::Status DirectAttention::Seal(void* stream) { return impl_->Seal(stream); }

absl::Status DirectAttention::Mark(DirectStep& step, void* stream) {
  KVTIDE_RETURN_IF_ERROR(step.mark->Set(stream));
  step.marked = true;
  return absl::OkStatus();
}

absl::Status DirectAttention::End(DirectStep step, std::span<const StepTokens> tokens) {
  if (!step.marked)
    return absl::FailedPreconditionError(
        "the step has no mark: its work may be under way (Mark after the last call)");
  KVTIDE_RETURN_IF_ERROR(step.mark->Wait());
  impl_->Retire(std::move(step.mark));
  return impl_->pool().EndStep(step.id, tokens);
}

absl::Status DirectAttention::RollBack(DirectStep step) {
  if (step.marked) KVTIDE_RETURN_IF_ERROR(step.mark->Wait());
  if (step.mark != nullptr) impl_->Retire(std::move(step.mark));
  return impl_->pool().RollBackStep(step.id);
}

size_t DirectAttention::device_bytes() const { return impl_->device_bytes(); }

}  // namespace kvtide::client
