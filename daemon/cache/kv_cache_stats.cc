// Snapshots: statistics, descriptions of sequences, predictions, and the check of all invariants.
#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache_impl.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Tokens of a group that the cache holds for a sequence: all, less those that left the window or were
// dropped.
int64_t HeldTokens(const GroupTable& table, bool may_have_drops) {
  int64_t tokens = std::max<int64_t>(0, table.MinTokens() - table.first_block * kBlockTokens);
  if (!may_have_drops) return tokens;
  int64_t index = table.first_block;
  for (const Block* block : table.blocks) {
    if (block->place == nullptr)
      tokens -= std::clamp<int64_t>(table.MinTokens() - index * kBlockTokens, 0, kBlockTokens);
    index++;
  }
  return tokens;
}

uint64_t ValuesPerToken(const GroupShape& shape) {
  return static_cast<uint64_t>(shape.layers) * static_cast<uint64_t>(shape.kv_heads) *
         static_cast<uint64_t>(shape.head_dim_k + shape.head_dim_v);
}

}  // namespace

CacheStats KvCache::Impl::Stats() const {
  MutexLock lock(mu_);
  CacheStats stats;
  for (size_t t = 0; t < store_.tiers(); t++) {
    const Tier& tier = store_.tier(static_cast<int>(t));
    TierStats& to = stats.tiers.emplace_back();
    to.name = tier.name;
    to.backend = tier.backend->name();
    to.device = tier.device;
    to.capacity_bytes = tier.allocator.capacity_bytes();
    to.used_bytes = tier.allocator.used_bytes();
    to.free_bytes = tier.allocator.free_bytes();
    to.largest_free_extent_bytes = tier.allocator.LargestFreeExtent();
    to.blocks = tier.blocks;
    to.pinned_blocks = tier.pinned;
    to.demoted_blocks = tier.demoted;
    to.promoted_blocks = tier.promoted;
    to.dropped_blocks = tier.dropped;
    for (const CacheType k : AllCacheTypes())
      for (const CacheType v : AllCacheTypes()) {
        const PairStats& pair = tier.pairs[PairIndex({k, v})];
        if (pair.blocks > 0) to.pairs[PairName({k, v})] = pair;
      }
  }
  stats.models = models_.size();
  stats.sequences = sequences_.size();
  for (const auto& [id, sequence] : sequences_) {
    stats.tokens += static_cast<uint64_t>(sequence->MinTokens());
    const bool may_have_drops = sequence->options.allow_drop || counters_.checksum_failures > 0;
    for (const GroupTable& table : sequence->groups)
      stats.f16_equivalent_bytes +=
          2 * ValuesPerToken(table.exact->shape()) * static_cast<uint64_t>(HeldTokens(table, may_have_drops));
  }
  stats.shared_blocks = store_.shared_blocks();
  stats.stored_bytes = store_.stored_bytes();
  if (stats.f16_equivalent_bytes > 0)
    stats.bits_per_value =
        16.0 * static_cast<double>(stats.stored_bytes) / static_cast<double>(stats.f16_equivalent_bytes);
  stats.sequences_created = counters_.sequences_created;
  stats.sequences_closed = counters_.sequences_closed;
  stats.appended_tokens = counters_.appended_tokens;
  stats.sealed_blocks = counters_.sealed_blocks;
  stats.failed_seals = counters_.failed_seals;
  stats.copied_on_write_blocks = counters_.copied_on_write_blocks;
  stats.window_freed_blocks = counters_.window_freed_blocks;
  stats.evict_calls = counters_.evict_calls;
  stats.prefetch_calls = counters_.prefetch_calls;
  stats.moves = counters_.moves;
  stats.failed_moves = counters_.failed_moves;
  stats.moved_bytes = counters_.moved_bytes;
  stats.dropped_blocks = counters_.dropped_blocks;
  stats.attended_blocks = counters_.attended_blocks;
  stats.attended_blocks_below_tier0 = counters_.attended_blocks_below_tier0;
  stats.checksum_failures = counters_.checksum_failures;
  stats.exhausted = counters_.exhausted;
  stats.max_sequences = options_.max_sequences;
  stats.max_models = options_.max_models;
  stats.max_tokens_per_sequence = options_.max_tokens_per_sequence;
  return stats;
}

SequenceInfo KvCache::Impl::Describe(const Sequence& sequence) const {
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
  info.device = store_.tier(sequence.home).device;
  info.blocks_by_tier.resize(store_.tiers());
  info.bytes_by_tier.resize(store_.tiers());
  const auto count = [&](const Block& block) {
    if (block.refs > 1) info.shared_blocks++;
    if (block.place == nullptr) {
      info.dropped_blocks++;
      return;
    }
    info.blocks_by_tier[static_cast<size_t>(block.place->tier)]++;
    info.bytes_by_tier[static_cast<size_t>(block.place->tier)] += block.place->bytes;
  };
  for (const GroupTable& table : sequence.groups) {
    for (const Block* block : table.blocks) count(*block);
    for (const auto& [index, block] : table.staging) count(*block);
  }
  return info;
}

absl::StatusOr<SequenceInfo> KvCache::Impl::GetSequence(SequenceId id) const {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  return Describe(*sequence);
}

std::vector<SequenceInfo> KvCache::Impl::ListSequences() const {
  MutexLock lock(mu_);
  std::vector<SequenceInfo> infos;
  infos.reserve(sequences_.size());
  for (const auto& [id, sequence] : sequences_) infos.push_back(Describe(*sequence));
  return infos;
}

absl::StatusOr<PredictedBytes> KvCache::Predict(const ModelSpec& model, const SequenceOptions& options,
                                                int64_t tokens) {
  KVTIDE_RETURN_IF_ERROR(CheckModelSpec(model));
  KVTIDE_RETURN_IF_ERROR(CheckSequenceOptions(options, model));
  if (tokens < 0) return absl::InvalidArgumentError(absl::StrCat(tokens, " tokens"));
  PredictedBytes predicted;
  for (size_t g = 0; g < model.groups.size(); g++) {
    const CachePair pair = options.PairOfGroup(static_cast<int>(g));
    const bool coding = !(pair == ExactPair());
    BlockCounts counts = CountLiveBlocks(tokens, options.EffectiveWindow(), model.groups[g].window);
    if (!coding) counts = {counts.exact + counts.coded, 0};
    // seal_at_once keeps the tail twice: f16, to append to, and coded, to attend over.
    if (coding && options.seal_at_once && tokens % kBlockTokens != 0) counts.coded++;
    predicted.exact_blocks += static_cast<uint64_t>(counts.exact);
    predicted.coded_blocks += static_cast<uint64_t>(counts.coded);
    predicted.bytes +=
        static_cast<uint64_t>(counts.exact) * BlockLayout(model.groups[g].shape, ExactPair()).block_bytes() +
        static_cast<uint64_t>(counts.coded) * BlockLayout(model.groups[g].shape, pair).block_bytes();
  }
  return predicted;
}

void KvCache::Impl::CheckInvariants() const {
  MutexLock lock(mu_);
  store_.CheckInvariants();
  std::map<const Block*, std::pair<int, int>> counted;  // references, keepers
  bool writers = closing_ > 0;
  std::vector<HomeCount> homes(home_counts_.size());
  for (const auto& entry : sequences_) {
    const SequenceId id = entry.first;
    const SequencePtr& sequence = entry.second;
    KVTIDE_CHECK(sequence->id == id && !sequence->closed && sequence->readers >= 0);
    writers = writers || sequence->writer;
    HomeCount& home = homes[static_cast<size_t>(sequence->home)];
    home.sequences++;
    if (sequence->empty) home.empty++;
    KVTIDE_CHECK(!sequence->empty || sequence->MaxTokens() == 0);
    const auto count = [&](const Block* block) {
      KVTIDE_CHECK(block->home == sequence->home, "block ", block->id, " of device ", block->home,
                   " in a sequence of device ", sequence->home);
      counted[block].first++;
      if (sequence->keeper()) counted[block].second++;
    };
    for (const GroupTable& table : sequence->groups) {
      KVTIDE_CHECK(table.first_block >= 0 && table.sealed >= 0);
      if (!sequence->writer) {
        const int64_t blocks = (table.MaxTokens() + kBlockTokens - 1) / kBlockTokens;
        KVTIDE_CHECK(table.end_block() == blocks, "sequence ", id, ": ", table.end_block(),
                     " blocks in the table, length needs ", blocks);
        KVTIDE_CHECK(table.first_block <=
                     std::max(FirstLiveBlock(table.MinTokens(), table.window), int64_t{0}));
      }
      int64_t index = table.first_block;
      for (const Block* block : table.blocks) {
        count(block);
        KVTIDE_CHECK(block->layout == table.exact || block->layout == table.coded);
        KVTIDE_CHECK(block->stamp.index == index && block->stamp.model == sequence->model->id, "block ",
                     block->id, " stamped ", block->stamp.index, " at ", index);
        KVTIDE_CHECK(block->refs > 1 ||
                     block->stamp.group == static_cast<int>(&table - sequence->groups.data()));
        if (!sequence->writer && block->layout == table.exact && !sequence->options.seal_at_once &&
            table.coding())
          KVTIDE_CHECK(block->profile == nullptr);
        index++;
      }
      for (const auto& [staged, block] : table.staging) {
        count(block);
        KVTIDE_CHECK(sequence->options.seal_at_once && block->layout == table.exact &&
                     block->stamp.index == staged);
      }
    }
  }
  for (size_t h = 0; h < homes.size(); h++)
    KVTIDE_CHECK(homes[h].sequences == home_counts_[h].sequences && homes[h].empty == home_counts_[h].empty);
  store_.ForEach([&](const Block& block) {
    const auto it = counted.find(&block);
    const int refs = it == counted.end() ? 0 : it->second.first,
              keepers = it == counted.end() ? 0 : it->second.second;
    // A writer may hold blocks of a closed sequence.
    KVTIDE_CHECK(writers ? refs <= block.refs : refs == block.refs && keepers == block.keepers, "block ",
                 block.id, ": ", refs, " entries, ", block.refs, " counted");
    KVTIDE_CHECK(writers || !block.writing || block.holds > 0);
  });
}

}  // namespace kvtide
