#include "daemon/cache/kv_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache_impl.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

KvCache::Impl::Impl(CacheOptions options)
    : options_(std::move(options)), ids_(options_.id_seed != 0 ? options_.id_seed : std::random_device{}()) {}

KvCache::Impl::~Impl() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    mover_wake_.NotifyAll();
  }
  if (mover_.joinable()) mover_.join();
  MutexLock lock(mu_);
  KVTIDE_CHECK(attends_running_ == 0 && closing_ == 0, "the cache is destroyed under running calls");
  for (auto& [id, sequence] : sequences_) ReleaseTables(*sequence);
}

absl::Status KvCache::Impl::Start() {
  MutexLock lock(mu_);
  KVTIDE_RETURN_IF_ERROR(store_.Init(options_));
  for (const TierOptions& tier : options_.tiers) backends_.push_back(tier.backend);
  home_counts_.resize(static_cast<size_t>(store_.homes()));
  if (options_.background_moves) mover_ = std::thread([this] { RunMover(); });
  return absl::OkStatus();
}

absl::StatusOr<ModelId> KvCache::Impl::RegisterModel(const ModelSpec& spec) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(spec));
  MutexLock lock(mu_);
  for (const auto& model : models_) {
    if (model->spec.name != spec.name) continue;
    if (model->spec == spec) return model->id;
    return absl::FailedPreconditionError(absl::StrCat(
        "model '", spec.name, "' is registered with another geometry; use another name for this one"));
  }
  if (models_.size() >= options_.max_models) {
    counters_.exhausted++;
    return absl::ResourceExhaustedError(
        absl::StrCat(models_.size(), " models are registered, which is the limit (max_models)"));
  }
  for (size_t g = 0; g < spec.groups.size(); g++)
    for (Backend* backend : backends_)
      KVTIDE_RETURN_IF_ERROR(Annotate(backend->CheckSupport(*Layout(spec.groups[g].shape, ExactPair())),
                                      absl::StrCat("model '", spec.name, "', layer group ", g)));
  auto model = std::make_shared<ModelState>();
  model->id = static_cast<ModelId>(models_.size() + 1);
  model->spec = spec;
  models_.push_back(model);
  return model->id;
}

absl::StatusOr<ModelSpec> KvCache::Impl::GetModel(ModelId model) const {
  MutexLock lock(mu_);
  if (model == 0 || model > models_.size())
    return absl::NotFoundError(absl::StrCat("model ", model, " is not registered"));
  return models_[model - 1]->spec;
}

absl::StatusOr<ModelId> KvCache::Impl::FindModel(const std::string& name) const {
  MutexLock lock(mu_);
  for (const auto& model : models_)
    if (model->spec.name == name) return model->id;
  return absl::NotFoundError(absl::StrCat("model '", name, "' is not registered"));
}

const BlockLayout* KvCache::Impl::Layout(const GroupShape& shape, CachePair pair) {
  for (const auto& layout : layouts_)
    if (layout->shape() == shape && layout->pair() == pair) return layout.get();
  layouts_.push_back(std::make_unique<const BlockLayout>(shape, pair));
  return layouts_.back().get();
}

SequenceId KvCache::Impl::NewId() {
  while (true) {
    const SequenceId id = ids_();
    if (id != 0 && sequences_.count(id) == 0 &&
        std::find(closed_.begin(), closed_.end(), id) == closed_.end())
      return id;
  }
}

absl::StatusOr<int> KvCache::Impl::ChooseHome(const std::string& device) const {
  std::vector<HomeView> homes;
  std::string known;
  for (int h = 0; h < store_.homes(); h++) {
    const Tier& tier = store_.tier(h);
    if (tier.device == device) return h;
    absl::StrAppend(&known, h == 0 ? "" : ", ", tier.device);
    const HomeCount& count = home_counts_[static_cast<size_t>(h)];
    homes.push_back({tier.allocator.free_bytes(), tier.allocator.used_bytes(), count.sequences, count.empty});
  }
  if (!device.empty())
    return absl::InvalidArgumentError(
        absl::StrCat("device \"", device, "\" is not one of this cache; known: ", known));
  return PickHome(homes);
}

void KvCache::Impl::Enter(const SequencePtr& sequence) {
  counters_.sequences_created++;
  sequences_[sequence->id] = sequence;
  HomeCount& count = home_counts_[static_cast<size_t>(sequence->home)];
  count.sequences++;
  if (sequence->empty) count.empty++;
  if (sequence->options.allow_drop) dropping_sequences_++;
}

void KvCache::Impl::NotEmptyAnyMore(Sequence& sequence) {
  if (!sequence.empty) return;
  sequence.empty = false;
  home_counts_[static_cast<size_t>(sequence.home)].empty--;
}

absl::StatusOr<KvCache::Impl::SequencePtr> KvCache::Impl::Find(SequenceId id) const {
  const auto it = sequences_.find(id);
  if (it != sequences_.end()) return it->second;
  if (std::find(closed_.begin(), closed_.end(), id) != closed_.end())
    return absl::NotFoundError(absl::StrCat("sequence ", id, " was closed"));
  return absl::NotFoundError(absl::StrCat("sequence ", id, " does not exist"));
}

absl::StatusOr<SequenceId> KvCache::Impl::CreateSequence(ModelId model_id, const SequenceOptions& options) {
  MutexLock lock(mu_);
  if (model_id == 0 || model_id > models_.size())
    return absl::NotFoundError(absl::StrCat("model ", model_id, " is not registered"));
  const auto& model = models_[model_id - 1];
  KVTIDE_RETURN_IF_ERROR(CheckSequenceOptions(options, model->spec));
  if (sequences_.size() >= options_.max_sequences) {
    counters_.exhausted++;
    return absl::ResourceExhaustedError(absl::StrCat(
        sequences_.size(), " sequences are open, which is the limit (max_sequences); close some"));
  }
  auto sequence = std::make_shared<Sequence>();
  sequence->model = model;
  sequence->options = options;
  KVTIDE_ASSIGN_OR_RETURN(sequence->home, ChooseHome(options.device));
  for (size_t g = 0; g < model->spec.groups.size(); g++) {
    const LayerGroupSpec& spec = model->spec.groups[g];
    const CachePair pair = options.PairOfGroup(static_cast<int>(g));
    GroupTable& table = sequence->groups.emplace_back();
    table.exact = Layout(spec.shape, ExactPair());
    table.coded = Layout(spec.shape, pair);
    table.window = spec.window;
    table.layers.resize(static_cast<size_t>(spec.shape.layers));
    table.profiled.resize(static_cast<size_t>(spec.shape.layers));
    table.profile_options = ProfileOptionsFor(options, pair.k);
    for (Backend* backend : backends_)
      KVTIDE_RETURN_IF_ERROR(
          Annotate(backend->CheckSupport(*table.coded), absl::StrCat("pair ", PairName(pair))));
  }
  sequence->id = NewId();
  sequence->created = sequence->last_used = options_.clock();
  Enter(sequence);
  return sequence->id;
}

absl::StatusOr<SequenceId> KvCache::Impl::ForkSequence(SequenceId id) {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr parent, Find(id));
  if (parent->writer)
    return absl::AbortedError(
        absl::StrCat("sequence ", id, " is being written; fork it when the call has ended"));
  if (sequences_.size() >= options_.max_sequences) {
    counters_.exhausted++;
    return absl::ResourceExhaustedError(absl::StrCat(
        sequences_.size(), " sequences are open, which is the limit (max_sequences); close some"));
  }
  auto child = std::make_shared<Sequence>(*parent);
  child->id = NewId();
  child->forked_from = id;
  child->readers = 0;
  child->created = child->last_used = options_.clock();
  for (GroupTable& table : child->groups) {
    for (Block* block : table.blocks) store_.AddRef(block, child->keeper());
    for (auto& [index, block] : table.staging) store_.AddRef(block, child->keeper());
  }
  Enter(child);
  return child->id;
}

absl::Status KvCache::Impl::CloseSequence(SequenceId id) {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  sequences_.erase(id);
  NotEmptyAnyMore(*sequence);
  home_counts_[static_cast<size_t>(sequence->home)].sequences--;
  closed_.push_back(id);
  if (closed_.size() > 1024) closed_.pop_front();
  counters_.sequences_closed++;
  sequence->closed = true;
  if (sequence->writer) {
    closing_++;  // EndWriter releases the tables
  } else {
    ReleaseTables(*sequence);
  }
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status KvCache::Impl::BeginWriter(Sequence& sequence) {
  if (sequence.closed) return absl::AbortedError(absl::StrCat("sequence ", sequence.id, " was closed"));
  if (sequence.writer)
    return absl::AbortedError(
        absl::StrCat("sequence ", sequence.id, " is being written by another call; one writer at a time"));
  if (sequence.options.seal_at_once && sequence.readers > 0)
    return absl::AbortedError(absl::StrCat(
        "sequence ", sequence.id, " codes at once (evaluation mode) and is being read; one call at a time"));
  sequence.writer = true;
  return absl::OkStatus();
}

void KvCache::Impl::EndWriter(Sequence& sequence) {
  KVTIDE_CHECK(sequence.writer);
  sequence.writer = false;
  if (!sequence.closed) return;
  ReleaseTables(sequence);
  closing_--;
}

void KvCache::Impl::ReleaseTables(Sequence& sequence) {
  if (sequence.options.allow_drop) dropping_sequences_--;
  for (GroupTable& table : sequence.groups) {
    for (Block* block : table.blocks) store_.Release(block, sequence.keeper());
    for (auto& [index, block] : table.staging) store_.Release(block, sequence.keeper());
    table.blocks.clear();
    table.staging.clear();
    table.first_block = table.sealed = 0;
    for (LayerProgress& layer : table.layers) layer = LayerProgress{};
  }
  changed_.NotifyAll();
}

absl::StatusOr<ModelId> KvCache::Impl::ModelOf(SequenceId id) const {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  return sequence->model->id;
}

absl::StatusOr<int64_t> KvCache::Impl::Length(SequenceId id) const {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  return sequence->MinTokens();
}

absl::StatusOr<int64_t> KvCache::Impl::LayerLength(SequenceId id, int layer) const {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  const auto& layers = sequence->model->spec.layers;
  if (layer < 0 || static_cast<size_t>(layer) >= layers.size())
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, ": the model has ", layers.size(), " layers"));
  const LayerSpec& spec = layers[static_cast<size_t>(layer)];
  return sequence->groups[static_cast<size_t>(spec.group)]
      .layers[static_cast<size_t>(spec.layer_in_group)]
      .tokens;
}

// The public face: forwards.
absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(CacheOptions options) {
  KVTIDE_RETURN_IF_ERROR(CheckCacheOptions(options));
  auto impl = std::make_unique<Impl>(std::move(options));
  KVTIDE_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<KvCache>(new KvCache(std::move(impl)));
}
KvCache::KvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvCache::~KvCache() = default;
absl::StatusOr<ModelId> KvCache::RegisterModel(const ModelSpec& spec) { return impl_->RegisterModel(spec); }
absl::StatusOr<ModelSpec> KvCache::GetModel(ModelId model) const { return impl_->GetModel(model); }
absl::StatusOr<ModelId> KvCache::FindModel(const std::string& name) const { return impl_->FindModel(name); }
absl::StatusOr<SequenceId> KvCache::CreateSequence(ModelId model, const SequenceOptions& options) {
  return impl_->CreateSequence(model, options);
}
absl::StatusOr<SequenceId> KvCache::ForkSequence(SequenceId sequence) {
  return impl_->ForkSequence(sequence);
}
absl::Status KvCache::TruncateSequence(SequenceId sequence, int64_t tokens) {
  return impl_->TruncateSequence(sequence, tokens);
}
absl::Status KvCache::CloseSequence(SequenceId sequence) { return impl_->CloseSequence(sequence); }
absl::Status KvCache::Append(const AppendCall& call) { return impl_->Append(call); }
absl::Status KvCache::Attend(const AttendCall& call) { return impl_->Attend(call, false); }
absl::Status KvCache::AppendAttend(const AttendCall& call) { return impl_->Attend(call, true); }
absl::StatusOr<MoveReport> KvCache::Evict(std::span<const SequenceId> sequences, int tier) {
  return impl_->Evict(sequences, tier);
}
absl::StatusOr<MoveReport> KvCache::EvictAll(int tier) { return impl_->EvictAll(tier); }
absl::StatusOr<MoveReport> KvCache::Prefetch(std::span<const SequenceId> sequences) {
  return impl_->Prefetch(sequences);
}
absl::StatusOr<SequenceInfo> KvCache::GetSequence(SequenceId sequence) const {
  return impl_->GetSequence(sequence);
}
std::vector<SequenceInfo> KvCache::ListSequences() const { return impl_->ListSequences(); }
absl::StatusOr<ModelId> KvCache::ModelOf(SequenceId sequence) const { return impl_->ModelOf(sequence); }
absl::StatusOr<int64_t> KvCache::Length(SequenceId sequence) const { return impl_->Length(sequence); }
absl::StatusOr<int64_t> KvCache::LayerLength(SequenceId sequence, int layer) const {
  return impl_->LayerLength(sequence, layer);
}
CacheStats KvCache::Stats() const { return impl_->Stats(); }
const CacheOptions& KvCache::options() const { return impl_->options(); }
MoveReport KvCache::RunMovesOnce() { return impl_->RunMovesOnce(); }
void KvCache::CheckInvariants() const { impl_->CheckInvariants(); }

}  // namespace kvtide
