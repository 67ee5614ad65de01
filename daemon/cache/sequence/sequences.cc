#include "daemon/cache/sequence/sequences.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/call/spec_hash.h"
#include "daemon/cache/tier/tier_policy.h"
#include "kernels/base/check.h"
#include "kernels/base/random_bytes.h"
#include "kernels/base/status.h"
#include "kernels/format/tide_maker.h"

namespace kvtide {

Sequences::Sequences(const CacheOptions& options, const LiveLimits* limits, BlockStore* store,
                     TenantTable* tenants)
    : options_(options),
      limits_(limits),
      store_(store),
      tenants_(tenants),
      home_counts_(static_cast<size_t>(CountHomes(options.tiers))),
      ids_(options.id_seed) {}

void Sequences::Clear() {
  KVTIDE_CHECK(closing_ == 0, "the cache is destroyed under running calls");
  for (auto& [id, sequence] : sequences_) ReleaseTables(*sequence);
  sequences_.clear();
  pins_.clear();
  by_id_.clear();
}

namespace {

// What a layer group was registered with; null = nothing.
absl::StatusOr<std::shared_ptr<const Profile>> ProfileOf(const LayerGroupSpec& group) {
  if (!group.key_transforms.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(Profile profile,
                            MakeCalibratedProfile(group.shape, group.key_means, group.key_transforms));
    return std::make_shared<const Profile>(std::move(profile));
  }
  if (group.key_means.empty()) return nullptr;
  return std::make_shared<const Profile>(MakeMeanProfile(group.shape, group.key_means));
}

absl::Status OtherGeometry(const std::string& name) {
  return absl::FailedPreconditionError(
      absl::StrCat("model '", name, "' is registered with another geometry; use another name for this one"));
}

}  // namespace

std::vector<Sequences::ModelPtr> Sequences::FamilyOf(const std::string& name,
                                                     const std::string& tenant) const {
  std::vector<ModelPtr> family;
  for (const auto& [id, model] : models_)
    if (model->spec.name == name && model->tenant == tenant) family.push_back(model);
  return family;
}

size_t Sequences::models() const {
  return static_cast<size_t>(std::count_if(
      models_.begin(), models_.end(), [](const auto& entry) { return entry.second->family == entry.first; }));
}

absl::StatusOr<Sequences::ModelPtr> Sequences::AddModel(const ModelSpec& spec, const std::string& tenant,
                                                        uint64_t revision, ModelId family) {
  if (family == 0 && models() >= limits_->max_models)
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(
                       absl::StrCat(models(), " models are registered, which is the limit (max_models)")));
  for (size_t g = 0; g < spec.groups.size(); g++)
    for (const TierOptions& tier : options_.tiers)
      if (tier.attends())
        KVTIDE_RETURN_IF_ERROR(
            Annotate(tier.backend->CheckSupport(*Layout(spec.groups[g].shape, ExactPair())),
                     absl::StrCat("model '", spec.name, "', layer group ", g)));
  std::vector<std::shared_ptr<const Profile>> calibrated;
  for (size_t g = 0; g < spec.groups.size(); g++) {
    KVTIDE_ASSIGN_OR_RETURN(calibrated.emplace_back(), ProfileOf(spec.groups[g]));
  }
  auto model = std::make_shared<ModelState>();
  model->id = ++last_model_;
  model->family = family != 0 ? family : model->id;
  model->revision = revision;
  model->spec = spec;
  model->tenant = tenant;
  model->hash = HashModel(spec);
  model->calibrated = std::move(calibrated);
  models_[model->id] = model;
  if (family == 0) tenants_->Get(tenant)->models++;
  return ModelPtr(model);
}

absl::StatusOr<ModelId> Sequences::RegisterModel(const ModelSpec& spec, const std::string& tenant,
                                                 bool restored) {
  ModelId family = 0;
  for (const ModelPtr& model : FamilyOf(spec.name, tenant)) {
    if (model->revision == 0) {
      if (model->spec == spec) return model->id;
      return OtherGeometry(spec.name);
    }
    // Profiles of its own are what it may differ in.
    if (WithoutProfiles(model->spec) != WithoutProfiles(spec)) return OtherGeometry(spec.name);
    family = model->family;
  }
  const std::shared_ptr<TenantAccount> account = tenants_->Get(tenant);
  if (!restored && family == 0) {
    KVTIDE_RETURN_IF_ERROR(account->CheckOneMore(&TenantAccount::models, account->limits.models, "models",
                                                 "unregister one that is not used any more"));
    const size_t limit = limits_->max_models;
    if (models() < limit && !LeavesRoomForOthers(account->models, models(), limit))
      return Refused(Refusal::kLimit,
                     absl::ResourceExhaustedError(absl::StrCat(
                         models(), " models are registered, and the last of max_models = ", limit,
                         " are for tenants that have few; unregister one that is not used any more")));
  }
  KVTIDE_ASSIGN_OR_RETURN(const ModelPtr model, AddModel(spec, tenant, 0, family));
  return model->id;
}

absl::StatusOr<ModelId> Sequences::RestoreRevision(const ModelSpec& spec, const std::string& tenant,
                                                   uint64_t revision) {
  ModelId family = 0;
  for (const ModelPtr& model : FamilyOf(spec.name, tenant)) {
    if (model->revision == revision && model->spec == spec) return model->id;
    if (WithoutProfiles(model->spec) != WithoutProfiles(spec)) return OtherGeometry(spec.name);
    family = model->family;
  }
  KVTIDE_ASSIGN_OR_RETURN(const ModelPtr model, AddModel(spec, tenant, revision, family));
  return model->id;
}

absl::StatusOr<Sequences::ModelPtr> Sequences::InstallRevision(ModelId id, const ModelSpec& spec) {
  constexpr size_t kMostRevisions = 16;
  KVTIDE_ASSIGN_OR_RETURN(const ModelPtr model, GetModel(id));
  if (WithoutProfiles(model->spec) != WithoutProfiles(spec))
    return absl::InvalidArgumentError(
        absl::StrCat("the profile is of a model with other layers than '", model->spec.name, "'"));
  for (size_t g = 0; g < spec.groups.size(); g++)
    if (spec.groups[g].key_transforms.empty())
      return absl::InvalidArgumentError(
          absl::StrCat("the profile has no transforms of keys in layer group ", g,
                       ", means alone are not "
                       "installed: register the model with them (Layer.key_mean)"));
  const std::vector<ModelPtr> family = FamilyOf(model->spec.name, model->tenant);
  uint64_t last = 0;
  for (const ModelPtr& one : family) last = std::max(last, one->revision);
  for (const ModelPtr& one : family)
    if (one->revision == last && last > 0 && one->spec == spec) return one;  // it is there
  if (family.size() > kMostRevisions)
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(absl::StrCat(
                       "open sequences of model '", model->spec.name, "' use ", family.size() - 1,
                       " profiles that were installed, the most that a model may have; close older ones")));
  return AddModel(spec, model->tenant, last + 1, model->family);
}

std::vector<Sequences::ModelPtr> Sequences::TakeUnusedRevisions() {
  std::set<ModelId> used;
  for (const auto& [id, sequence] : sequences_) used.insert(sequence->model->id);
  const std::map<ModelId, ModelPtr> newest = NewestByFamily();
  std::vector<ModelPtr> taken;
  for (const auto& [id, model] : models_)
    if (model->revision != 0 && model->revision != newest.at(model->family)->revision &&
        model->family != id && !used.contains(id))
      taken.push_back(model);
  for (const ModelPtr& model : taken) models_.erase(model->id);
  return taken;
}

Sequences::ModelPtr Sequences::RevisionFor(ModelPtr model, const SequenceOptions& options) const {
  // Options that have not been checked yet: with the profile of the revision they may be right.
  if (!options.group_pairs.empty() && options.group_pairs.size() != model->spec.groups.size()) return model;
  bool wants_profile = false;
  for (size_t g = 0; g < model->spec.groups.size(); g++)
    wants_profile = wants_profile || Info(options.PairOfGroup(static_cast<int>(g)).k).calibrated;
  return wants_profile ? Newest(std::move(model)) : model;
}

Sequences::ModelPtr Sequences::Newest(ModelPtr model) const {
  for (const auto& [id, other] : models_)
    if (other->family == model->family && other->revision > model->revision) model = other;
  return model;
}

std::map<ModelId, Sequences::ModelPtr> Sequences::NewestByFamily() const {
  std::map<ModelId, ModelPtr> newest;
  for (const auto& [id, model] : models_) {
    ModelPtr& found = newest[model->family];
    if (found == nullptr || found->revision < model->revision) found = model;
  }
  return newest;
}

std::vector<InstalledProfile> Sequences::InstalledProfiles(const Identity& caller) const {
  std::map<ModelId, ModelPtr> newest = NewestByFamily();
  std::erase_if(newest, [&](const auto& entry) {
    return entry.second->revision == 0 || !caller.MaySee(entry.second->tenant);
  });
  if (newest.empty()) return {};
  absl::flat_hash_map<const ModelState*, int64_t> users;
  for (const auto& [id, sequence] : sequences_) users[sequence->model.get()]++;
  std::vector<InstalledProfile> profiles;
  for (const auto& [family, model] : newest)
    profiles.push_back({model->spec.name, model->tenant, model->revision,
                        model->spec.groups[0].key_transforms.frequencies.empty(), users[model.get()]});
  return profiles;
}

absl::StatusOr<std::vector<Sequences::ModelPtr>> Sequences::UnregisterModel(const std::string& name,
                                                                            const std::string& tenant) {
  KVTIDE_RETURN_IF_ERROR(FindModel(name, tenant).status());
  const std::vector<ModelPtr> family = FamilyOf(name, tenant);
  const auto users = std::count_if(sequences_.begin(), sequences_.end(), [&](const auto& entry) {
    return entry.second->model->family == family.front()->family;
  });
  if (users > 0)
    return absl::FailedPreconditionError(
        absl::StrCat("model '", name, "' has ", users, " open sequences; close them first"));
  for (const ModelPtr& model : family) models_.erase(model->id);
  tenants_->Get(tenant)->models--;
  return family;
}

absl::StatusOr<std::shared_ptr<const ModelState>> Sequences::GetModel(ModelId model) const {
  const auto found = models_.find(model);
  if (found == models_.end()) return absl::NotFoundError(absl::StrCat("model ", model, " is not registered"));
  return found->second;
}

std::vector<std::string> Sequences::ModelNames(const Identity& caller) const {
  std::vector<std::string> names;
  for (const auto& [id, model] : models_)
    if (caller.MaySee(model->tenant) &&
        std::find(names.begin(), names.end(), model->spec.name) == names.end())
      names.push_back(model->spec.name);
  return names;
}

absl::StatusOr<ModelId> Sequences::FindModel(const std::string& name, const std::string& tenant) const {
  ModelPtr found;
  for (const ModelPtr& model : FamilyOf(name, tenant))
    if (found == nullptr || model->revision == 0 ||
        (found->revision != 0 && model->revision > found->revision))
      found = model;
  if (found == nullptr) return absl::NotFoundError(absl::StrCat("model '", name, "' is not registered"));
  return found->id;
}

const BlockLayout* Sequences::Layout(const GroupShape& shape, CachePair pair) const {
  for (const auto& layout : layouts_)
    if (layout->shape() == shape && layout->pair() == pair) return layout.get();
  layouts_.push_back(std::make_unique<const BlockLayout>(shape, pair));
  return layouts_.back().get();
}

const Ladder* Sequences::LadderOf(const GroupShape& shape, CachePair pair,
                                  std::span<const CachePair> degrade) const {
  Ladder ladder;
  ladder.rungs.push_back(Layout(shape, pair));
  for (const CachePair& rung : degrade) {
    const BlockLayout* const layout = Layout(shape, rung);
    if (layout->block_bytes() < ladder.rungs.back()->block_bytes()) ladder.rungs.push_back(layout);
  }
  if (ladder.rungs.size() == 1) return nullptr;
  for (const auto& known : ladders_)
    if (known->rungs == ladder.rungs) return known.get();
  spare_bytes_ = std::max(spare_bytes_, ladder.rungs.front()->block_bytes());
  ladders_.push_back(std::make_unique<const Ladder>(std::move(ladder)));
  return ladders_.back().get();
}

uint64_t Sequences::RandomId() {
  if (options_.id_seed != 0) return ids_();
  SequenceId id = 0;
  FillRandom(std::as_writable_bytes(std::span(&id, 1)));
  return id;
}

SequenceId Sequences::NewId() {
  while (true) {
    const SequenceId id = RandomId();
    if (id != 0 && by_id_.count(id) == 0 && !reserved_.contains(id) &&
        std::find(closed_.begin(), closed_.end(), id) == closed_.end())
      return id;
  }
}

absl::StatusOr<int> Sequences::ChooseHome(const std::string& device) const {
  std::vector<HomeView> homes;
  std::string known;
  for (int h = 0; h < store_->homes(); h++) {
    const Tier& tier = store_->tier(h);
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

void Sequences::Enter(const SequencePtr& sequence) {
  created_++;
  sequence->account->sequences++;
  sequences_[sequence->id] = sequence;
  by_id_[sequence->id] = sequence;
  HomeCount& count = home_counts_[static_cast<size_t>(sequence->home)];
  count.sequences++;
  if (sequence->empty) count.empty++;
  if (sequence->options.allow_drop) dropping_sequences_++;
  CountHeld(*sequence);
}

uint64_t BytesPerToken(const GroupShape& shape) {
  return 2 * static_cast<uint64_t>(shape.layers) * static_cast<uint64_t>(shape.kv_heads) *
         static_cast<uint64_t>(shape.head_dim_k + shape.head_dim_v);
}

void Sequences::CountHeld(Sequence& sequence) {
  // A closed sequence counts no more, even if its writer keeps the tables for a while.
  uint64_t tokens = 0, bytes = 0;
  if (!sequence.closed) {
    tokens = static_cast<uint64_t>(sequence.MinTokens());
    for (const GroupTable& table : sequence.groups)
      bytes +=
          BytesPerToken(table.exact->shape()) *
          static_cast<uint64_t>(std::max<int64_t>(0, table.MinTokens() - table.first_block() * kBlockTokens));
  }
  tokens_ += tokens - std::exchange(sequence.counted_tokens, tokens);
  held_f16_bytes_ += bytes - std::exchange(sequence.counted_f16_bytes, bytes);
}

void Sequences::NotEmptyAnyMore(Sequence& sequence) {
  if (!sequence.empty) return;
  sequence.empty = false;
  home_counts_[static_cast<size_t>(sequence.home)].empty--;
}

absl::StatusOr<SequencePtr> Sequences::Find(SequenceId id, const CallContext& context) const {
  const auto it = by_id_.find(id);
  if (it != by_id_.end()) {
    if (context.identity->MaySee(it->second->options.name_space)) return it->second;
    return Refused(Refusal::kOtherTenant,
                   absl::NotFoundError(absl::StrCat("sequence ", id, " does not exist")));
  }
  if (std::find(closed_.begin(), closed_.end(), id) != closed_.end())
    return absl::NotFoundError(absl::StrCat("sequence ", id, " was closed"));
  return absl::NotFoundError(absl::StrCat("sequence ", id, " does not exist"));
}

absl::StatusOr<std::vector<SequencePtr>> Sequences::FindAll(std::span<const SequenceId> ids,
                                                            const CallContext& context) const {
  std::vector<SequencePtr> found;
  std::set<SequenceId> seen;
  for (const SequenceId id : ids) {
    if (!seen.insert(id).second) continue;
    KVTIDE_ASSIGN_OR_RETURN(SequencePtr sequence, Find(id, context));
    found.push_back(std::move(sequence));
  }
  return found;
}

absl::Status Sequences::CheckQuota(const TenantAccount& account) {
  return account.CheckOneMore(&TenantAccount::sequences, account.limits.sequences, "sequences",
                              "close some of them");
}

absl::Status Sequences::CheckRoomForOne(const TenantAccount* account) const {
  const size_t limit = limits_->max_sequences;
  if (LeavesRoomForOthers(account == nullptr ? 0 : account->sequences, sequences_.size(), limit))
    return absl::OkStatus();
  return Refused(
      Refusal::kLimit,
      absl::ResourceExhaustedError(absl::StrCat(
          sequences_.size(), " sequences are open, which is the limit (max_sequences = ", limit,
          sequences_.size() < limit ? ", the last of them for tenants that have few" : "", "); close some")));
}

absl::StatusOr<SequencePtr> Sequences::Create(ModelId model_id, const SequenceOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Build(model_id, options));
  KVTIDE_RETURN_IF_ERROR(CheckQuota(*sequence->account));
  KVTIDE_RETURN_IF_ERROR(CheckRoomForOne(sequence->account.get()));
  sequence->id = NewId();
  Enter(sequence);
  return sequence;
}

absl::Status Sequences::Restore(const SequencePtr& sequence) {
  // Not the quota: what was there stays, and counts.
  KVTIDE_RETURN_IF_ERROR(CheckRoomForOne(nullptr));
  if (sequence->id == 0 || by_id_.count(sequence->id) != 0)
    return absl::AlreadyExistsError(absl::StrCat("sequence ", sequence->id, " exists"));
  sequence->empty = sequence->MaxTokens() == 0;
  Enter(sequence);
  return absl::OkStatus();
}

absl::StatusOr<SequencePtr> Sequences::Build(ModelId model_id, const SequenceOptions& options,
                                             bool restored) const {
  KVTIDE_ASSIGN_OR_RETURN(std::shared_ptr<const ModelState> model, GetModel(model_id));
  if (!restored) model = RevisionFor(std::move(model), options);
  KVTIDE_RETURN_IF_ERROR(CheckSequenceOptions(options, model->spec));
  auto sequence = std::make_shared<Sequence>();
  sequence->account = tenants_->Get(options.name_space);
  sequence->model = model;
  sequence->options = options;
  sequence->name_space_hash = HashNameSpace(options.name_space);
  KVTIDE_ASSIGN_OR_RETURN(sequence->home, ChooseHome(options.device));
  for (size_t g = 0; g < model->spec.groups.size(); g++) {
    const LayerGroupSpec& spec = model->spec.groups[g];
    const CachePair pair = options.PairOfGroup(static_cast<int>(g));
    GroupTable& table = sequence->groups.emplace_back();
    table.exact = Layout(spec.shape, ExactPair());
    table.coded = Layout(spec.shape, pair);
    table.window = spec.window;
    table.blocks = std::make_unique<BlockTable>(store_, sequence->keeper());
    table.SetLayers(static_cast<size_t>(spec.shape.layers));
    table.profiled.resize(static_cast<size_t>(spec.shape.layers));
    table.profile_options = ProfileOptionsFor(options, pair.k);
    if ((options.centre == Centre::kCalibrated && Info(pair.k).storage != Storage::kHalf) ||
        Info(pair.k).calibrated)
      table.profile = table.calibrated = model->calibrated[g];
    if (table.coding()) table.ladder = LadderOf(spec.shape, pair, options.degrade);
    std::vector<const BlockLayout*> layouts = {table.coded};
    if (table.ladder != nullptr) layouts = table.ladder->rungs;
    for (const TierOptions& tier : options_.tiers)
      for (const BlockLayout* const layout : layouts)
        if (tier.attends())
          KVTIDE_RETURN_IF_ERROR(
              Annotate(tier.backend->CheckSupport(*layout), absl::StrCat("pair ", PairName(layout->pair()))));
  }
  sequence->created = sequence->last_used = options_.clock();
  sequence->recency.own = store_->NewRecency(sequence->created, Standing::kUsed, options.priority);
  return sequence;
}

namespace {

GroupTable ForkTable(const GroupTable& from) {
  GroupTable to;
  to.exact = from.exact;
  to.coded = from.coded;
  to.ladder = from.ladder;
  to.window = from.window;
  to.blocks = from.blocks->Fork();
  to.staging = from.staging;
  to.sealed = from.sealed;
  to.profile_options = from.profile_options;
  to.calibrated = from.calibrated;
  to.profile = from.profile;
  to.profiled = from.profiled;
  to.SetLayers(from.layers());
  for (size_t l = 0; l < from.layers(); l++)
    to.SetLayer(static_cast<int>(l), from.layer(static_cast<int>(l)));
  return to;
}

}  // namespace

absl::StatusOr<SequencePtr> Sequences::Fork(SequenceId id, const CallContext& context) {
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr parent, Find(id, context));
  if (parent->writer)
    return absl::AbortedError(
        absl::StrCat("sequence ", id, " is being written; fork it when the call has ended"));
  KVTIDE_RETURN_IF_ERROR(CheckQuota(*parent->account));
  KVTIDE_RETURN_IF_ERROR(CheckRoomForOne(parent->account.get()));
  auto child = std::make_shared<Sequence>();
  child->account = parent->account;
  child->id = NewId();
  child->model = parent->model;
  child->options = parent->options;
  child->name_space_hash = parent->name_space_hash;
  child->forked_from = id;
  child->options.persistence = Persistence::kNone;  // who forks says which branch is worth it
  child->home = parent->home;
  child->empty = parent->empty;
  child->created = child->last_used = options_.clock();
  child->chain = parent->chain;
  child->prefixes = parent->prefixes;
  child->found_blocks = parent->found_blocks;
  child->reused_tokens = parent->reused_tokens;
  store_->ForkRecency(&parent->recency, &child->recency);
  ApplyPins(child->created);
  for (const GroupTable& from : parent->groups) {
    GroupTable& to = child->groups.emplace_back(ForkTable(from));
    for (const auto& [index, block] : to.staging) store_->AddDirect(block, child->keeper());
  }
  Enter(child);
  return child;
}

absl::Status Sequences::Pin(std::span<const SequencePtr> sequences, absl::Time until) {
  const absl::Time now = options_.clock();
  absl::flat_hash_map<TenantAccount*, uint64_t> more;
  if (until > now)
    for (const SequencePtr& sequence : sequences)
      if (!pins_.contains(sequence->id)) more[sequence->account.get()]++;
  for (const auto& [account, count] : more)
    if (const uint64_t limit = account->limits.pins; count > limit || account->pins > limit - count)
      return Refused(Refusal::kQuota,
                     absl::ResourceExhaustedError(absl::StrCat(
                         "tenant '", account->tenant, "' has ", account->pins,
                         " pinned sequences, and its quota is ", limit, "; end some pins or let them end")));
  for (const SequencePtr& sequence : sequences) {
    sequence->pinned_until = until;
    if (until > now && pins_.emplace(sequence->id, sequence).second) sequence->account->pins++;
  }
  ApplyPins(now);
  return absl::OkStatus();
}

void Sequences::SetPriority(std::span<const SequencePtr> sequences, Priority priority) {
  absl::flat_hash_map<const Recency*, std::pair<RecencyPtr, Priority>> shared;
  const auto root = [](const RecencyPtr& record) {
    return record->merged_into != nullptr ? record->merged_into : record;
  };
  for (const SequencePtr& sequence : sequences) {
    if (std::exchange(sequence->options.priority, priority) != priority) sequence->changes++;
    store_->SetPriority(sequence->recency.own, priority);
    sequence->recency.ForEach([&](const RecencyPtr& record) {
      if (record != sequence->recency.own) shared.try_emplace(root(record).get(), root(record), priority);
    });
  }
  if (shared.empty()) return;
  // What others have, too, goes by the highest of theirs.
  for (const auto& [id, sequence] : sequences_)
    sequence->recency.ForEach([&](const RecencyPtr& record) {
      const auto found = shared.find(root(record).get());
      if (found != shared.end())
        found->second.second = std::max(found->second.second, sequence->options.priority);
    });
  // The one that was used last is the hottest of its priority.
  std::vector<std::pair<RecencyPtr, Priority>> records;
  for (const auto& [record, both] : shared) records.push_back(both);
  std::sort(records.begin(), records.end(),
            [](const auto& a, const auto& b) { return a.first->touch_serial < b.first->touch_serial; });
  for (const auto& [record, highest] : records) store_->SetPriority(record, highest);
}

void Sequences::ApplyPins(absl::Time now) {
  if (pins_.empty() && marked_.empty()) return;
  for (const std::weak_ptr<Recency>& weak : marked_)
    if (const RecencyPtr record = weak.lock(); record != nullptr) store_->SetPinned(record, false);
  marked_.clear();
  std::erase_if(pins_, [&](const auto& entry) {
    const bool over = entry.second->closed || entry.second->pinned_until <= now;
    if (over) entry.second->account->pins--;
    return over;
  });
  for (const auto& [id, sequence] : pins_)
    for (const RecencyPtr* record : {&sequence->recency.own, &sequence->recency.family}) {
      if (*record == nullptr) continue;
      store_->SetPinned(*record, true);
      marked_.push_back(*record);
    }
}

absl::Status Sequences::Close(const SequencePtr& sequence) {
  const SequenceId id = sequence->id;
  sequences_.erase(id);
  by_id_.erase(id);
  if (pins_.contains(id)) {
    sequence->pinned_until = absl::InfinitePast();
    ApplyPins(options_.clock());
  }
  NotEmptyAnyMore(*sequence);
  home_counts_[static_cast<size_t>(sequence->home)].sequences--;
  closed_.push_back(id);
  if (closed_.size() > 1024) closed_.pop_front();
  closed_count_++;
  sequence->account->sequences--;
  sequence->closed = true;
  CountHeld(*sequence);
  if (sequence->writer) {
    closing_++;  // its WriterGuard releases the tables
  } else {
    ReleaseTables(*sequence);
  }
  return absl::OkStatus();
}

void Sequences::ReleaseTables(Sequence& sequence) {
  if (sequence.options.allow_drop) dropping_sequences_--;
  for (GroupTable& table : sequence.groups) {
    table.blocks->Clear();
    for (const auto& [index, block] : table.staging) store_->RemoveDirect(block, sequence.keeper());
    table.staging.clear();
    table.sealed = 0;
    table.SetLayers(table.layers());
  }
  // What it leaves is cached, and new as that.
  if (sequence.recency.own != nullptr) store_->MakeNew(sequence.recency.own);
  CountHeld(sequence);
}

void Sequences::CheckInvariants() const {
  std::vector<HomeCount> homes(home_counts_.size());
  uint64_t tokens = 0;
  for (const auto& [id, sequence] : sequences_) {
    KVTIDE_CHECK(sequence->id == id && !sequence->closed && sequence->readers >= 0);
    tokens += static_cast<uint64_t>(sequence->MinTokens());
    HomeCount& home = homes[static_cast<size_t>(sequence->home)];
    home.sequences++;
    if (sequence->empty) home.empty++;
    KVTIDE_CHECK(!sequence->empty || sequence->MaxTokens() == 0);
  }
  KVTIDE_CHECK(tokens == tokens_ && by_id_.size() == sequences_.size(), tokens, " tokens, counted ", tokens_);
  for (size_t h = 0; h < homes.size(); h++)
    KVTIDE_CHECK(homes[h].sequences == home_counts_[h].sequences && homes[h].empty == home_counts_[h].empty);
}

absl::StatusOr<WriterGuard> WriterGuard::Begin(Sequences& sequences, SequencePtr sequence,
                                               const void* writer) {
  if (sequence->closed) return absl::AbortedError(absl::StrCat("sequence ", sequence->id, " was closed"));
  if (sequence->writer == writer)
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", sequence->id, " is appended to twice in one call"));
  if (sequence->writer != nullptr)
    return absl::AbortedError(
        absl::StrCat("sequence ", sequence->id, " is being written by another call; one writer at a time"));
  if (sequence->options.seal_at_once && sequence->readers > 0)
    return absl::AbortedError(absl::StrCat(
        "sequence ", sequence->id, " codes at once (evaluation mode) and is being read; one call at a time"));
  sequence->writer = writer;
  return WriterGuard(sequences, std::move(sequence));
}

WriterGuard::~WriterGuard() {
  if (sequence_ == nullptr) return;
  KVTIDE_CHECK(sequence_->writer != nullptr);
  sequence_->writer = nullptr;
  if (!sequence_->closed) return;
  sequences_->ReleaseTables(*sequence_);
  sequences_->closing_--;
}

}  // namespace kvtide
