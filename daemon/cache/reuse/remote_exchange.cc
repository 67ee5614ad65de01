#include "daemon/cache/reuse/remote_exchange.h"

#include <xxhash.h>

#include <algorithm>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/block/block_label.h"
#include "daemon/cache/persist/manifest.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

constexpr size_t kBatchBytes = size_t{16} << 20;  // of one round trip with bytes, or one block
constexpr absl::Duration kWriteTime = absl::Seconds(10);

// What names of a namespace's blocks are unique in; a prefix space has its identity.
std::string SpaceOf(const NamespaceSpec& spec) {
  std::string text = "blocks,";
  for (const std::string& part : {spec.tenant, spec.model, spec.salt})
    absl::StrAppend(&text, part.size(), ":", part, ",");
  absl::StrAppend(&text, HashNamespaceSpec(spec), ",", spec.block_tokens, ",");
  if (spec.tensors.has_value()) {
    const TensorContent& rows = *spec.tensors;
    absl::StrAppend(&text, rows.layers, ",", rows.kv_heads, ",", rows.head_dim_k, ",", rows.head_dim_v, ",",
                    PairName(rows.pair));
  } else {
    absl::StrAppend(&text, spec.opaque->block_bytes, ",", spec.opaque->encoding.size(), ":",
                    spec.opaque->encoding);
  }
  return text;
}
std::string SpaceOf(const PrefixSpace& space) { return absl::StrCat("prefix,", space.identity); }

// The label under which others look for a block of a prefix.
BlockLabel PrefixLabel(const ModelState& model, uint64_t name_space_hash, int group, int64_t index,
                       const BlockKey& key, const BlockLayout& layout) {
  BlockLabel label;
  label.bytes = layout.block_bytes();
  label.model_hash = model.hash;
  label.name_space_hash = name_space_hash;
  label.group = group;
  label.index = index;
  label.chain = {key.low, key.high};
  SetLayout(layout, &label);
  return label;
}
BlockLabel KeyedLabel(const KeyedNamespace& space, const BlockKey& key) {
  BlockLabel label;
  label.bytes = space.form.bytes;
  label.name_space_hash = space.id;
  label.chain = {key.low, key.high};
  label.k_type = label.v_type = "opaque";
  if (space.form.layout != nullptr) SetLayout(*space.form.layout, &label);
  return label;
}
BlockLabel ProfileLabel(uint64_t hash) {
  BlockLabel label;
  label.kind = BlockLabel::Kind::kManifest;
  label.model_hash = hash;
  return label;
}
RemoteName ProfileName(uint64_t hash, int group) { return {RemoteName::Kind::kProfile, {hash, 0}, group}; }

}  // namespace

RemoteExchange::Fetched::~Fetched() {
  for (HeldBlock& block : blocks_) block->leases--;
}
void RemoteExchange::Fetched::Add(BlockStore& store, Block* block) {
  block->leases++;
  blocks_.emplace_back(store, block);
}

// Writes.

void RemoteExchange::Start() {
  if (tier() == nullptr) return;
  {
    CacheLock lock(core_);
    lock->unsent.most = writes() != RemoteWrites::kNone ? core_.options().max_unsent_blocks : 0;
    lock->unsent.when_found = writes() == RemoteWrites::kAll;
  }
  if (writes() != RemoteWrites::kNone && core_.options().background_moves)
    thread_ = std::thread([this] { Run(); });
}

void RemoteExchange::Stop() {
  {
    CacheLock lock(core_);
    stopping_.Cancel();
    lock->unsent.come.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void RemoteExchange::Run() {
  bool wrote = false;
  while (true) {
    {
      CacheLock lock(core_);
      if (stopping_.cancelled()) return;
      const bool idle = (lock->unsent.ids.empty() && !wrote) || !tier()->Writable();
      if (idle) lock.Wait(lock->unsent.come, absl::Milliseconds(200));
      if (stopping_.cancelled()) return;
    }
    wrote = WriteOnce();
  }
}

// The blocks that would be dropped next, as many as lie above the low watermark of the last tier, are queued
// if they were not offered so far. A full tier drops under the mutex, and waits for no network: so they are
// offered before it is full.
void RemoteExchange::Offer(CacheState& state) const {
  constexpr size_t kPeeks = 4096;
  BlockStore& store = state.store;
  const int last = static_cast<int>(store.tiers()) - 1;
  const ExtentAllocator& space = store.tier(last).allocator;
  double above = static_cast<double>(space.used_bytes()) -
                 static_cast<double>(space.capacity_bytes()) * state.limits.low_watermark;
  const size_t most = std::min(state.unsent.most, core_.options().max_moves_in_flight);
  size_t peeks = 0;
  store.PeekIdle(last, ~uint64_t{0}, [&](const Block& block) {
    if (above <= 0 || state.unsent.ids.size() >= most || ++peeks > kPeeks) return false;
    if (!store.IsCachedOnly(block) || !block.droppable()) return true;
    above -= static_cast<double>(block.place->extent());
    if (block.offered) return true;
    store.Get(block.id)->offered = true;
    state.unsent.Add(block.id);
    return true;
  });
}

struct RemoteExchange::Outgoing {
  std::string space;
  NamespacePtr name_space;  // null: of a prefix
  RemoteJob job;
  std::shared_ptr<const Profile> profile;
  BlockId id = 0;
  HeldBlock block;
  PinnedPlace place;
  IoJob read;  // where it lies in a tier of I/O
  bool verify = false;
  uint64_t checksum = 0;
  std::vector<std::byte> bytes;
  bool present = false;
};

void RemoteExchange::EraseLeftovers() {
  std::vector<std::pair<std::string, uint64_t>> notes;
  {
    CacheLock lock(core_);
    for (const auto& note : unerased_)
      if (!writing_.contains(note.first)) notes.push_back(note);
  }
  for (const auto& [space, number] : notes) {
    const absl::Status status = tier()->Erase(space, {kWriteTime, &stopping_});
    CacheLock lock(core_);
    // A note that was made meanwhile is of a write that ended meanwhile.
    const auto note = unerased_.find(space);
    if (status.ok() && note != unerased_.end() && note->second == number) unerased_.erase(note);
  }
}

bool RemoteExchange::WriteOnce() {
  if (tier() == nullptr || !tier()->Writable()) return false;
  EraseLeftovers();
  const RemoteLimit limit{kWriteTime, &stopping_};
  std::vector<Outgoing> batch;
  {
    CacheLock lock(core_);
    BlockStore& store = lock->store;
    if (writes() == RemoteWrites::kOnDemote) Offer(*lock);
    std::deque<BlockId>& ids = lock->unsent.ids;
    size_t bytes = 0;
    while (!ids.empty() && batch.size() < core_.options().max_moves_in_flight) {
      Block* const block = store.Get(ids.front());
      if (block != nullptr && !batch.empty() && bytes + block->bytes() > kBatchBytes) break;
      ids.pop_front();
      // Others are to find what was asked for, not what little room has left of it.
      if (block == nullptr || block->place == nullptr || block->writing || block->kind->IsDegraded()) {
        lock->unsent.left_out += writes() == RemoteWrites::kOnDemote;  // dropped meanwhile
        continue;
      }
      Outgoing out;
      if (block->prefix() != nullptr) {
        const PrefixSpace& space = *block->prefix();
        out.space = SpaceOf(space);
        out.job.name = {RemoteName::Kind::kBlock, block->key, block->group()};
        out.job.label = PrefixLabel(*space.model, block->kind->name_space_hash, block->group(), block->index,
                                    block->key, *block->layout());
        out.job.label.sequence = block->sequence;
        out.profile = block->profile();
        out.job.label.profile_hash = out.profile != nullptr ? out.profile->hash : 0;
      } else if (block->keyed) {
        const auto& spaces = lock->keyed.namespaces();
        const auto space = spaces.find(block->kind->name_space_hash);
        if (space == spaces.end()) continue;
        out.space = SpaceOf(space->second->spec);
        if (IsBeingErased(out.space)) {  // it would be erased with the others
          lock->unsent.left_out++;
          continue;
        }
        out.name_space = space->second;
        writing_[out.space]++;
        out.job.name = {RemoteName::Kind::kBlock, block->key, 0};
        out.job.label = KeyedLabel(*space->second, block->key);
      } else {
        continue;
      }
      bytes += block->bytes();
      out.id = block->id;
      out.block = HeldBlock(store, block);
      batch.push_back(std::move(out));
    }
  }
  if (batch.empty()) return false;
  // Spaces follow each other in the queue as calls did.
  size_t begin = 0;
  while (begin < batch.size()) {
    size_t end = begin;
    while (end < batch.size() && batch[end].space == batch[begin].space) end++;
    const std::span<Outgoing> part(&batch[begin], end - begin);
    begin = end;
    const std::string& space = part.front().space;
    std::vector<RemoteName> names;
    std::map<std::pair<uint64_t, int>, std::shared_ptr<const Profile>> profiles;
    for (const Outgoing& out : part) names.push_back(out.job.name);
    const auto there = tier()->Find(space, names, limit);
    uint64_t present = 0;
    {
      CacheLock lock(core_);
      for (size_t i = 0; i < part.size(); i++) {
        Outgoing& out = part[i];
        const Block* const block = out.block.get();
        // Of another codec version or damaged: it is written anew.
        out.present = there[i].has_value() && there[i]->layout_hash == out.job.label.layout_hash &&
                      there[i]->bytes == out.job.label.bytes && there[i]->chain == out.job.label.chain;
        present += out.present;
        if (out.present || block->place == nullptr || block->writing || block->kind->IsDegraded()) continue;
        if (block->prefix() == nullptr && !block->keyed) continue;
        out.place = PinnedPlace(lock->store, block->place);
        out.verify = block->has_checksum;
        out.checksum = block->checksum;
        if (core_.attends(block->place->tier)) continue;
        out.read.offset = block->place->offset;
        out.read.label = LabelOf(*block, *block->place);
      }
      lock->counters.remote_present += present;
    }
    std::vector<Outgoing*> sending;
    for (Outgoing& out : part) {
      if (out.place.get() == nullptr) continue;
      out.bytes.resize(static_cast<size_t>(out.job.label.bytes));
      const Place& place = *out.place.get();
      absl::Status status;
      if (core_.attends(place.tier)) {
        status =
            core_.backend(place.tier)
                .CopyNow({out.bytes.data(), core_.Data(place), out.bytes.size()}, CopyDirection::kToHost);
        if (status.ok() && out.verify && XXH3_64bits(out.bytes.data(), out.bytes.size()) != out.checksum)
          status = absl::DataLossError("the block is not what it was");
      } else {
        out.read.copy = [&out](size_t at, std::span<std::byte> piece) {
          std::copy(piece.begin(), piece.end(), out.bytes.begin() + static_cast<std::ptrdiff_t>(at));
          return absl::OkStatus();
        };
        core_.io(place.tier).Run({&out.read, 1});
        status = out.read.status;
      }
      if (!status.ok()) continue;
      out.job.copy = [&out](size_t at, std::span<std::byte> piece) {
        std::copy_n(out.bytes.begin() + static_cast<std::ptrdiff_t>(at), piece.size(), piece.begin());
        return absl::OkStatus();
      };
      if (out.profile != nullptr && out.profile->hash != 0)
        profiles.emplace(std::pair(out.profile->hash, out.job.name.group), out.profile);
      sending.push_back(&out);
    }
    {
      CacheLock lock(core_);
      for (Outgoing& out : part) {
        out.place = {};
        out.block = {};
      }
    }
    // Profiles first: a block without its profile is of no use.
    std::vector<RemoteJob> jobs;
    std::vector<std::string> texts;
    std::vector<RemoteName> profile_names;
    for (const auto& [key, profile] : profiles) profile_names.push_back(ProfileName(key.first, key.second));
    const auto profiles_there = tier()->Find(space, profile_names, limit);
    texts.reserve(profiles.size());
    size_t at_profile = 0;
    for (const auto& [key, profile] : profiles) {
      if (profiles_there[at_profile++].has_value()) continue;
      texts.push_back(EncodeProfile(*profile));
      RemoteJob& job = jobs.emplace_back();
      job.name = ProfileName(key.first, key.second);
      job.label = ProfileLabel(key.first);
      job.label.bytes = texts.back().size();
      job.copy = [&text = texts.back()](size_t at, std::span<std::byte> piece) {
        std::copy_n(reinterpret_cast<const std::byte*>(text.data()) + at, piece.size(), piece.begin());
        return absl::OkStatus();
      };
    }
    if (!jobs.empty()) tier()->Write(space, jobs, limit);
    const bool lost_profiles =
        std::any_of(jobs.begin(), jobs.end(), [](const RemoteJob& job) { return !job.status.ok(); });
    jobs.clear();
    if (!lost_profiles)
      for (Outgoing* const out : sending) jobs.push_back(std::move(out->job));
    if (!jobs.empty()) tier()->Write(space, jobs, limit);
    const auto written = static_cast<uint64_t>(
        std::count_if(jobs.begin(), jobs.end(), [](const RemoteJob& job) { return job.status.ok(); }));
    bool deleted = false;
    {
      CacheLock lock(core_);
      lock->unsent.left_out += part.size() - present - written;
      // A server that is away for now is offered them again.
      const bool again = written + present < part.size() && !tier()->Writable();
      for (Outgoing& out : part) {
        if (Block* const block = again ? lock->store.Get(out.id) : nullptr; block != nullptr)
          block->offered = false;
        if (out.name_space == nullptr) continue;
        deleted = deleted || out.name_space->deleted;
        out.name_space.reset();  // what it has belongs to the mutex
        const auto writing = writing_.find(space);
        if (--writing->second == 0) writing_.erase(writing);
      }
      // Deleted while this wrote: the deletion wins.
      if (deleted) unerased_[space] = ++notes_;
    }
  }
  EraseLeftovers();
  return true;
}

// Fetches.

struct RemoteExchange::Want {
  RemoteName name;
  BlockLabel label;  // that is expected
  BlockForm form = BlockForm::Opaque(0);
  std::shared_ptr<TenantAccount> account;
  int home = 0;
  int64_t index = 0;          // of the block in its prefix: what lies behind a missing one is of no use
  uint64_t profile_hash = 0;  // as it was found
  std::shared_ptr<const Profile> profile;  // that is here
  const LayerGroupSpec* group = nullptr;   // null: no profile
};

// A prefix is about to be attended: at home while there is room, as what is brought in from a disk.
WritingBlock RemoteExchange::Allocate(CacheLock& lock, const Want& want, size_t want_bytes) {
  BlockStore& store = lock->store;
  const ExtentAllocator& top = store.tier(want.home).allocator;
  const auto limit =
      static_cast<size_t>(static_cast<double>(top.capacity_bytes()) * core_.options().limits.promote_below);
  if (want.group != nullptr && top.used_bytes() + want.form.bytes <= limit &&
      want.form.bytes <= store.QuotaLeft(*want.account, want.home))
    if (Block* const block = store.Allocate(want.home, want.home, want.form); block != nullptr) {
      store.SetAccount(block, want.account);
      return WritingBlock(store, block);
    }
  bool over_quota = false;
  return room_.AllocateCached(lock, want.account, want.home, want.form, want_bytes, &over_quota);
}

absl::Duration RemoteExchange::TimeLeft(const CallContext& context, absl::Time end) const {
  return std::min(end, context.deadline) - core_.options().clock();
}

template <class Enter>
void RemoteExchange::Fetch(CacheLock& lock, const std::string& space, std::span<Want> wants,
                           const CallContext& context, absl::Time end, Fetched* fetched, const Enter& enter) {
  struct Coming {
    Want* want = nullptr;
    WritingBlock block;
    PinnedPlace place;
  };
  BlockStore& store = lock->store;
  std::map<std::pair<uint64_t, int>, std::shared_ptr<const Profile>> profiles;
  bool missing = false;
  for (size_t next = 0; next < wants.size() && !missing;) {
    const absl::Duration left = TimeLeft(context, end);
    if (left <= absl::ZeroDuration() || IsCancelled(context.cancellation)) return;
    std::vector<Coming> batch;
    size_t bytes = 0;
    while (next < wants.size() && batch.size() < core_.options().max_moves_in_flight) {
      Want& want = wants[next];
      if (!batch.empty() && bytes + want.form.bytes > kBatchBytes) break;
      Coming coming;
      coming.block = Allocate(lock, want, (wants.size() - next) * want.form.bytes);
      if (!coming.block) {
        missing = true;
        break;
      }
      coming.want = &want;
      coming.place = PinnedPlace(store, coming.block->place);
      bytes += want.form.bytes;
      batch.push_back(std::move(coming));
      next++;
    }
    if (batch.empty()) return;
    std::vector<RemoteJob> jobs(batch.size());
    std::vector<uint64_t> checksums(batch.size());
    {
      const Unlocked unlocked(lock);
      // Profiles that are not here yet.
      std::vector<RemoteJob> asked;
      std::vector<std::vector<std::byte>> texts(batch.size());
      std::vector<const Want*> of;
      for (const Coming& coming : batch) {
        const Want& want = *coming.want;
        const std::pair key(want.profile_hash, want.name.group);
        if (want.profile_hash == 0 || want.profile != nullptr || !profiles.emplace(key, nullptr).second)
          continue;
        RemoteJob& job = asked.emplace_back();
        job.name = ProfileName(want.profile_hash, want.name.group);
        job.label = ProfileLabel(want.profile_hash);
        std::vector<std::byte>& text = texts[of.size()];
        job.copy = [&text](size_t at, std::span<std::byte> piece) {
          text.resize(std::max(text.size(), at + piece.size()));
          std::copy(piece.begin(), piece.end(), text.begin() + static_cast<std::ptrdiff_t>(at));
          return absl::OkStatus();
        };
        of.push_back(&want);
      }
      if (!asked.empty()) tier()->Read(space, asked, {left, context.cancellation});
      for (size_t i = 0; i < asked.size(); i++) {
        if (!asked[i].status.ok()) continue;
        const std::string text(reinterpret_cast<const char*>(texts[i].data()), texts[i].size());
        auto profile = DecodeProfile(text, *of[i]->group);
        if (profile.ok() && (*profile)->hash == of[i]->profile_hash)
          profiles[{of[i]->profile_hash, of[i]->name.group}] = *std::move(profile);
      }
      for (size_t i = 0; i < batch.size(); i++) {
        const Place& place = *batch[i].place.get();
        jobs[i].name = batch[i].want->name;
        jobs[i].label = batch[i].want->label;
        jobs[i].copy = [this, &place](size_t at, std::span<std::byte> piece) {
          return core_.backend(place.tier)
              .CopyNow({core_.Data(place) + at, piece.data(), piece.size()}, CopyDirection::kFromHost);
        };
      }
      const absl::Duration rest = TimeLeft(context, end);
      if (rest > absl::ZeroDuration()) tier()->Read(space, jobs, {rest, context.cancellation});
    }
    for (size_t i = 0; i < batch.size(); i++) {
      const Want& want = *batch[i].want;
      Block* const block = batch[i].block.get();
      batch[i].place = {};
      std::shared_ptr<const Profile> profile = want.profile;
      if (jobs[i].status.ok() && jobs[i].label.profile_hash != 0 && profile == nullptr)
        if (const auto found = profiles.find({jobs[i].label.profile_hash, want.name.group});
            found != profiles.end())
          profile = found->second;
      const uint64_t profile_hash = profile != nullptr ? profile->hash : 0;
      const bool whole =
          jobs[i].status.ok() && profile_hash == jobs[i].label.profile_hash &&
          (want.form.layout == nullptr || want.group == nullptr ||
           CheckProfileFor(want.form.layout->pair().k, want.form.layout->shape(), profile.get()).ok());
      if (!whole) {
        missing = true;
        continue;
      }
      store.SetProfile(block, profile);
      block->has_checksum = store.tier(block->place->tier).checksum;
      block->checksum = jobs[i].label.checksum;
      if (enter(want, jobs[i].label, block)) fetched->Add(store, block);
    }
  }
}

RemoteExchange::Fetched RemoteExchange::FetchPrefix(CacheLock& lock, Sequence& like,
                                                    std::span<const BlockKey> keys,
                                                    const CallContext& context) {
  Fetched fetched;
  if (tier() == nullptr || keys.empty()) return fetched;
  const CacheOptions& options = core_.options();
  const absl::Time end = options.clock() + options.remote_read;
  const size_t groups = like.groups.size();
  const PrefixSpacePtr space = lock->prefixes.Open(like);
  const std::string name = SpaceOf(*space);
  const auto layout_of = [&](size_t g, int64_t index) {
    const GroupTable& table = like.groups[g];
    return index < like.options.EffectiveWindow().first_blocks ? table.exact : table.coded;
  };
  using Presence = PrefixIndex::Presence;
  std::vector<Presence> there(keys.size() * groups);
  std::vector<RemoteName> names;
  std::vector<size_t> of_name;
  for (size_t i = 0; i < keys.size(); i++)
    for (size_t g = 0; g < groups; g++) {
      const Block* const block = lock->prefixes.Get(*space, keys[i], static_cast<int>(g));
      if (block != nullptr) {
        there[i * groups + g] = PrefixIndex::PresenceOf(block);
        continue;
      }
      names.push_back({RemoteName::Kind::kBlock, keys[i], static_cast<int>(g)});
      of_name.push_back(i * groups + g);
    }
  const auto longest = [&] {
    return PrefixIndex::Longest(*space, keys.size(),
                                [&](size_t i, size_t g) { return there[i * groups + g]; });
  };
  const int64_t before = longest();
  if (before == static_cast<int64_t>(keys.size())) return fetched;
  std::vector<std::optional<BlockLabel>> labels;
  {
    const Unlocked unlocked(lock);
    const absl::Duration left = TimeLeft(context, end);
    labels = left > absl::ZeroDuration() ? tier()->Find(name, names, {left, context.cancellation})
                                         : std::vector<std::optional<BlockLabel>>(names.size());
  }
  std::vector<const BlockLabel*> remote(there.size(), nullptr);
  for (size_t i = 0; i < names.size(); i++) {
    if (!labels[i].has_value()) continue;
    const size_t at = of_name[i];
    const BlockLayout* const layout = layout_of(at % groups, static_cast<int64_t>(at / groups));
    remote[at] = &*labels[i];
    there[at] = {true, !(layout->pair() == ExactPair()), labels[i]->profile_hash};
  }
  const int64_t blocks = longest();
  lock->counters.remote_hits += static_cast<uint64_t>(blocks - before);
  lock->counters.remote_misses += keys.size() - static_cast<uint64_t>(blocks);
  if (blocks <= before) return fetched;
  std::vector<Want> wants;
  for (int64_t index = 0; index < blocks; index++)
    for (size_t g = 0; g < groups; g++) {
      const size_t at = static_cast<size_t>(index) * groups + g;
      if (remote[at] == nullptr || index < PrefixIndex::FirstBlock(*space, static_cast<int>(g), blocks))
        continue;
      const BlockKey& key = keys[static_cast<size_t>(index)];
      const BlockLayout* const layout = layout_of(g, index);
      const GroupTable& table = like.groups[g];
      Want want;
      want.name = {RemoteName::Kind::kBlock, key, static_cast<int>(g)};
      want.label = PrefixLabel(*like.model, like.name_space_hash, static_cast<int>(g), index, key, *layout);
      want.form = layout;
      want.account = like.account;
      want.home = like.home;
      want.index = index;
      want.profile_hash = remote[at]->profile_hash;
      if (table.calibrated != nullptr && table.calibrated->hash == want.profile_hash)
        want.profile = table.calibrated;
      want.group = &like.model->spec.groups[g];
      wants.push_back(std::move(want));
    }
  const RecencyPtr record = lock->store.NewRecency(options.clock(), Standing::kUsed, like.options.priority);
  Fetch(lock, name, wants, context, end, &fetched,
        [&](const Want& want, const BlockLabel& found, Block* block) {
          const absl::StatusOr<std::shared_ptr<const ModelState>> still =
              lock->sequences.GetModel(like.model->id);
          if (!still.ok() || still->get() != like.model.get()) return false;
          if (lock->prefixes.blocks() >= options.max_prefix_blocks) return false;
          if (lock->prefixes.Get(*space, want.name.key, want.name.group) != nullptr)
            return false;  // another call was faster
          BlockKind kind = *block->kind;
          kind.model_hash = like.model->hash;
          kind.name_space_hash = like.name_space_hash;
          kind.group = want.name.group;
          const GroupTable& table = like.groups[static_cast<size_t>(want.name.group)];
          if (kind.layout == table.coded) kind.ladder = table.ladder;
          lock->store.SetKind(block, kind);
          block->sequence = found.sequence;
          block->index = static_cast<int32_t>(want.index);
          lock->prefixes.Insert(*space, want.name.key, want.name.group, block);
          lock->store.Join(block, record, BlockStore::End::kColdest);
          return true;
        });
  return fetched;
}

RemoteExchange::Fetched RemoteExchange::FetchKeyed(CacheLock& lock, const NamespacePtr& space,
                                                   std::span<const BlockKey> keys,
                                                   const CallContext& context) {
  Fetched fetched;
  if (tier() == nullptr) return fetched;
  const CacheOptions& options = core_.options();
  const absl::Time end = options.clock() + options.remote_read;
  const std::string name = SpaceOf(space->spec);
  if (IsBeingErased(name)) return fetched;
  std::vector<RemoteName> names;
  std::vector<size_t> of_name;
  for (size_t i = 0; i < keys.size(); i++) {
    if (space->blocks.contains(keys[i])) continue;
    names.push_back({RemoteName::Kind::kBlock, keys[i], 0});
    of_name.push_back(i);
  }
  if (names.empty()) return fetched;
  std::vector<std::optional<BlockLabel>> labels;
  {
    const Unlocked unlocked(lock);
    const absl::Duration left = TimeLeft(context, end);
    if (left <= absl::ZeroDuration()) return fetched;
    labels = tier()->Find(name, names, {left, context.cancellation});
  }
  // From the first key on: what lies behind a miss is of no use.
  size_t hits = 0;
  while (hits < labels.size() && labels[hits].has_value()) hits++;
  lock->counters.remote_hits += hits;
  lock->counters.remote_misses += labels.size() - hits;
  if (space->deleted) return fetched;
  std::vector<Want> wants(hits);
  for (size_t i = 0; i < hits; i++) {
    Want& want = wants[i];
    want.name = names[i];
    want.label = KeyedLabel(*space, names[i].key);
    want.form = space->form;
    want.account = space->account;
    want.home = RoomiestHome(lock->store);
    want.profile_hash = labels[i]->profile_hash;
  }
  const RecencyPtr record = lock->store.NewRecency(options.clock(), Standing::kUsed, space->priority);
  Fetch(lock, name, wants, context, end, &fetched, [&](const Want& want, const BlockLabel&, Block* block) {
    if (space->deleted || lock->keyed.blocks() >= options.max_keyed_blocks ||
        space->blocks.contains(want.name.key))
      return false;
    lock->keyed.Insert(*space, want.name.key, block);
    lock->store.Join(block, record, BlockStore::End::kColdest);
    return true;
  });
  return fetched;
}

void RemoteExchange::BeginErase(CacheLock&, const KeyedNamespace& space) {
  if (tier() == nullptr || writes() == RemoteWrites::kNone) return;
  const std::string name = SpaceOf(space.spec);
  erasing_[name]++;
  if (writing_.contains(name)) unerased_[name] = ++notes_;
}

absl::Status RemoteExchange::Erase(const KeyedNamespace& space, const CallContext& context) {
  if (tier() == nullptr || writes() == RemoteWrites::kNone) return absl::OkStatus();
  const absl::Duration left = TimeLeft(context, core_.options().clock() + kWriteTime);
  const std::string name = SpaceOf(space.spec);
  const absl::Status status = tier()->Erase(name, {left, context.cancellation});
  {
    CacheLock lock(core_);
    const auto erasing = erasing_.find(name);
    if (--erasing->second == 0) erasing_.erase(erasing);
  }
  if (status.ok()) return status;
  return absl::UnavailableError(absl::StrCat("the namespace is gone here, but its blocks may be found in ",
                                             tier()->name(),
                                             " until their time is over: ", status.message()));
}

RemoteStats RemoteExchange::Stats(const CacheState& state) const {
  RemoteStats stats = tier()->Stats();
  stats.hit_blocks = state.counters.remote_hits;
  stats.miss_blocks = state.counters.remote_misses;
  stats.present_blocks = state.counters.remote_present;
  stats.left_out_blocks = state.unsent.left_out;
  stats.queued_blocks = state.unsent.ids.size();
  return stats;
}

}  // namespace kvtide
