#include "daemon/cache/kv_cache.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "daemon/cache/block/priority_records.h"
#include "daemon/cache/move/mover.h"
#include "daemon/cache/persist/persister.h"
#include "daemon/cache/read/reader.h"
#include "daemon/cache/reuse/keyed_store.h"
#include "daemon/cache/reuse/prefix_reuse.h"
#include "daemon/cache/reuse/remote_exchange.h"
#include "daemon/cache/sequence/cache_core.h"
#include "daemon/cache/sequence/inspector.h"
#include "daemon/cache/sequence/persist_turn.h"
#include "daemon/cache/stepper.h"
#include "daemon/cache/write/sealer.h"
#include "daemon/cache/write/truncator.h"
#include "daemon/cache/write/writer.h"
#include "kernels/attend_args.h"
#include "kernels/base/check.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide {

// The parts, in the order in which they need each other.
class KvCache::Impl {
 public:
  explicit Impl(CacheOptions options) : core(std::move(options)) {}
  ~Impl();

  absl::Status AppendAttend(const AttendCall& call);
  // Its part under the mutex.
  absl::Status WriteAndAttend(const AttendCall& call, const std::vector<SequencePtr>& sequences,
                              bool codes_at_once, WriteBatch& batch);
  absl::Status CheckWanted(const CallContext& context) const {
    return context.Check(core.options().clock(), "the attention (nothing was written)");
  }

  CacheCore core;
  Mover mover{core};
  Sealer sealer{core, mover};
  Writer writer{core, mover, sealer};
  Truncator truncator{core, mover};
  Reader reader{core, mover};
  Stepper stepper{core, mover, sealer, writer, reader};
  Inspector inspector{core};
  RemoteExchange remote{core};
  KeyedStore keyed{core, mover, remote};
  PrefixReuse prefixes{core, remote};
  Persister persister{core};
  RestoreReport restored;
};

namespace {

const CallContext& ContextOf(const AttendCall& call) {
  static const CallContext kNobody;
  return call.context != nullptr ? *call.context : kNobody;
}

// A call on its way, for whoever watches the traffic.
class WatchedCall {
 public:
  explicit WatchedCall(const CacheOptions& options)
      : options_(options),
        watcher_(options.traffic != nullptr && options.traffic->active() ? options.traffic : nullptr),
        begin_(watcher_ != nullptr ? options.clock() : absl::Time()) {}
  bool watched() const { return watcher_ != nullptr; }

  // The call went well, on one layer of these sequences.
  void Show(const AttendCall& call, const std::vector<SequencePtr>& sequences, bool append) const {
    if (!watched()) return;
    const ModelState& model = *sequences.front()->model;
    const int64_t tokens = watcher_->Wants(model.family, call.layer, options_.clock() - begin_);
    if (tokens == 0) return;
    std::vector<TrafficRows> rows;
    rows.reserve(call.items.size());
    for (size_t i = 0; i < call.items.size(); i++) {
      const AttendRequest& item = call.items[i];
      if (sequences[i]->options.name_space != model.tenant) continue;
      rows.push_back({item.start_position, append ? item.new_tokens : 0, item.k, item.first_query_position,
                      item.queries, item.q});
    }
    watcher_->See(model.family, call.layer, rows, tokens);
  }
  void Show(const AppendCall& call, const Sequence& sequence) const {
    if (sequence.options.name_space != sequence.model->tenant || call.layers.empty()) return;
    const absl::Duration each = (options_.clock() - begin_) / static_cast<int64_t>(call.layers.size());
    for (const LayerKv& layer : call.layers) {
      const int64_t tokens = watcher_->Wants(sequence.model->family, layer.layer, each);
      const TrafficRows rows{call.start_position, call.tokens, layer.k, 0, 0, {}};
      if (tokens > 0) watcher_->See(sequence.model->family, layer.layer, {&rows, 1}, tokens);
    }
  }

 private:
  const CacheOptions& options_;
  TrafficWatcher* const watcher_;
  const absl::Time begin_;
};

}  // namespace

KvCache::Impl::~Impl() {
  remote.Stop();
  persister.Stop();
  mover.Stop();
  CacheLock lock(core);
  KVTIDE_CHECK(lock->attends_running == 0, "the cache is destroyed under running calls");
  lock->keyed.Clear();
  lock->sequences.Clear();
  lock->prefixes.Clear();
}

// Reserve, write and attend, publish, then what follows an append: the new tokens are seen as they came. The
// backends write them on their way to the attention; values are checked while a device computes. Until all
// is well nobody else sees the new tokens.
absl::Status KvCache::Impl::AppendAttend(const AttendCall& call) {
  const CallContext& context = ContextOf(call);
  const WatchedCall watched(core.options());
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, reader.FindSequences(call));
  const ModelSpec& model = sequences.front()->model->spec;
  KVTIDE_RETURN_IF_ERROR(reader.CheckCall(call, model, true));
  KVTIDE_RETURN_IF_ERROR(CheckWanted(context));
  WriteBatch batch;
  batch.context = &context;
  batch.sequences.reserve(call.items.size());
  batch.writes.reserve(call.items.size());
  bool codes_at_once = false;
  for (size_t i = 0; i < call.items.size(); i++) {
    const AttendRequest& item = call.items[i];
    if (item.new_tokens == 0) continue;
    batch.AddSequence(sequences[i]);
    LayerWrite& write = batch.AddWrite(call.layer, item.start_position, item.new_tokens);
    write.k = item.k;
    write.v = item.v;
    write.token_ids = item.token_ids;
    codes_at_once = codes_at_once || sequences[i]->options.seal_at_once;
  }
  if (codes_at_once) KVTIDE_RETURN_IF_ERROR(reader.CheckValues(call, model, &batch));
  KVTIDE_RETURN_IF_ERROR(WriteAndAttend(call, sequences, codes_at_once, batch));
  watched.Show(call, sequences, true);
  return absl::OkStatus();
}

absl::Status KvCache::Impl::WriteAndAttend(const AttendCall& call, const std::vector<SequencePtr>& sequences,
                                           bool codes_at_once, WriteBatch& batch) {
  const CallContext& context = ContextOf(call);
  CacheLock lock(core);
  if (batch.empty()) return reader.Attend(lock, call, sequences, nullptr);
  KVTIDE_RETURN_IF_ERROR(writer.Begin(lock, batch));
  absl::Status status = CheckWanted(context);
  if (status.ok() && codes_at_once) {  // attention sees the tokens coded
    {
      const Unlocked unlocked(lock);
      status = writer.WriteBytes(batch);
    }
    writer.PublishProfiles(lock->store, batch);
  }
  if (status.ok()) status = reader.Attend(lock, call, sequences, &batch);
  if (!status.ok()) {
    writer.Rollback(*lock, batch);
    return status;
  }
  KVTIDE_RETURN_IF_ERROR(writer.Commit(*lock, batch));
  return writer.Finish(lock, batch);
}

// Models and sequences.
absl::StatusOr<ModelId> KvCache::RegisterModel(const ModelSpec& spec, const CallContext& context) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(spec));
  CacheLock lock(impl_->core);
  const absl::StatusOr<ModelId> id = lock->sequences.RegisterModel(spec, context.tenant());
  if (id.status().code() == absl::StatusCode::kResourceExhausted) lock->counters.exhausted++;
  return id;
}

absl::StatusOr<ModelId> KvCache::UnregisterModel(const std::string& name, const CallContext& context) {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const ModelId id, lock->sequences.FindModel(name, context.tenant()));
  KVTIDE_ASSIGN_OR_RETURN(const auto forgotten, lock->sequences.UnregisterModel(name, context.tenant()));
  for (const auto& model : forgotten) lock->prefixes.Forget(*model);
  lock->changed.NotifyAll();
  KVTIDE_RETURN_IF_ERROR(impl_->persister.EraseDeadRuns(lock));
  return id;
}

absl::StatusOr<uint64_t> KvCache::InstallProfile(ModelId model, const ModelSpec& spec) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(spec));
  CacheLock lock(impl_->core);
  const auto forget_unused = [&] {
    for (const auto& unused : lock->sequences.TakeUnusedRevisions()) lock->prefixes.Forget(*unused);
  };
  forget_unused();  // there may be room for one more
  KVTIDE_ASSIGN_OR_RETURN(const auto installed, lock->sequences.InstallRevision(model, spec));
  forget_unused();
  lock->changed.NotifyAll();
  impl_->persister.EraseDeadRuns(lock).IgnoreError();  // as long as it fails, tried again with the next ones
  return installed->revision;
}

std::vector<InstalledProfile> KvCache::InstalledProfiles(const CallContext& context) const {
  CacheLock lock(impl_->core);
  return lock->sequences.InstalledProfiles(*context.identity);
}

absl::StatusOr<ModelSpec> KvCache::NewestModel(ModelId model) const {
  Sequences::ModelPtr newest;
  {
    CacheLock lock(impl_->core);
    KVTIDE_ASSIGN_OR_RETURN(newest, lock->sequences.GetModel(model));
    newest = lock->sequences.Newest(newest);
  }
  return newest->spec;  // megabytes of transforms, copied without the mutex
}

absl::StatusOr<ModelId> KvCache::FamilyOf(ModelId model) const {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const auto state, lock->sequences.GetModel(model));
  return state->family;
}

absl::StatusOr<ModelSpec> KvCache::GetModel(ModelId model) const {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const auto state, lock->sequences.GetModel(model));
  return state->spec;
}

std::vector<std::string> KvCache::ModelNames(const CallContext& context) const {
  CacheLock lock(impl_->core);
  return lock->sequences.ModelNames(*context.identity);
}

absl::StatusOr<ModelId> KvCache::FindModel(const std::string& name, const CallContext& context) const {
  CacheLock lock(impl_->core);
  return lock->sequences.FindModel(name, context.tenant());
}

absl::StatusOr<SequenceId> KvCache::CreateSequence(ModelId model, const SequenceOptions& asked,
                                                   const CallContext& context, LeaseId prefix) {
  SequenceOptions options = asked;
  if (options.name_space.empty()) options.name_space = context.tenant();
  if (!context.identity->MaySee(options.name_space))
    return absl::PermissionDeniedError(absl::StrCat("the caller is of tenant '", context.tenant(),
                                                    "' and makes no sequences for others; leave the tenant "
                                                    "away, or ask an admin"));
  CacheLock lock(impl_->core);
  const absl::StatusOr<SequencePtr> sequence =
      prefix != 0 ? impl_->prefixes.Begin(lock, model, options, prefix, context)
                  : lock->sequences.Create(model, options);
  if (sequence.ok()) return (*sequence)->id;
  if (sequence.status().code() == absl::StatusCode::kResourceExhausted) lock->counters.exhausted++;
  return sequence.status();
}

absl::StatusOr<SequenceId> KvCache::ForkSequence(SequenceId id, const CallContext& context) {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr parent, lock->sequences.Find(id, context));
  KVTIDE_RETURN_IF_ERROR(AwaitPersisted(lock, {&parent, 1}, context, "the fork"));
  const absl::StatusOr<SequencePtr> child = lock->sequences.Fork(id, context);
  if (child.ok()) return (*child)->id;
  if (child.status().code() == absl::StatusCode::kResourceExhausted) lock->counters.exhausted++;
  return child.status();
}

absl::Status KvCache::CloseSequence(SequenceId sequence, const CallContext& context) {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr closing, lock->sequences.Find(sequence, context));
  const std::vector<Block*> cached = PrefixReuse::BlocksOf(*closing);
  std::unique_ptr<KeptPrefix> kept = impl_->persister.KeepPrefix(*lock, *closing);
  KVTIDE_RETURN_IF_ERROR(lock->sequences.Close(closing));
  const RecencyPtr& own = closing->recency.own;
  PriorityRecords records(lock->store, lock->store.LastTouched(own), own);
  lock->prefixes.Order(cached, &records);
  lock->changed.NotifyAll();
  return impl_->persister.Forget(lock, *closing, std::move(kept));
}

absl::StatusOr<PrefixReport> KvCache::LookupPrefix(const PrefixCall& call) {
  return impl_->prefixes.Lookup(call);
}

absl::Status KvCache::Pin(std::span<const SequenceId> sequences, absl::Duration time,
                          const CallContext& context) {
  constexpr absl::Duration kLongest = absl::Hours(24);
  if (time < absl::ZeroDuration() || time > kLongest)
    return absl::InvalidArgumentError(absl::StrCat("a pin of ", absl::FormatDuration(time),
                                                   ": allowed are up to ", absl::FormatDuration(kLongest),
                                                   ", and 0 to end it"));
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> found, lock->sequences.FindAll(sequences, context));
  return lock->sequences.Pin(found, options().clock() + time);
}

absl::Status KvCache::SetPriority(std::span<const SequenceId> sequences, Priority priority,
                                  const CallContext& context) {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> found, lock->sequences.FindAll(sequences, context));
  lock->sequences.SetPriority(found, priority);
  return absl::OkStatus();
}

absl::StatusOr<PersistReport> KvCache::Persist(std::span<const SequenceId> sequences,
                                               const CallContext& context) {
  return impl_->persister.Persist(sequences, context);
}

void KvCache::PersistChanged() { impl_->persister.PersistChanged(); }

bool KvCache::IsDurable(SequenceId id) const {
  CacheLock lock(impl_->core);
  const absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(id, {});
  return sequence.ok() && (*sequence)->durable.exists;
}

const RestoreReport& KvCache::restored() const { return impl_->restored; }

absl::StatusOr<ModelId> KvCache::ModelOf(SequenceId id, const CallContext& context) const {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(id, context));
  return sequence->model->id;
}

absl::StatusOr<int64_t> KvCache::Length(SequenceId id, const CallContext& context) const {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(id, context));
  return sequence->MinTokens();
}

absl::StatusOr<int64_t> KvCache::LayerLength(SequenceId id, int layer, const CallContext& context) const {
  CacheLock lock(impl_->core);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(id, context));
  const auto& layers = sequence->model->spec.layers;
  if (layer < 0 || static_cast<size_t>(layer) >= layers.size())
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, ": the model has ", layers.size(), " layers"));
  const LayerSpec& spec = layers[static_cast<size_t>(layer)];
  return sequence->groups[static_cast<size_t>(spec.group)].layer(spec.layer_in_group).tokens;
}

// The bytes that a sequence holds at rest, from the same functions as the allocation.
absl::StatusOr<PredictedBytes> KvCache::Predict(const ModelSpec& model, const SequenceOptions& options,
                                                int64_t tokens) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(model));
  KVTIDE_RETURN_IF_ERROR(CheckSequenceOptions(options, model));
  if (tokens < 0 || tokens > kMostPosition)
    return absl::InvalidArgumentError(absl::StrCat(tokens, " tokens: must be 0 to 2^48"));
  PredictedBytes predicted;
  for (size_t g = 0; g < model.groups.size(); g++) {
    const CachePair pair = options.PairOfGroup(static_cast<int>(g));
    const bool coding = !(pair == ExactPair());
    const BlockCounts counts = options.LiveBlocks(tokens, model.groups[g].window, coding);
    predicted.exact_blocks += static_cast<uint64_t>(counts.exact);
    predicted.coded_blocks += static_cast<uint64_t>(counts.coded);
    for (const auto& [blocks, of_pair] :
         {std::pair(counts.exact, ExactPair()), std::pair(counts.coded, pair)})
      predicted.bytes = SaturatingAdd(
          predicted.bytes, SaturatingMul(static_cast<uint64_t>(blocks),
                                         BlockLayout(model.groups[g].shape, of_pair).block_bytes()));
  }
  return predicted;
}

// The rest forwards to the parts.
absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(CacheOptions options) {
  KVTIDE_RETURN_IF_ERROR(CheckCacheOptions(options));
  auto impl = std::make_unique<Impl>(std::move(options));
  KVTIDE_RETURN_IF_ERROR(impl->core.Start());
  impl->restored = impl->persister.Restore();
  if (impl->core.options().background_moves) {
    impl->mover.Start();
    impl->persister.Start();
  }
  impl->remote.Start();
  return std::unique_ptr<KvCache>(new KvCache(std::move(impl)));
}
KvCache::KvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvCache::~KvCache() = default;
absl::Status KvCache::TruncateSequence(SequenceId sequence, int64_t tokens, const CallContext& context) {
  return impl_->truncator.Truncate(sequence, tokens, context);
}
absl::Status KvCache::Append(const AppendCall& call) {
  const WatchedCall watched(options());
  KVTIDE_RETURN_IF_ERROR(impl_->writer.Append(call));
  if (!watched.watched()) return absl::OkStatus();
  absl::StatusOr<SequencePtr> sequence;
  {
    const CacheLock lock(impl_->core);
    sequence = lock->sequences.Find(call.sequence, {});
  }
  if (sequence.ok()) watched.Show(call, **sequence);
  return absl::OkStatus();
}
absl::Status KvCache::Attend(const AttendCall& call) {
  const WatchedCall watched(options());
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<SequencePtr> sequences, impl_->reader.FindSequences(call));
  KVTIDE_RETURN_IF_ERROR(impl_->reader.CheckCall(call, sequences.front()->model->spec, false));
  KVTIDE_RETURN_IF_ERROR(ContextOf(call).Check(options().clock(), "the attention"));
  {
    CacheLock lock(impl_->core);
    KVTIDE_RETURN_IF_ERROR(impl_->reader.Attend(lock, call, sequences, nullptr));
  }
  watched.Show(call, sequences, false);
  return absl::OkStatus();
}
double KvCache::EstimateWork(const AttendCall& call) const {
  constexpr double kAnything = std::numeric_limits<double>::infinity();
  constexpr size_t kFewItems = 4;
  if (call.items.size() > kFewItems) return kAnything;
  double work = 0;
  CacheLock lock(impl_->core);
  for (const AttendRequest& item : call.items) {
    const absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(item.sequence, ContextOf(call));
    if (!sequence.ok()) return kAnything;
    const ModelSpec& model = (*sequence)->model->spec;
    if (call.layer < 0 || static_cast<size_t>(call.layer) >= model.layers.size()) return kAnything;
    const LayerSpec& layer = model.layers[static_cast<size_t>(call.layer)];
    if (item.new_tokens > 0 && !Writer::IsPlain(**sequence, layer, item.start_position, item.new_tokens))
      return kAnything;
    const GroupTable& table = (*sequence)->groups[static_cast<size_t>(layer.group)];
    const int64_t tokens = table.layer(layer.layer_in_group).tokens + item.new_tokens;
    constexpr int64_t kFewTokens = 1 << 16;  // a thousand blocks to look at
    if (tokens > kFewTokens) return kAnything;
    bool far = false;
    const bool stays = options().attend_lower_tiers == AttendLowerTiers::kInPlace;
    table.ForEachBlock([&](const Block* block) {
      far = far || impl_->mover.IsFar(*block) ||
            (!stays && block->place != nullptr && block->place->tier >= impl_->core.homes());
    });
    if (far) return kAnything;
    work += static_cast<double>(tokens) * static_cast<double>(item.queries) *
            model.groups[static_cast<size_t>(layer.group)].heads;
  }
  return work;
}
absl::Status KvCache::ReadTokens(const ReadCall& call) { return impl_->reader.ReadTokens(call); }
absl::Status KvCache::AppendAttend(const AttendCall& call) { return impl_->AppendAttend(call); }
absl::StatusOr<std::unique_ptr<Step>> KvCache::BeginStep(const StepCall& call) {
  return impl_->stepper.Begin(call);
}

absl::Status KvCache::AttendStepLayer(Step& step, const AttendCall& call) {
  const WatchedCall watched(options());
  KVTIDE_RETURN_IF_ERROR(impl_->stepper.AttendLayer(step, call));
  watched.Show(call, step.sequences(), true);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Step>> KvCache::PinStep(const PinCall& call) {
  return impl_->stepper.Pin(call);
}

absl::Status KvCache::AttendPinned(const Step& step, const AttendCall& call) {
  const WatchedCall watched(options());
  KVTIDE_RETURN_IF_ERROR(impl_->stepper.AttendPinned(step, call));
  if (!watched.watched()) return absl::OkStatus();
  std::vector<SequencePtr> sequences;
  for (size_t i = 0; i < call.items.size(); i++)
    sequences.push_back(step.sequences()[step.Find(call.items[i].sequence, i)]);
  watched.Show(call, sequences, false);
  return absl::OkStatus();
}

absl::Status KvCache::EndStep(std::unique_ptr<Step> step) { return impl_->stepper.Commit(*step); }

const Slab* KvCache::SlabOf(int tier) const {
  CacheLock lock(impl_->core);
  return lock->store.tier(tier).slab.get();
}

absl::StatusOr<MoveReport> KvCache::Evict(std::span<const SequenceId> sequences, int tier,
                                          const CallContext& context) {
  absl::StatusOr<MoveReport> report = impl_->mover.Evict(sequences, tier, context);
  if (report.ok() && tier != kDropTier)
    KVTIDE_RETURN_IF_ERROR(impl_->persister.PersistParked(sequences, context));
  return report;
}
absl::StatusOr<MoveReport> KvCache::EvictAll(int tier, const CallContext& context) {
  absl::StatusOr<MoveReport> report = impl_->mover.EvictAll(tier, context);
  if (!report.ok() || tier == kDropTier) return report;
  std::vector<SequenceId> ids;
  for (const SequenceInfo& info : impl_->inspector.ListSequences({}, context))
    if (info.options.persistence != Persistence::kNone) ids.push_back(info.id);
  KVTIDE_RETURN_IF_ERROR(impl_->persister.PersistParked(ids, context));
  return report;
}
absl::StatusOr<MoveReport> KvCache::Prefetch(std::span<const SequenceId> sequences,
                                             const CallContext& context) {
  return impl_->mover.Prefetch(sequences, context);
}
absl::StatusOr<NamespaceInfo> KvCache::OpenNamespace(const NamespaceSpec& spec, Persistence persistence,
                                                     Priority priority) {
  return impl_->keyed.Open(spec, persistence, priority);
}
absl::StatusOr<StoreReport> KvCache::StoreBlocks(const StoreCall& call) { return impl_->keyed.Store(call); }
absl::StatusOr<LookupReport> KvCache::LookupBlocks(const LookupCall& call) {
  return impl_->keyed.Lookup(call);
}
absl::StatusOr<LeaseInfo> KvCache::DescribeLease(LeaseId lease, const CallContext& context) {
  return impl_->keyed.DescribeLease(lease, context);
}
absl::StatusOr<LoadReport> KvCache::LoadBlocks(const LoadCall& call) { return impl_->keyed.Load(call); }
bool KvCache::ReleasePlaces(PlacesId places) { return impl_->keyed.ReleasePlaces(places); }
bool KvCache::ReleaseLease(LeaseId lease, const CallContext& context) {
  return impl_->keyed.Release(lease, context);
}
absl::StatusOr<uint64_t> KvCache::DeleteNamespace(NamespaceId name_space, const CallContext& context) {
  uint64_t blocks = 0;
  KVTIDE_ASSIGN_OR_RETURN(const NamespacePtr space, impl_->keyed.Delete(name_space, context, &blocks));
  const absl::Status kept_away = impl_->remote.Erase(*space, context);
  KVTIDE_RETURN_IF_ERROR(impl_->persister.ForgetNamespace(*space));
  KVTIDE_RETURN_IF_ERROR(kept_away);
  return blocks;
}
absl::StatusOr<NamespacePersistReport> KvCache::PersistNamespace(NamespaceId name_space,
                                                                 const CallContext& context) {
  return impl_->persister.PersistNamespace(name_space, context);
}
absl::StatusOr<NamespaceInfo> KvCache::GetNamespace(NamespaceId name_space,
                                                    const CallContext& context) const {
  return impl_->keyed.Get(name_space, context);
}
std::vector<NamespaceInfo> KvCache::ListNamespaces(const CallContext& context) const {
  return impl_->keyed.List(context);
}

absl::StatusOr<SequenceInfo> KvCache::GetSequence(SequenceId sequence, const CallContext& context) const {
  return impl_->inspector.GetSequence(sequence, context);
}
std::vector<SequenceInfo> KvCache::ListSequences(const SequenceList& list, const CallContext& context) const {
  return impl_->inspector.ListSequences(list, context);
}
SequenceMemory KvCache::MemoryOfSequences() const { return impl_->inspector.MemoryOfSequences(); }
CacheStats KvCache::Stats() const {
  CacheStats stats = impl_->inspector.Stats();
  stats.plan_bytes = impl_->reader.plan_bytes();
  if (options().remote != nullptr) {
    const CacheLock lock(impl_->core);
    stats.remote = impl_->remote.Stats(*lock);
  }
  return stats;
}
const CacheOptions& KvCache::options() const { return impl_->core.options(); }
LiveLimits KvCache::limits() const {
  const CacheLock lock(impl_->core);
  return lock->limits;
}
absl::Status KvCache::SetLimits(LiveLimits limits) {
  CacheOptions options = impl_->core.options();
  options.limits.high_watermark = limits.high_watermark;
  options.limits.low_watermark = limits.low_watermark;
  options.max_sequences = limits.max_sequences;
  options.max_models = limits.max_models;
  KVTIDE_RETURN_IF_ERROR(CheckCacheOptions(options));
  const CacheLock lock(impl_->core);
  lock->limits = std::move(limits);
  lock->tenants.TakeQuotas();
  return absl::OkStatus();
}
MoveReport KvCache::RunMovesOnce() {
  const MoveReport report = impl_->mover.RunOnce();
  if (!options().background_moves) {
    impl_->persister.PersistChanged();
    while (impl_->remote.WriteOnce()) continue;
  }
  return report;
}
void KvCache::CheckInvariants() const { impl_->inspector.CheckInvariants(); }

}  // namespace kvtide
