// What follows an append: the profile from the first block, blocks that fell out of a sliding window, and
// sealing. All of it may wait for the next append when there is no room; nothing here fails a call.
#include <algorithm>

#include "daemon/cache/kv_cache_impl.h"
#include "kernels/base/check.h"

namespace kvtide {

void KvCache::Impl::Settle(Sequence& sequence) {
  const ExactWindow exact = sequence.options.EffectiveWindow();
  for (size_t g = 0; g < sequence.groups.size(); g++) {
    GroupTable& table = sequence.groups[g];
    const int64_t full = table.MinTokens() / kBlockTokens;
    if (sequence.options.seal_at_once) {
      while (!table.staging.empty() && table.staging.begin()->first < full) {
        store_.Release(table.staging.begin()->second, sequence.keeper());
        table.staging.erase(table.staging.begin());
      }
      FreeFallenBlocks(sequence, table);
      continue;
    }
    bool ready = table.coding();
    if (ready && full > 0 && table.profile == nullptr) ready = MakeFirstBlockProfile(table);
    FreeFallenBlocks(sequence, table);
    if (!ready) continue;
    const int64_t end = std::max<int64_t>(0, full - exact.last_blocks);
    constexpr int64_t kStep = 16;  // blocks that exist twice at a time
    table.sealed = std::max({table.sealed, table.first_block, std::min<int64_t>(end, exact.first_blocks)});
    while (table.sealed < end) {
      const int64_t done =
          SealRange(sequence, static_cast<int>(g), table.sealed, std::min(end, table.sealed + kStep));
      if (done == table.sealed) break;
      table.sealed = done;
    }
  }
}

void KvCache::Impl::FreeFallenBlocks(Sequence& sequence, GroupTable& table) {
  const int64_t live = FirstLiveBlock(table.MinTokens(), table.window);
  while (table.first_block < live && !table.blocks.empty()) {
    const auto staged = table.staging.find(table.first_block);
    if (staged != table.staging.end()) {
      store_.Release(staged->second, sequence.keeper());
      table.staging.erase(staged);
    }
    store_.Release(table.blocks.front(), sequence.keeper());
    table.blocks.pop_front();
    table.first_block++;
    counters_.window_freed_blocks++;
  }
}

// False if the sequence wants a profile and a backend error was in the way: sealing waits, so that all coded
// blocks have it.
bool KvCache::Impl::MakeFirstBlockProfile(GroupTable& table) {
  if (!table.profile_options.mean && table.profile_options.equalise == Equalise::kNone) return true;
  const int64_t full = table.MinTokens() / kBlockTokens;
  int64_t index = table.first_block;
  while (index < full && (table.at(index)->place == nullptr || table.at(index)->layout != table.exact))
    index++;
  if (index >= full) return true;
  Block* block = table.at(index);
  Place* place = block->place;
  const GroupShape& shape = table.exact->shape();
  const size_t rows = static_cast<size_t>(kBlockTokens) * static_cast<size_t>(shape.kv_heads);
  store_.Pin(place);
  mu_.Unlock();
  std::vector<std::vector<float>> keys(static_cast<size_t>(shape.layers),
                                       std::vector<float>(rows * static_cast<size_t>(shape.head_dim_k)));
  std::vector<const float*> pointers;
  absl::Status status;
  for (int layer = 0; layer < shape.layers && status.ok(); layer++) {
    DecodeArgs args;
    args.layout = table.exact;
    args.block = place->data;
    args.layer = layer;
    args.k = keys[static_cast<size_t>(layer)].data();
    status = backends_[static_cast<size_t>(place->tier)]->Decode(args);
    pointers.push_back(args.k);
  }
  std::shared_ptr<const Profile> profile;
  if (status.ok()) {
    Profile made = MakeProfile(shape, pointers, kBlockTokens, table.profile_options);
    if (made.hash != 0) profile = std::make_shared<const Profile>(std::move(made));
  }
  mu_.Lock();
  store_.Unpin(place);
  changed_.NotifyAll();
  if (!status.ok()) counters_.failed_seals++;
  table.profile = std::move(profile);
  return status.ok();
}

// Codes the exact blocks of [begin, end), each in its tier. Returns the first one that had no room or could
// not be coded, else the end: those stay exact until the next append.
int64_t KvCache::Impl::SealRange(Sequence& sequence, int group, int64_t begin, int64_t end) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  struct Seal {
    int64_t index;
    Place* source;
    Block* target;
    absl::Status status;
  };
  std::vector<Seal> seals;
  int64_t done = end;
  for (int64_t index = begin; index < end; index++) {
    Block* source = table.at(index);
    if (source->layout == table.coded || source->place == nullptr) continue;
    KVTIDE_CHECK(source->layout == table.exact);
    Place* place = source->place;
    store_.Pin(place);
    Block* target = AllocateIn(place->tier, sequence.home, table.coded,
                               table.coded->block_bytes() * static_cast<size_t>(end - index));
    if (target == nullptr) {
      store_.Unpin(place);
      done = index;
      break;
    }
    seals.push_back({index, place, target, {}});
  }
  if (!seals.empty()) {
    mu_.Unlock();
    for (size_t t = 0; t < backends_.size(); t++) {
      std::vector<RecodePiece> pieces;
      for (const Seal& seal : seals) {
        if (seal.source->tier != static_cast<int>(t)) continue;
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
      const absl::Status status = backends_[t]->Recode(pieces);
      for (Seal& seal : seals)
        if (seal.source->tier == static_cast<int>(t)) seal.status = status;
    }
    mu_.Lock();
  }
  for (Seal& seal : seals) {
    seal.target->writing = false;
    store_.Unpin(seal.source);
    if (seal.status.ok()) {
      Block*& entry = table.at(seal.index);
      seal.target->profile = table.profile;
      Stamp(seal.target, sequence, group, seal.index);
      store_.AddRef(seal.target, sequence.keeper());
      store_.Release(entry, sequence.keeper());
      entry = seal.target;
      counters_.sealed_blocks++;
    } else {
      counters_.failed_seals++;
      done = std::min(done, seal.index);
    }
    store_.Unhold(seal.target);
  }
  changed_.NotifyAll();
  return done;
}

}  // namespace kvtide
