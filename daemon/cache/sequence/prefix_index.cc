#include "daemon/cache/sequence/prefix_index.h"

#include <xxhash.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/spec_hash.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

// Blocks of a table below this number never change while the sequence grows.
int64_t SealedBlocks(const GroupTable& table) {
  return table.coding() ? table.sealed : table.MinTokens() / kBlockTokens;
}

// Whether the table's block of this number is stored as sealed ones are.
bool IsSealed(const Sequence& sequence, const GroupTable& table, int64_t index) {
  const Block& block = *table.at(index);
  return index < sequence.options.EffectiveWindow().first_blocks ? block.layout() == table.exact
                                                                 : table.IsCoded(block);
}

bool IsAlone(const Block& block) { return block.chunks.empty(); }

bool IsCoded(const Block& block) { return !(block.layout()->pair() == ExactPair()); }

// A table that has every block of the sequence; null: all have a sliding window.
const GroupTable* WholeTable(const Sequence& sequence) {
  const auto whole = std::find_if(sequence.groups.begin(), sequence.groups.end(),
                                  [](const GroupTable& table) { return table.window <= 0; });
  return whole != sequence.groups.end() ? &*whole : nullptr;
}

uint64_t HashOf(const std::shared_ptr<const Profile>& profile) {
  return profile != nullptr ? profile->hash : 0;
}

}  // namespace

PrefixIndex::PrefixIndex(BlockStore* store) : store_(store) {
  store->SetForgetPrefix([this](Block* block) { Leave(block); });
}

// Texts have their length before them, numbers end with a comma: different values give different texts.
std::string PrefixIndex::Identity(const Sequence& sequence) {
  const SequenceOptions& options = sequence.options;
  std::string text;
  for (const std::string& part :
       {options.name_space, sequence.model->tenant, sequence.model->spec.name, options.salt})
    absl::StrAppend(&text, part.size(), ":", part, ",");
  absl::StrAppend(&text, sequence.model->hash, ",", options.exact_window.first_blocks, ",",
                  options.exact_window.last_blocks, ",");
  for (const GroupTable& table : sequence.groups) {
    const CachePair pair = table.coded->pair();
    absl::StrAppend(&text, PairName(pair), ",", Info(pair.k).version, ",", Info(pair.v).version, ",",
                    HashLayout(*table.exact), ",", HashLayout(*table.coded), ",", table.window, ",");
    // Who does not allow it gets no block of fewer bits.
    for (const BlockLayout* const rung : RungsBelow(table))
      absl::StrAppend(&text, "degrade ", PairName(rung->pair()), ",", Info(rung->pair().k).version, ",",
                      Info(rung->pair().v).version, ",", HashLayout(*rung), ",");
    absl::StrAppend(&text, table.profile_options.mean ? 1 : 0, ",",
                    static_cast<int>(table.profile_options.equalise), ",",
                    static_cast<int>(table.profile_options.pairs), ",",
                    table.calibrated != nullptr ? table.calibrated->hash : 0, ";");
  }
  return text;
}

uint64_t PrefixIndex::BlockBytes(const Sequence& sequence) {
  uint64_t bytes = 0;
  for (const GroupTable& table : sequence.groups) bytes += table.coded->block_bytes();
  return bytes;
}

uint64_t PrefixIndex::Seed(const Sequence& sequence) {
  const std::string identity = Identity(sequence);
  return XXH3_64bits(identity.data(), identity.size());
}

PrefixSpacePtr PrefixIndex::Find(const Sequence& like, int home) const {
  const auto found = spaces_.find({Identity(like), home});
  return found != spaces_.end() ? found->second : nullptr;
}

PrefixSpacePtr PrefixIndex::Open(const Sequence& sequence) {
  std::string identity = Identity(sequence);
  if (const auto found = spaces_.find({identity, sequence.home}); found != spaces_.end())
    return found->second;
  if (spaces_.size() >= sweep_at_) {
    std::erase_if(spaces_, [](const auto& entry) {
      return entry.second->blocks.empty() && entry.second.use_count() == 1;
    });
    sweep_at_ = std::max<size_t>(64, 2 * spaces_.size());
  }
  auto space = std::make_shared<PrefixSpace>(store_);
  space->home = sequence.home;
  space->seed = XXH3_64bits(identity.data(), identity.size());
  space->model = sequence.model;
  space->tenant = sequence.options.name_space;
  for (const GroupTable& table : sequence.groups) space->windows.push_back(table.window);
  space->identity = identity;
  spaces_.emplace(Name(std::move(identity), sequence.home), space);
  return space;
}

void PrefixIndex::Insert(PrefixSpace& space, const BlockKey& key, int group, Block* block) {
  KVTIDE_CHECK(block->prefix() == nullptr && block->place != nullptr && block->home() == space.home &&
               block->group() == group && !block->keyed && Get(space, key, group) == nullptr);
  SetSpace(block, &space);
  block->key = key;
  space.blocks.Insert(*block);
  store_->CountAlone(*block, 1);
  blocks_++;
}

void PrefixIndex::SetSpace(Block* block, PrefixSpace* space) {
  BlockKind kind = *block->kind;
  kind.prefix = space;
  store_->SetKind(block, kind);
}

void PrefixIndex::Leave(Block* block) {
  KVTIDE_CHECK(block->prefix() != nullptr);
  if (const auto found = runs_of_.find(block->id); found != runs_of_.end()) {
    const auto kept = std::move(found->second);
    runs_of_.erase(found);
    for (const auto& [run, place] : kept) {
      store_->Unkeep(place);
      if (--run->live > 0) continue;
      dead_runs_.push_back(run->id);
      ages_.erase({run->written, run->id});
      runs_.erase(run->id);
    }
  }
  store_->CountAlone(*block, -1);
  const bool erased = block->prefix()->blocks.Erase(*block);
  KVTIDE_CHECK(erased);
  SetSpace(block, nullptr);
  blocks_--;
}

bool PrefixIndex::DropColdest() {
  constexpr int kPeeks = 4096;
  for (int t = static_cast<int>(store_->tiers()) - 1; t >= 0; t--) {
    BlockId coldest = 0;
    bool found = false;
    int peeks = 0;
    store_->PeekIdle(t, ~uint64_t{0}, [&](const Block& block) {
      found = block.prefix() != nullptr && IsAlone(block) && block.droppable();
      coldest = block.id;
      return !found && ++peeks < kPeeks;
    });
    if (!found) continue;
    store_->Drop(store_->Get(coldest));
    return true;
  }
  return false;
}

// Whether the block before this one, if it is coded, is found and was coded with the table's profile.
bool PrefixIndex::Continues(const Sequence& sequence, size_t group, int64_t index) const {
  const GroupTable& table = sequence.groups[group];
  if (index <= table.first_block() || !IsCoded(*table.at(index - 1))) return true;
  const Block* const before = Get(*sequence.prefixes, KeyOf(sequence, index - 1), static_cast<int>(group));
  return before != nullptr && HashOf(before->profile()) == HashOf(table.profile);
}

uint64_t PrefixIndex::Register(Sequence& sequence, uint64_t most, UnsentBlocks* unsent) {
  if (!sequence.chain.has_value()) return 0;
  PrefixSpace& space = *sequence.prefixes;
  int64_t end = sequence.chain->blocks();
  for (const GroupTable& table : sequence.groups) end = std::min(end, SealedBlocks(table));
  // A block that is being coded ends what is sealed.
  for (int64_t index = sequence.found_blocks; index < end; index++)
    for (const GroupTable& table : sequence.groups)
      if (index >= table.first_block() && index < table.end_block() && table.at(index)->place != nullptr &&
          !IsSealed(sequence, table, index))
        end = index;
  uint64_t dropped = 0;
  RecencyPtr returned;  // of blocks that were dropped not long ago
  for (int64_t index = sequence.found_blocks; index < end; index++) {
    const BlockKey key = KeyOf(sequence, index);
    for (size_t g = 0; g < sequence.groups.size(); g++) {
      GroupTable& table = sequence.groups[g];
      if (index < table.first_block() || index >= table.end_block()) continue;
      Block* const mine = table.at(index);
      // What could not be coded, or is lost, nobody else is to have.
      if (mine->place == nullptr || !IsSealed(sequence, table, index)) continue;
      Block* there = Get(space, key, static_cast<int>(g));
      if (there == mine) continue;
      // One that came from before a restart may not be there any more, one that lies deeper would have to be
      // brought in.
      // One that was recoded to fewer bits is worse, whoever has it still.
      const bool worse = there != nullptr &&
                         (there->bytes() < mine->bytes() ||
                          (IsAlone(*there) && (!there->checked || there->place->tier > mine->place->tier)));
      if (worse && there->leases == 0 && there->holds == 0 && mine->prefix() == nullptr) {
        Leave(there);
        store_->DeleteIfUnused(there);
        there = nullptr;
      }
      const bool coded = IsCoded(*mine);
      if (coded && !Continues(sequence, g, index)) continue;
      if (there != nullptr) {
        if (coded && HashOf(there->profile()) != HashOf(table.profile)) continue;
        // What a tier of I/O has is as good as its bytes, which nobody has looked at.
        if (!there->checked || there->bytes() < mine->bytes() ||
            (!store_->tier(there->place->tier).attends() && store_->tier(mine->place->tier).attends()))
          continue;
        table.blocks->Replace(index, there, sequence.recency.own);
        sequence.recency.AddPrefix(store_->RecordOf(*there));
        store_->RaisePriority(store_->RecordOf(*there), sequence.options.priority);
        continue;
      }
      if (mine->prefix() != nullptr) continue;
      while (blocks_ >= most && DropColdest()) dropped++;
      if (blocks_ >= most) continue;
      Insert(space, key, static_cast<int>(g), mine);
      if (store_->TakeGhost(key, static_cast<int>(g))) {
        // When the sequence is closed it is not on trial once more.
        if (returned == nullptr)
          returned = store_->NewRecency(store_->LastTouched(sequence.recency.own), Standing::kUsed,
                                        sequence.options.priority);
        store_->Rejoin(mine, returned, BlockStore::End::kColdest);
        sequence.recency.AddPrefix(returned);
      }
      if (unsent != nullptr) unsent->Found(mine->id);
    }
  }
  sequence.found_blocks = std::max(sequence.found_blocks, end);
  return dropped;
}

void PrefixIndex::Prefer(const Sequence& sequence, absl::FunctionRef<bool(const Block&)> better) {
  PrefixSpace& space = *sequence.prefixes;
  for (int64_t index = 0; index < sequence.found_blocks; index++) {
    for (size_t g = 0; g < sequence.groups.size(); g++) {
      const GroupTable& table = sequence.groups[g];
      if (index < table.first_block() || index >= table.end_block()) continue;
      Block* const mine = table.at(index);
      Block* const there = Get(space, KeyOf(sequence, index), static_cast<int>(g));
      if (there == nullptr || there == mine || there->leases > 0 || there->holds > 0 ||
          mine->prefix() != nullptr || mine->place == nullptr || mine->keyed || mine->home() != space.home ||
          mine->group() != static_cast<int>(g) || mine->layout() != there->layout() ||
          HashOf(mine->profile()) != HashOf(there->profile()) || !better(*mine) || better(*there))
        continue;
      Leave(there);
      store_->DeleteIfUnused(there);
      Insert(space, KeyOf(sequence, index), static_cast<int>(g), mine);
    }
  }
}

BlockKey PrefixIndex::KeyOf(const Sequence& sequence, int64_t index) {
  const TokenChain& chain = *sequence.chain;
  return index < chain.forgotten() ? WholeTable(sequence)->at(index)->key : chain.key(index);
}

std::vector<BlockKey> PrefixIndex::KeysOf(const Sequence& sequence) {
  std::vector<BlockKey> keys;
  keys.reserve(static_cast<size_t>(sequence.chain->blocks()));
  for (int64_t index = 0; index < sequence.chain->blocks(); index++) keys.push_back(KeyOf(sequence, index));
  return keys;
}

void PrefixIndex::ForgetKeys(Sequence& sequence) {
  const GroupTable* const whole = WholeTable(sequence);
  if (!sequence.chain.has_value() || whole == nullptr) return;
  TokenChain& chain = *sequence.chain;
  const int64_t end = std::min({sequence.found_blocks, chain.blocks(), whole->end_block()});
  int64_t index = chain.forgotten();
  for (; index < end; index++) {
    Block* const block = whole->at(index);
    const BlockKey& key = chain.key(index);
    if (block->key == key) continue;
    // One that is not found, and so needs no key of its own.
    if (block->keyed || block->prefix() != nullptr || (block->key != BlockKey{} && block->references() > 1))
      break;
    block->key = key;
  }
  chain.Forget(index);
}

int64_t PrefixIndex::FirstBlock(const PrefixSpace& space, int group, int64_t blocks) {
  return FirstLiveBlock(blocks * kBlockTokens, space.windows[static_cast<size_t>(group)]);
}

PrefixIndex::Prefix PrefixIndex::Longest(const PrefixSpace& space, std::span<const BlockKey> keys) {
  // Entries and blocks are fetched while those before them are looked at.
  constexpr size_t kEntriesAhead = 16, kBlocksAhead = 8;
  Prefix prefix;
  prefix.blocks = Longest(space, keys.size(), [&](size_t i, size_t g) {
    const int group = static_cast<int>(g);
    if (i + kEntriesAhead < keys.size()) space.blocks.FetchEntry(keys[i + kEntriesAhead], group);
    if (i + kBlocksAhead < keys.size()) space.blocks.FetchBlock(keys[i + kBlocksAhead], group);
    Block* const block = Get(space, keys[i], group);
    prefix.there.push_back(block);
    return PresenceOf(block);
  });
  return prefix;
}

PrefixIndex::Presence PrefixIndex::PresenceOf(const Block* block) {
  return block != nullptr ? Presence{true, IsCoded(*block), HashOf(block->profile())} : Presence();
}

void PrefixIndex::Order(std::span<Block* const> blocks, PriorityRecords* records) {
  for (Block* const block : blocks)
    if (block->prefix() != nullptr && IsAlone(*block))
      store_->Rejoin(block, records->Of(*block), BlockStore::End::kColdest);
}

void PrefixIndex::Forget(const ModelState& model) {
  std::vector<Block*> blocks;
  for (const auto& [name, space] : spaces_) {
    if (space->model.get() != &model) continue;
    space->blocks.ForEach([&](Block* block) { blocks.push_back(block); });
  }
  // The map has no order that a second run would have.
  std::sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->id < b->id; });
  for (Block* const block : blocks) {
    Leave(block);
    store_->DeleteIfUnused(block);
  }
  std::erase_if(spaces_, [&](const auto& entry) { return entry.second->model.get() == &model; });
}

void PrefixIndex::EnterRun(std::unique_ptr<PrefixRun> run) {
  run->live = run->blocks.size();
  for (const auto& [block, place] : run->blocks) runs_of_[block].push_back({run.get(), place});
  const uint64_t id = run->id;
  ages_.emplace(run->written, id);
  const bool added = runs_.emplace(id, std::move(run)).second;
  KVTIDE_CHECK(added);
}

uint64_t PrefixIndex::OldestRun(uint64_t besides) const {
  for (const auto& [written, id] : ages_)
    if (id != besides) return id;
  return 0;
}

void PrefixIndex::LeaveRun(uint64_t id) {
  const auto found = runs_.find(id);
  if (found == runs_.end()) return;
  for (const auto& [block, place] : found->second->blocks) {
    const auto of = runs_of_.find(block);
    if (of == runs_of_.end()) continue;  // dropped
    const auto mine = std::find_if(of->second.begin(), of->second.end(),
                                   [&](const Kept& kept) { return kept.run == found->second.get(); });
    if (mine == of->second.end()) continue;
    of->second.erase(mine);
    if (of->second.empty()) runs_of_.erase(of);
    store_->Unkeep(place);
  }
  ages_.erase({found->second->written, id});
  runs_.erase(found);
}

void PrefixIndex::Clear() {
  for (auto& [name, space] : spaces_) {
    std::vector<Block*> blocks;
    space->blocks.ForEach([&](Block* block) { blocks.push_back(block); });
    for (Block* const block : blocks) {
      Leave(block);
      store_->DeleteIfUnused(block);
    }
  }
  spaces_.clear();
}

void PrefixIndex::CheckInvariants() const {
  uint64_t blocks = 0, alone = 0, durable = 0;
  for (const auto& [name, space] : spaces_) {
    space->blocks.ForEach([&, &space = space](const Block* block) {
      KVTIDE_CHECK(block->prefix() == space.get() && Get(*space, block->key, block->group()) == block &&
                   block->place != nullptr && block->home() == space->home && !block->keyed);
      if (IsAlone(*block)) alone += block->bytes();
      if (const auto of = runs_of_.find(block->id); of != runs_of_.end()) {
        for (const Kept& kept : of->second)
          KVTIDE_CHECK(kept.place->keeps() > 0 && runs_.contains(kept.run->id));
        durable++;
      }
      blocks++;
    });
  }
  KVTIDE_CHECK(ages_.size() == runs_.size());
  KVTIDE_CHECK(blocks == blocks_ && alone == store_->alone_bytes() && durable == runs_of_.size(), blocks,
               " blocks of prefixes, ", blocks_, " counted; ", alone, " bytes that no sequence has, ",
               store_->alone_bytes(), " counted; ", durable, " durable, ", runs_of_.size(), " counted");
  store_->ForEach([&](const Block& block) {
    if (block.prefix() == nullptr) return;
    KVTIDE_CHECK(Get(*block.prefix(), block.key, block.group()) == &block, "block ", block.id,
                 " is not where its prefix says");
  });
}

}  // namespace kvtide
