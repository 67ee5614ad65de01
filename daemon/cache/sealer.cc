#include "daemon/cache/sealer.h"

#include <algorithm>

#include "kernels/base/check.h"

namespace kvtide {

void Sealer::Settle(CacheLock& lock, Sequence& sequence) {
  const ExactWindow exact = sequence.options.EffectiveWindow();
  for (size_t g = 0; g < sequence.groups.size(); g++) {
    GroupTable& table = sequence.groups[g];
    const int64_t full = table.MinTokens() / kBlockTokens;
    if (sequence.options.seal_at_once) {
      while (!table.staging.empty() && table.staging.begin()->first < full) {
        lock->store.RemoveDirect(table.staging.begin()->second, sequence.keeper());
        table.staging.erase(table.staging.begin());
      }
      FreeFallenBlocks(*lock, sequence, table);
      continue;
    }
    bool ready = table.coding();
    if (ready && full > 0 && table.profile == nullptr) ready = MakeFirstBlockProfile(lock, table);
    FreeFallenBlocks(*lock, sequence, table);
    if (!ready) continue;
    const int64_t end = std::max<int64_t>(0, full - exact.last_blocks);
    constexpr int64_t kStep = 16;  // blocks that exist twice at a time
    table.sealed = std::max({table.sealed, table.first_block(), std::min<int64_t>(end, exact.first_blocks)});
    while (table.sealed < end) {
      const int64_t done =
          SealRange(lock, sequence, static_cast<int>(g), table.sealed, std::min(end, table.sealed + kStep));
      if (done == table.sealed) break;
      table.sealed = done;
    }
  }
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
  state.sequences.CountHeld(sequence);
}

// False if the sequence wants a profile and a backend error was in the way: sealing waits, so that all coded
// blocks have it.
bool Sealer::MakeFirstBlockProfile(CacheLock& lock, GroupTable& table) {
  if (!table.profile_options.mean && table.profile_options.equalise == Equalise::kNone) return true;
  const int64_t full = table.MinTokens() / kBlockTokens;
  int64_t index = table.first_block();
  while (index < full && (table.at(index)->place == nullptr || table.at(index)->layout != table.exact))
    index++;
  if (index >= full) return true;
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
      args.block = place->data;
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

// Codes the exact blocks of [begin, end), each in its tier. Returns the first one that had no room or could
// not be coded, else the end: those stay exact until the next append.
int64_t Sealer::SealRange(CacheLock& lock, Sequence& sequence, int group, int64_t begin, int64_t end) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  struct Seal {
    int64_t index = 0;
    PinnedPlace source;
    WritingBlock target;
    absl::Status status;
  };
  std::vector<Seal> seals;
  int64_t done = end;
  for (int64_t index = begin; index < end; index++) {
    Block* source = table.at(index);
    if (source->layout == table.coded || source->place == nullptr) continue;
    KVTIDE_CHECK(source->layout == table.exact);
    PinnedPlace place(lock->store, source->place);
    WritingBlock target = mover_.AllocateIn(lock, place->tier, sequence.home, table.coded,
                                            table.coded->block_bytes() * static_cast<size_t>(end - index));
    if (!target) {
      done = index;
      break;
    }
    seals.push_back({index, std::move(place), std::move(target), {}});
  }
  if (!seals.empty()) {
    const Unlocked unlocked(lock);
    for (int t = 0; t < static_cast<int>(core_.tiers()); t++) {
      std::vector<RecodePiece> pieces;
      for (const Seal& seal : seals) {
        if (seal.source->tier != t) continue;
        RecodePiece piece;
        piece.from = table.exact;
        piece.source = seal.source->data;
        piece.to = table.coded;
        piece.target = seal.target->place->data;
        piece.to_profile = table.profile.get();
        piece.first_layer = 0;
        piece.layers = table.coded->shape().layers;
        pieces.push_back(piece);
      }
      if (pieces.empty()) continue;
      const absl::Status status = core_.backend(t).Recode(pieces);
      for (Seal& seal : seals)
        if (seal.source->tier == t) seal.status = status;
    }
  }
  for (Seal& seal : seals) {
    if (!seal.status.ok()) {
      lock->counters.failed_seals++;
      done = std::min(done, seal.index);
      continue;
    }
    seal.target->profile = table.profile;
    Stamp(*seal.target.get(), sequence, group, seal.index);
    table.blocks->Replace(seal.index, seal.target.get(), sequence.recency.own);
    lock->counters.sealed_blocks++;
  }
  lock->changed.NotifyAll();
  return done;
}

}  // namespace kvtide
