#include "clients/cpp/direct_attention.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
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
  absl::StatusOr<std::pair<PagedAttention*, int>> LayerOf(int layer) const {
    if (layer < 0 || Size(layer) >= layers_.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " of ", layers_.size()));
    const auto& [group, index] = layers_[Size(layer)];
    return std::pair(groups_[group].attention.get(), index);
  }
  absl::Status Seal(void* stream) {
    for (Group& group : groups_) KVTIDE_RETURN_IF_ERROR(group.attention->SealLayers(stream));
    return absl::OkStatus();
  }
  DirectDevice& device() const { return *device_; }
  Pool& pool() const { return *pool_; }
  size_t device_bytes() const {
    size_t sum = bytes_;
    for (const Group& group : groups_) sum += group.attention->bytes();
    return sum;
  }
  // Marks that may still have work before them.
  void Retire(std::unique_ptr<StreamMark> mark) { spare_marks_.push_back(std::move(mark)); }

 private:
  // What stands in a row of the device's tables.
  struct Row {
    SequenceId sequence = 0;
    uint64_t version = 0;  // StepTable::version
    int32_t coded_first = 0, coded_count = 0;
  };
  // What is known of a sequence's table in a group.
  struct Known {
    uint64_t version = 0;  // StepTable::version
    int32_t coded_first = 0, coded_count = 0;
  };
  struct Group {
    GroupShape shape;
    int64_t window = 0;
    std::unique_ptr<PagedAttention> attention;
    PagedOptions options;
    Part<int32_t> lengths, coded_first, coded_count, profiles, seal_count, seal_profiles, seal_pages;
    Part<int32_t> coded_table, exact_table;  // [max_sequences][blocks_]
    std::vector<Row> rows;
    std::map<SequenceId, Known> known;
    // Profiles on the device: 0 = none, then by their hash, the one that was used longest ago goes.
    struct Slot {
      uint64_t hash = 0, used = 0;
    };
    std::vector<Slot> slots;
    int32_t seals = 0;  // of the step at hand
  };

  template <class T>
  Part<T> Take(size_t count) {
    const Part<T> part{bytes_, count};
    bytes_ = (bytes_ + count * sizeof(T) + 127) / 128 * 128;
    return part;
  }
  absl::Status MakeGroup(const v1::LayerGroup& told, const Model& model);
  absl::Status Fill(std::span<const StepItem> items, const StepView& view, void* stream);
  absl::Status FillRow(size_t g, size_t item, const StepItem& of, const StepView& view, std::byte* host,
                       std::vector<StepArrays::Range>* ranges);
  absl::Status Classify(const StepTable& table, const Group& group, Known* known);
  absl::StatusOr<bool> IsCoded(int kind);
  absl::StatusOr<int32_t> ProfileSlot(Group& group, const StepView& view, size_t item, size_t g,
                                      uint64_t hash, void* stream);

  Pool* const pool_;
  Client::Impl* const client_;
  DirectDevice* const device_;
  DirectOptions options_;
  CachePair pair_;
  const PoolSlab* slab_ = nullptr;
  std::vector<Group> groups_;
  std::vector<std::pair<size_t, int>> layers_;  // of the model: group, and layer within it
  std::vector<int> coded_kinds_;                // by kind: 1 coded, 0 exact
  size_t bytes_ = 0;                            // of the arrays
  int64_t blocks_ = 0;                          // of a sequence, at most
  Part<int32_t> query_start_;
  std::unique_ptr<StepArrays> arrays_;
  std::vector<int32_t> host_query_start_;
  std::vector<std::vector<int32_t>> host_lengths_, host_first_, host_count_;
  std::vector<std::unique_ptr<StreamMark>> spare_marks_;
  uint64_t steps_ = 0;
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
  auto pair = ParseCachePair(options_.pair);
  if (!pair.ok()) return Annotate(pair.status(), "DirectOptions::pair");
  pair_ = *pair;
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
  for (const v1::LayerGroup& group : answer.register_model().groups())
    KVTIDE_RETURN_IF_ERROR(MakeGroup(group, model));
  KVTIDE_ASSIGN_OR_RETURN(arrays_, device_->MakeArrays(bytes_));
  return absl::OkStatus();
}

absl::Status DirectAttention::Impl::MakeGroup(const v1::LayerGroup& told, const Model& model) {
  const size_t index = groups_.size();
  Group group;
  group.shape = {told.layers_size(), told.kv_heads(), told.head_dim_k(), told.head_dim_v()};
  group.window = told.window();
  const ModelLayer& like = model.layers.at(Size(told.layers(0)));
  const BlockLayout coded(group.shape, pair_), exact(group.shape, ExactPair());
  PagedOptions& paged = group.options;
  paged.shape = {1, told.kv_heads(), told.head_dim_k(), told.head_dim_v()};
  paged.pair = pair_;
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
  paged.max_coded_blocks = pair_ == ExactPair() ? 0 : static_cast<int>(blocks_);
  paged.max_exact_blocks = static_cast<int>(blocks_);
  paged.max_seals = pair_ == ExactPair() ? 0 : options_.max_seals;
  paged.exact_pages = static_cast<int>(slab_->bytes / kPoolUnit);
  paged.prefill_bytes = options_.prefill_bytes;
  // Steps that follow each other, and blocks that are sealed meanwhile, each with another profile.
  paged.max_profiles = Info(pair_.k).storage == Storage::kCodes ? 1 + 3 * options_.max_sequences : 0;
  std::vector<PagedLayer> layers;
  for (int l = 0; l < told.layers_size(); l++) {
    PagedLayer& layer = layers.emplace_back();
    layer.coded = slab_->data + coded.RecordOffset(l, 0);
    layer.exact = slab_->data + exact.RecordOffset(l, 0);
    layers_.at(Size(told.layers(l))) = {index, l};
  }
  auto attention = device_->MakeAttention(paged, layers);
  if (!attention.ok()) return Annotate(attention.status(), absl::StrCat("layer group ", index));
  group.attention = *std::move(attention);
  const size_t sequences = Size(options_.max_sequences), seals = Size(options_.max_seals);
  group.lengths = Take<int32_t>(sequences);
  group.coded_first = Take<int32_t>(sequences);
  group.coded_count = Take<int32_t>(sequences);
  group.profiles = Take<int32_t>(sequences);
  group.seal_count = Take<int32_t>(1);
  group.seal_profiles = Take<int32_t>(seals);
  group.seal_pages = Take<int32_t>(2 * seals);
  group.coded_table = Take<int32_t>(sequences * Size(blocks_));
  group.exact_table = Take<int32_t>(sequences * Size(blocks_));
  group.rows.resize(sequences);
  group.slots.resize(Size(std::max(1, paged.max_profiles)));
  groups_.push_back(std::move(group));
  host_lengths_.emplace_back(sequences);
  host_first_.emplace_back(sequences);
  host_count_.emplace_back(sequences);
  return absl::OkStatus();
}

absl::StatusOr<bool> DirectAttention::Impl::IsCoded(int kind) {
  if (Size(kind) >= coded_kinds_.size()) {
    const std::vector<BlockKind> kinds = client_->step_tables.kinds();
    coded_kinds_.clear();
    for (const BlockKind& known : kinds) {
      const bool here = known.tier == slab_->tier && known.device == slab_->device;
      coded_kinds_.push_back(!here                                 ? -1
                             : known.pair == PairName(ExactPair()) ? 0
                             : known.pair == PairName(pair_)       ? 1
                                                                   : -2);
    }
  }
  const int is = coded_kinds_.at(Size(kind));
  if (is >= 0) return is == 1;
  const BlockKind of = client_->step_tables.kinds().at(Size(kind));
  if (is == -1)
    return absl::FailedPreconditionError(absl::StrCat(
        "blocks lie in tier ", of.tier, " on ", of.device, ", this engine has mapped ", slab_->tier, " on ",
        slab_->device, "; create the sequence with device ", slab_->device));
  return absl::InvalidArgumentError(absl::StrCat("blocks are coded as ", of.pair, ", this object attends ",
                                                 options_.pair, "; make one for each pair"));
}

// Where the coded blocks stand: exact ones, coded ones, exact ones.
absl::Status DirectAttention::Impl::Classify(const StepTable& table, const Group& group, Known* known) {
  int64_t at = 0;
  const auto count = static_cast<int64_t>(table.blocks.size());
  const auto skip = [&](bool coded) -> absl::Status {
    int last = -1;
    for (; at < count; at++) {
      const int kind = table.blocks[Size(at)].kind;
      if (kind != last) {
        KVTIDE_ASSIGN_OR_RETURN(const bool is, IsCoded(kind));
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

absl::Status DirectAttention::Impl::FillRow(size_t g, size_t item, const StepItem& of, const StepView& view,
                                            std::byte* host, std::vector<StepArrays::Range>* ranges) {
  Group& group = groups_[g];
  const StepTable& table = *view.tables[item * groups_.size() + g];
  const auto end = table.first_block + static_cast<int64_t>(table.blocks.size());
  if (group.known.size() > kMostKnown) group.known.clear();
  Known& known = group.known[of.sequence];
  if (known.version != table.version) {
    known.version = 0;
    KVTIDE_RETURN_IF_ERROR(Classify(table, group, &known));
    known.version = table.version;
  }
  group.lengths.In(host)[item] = host_lengths_[g][item] =
      static_cast<int32_t>(view.starts[item] + of.new_tokens);
  group.coded_first.In(host)[item] = host_first_[g][item] = known.coded_first;
  group.coded_count.In(host)[item] = host_count_[g][item] = known.coded_count;
  Row& row = group.rows[item];
  if (row.sequence == of.sequence && row.version == known.version) return absl::OkStatus();
  row = {of.sequence, known.version, known.coded_first, known.coded_count};
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

absl::StatusOr<int32_t> DirectAttention::Impl::ProfileSlot(Group& group, const StepView& view, size_t item,
                                                           size_t g, uint64_t hash, void* stream) {
  if (hash == 0 || group.options.max_profiles == 0) return 0;
  size_t oldest = 1;
  for (size_t i = 1; i < group.slots.size(); i++) {
    if (group.slots[i].hash == hash) {
      group.slots[i].used = steps_;
      return static_cast<int32_t>(i);
    }
    if (group.slots[i].used < group.slots[oldest].used) oldest = i;
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
  KVTIDE_RETURN_IF_ERROR(group.attention->SetProfile(
      static_cast<int>(oldest), profile.mean_size() == 0 ? nullptr : profile.mean().data(),
      profile.gain_size() == 0 ? nullptr : profile.gain().data(), stream));
  group.slots[oldest] = {hash, steps_};
  return static_cast<int32_t>(oldest);
}

// The arrays of the step, on the device.
absl::Status DirectAttention::Impl::Fill(std::span<const StepItem> items, const StepView& view,
                                         void* stream) {
  KVTIDE_ASSIGN_OR_RETURN(std::byte* const host, arrays_->Host());
  std::vector<StepArrays::Range> ranges;
  int32_t* const query_start = query_start_.In(host);
  query_start[0] = 0;
  for (size_t i = 0; i < items.size(); i++)
    query_start[i + 1] = query_start[i] + static_cast<int32_t>(items[i].new_tokens);
  host_query_start_.assign(query_start, query_start + items.size() + 1);
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    for (size_t i = 0; i < items.size(); i++) {
      if (const absl::Status status = FillRow(g, i, items[i], view, host, &ranges); !status.ok())
        return Annotate(status, absl::StrCat("items[", i, "]"));
      KVTIDE_ASSIGN_OR_RETURN(
          group.profiles.In(host)[i],
          ProfileSlot(group, view, i, g, view.tables[i * groups_.size() + g]->profile, stream));
    }
    group.seals = 0;
    for (const v1::StepSeal& seal : view.seals) {
      if (Size(seal.group()) != g) continue;
      if (seal.pair() != PairName(pair_) || group.seals >= options_.max_seals)
        return absl::InternalError("kvtided asks for a seal that it was not told of");
      group.seal_pages.In(host)[2 * group.seals] = static_cast<int32_t>(seal.source_offset() / kPoolUnit);
      group.seal_pages.In(host)[2 * group.seals + 1] = static_cast<int32_t>(seal.target_offset() / kPoolUnit);
      group.seal_profiles.In(host)[group.seals++] = group.profiles.In(host)[seal.item()];
    }
    *group.seal_count.In(host) = group.seals;
  }
  // What lies side by side and is always new goes in one piece: from a group's lengths to its seals.
  ranges.push_back({query_start_.offset, (items.size() + 1) * sizeof(int32_t)});
  for (const Group& group : groups_)
    ranges.push_back({group.lengths.offset, group.coded_table.offset - group.lengths.offset});
  return arrays_->Upload(ranges, stream);
}

absl::StatusOr<DirectStep> DirectAttention::Impl::Begin(std::span<const StepItem> items, void* stream,
                                                        uint64_t after) {
  int64_t tokens = 0, most = 0;
  for (const StepItem& item : items) {
    tokens += std::max<int64_t>(0, item.new_tokens);
    most = std::max(most, item.new_tokens);
  }
  if (items.size() > Size(options_.max_sequences) || tokens > options_.max_new_tokens)
    return absl::InvalidArgumentError(absl::StrCat("a step of ", items.size(), " sequences and ", tokens,
                                                   " new tokens; made for ", options_.max_sequences, " and ",
                                                   options_.max_new_tokens));
  v1::SessionRequest message;
  v1::BeginStepRequest& request = RequestStep(items, after, &message);
  request.set_mapped(true);
  request.set_most_seals(options_.max_seals);
  KVTIDE_ASSIGN_OR_RETURN(const StepView view, client_->step_tables.Begin(client_->carrier.get(), &message));
  steps_++;
  absl::Status status = Fill(items, view, stream);
  for (size_t g = 0; g < groups_.size() && status.ok(); g++) {
    Group& group = groups_[g];
    const std::byte* const device = arrays_->device();
    PagedStep step;
    step.sequences = static_cast<int>(items.size());
    step.tokens = static_cast<int>(tokens);
    step.most_queries = static_cast<int>(most);
    step.seals = group.options.max_seals == 0 ? 0 : options_.graphs ? options_.max_seals : group.seals;
    step.query_start = query_start_.In(device);
    step.lengths = group.lengths.In(device);
    step.coded_first = group.coded_first.In(device);
    step.coded_count = group.coded_count.In(device);
    step.coded_table = group.coded_table.In(device);
    step.coded_row = step.exact_row = blocks_;
    step.exact_table = group.exact_table.In(device);
    step.seal_pages = group.seal_pages.In(device);
    step.seal_count = group.seal_count.In(device);
    step.profiles = group.profiles.In(device);
    step.seal_profiles = group.seal_profiles.In(device);
    if (most > 1 && options_.prefill_bytes > 0) {
      step.host_query_start = host_query_start_.data();
      step.host_lengths = host_lengths_[g].data();
      step.host_coded_first = host_first_[g].data();
      step.host_coded_count = host_count_[g].data();
    }
    status = group.attention->Plan(step, stream);
  }
  DirectStep begun{view.id, view.starts, tokens, static_cast<int>(view.seals.size()), nullptr, false};
  if (status.ok() && spare_marks_.empty()) {
    absl::StatusOr<std::unique_ptr<StreamMark>> mark = device_->MakeMark();
    status = mark.status();
    if (mark.ok()) spare_marks_.push_back(*std::move(mark));
  }
  if (!status.ok()) {
    // What stands on the device is not known any more.
    for (Group& group : groups_) std::fill(group.rows.begin(), group.rows.end(), Row{});
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

absl::Status DirectAttention::Write(int layer, PagedRows k, PagedRows v, void* stream) {
  KVTIDE_ASSIGN_OR_RETURN(const auto of, impl_->LayerOf(layer));
  return of.first->Write(of.second, k, v, stream);
}

absl::Status DirectAttention::Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void* stream) {
  KVTIDE_ASSIGN_OR_RETURN(const auto of, impl_->LayerOf(layer));
  return of.first->Attend(of.second, q, out, lse, stream);
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
