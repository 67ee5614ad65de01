#include "daemon/cache/sequence/inspector.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Tokens of a table whose blocks were dropped.
int64_t DroppedTokens(const GroupTable& table) {
  int64_t tokens = 0;
  const std::vector<Chunk*>& chunks = table.blocks->chunks();
  for (size_t c = 0; c < chunks.size(); c++) {
    if (chunks[c]->dropped == 0) continue;
    for (int slot = 0; slot < kChunkBlocks; slot++) {
      const Block* block = chunks[c]->blocks[static_cast<size_t>(slot)];
      if (block == nullptr || block->place != nullptr) continue;
      tokens += std::clamp<int64_t>(table.MinTokens() - (table.blocks->ChunkBegin(c) + slot) * kBlockTokens,
                                    0, kBlockTokens);
    }
  }
  return tokens;
}

TierStats StatsOf(const Tier& tier, const std::string& medium) {
  TierStats stats;
  stats.name = tier.name;
  stats.backend = medium;
  stats.attends = tier.attends();
  stats.device = tier.device;
  stats.capacity_bytes = tier.allocator.capacity_bytes();
  stats.used_bytes = tier.allocator.used_bytes();
  stats.free_bytes = tier.allocator.free_bytes();
  stats.largest_free_extent_bytes = tier.allocator.LargestFreeExtent();
  stats.blocks = tier.blocks;
  stats.pinned_blocks = std::min(tier.blocks, tier.read + tier.pinned);
  stats.demoted_blocks = tier.demoted;
  stats.promoted_blocks = tier.promoted;
  stats.dropped_blocks = tier.dropped;
  stats.degraded_blocks = tier.degraded;
  stats.degraded_bytes = tier.degraded_bytes;
  stats.lost_blocks = tier.lost;
  stats.prefix_hit_tokens = tier.prefix_hit_tokens;
  if (tier.io != nullptr) stats.io = tier.io->Stats();
  std::vector<CacheType> keys = AllCacheTypes();
  for (const CacheType type : CalibratedTypes()) keys.push_back(type);
  for (const CacheType k : keys)
    for (const CacheType v : AllCacheTypes()) {
      const PairStats& pair = tier.pairs[PairIndex({k, v})];
      if (pair.blocks > 0) stats.pairs[PairName({k, v})] = pair;
    }
  if (const PairStats& opaque = tier.pairs[kOpaquePairIndex]; opaque.blocks > 0)
    stats.pairs["opaque"] = opaque;
  return stats;
}

void AddSequences(const CacheState& state, CacheStats& stats) {
  const Sequences& sequences = state.sequences;
  stats.models = sequences.models();
  stats.sequences = sequences.all().size();
  stats.sequences_created = sequences.created();
  stats.sequences_closed = sequences.closed();
  stats.durable_sequences = state.durable_sequences;
  stats.pinned_sequences = sequences.pins();
  stats.tokens = sequences.tokens();
  stats.f16_equivalent_bytes = sequences.held_f16_bytes();
  if (state.store.dropped_blocks() == 0) return;
  for (const auto& [id, sequence] : sequences.all())
    for (const GroupTable& table : sequence->groups)
      stats.f16_equivalent_bytes -=
          BytesPerToken(table.exact->shape()) * static_cast<uint64_t>(DroppedTokens(table));
}

void AddPrefixes(const CacheState& state, CacheStats& stats) {
  stats.prefix_blocks = state.prefixes.blocks();
  stats.prefix_alone_bytes = state.store.alone_bytes();
  stats.durable_prefix_blocks = state.prefixes.durable_blocks();
  stats.prefix_lookups = state.counters.prefix_lookups;
  stats.prefix_miss_tokens = state.counters.prefix_miss_tokens;
  stats.prefix_reused_tokens = state.counters.prefix_reused_tokens;
}

void AddKeyed(const KeyedIndex& keyed, CacheStats& stats) {
  stats.namespaces = keyed.namespaces().size();
  stats.keyed_blocks = keyed.blocks();
  stats.keyed_bytes = keyed.bytes();
  for (const auto& [id, space] : keyed.namespaces()) {
    stats.durable_keyed_blocks += space->durable.size();
    stats.degraded_keyed_blocks += space->degraded;
  }
  stats.leases = keyed.leases();
  stats.leases_expired = keyed.expired();
}

void AddCounters(const Counters& counters, CacheStats& stats) {
  stats.appended_tokens = counters.appended_tokens;
  stats.sealed_blocks = counters.sealed_blocks;
  stats.failed_seals = counters.failed_seals;
  stats.deferred_seals = counters.deferred_seals;
  stats.copied_on_write_blocks = counters.copied_on_write_blocks;
  stats.window_freed_blocks = counters.window_freed_blocks;
  stats.evict_calls = counters.evict_calls;
  stats.prefetch_calls = counters.prefetch_calls;
  stats.moves = counters.moves;
  stats.failed_moves = counters.failed_moves;
  stats.moved_bytes = counters.moved_bytes;
  stats.compacted_blocks = counters.compacted_blocks;
  stats.compacted_bytes = counters.compacted_bytes;
  stats.dropped_blocks = counters.dropped_blocks;
  stats.attended_blocks = counters.attended_blocks;
  stats.attended_blocks_below_tier0 = counters.attended_blocks_below_tier0;
  stats.checksum_failures = counters.checksum_failures;
  stats.exhausted = counters.exhausted;
  stats.lost_blocks = counters.lost_blocks;
  stats.persist_calls = counters.persist_calls;
  stats.persisted = counters.persisted;
  stats.failed_persists = counters.failed_persists;
  stats.persist_problem = counters.persist_problem;
  stats.persisted_bytes = counters.persisted_bytes;
  stats.leases_granted = counters.leases_granted;
  stats.keyed_hits = counters.keyed_hits;
  stats.keyed_misses = counters.keyed_misses;
  stats.keyed_stored = counters.keyed_stored;
  stats.keyed_present = counters.keyed_present;
  stats.keyed_left_out = counters.keyed_left_out;
  stats.keyed_loaded = counters.keyed_loaded;
  stats.keyed_loaded_bytes = counters.keyed_loaded_bytes;
  stats.keyed_in_place = counters.keyed_in_place;
  stats.keyed_in_place_bytes = counters.keyed_in_place_bytes;
  stats.keyed_held = counters.keyed_held;
  stats.keyed_held_bytes = counters.keyed_held_bytes;
}

}  // namespace

CacheStats Inspector::Stats() const {
  CacheLock lock(core_);
  CacheStats stats;
  stats.lock_waits = core_.lock_waits();
  for (size_t t = 0; t < lock->store.tiers(); t++)
    stats.tiers.push_back(StatsOf(lock->store.tier(static_cast<int>(t)), core_.options().tiers[t].Medium()));
  AddSequences(*lock, stats);
  AddKeyed(lock->keyed, stats);
  AddCounters(lock->counters, stats);
  for (size_t t = 0; t < lock->counters.attended_bytes.size() && t < stats.tiers.size(); t++)
    stats.tiers[t].attended_bytes = lock->counters.attended_bytes[t];
  const auto of = [](const std::vector<uint64_t>& counts, size_t t) {
    return t < counts.size() ? counts[t] : 0;
  };
  for (size_t t = 0; t < stats.tiers.size(); t++) {
    TierStats& tier = stats.tiers[t];
    tier.attended_in_place = of(lock->counters.attended_in_place, t);
    tier.promoted_first = of(lock->counters.promoted_first, t);
    if (tier.attends) tier.attend_rate = core_.rates().attend(static_cast<int>(t));
    if (tier.attends && static_cast<int>(t) >= core_.homes())
      tier.promote_rate = core_.rates().copy_up(static_cast<int>(t));
    const PriorityOrder& order = *lock->store.tier(static_cast<int>(t)).policy;
    tier.low_priority_blocks = order.blocks(Priority::kLow);
    tier.high_priority_blocks = order.blocks(Priority::kHigh);
  }
  stats.table_bytes = lock->store.table_bytes();
  stats.shared_blocks = lock->store.shared_blocks();
  stats.stored_bytes = lock->store.stored_bytes();
  if (stats.f16_equivalent_bytes > 0)
    stats.bits_per_value =
        16.0 * static_cast<double>(stats.stored_bytes - lock->keyed.bytes() - lock->store.alone_bytes()) /
        static_cast<double>(stats.f16_equivalent_bytes);
  AddPrefixes(*lock, stats);
  stats.max_sequences = lock->limits.max_sequences;
  stats.max_models = lock->limits.max_models;
  stats.max_tokens_per_sequence = core_.options().max_tokens_per_sequence;
  for (const TenantAccount* account : lock->tenants.All())
    stats.tenants.push_back({account->tenant, account->sequences, account->models, account->tier_bytes});
  return stats;
}

SequenceMemory Inspector::MemoryOfSequences() const {
  constexpr size_t kAtOnce = 256;
  SequenceMemory memory;
  SequenceId after = 0;
  for (bool more = true; more;) {
    CacheLock lock(core_);
    const auto& all = lock->sequences.all();
    auto it = all.upper_bound(after);
    for (size_t i = 0; i < kAtOnce && it != all.end(); i++, ++it) {
      const Sequence& sequence = *it->second;
      after = it->first;
      for (const GroupTable& table : sequence.groups) {
        const BlockCounts counts =
            sequence.options.LiveBlocks(table.MinTokens(), table.window, table.coding());
        memory.predicted_bytes += static_cast<uint64_t>(counts.exact) * table.exact->block_bytes() +
                                  static_cast<uint64_t>(counts.coded) * table.coded->block_bytes();
        for (const Chunk* chunk : table.blocks->chunks())
          for (const auto& tier : chunk->tiers) memory.held_bytes += tier.bytes;
        for (const auto& [index, block] : table.staging)
          if (block->place != nullptr) memory.held_bytes += block->bytes();
      }
    }
    more = it != all.end();
  }
  return memory;
}

SequenceInfo Inspector::Describe(const CacheState& state, const Sequence& sequence) {
  SequenceInfo info;
  info.id = sequence.id;
  info.model = sequence.model->id;
  info.model_name = sequence.model->spec.name;
  info.options = sequence.options;
  info.forked_from = sequence.forked_from;
  info.tokens = sequence.MinTokens();
  info.max_layer_tokens = sequence.MaxTokens();
  info.created = sequence.created;
  info.last_used = sequence.last_used;
  info.device = state.store.tier(sequence.home).device;
  info.durable = sequence.durable.exists;
  info.durable_tokens = sequence.durable.tokens;
  info.pinned_until = sequence.pinned_until;
  info.known_tokens = sequence.chain.has_value() ? sequence.chain->tokens() : 0;
  info.reused_tokens = sequence.reused_tokens;
  info.blocks_by_tier.resize(state.store.tiers());
  info.bytes_by_tier.resize(state.store.tiers());
  for (const GroupTable& table : sequence.groups) {
    if (const int64_t first = std::max(table.sealed, table.first_block()); first < table.deferred)
      info.deferred.push_back({static_cast<int>(&table - sequence.groups.data()), first, table.deferred});
    for (const Chunk* chunk : table.blocks->chunks()) {
      for (size_t t = 0; t < chunk->tiers.size(); t++) {
        info.blocks_by_tier[t] += chunk->tiers[t].blocks;
        info.bytes_by_tier[t] += chunk->tiers[t].bytes;
      }
      info.dropped_blocks += static_cast<uint64_t>(chunk->dropped);
      info.degraded_blocks += static_cast<uint64_t>(chunk->degraded);
      info.shared_blocks +=
          static_cast<uint64_t>(chunk->owners > 1 ? chunk->count : chunk->count - chunk->sole);
    }
    for (const auto& [index, block] : table.staging) {
      if (block->references() > 1) info.shared_blocks++;
      if (block->place == nullptr) {
        info.dropped_blocks++;
        continue;
      }
      info.blocks_by_tier[static_cast<size_t>(block->place->tier)]++;
      info.bytes_by_tier[static_cast<size_t>(block->place->tier)] += block->bytes();
    }
  }
  return info;
}

absl::StatusOr<SequenceInfo> Inspector::GetSequence(SequenceId id, const CallContext& context) const {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(id, context));
  SequenceInfo info = Describe(*lock, *sequence);
  for (size_t g = 0; g < sequence->groups.size(); g++)
    AddDegraded(static_cast<int>(g), sequence->groups[g], info);
  return info;
}

void Inspector::AddDegraded(int group, const GroupTable& table, SequenceInfo& info) {
  const std::vector<Chunk*>& chunks = table.blocks->chunks();
  for (size_t c = 0; c < chunks.size(); c++) {
    for (int slot = 0; slot < kChunkBlocks && chunks[c]->degraded > 0; slot++) {
      const Block* const block = chunks[c]->blocks[static_cast<size_t>(slot)];
      const int64_t index = table.blocks->ChunkBegin(c) + slot;
      if (block == nullptr || block->place == nullptr || !block->kind->IsDegraded() ||
          index < table.first_block() || index >= table.end_block())
        continue;
      const CachePair pair = block->layout()->pair();
      if (!info.degraded.empty() && info.degraded.back().group == group &&
          info.degraded.back().end == index && info.degraded.back().pair == pair) {
        info.degraded.back().end++;
      } else {
        info.degraded.push_back({group, index, index + 1, pair});
      }
    }
  }
}

std::vector<SequenceInfo> Inspector::ListSequences(const SequenceList& list,
                                                   const CallContext& context) const {
  CacheLock lock(core_);
  std::vector<SequenceInfo> infos;
  const auto& all = lock->sequences.all();
  for (auto it = all.upper_bound(list.after); it != all.end() && infos.size() < list.limit; ++it)
    if ((list.model.empty() || it->second->model->spec.name == list.model) &&
        context.identity->MaySee(it->second->options.name_space))
      infos.push_back(Describe(*lock, *it->second));
  return infos;
}

void Inspector::CheckInvariants() const {
  CacheLock lock(core_);
  lock->store.CheckInvariants();
  std::map<const Block*, std::pair<int, int>> counted;  // references, keepers
  bool writers = lock->sequences.closing() > 0;
  lock->sequences.CheckInvariants();
  for (const auto& entry : lock->sequences.all()) {
    const SequenceId id = entry.first;
    const SequencePtr& sequence = entry.second;
    writers = writers || sequence->writer;
    const auto count = [&](const Block* block) {
      KVTIDE_CHECK(block->home() == sequence->home, "block ", block->id, " of device ", block->home(),
                   " in a sequence of device ", sequence->home);
      counted[block].first++;
      if (sequence->keeper()) counted[block].second++;
    };
    if (sequence->chain.has_value() && sequence->chain->forgotten() > 0)
      KVTIDE_CHECK(std::any_of(sequence->groups.begin(), sequence->groups.end(),
                               [&](const GroupTable& table) {
                                 return table.window <= 0 && table.first_block() == 0 &&
                                        table.end_block() >= sequence->chain->forgotten();
                               }),
                   "sequence ", id, " has forgotten hashes that no table has");
    for (const GroupTable& table : sequence->groups) {
      KVTIDE_CHECK(table.first_block() >= 0 && table.sealed >= 0);
      if (!sequence->writer) {
        const int64_t blocks = (table.MaxTokens() + kBlockTokens - 1) / kBlockTokens;
        KVTIDE_CHECK(table.end_block() == blocks, "sequence ", id, ": ", table.end_block(),
                     " blocks in the table, length needs ", blocks);
        KVTIDE_CHECK(table.first_block() <=
                     std::max(FirstLiveBlock(table.MinTokens(), table.window), int64_t{0}));
      }
      int64_t index = table.first_block();
      table.blocks->ForEach([&](const Block* block) {
        count(block);
        KVTIDE_CHECK(block->layout() == table.exact || table.IsCoded(*block));
        KVTIDE_CHECK(block->kind->ladder == nullptr || block->kind->ladder == table.ladder);
        KVTIDE_CHECK(block->index == index && block->kind->model_hash == sequence->model->hash, "block ",
                     block->id, " stamped ", block->index, " at ", index);
        KVTIDE_CHECK(block->references() > 1 ||
                     block->group() == static_cast<int>(&table - sequence->groups.data()));
        if (!sequence->writer && block->layout() == table.exact && !sequence->options.seal_at_once &&
            table.coding())
          KVTIDE_CHECK(block->profile() == nullptr);
        index++;
      });
      for (const auto& [staged, block] : table.staging) {
        count(block);
        KVTIDE_CHECK(sequence->options.seal_at_once && block->layout() == table.exact &&
                     block->index == staged);
      }
    }
  }
  lock->keyed.CheckInvariants();
  lock->keyed.ForEach(
      [&](const KeyedNamespace&, const BlockKey&, const Block* block) { counted[block].first++; });
  lock->prefixes.CheckInvariants();
  lock->store.ForEach([&](const Block& block) {
    const auto it = counted.find(&block);
    const int refs = it == counted.end() ? 0 : it->second.first,
              keepers = it == counted.end() ? 0 : it->second.second;
    // A writer may hold blocks of a closed sequence.
    KVTIDE_CHECK(
        writers ? refs <= block.references() : refs == block.references() && keepers == block.keepers(),
        "block ", block.id, ": ", refs, " entries, ", block.references(), " counted");
    KVTIDE_CHECK(writers || !block.writing || block.holds > 0);
  });
}

}  // namespace kvtide
