#include "daemon/cache/write/sealer.h"

#include <algorithm>

#include "kernels/base/check.h"

namespace kvtide {
namespace {

constexpr int64_t kStep = 16;  // blocks of a table that exist twice at a time

}  // namespace

void Sealer::Settle(CacheLock& lock, std::span<const SequencePtr> sequences, const CallContext* context) {
  std::vector<Work> work;
  for (const SequencePtr& sequence : sequences) {
    if (sequence->closed) continue;
    for (size_t g = 0; g < sequence->groups.size(); g++)
      SettleTable(lock, *sequence, static_cast<int>(g), work);
  }
  while (SealRound(lock, work))
    if (context != nullptr && !context->Check(core_.options().clock(), "sealing").ok()) break;
  Register(*lock, sequences);
  for (const SequencePtr& sequence : sequences)
    if (!sequence->closed && sequence->chain.has_value())
      for (GroupTable& table : sequence->groups) FreeFallenBlocks(*lock, *sequence, table);
}

void Sealer::Register(CacheState& state, std::span<const SequencePtr> sequences) {
  const CacheOptions& options = core_.options();
  for (const SequencePtr& sequence : sequences) {
    if (sequence->closed) continue;
    const int64_t before = sequence->found_blocks;
    state.counters.dropped_blocks +=
        state.prefixes.Register(*sequence, options.max_prefix_blocks, &state.unsent);
    const int64_t found = sequence->found_blocks - before;
    if (options.trace != nullptr && found > 0)
      options.trace->Record({options.clock(), TraceVerb::kSeal, sequence->prefixes->seed, kBlockTokens,
                             PrefixIndex::BlockBytes(*sequence), 0,
                             std::span(sequence->chain->keys())
                                 .subspan(static_cast<size_t>(before - sequence->chain->forgotten()),
                                          static_cast<size_t>(found))});
    PrefixIndex::ForgetKeys(*sequence);
  }
}

std::vector<Sealer::Seal> Sealer::Start(CacheLock& lock, std::span<const SequencePtr> sequences,
                                        size_t most) {
  std::vector<Work> work;
  for (const SequencePtr& sequence : sequences) {
    if (sequence->closed) continue;
    for (size_t g = 0; g < sequence->groups.size(); g++)
      SettleTable(lock, *sequence, static_cast<int>(g), work);
    // Others code them when it suits them: what leaves a sliding window before is not found.
    for (GroupTable& table : sequence->groups) {
      FreeFallenBlocks(*lock, *sequence, table);
      table.sealed = std::max(table.sealed, table.first_block());
    }
  }
  std::vector<Seal> seals;
  for (Work& table : work) StartSeals(lock, table, static_cast<int64_t>(most - seals.size()), seals);
  for (Seal& seal : seals) seal.work = nullptr;
  return seals;
}

void Sealer::TakeBack(Seal& seal) { seal.table().sealed = std::min(seal.table().sealed, seal.index); }

// What needs no coding is done at once.
void Sealer::SettleTable(CacheLock& lock, Sequence& sequence, int group, std::vector<Work>& work) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const int64_t full = table.MinTokens() / kBlockTokens;
  if (sequence.options.seal_at_once) {
    while (!table.staging.empty() && table.staging.begin()->first < full) {
      lock->store.RemoveDirect(table.staging.begin()->second, sequence.keeper());
      table.staging.erase(table.staging.begin());
    }
    FreeFallenBlocks(*lock, sequence, table);
    return;
  }
  const ExactWindow exact = sequence.options.EffectiveWindow();
  const int64_t end = std::max<int64_t>(0, full - exact.last_blocks);
  table.deferred = 0;
  bool ready = table.coding();
  if (ready && full > 0 && table.profile == nullptr) ready = MakeFirstBlockProfile(lock, table, end);
  // Blocks of known tokens are coded and found by them before they leave a sliding window.
  if (!sequence.chain.has_value()) FreeFallenBlocks(*lock, sequence, table);
  if (!ready) return;
  table.sealed = std::max({table.sealed, table.first_block(), std::min<int64_t>(end, exact.first_blocks)});
  if (table.sealed < end) work.push_back({&sequence, group, end});
}

void Sealer::FreeFallenBlocks(CacheState& state, Sequence& sequence, GroupTable& table) {
  const int64_t live = FirstLiveBlock(table.MinTokens(), table.window);
  while (table.first_block() < live && !table.blocks->empty()) {
    const auto staged = table.staging.find(table.first_block());
    if (staged != table.staging.end()) {
      state.store.RemoveDirect(staged->second, sequence.keeper());
      table.staging.erase(staged);
    }
    table.blocks->PopFront();
    state.counters.window_freed_blocks++;
  }
}

// False if the sequence wants a profile and a backend error was in the way: sealing waits, so that all coded
// blocks have it.
bool Sealer::MakeFirstBlockProfile(CacheLock& lock, GroupTable& table, int64_t end) {
  if (!table.profile_options.mean && table.profile_options.equalise == Equalise::kNone) return true;
  const int64_t full = table.MinTokens() / kBlockTokens;
  int64_t index = table.first_block();
  while (index < full && (table.at(index)->place == nullptr || table.at(index)->layout() != table.exact))
    index++;
  if (index >= full) return true;
  if (!BringIn(lock, table, index)) {
    Defer(*lock, table, end);
    return false;
  }
  if (table.at(index)->place == nullptr)
    return MakeFirstBlockProfile(lock, table, end);  // lost: the next one
  const GroupShape& shape = table.exact->shape();
  const size_t rows = static_cast<size_t>(kBlockTokens) * static_cast<size_t>(shape.kv_heads);
  const PinnedPlace place(lock->store, table.at(index)->place);
  absl::Status status;
  std::shared_ptr<const Profile> profile;
  {
    const Unlocked unlocked(lock);
    std::vector<std::vector<float>> keys(static_cast<size_t>(shape.layers),
                                         std::vector<float>(rows * static_cast<size_t>(shape.head_dim_k)));
    std::vector<const float*> pointers;
    for (int layer = 0; layer < shape.layers && status.ok(); layer++) {
      DecodeArgs args;
      args.layout = table.exact;
      args.block = core_.Data(*place.get());
      args.layer = layer;
      args.k = keys[static_cast<size_t>(layer)].data();
      status = core_.backend(place->tier).Decode(args);
      pointers.push_back(args.k);
    }
    if (status.ok()) {
      Profile made = MakeProfile(shape, pointers, kBlockTokens, table.profile_options);
      if (made.hash != 0) profile = std::make_shared<const Profile>(std::move(made));
    }
  }
  lock->changed.NotifyAll();
  if (!status.ok()) lock->counters.failed_seals++;
  table.profile = std::move(profile);
  return status.ok();
}

// The block lies where a backend can work on it, or was lost; false if that cannot be had now.
bool Sealer::BringIn(CacheLock& lock, const GroupTable& table, int64_t index) {
  Block* const block = table.at(index);
  return !mover_.IsFar(*block) || (mover_.BringIn(lock, block).ok() && !mover_.IsFar(*block));
}

bool Sealer::SealRound(CacheLock& lock, std::vector<Work>& work) {
  std::vector<Seal> seals;
  std::vector<int64_t> begun;  // of each table
  for (Work& table : work) {
    begun.push_back(table.table().sealed);
    if (!table.stuck) StartSeals(lock, table, kStep, seals);
  }
  if (!seals.empty()) {
    const Unlocked unlocked(lock);
    Recode(seals);
  }
  for (Seal& seal : seals) Publish(*lock, seal);
  if (!seals.empty()) lock->changed.NotifyAll();
  bool more = false;
  for (size_t i = 0; i < work.size(); i++) {
    if (work[i].table().sealed == begun[i]) work[i].stuck = true;
    more = more || (!work[i].stuck && work[i].table().sealed < work[i].end);
  }
  return more;
}

void Sealer::Defer(CacheState& state, GroupTable& table, int64_t end) {
  if (table.first_block() >= end) return;
  table.deferred = end;
  state.counters.deferred_seals++;
}

// Room for the coded blocks of the table's next exact ones. Sets `sealed` as if all of them succeeded.
void Sealer::StartSeals(CacheLock& lock, Work& work, int64_t most, std::vector<Seal>& seals) {
  GroupTable& table = work.table();
  const int64_t end = std::min(work.end, table.sealed + std::min(kStep, most));
  for (; table.sealed < end; table.sealed++) {
    Block* source = table.at(table.sealed);
    if (table.IsCoded(*source) || source->place == nullptr) continue;
    KVTIDE_CHECK(source->layout() == table.exact);
    if (!BringIn(lock, table, table.sealed)) {
      work.stuck = true;
      return Defer(*lock, table, work.end);
    }
    if (source->place == nullptr) continue;  // lost on the way
    PinnedPlace place(lock->store, source->place);
    WritingBlock target =
        mover_.AllocateIn(lock, place->tier, work.sequence->home, table.coded,
                          table.coded->block_bytes() * static_cast<size_t>(end - table.sealed));
    if (!target) {
      work.stuck = true;
      return Defer(*lock, table, work.end);
    }
    seals.push_back({work.sequence,
                     work.group,
                     table.sealed,
                     std::move(place),
                     std::move(target),
                     table.profile,
                     {},
                     &work});
  }
}

void Sealer::Recode(std::vector<Seal>& seals) {
  for (int t = 0; t < static_cast<int>(core_.tiers()); t++) {
    std::vector<RecodePiece> pieces;
    for (const Seal& seal : seals) {
      if (seal.source->tier != t) continue;
      const GroupTable& table = seal.table();
      RecodePiece& piece = pieces.emplace_back();
      piece.from = table.exact;
      piece.source = core_.Data(*seal.source.get());
      piece.to = table.coded;
      piece.target = core_.Data(*seal.target->place);
      piece.to_profile = seal.profile.get();
      piece.position = seal.index * kBlockTokens;
      piece.first_layer = 0;
      piece.layers = table.coded->shape().layers;
    }
    if (pieces.empty()) continue;
    const absl::Status status = core_.backend(t).Recode(pieces);
    for (Seal& seal : seals)
      if (seal.source->tier == t) seal.status = status;
  }
}

// The coded block takes the exact one's place in the table; after an error the table goes back to the exact
// one and waits for the next append.
void Sealer::Publish(CacheState& state, Seal& seal) {
  Sequence& sequence = *seal.sequence;
  GroupTable& table = seal.table();
  if (!seal.status.ok()) {
    state.counters.failed_seals++;
    TakeBack(seal);
    seal.work->stuck = true;
    return;
  }
  if (seal.index < table.first_block()) return;  // it fell out of the window
  Stamp(state.store, seal.target.get(), sequence, seal.group, seal.index, seal.profile);
  table.blocks->Replace(seal.index, seal.target.get(), sequence.recency.own);
  state.counters.sealed_blocks++;
}

}  // namespace kvtide
