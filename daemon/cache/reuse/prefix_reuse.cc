#include "daemon/cache/reuse/prefix_reuse.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/block/priority_records.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/move/label_check.h"
#include "daemon/cache/reuse/keyed_store.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

const CallContext& ContextOf(const PrefixCall& call) {
  static const CallContext kNobody;
  return call.context != nullptr ? *call.context : kNobody;
}

// Every block that a sequence beginning with the prefix would have.
std::vector<Block*> Blocks(const PrefixSpace& space, const PrefixIndex::Prefix& prefix) {
  std::vector<Block*> all;
  const size_t groups = space.windows.size();
  all.reserve(static_cast<size_t>(prefix.blocks) * groups);
  absl::InlinedVector<int64_t, 2> first;
  for (size_t g = 0; g < groups; g++)
    first.push_back(PrefixIndex::FirstBlock(space, static_cast<int>(g), prefix.blocks));
  for (int64_t index = 0; index < prefix.blocks; index++)
    for (size_t g = 0; g < groups; g++)
      if (index >= first[g]) all.push_back(prefix.there[static_cast<size_t>(index) * groups + g]);
  return all;
}

// Tells whoever records it what was asked of the prefix that the sequence has or would have.
void Trace(const CacheOptions& options, TraceVerb verb, const Sequence& like, uint64_t seed,
           std::span<const BlockKey> keys, int64_t there = 0) {
  if (options.trace == nullptr) return;
  options.trace->Record({options.clock(), verb, seed, kBlockTokens, PrefixIndex::BlockBytes(like),
                         static_cast<uint64_t>(there), keys});
}

}  // namespace

std::vector<Block*> PrefixReuse::BlocksOf(const Sequence& sequence) {
  std::vector<Block*> blocks;
  for (int64_t index = 0; index < sequence.found_blocks; index++)
    for (const GroupTable& table : sequence.groups)
      if (index >= table.first_block() && index < table.end_block() && table.at(index)->prefix() != nullptr)
        blocks.push_back(table.at(index));
  return blocks;
}

// The longest prefix of blocks whose labels were seen: those from before a restart are looked at now.
absl::Status PrefixReuse::CheckAnswering(CacheLock& lock, const PrefixSpace& space,
                                         std::span<const BlockKey> keys, const CallContext& context,
                                         Found* found) {
  while (true) {
    const PrefixIndex::Prefix prefix = PrefixIndex::Longest(space, keys);
    found->blocks = prefix.blocks;
    found->all = Blocks(space, prefix);
    std::vector<HeldBlock> unchecked;
    for (Block* const block : found->all)
      if (!block->checked) unchecked.emplace_back(lock->store, block);
    if (unchecked.empty()) return absl::OkStatus();
    KVTIDE_RETURN_IF_ERROR(context.Check(core_.options().clock(), "the lookup"));
    CheckLabels(lock, unchecked);
    keys = BeforeUnchecked(keys, unchecked);
  }
}

absl::StatusOr<PrefixSpacePtr> PrefixReuse::Best(CacheLock& lock, const Sequence& like,
                                                 std::span<const BlockKey> keys, const CallContext& context,
                                                 Found* found) {
  PrefixSpacePtr best;
  *found = {};
  for (int home = 0; home < core_.homes(); home++) {
    if (!like.options.device.empty() && home != like.home) continue;
    const PrefixSpacePtr space = lock->prefixes.Find(like, home);
    if (space == nullptr) continue;
    Found there;
    KVTIDE_RETURN_IF_ERROR(CheckAnswering(lock, *space, keys, context, &there));
    if (there.blocks <= found->blocks) continue;
    *found = std::move(there);
    best = space;
  }
  // One device may have lost some while the mutex was free for the next one.
  if (best != nullptr && core_.homes() > 1) {
    const PrefixIndex::Prefix prefix =
        PrefixIndex::Longest(*best, keys.first(static_cast<size_t>(found->blocks)));
    found->blocks = prefix.blocks;
    found->all = Blocks(*best, prefix);
  }
  return best;
}

absl::StatusOr<PrefixReport> PrefixReuse::Lookup(const PrefixCall& call) {
  const CallContext& context = ContextOf(call);
  const CacheOptions& options = core_.options();
  SequenceOptions asked = call.options;
  if (asked.name_space.empty()) asked.name_space = context.tenant();
  if (!context.identity->MaySee(asked.name_space))
    return absl::PermissionDeniedError(
        absl::StrCat("the caller is of tenant '", context.tenant(),
                     "' and has no prefixes of others; leave the tenant away, or ask "
                     "an admin"));
  if (static_cast<int64_t>(call.token_ids.size()) > options.max_tokens_per_sequence)
    return absl::InvalidArgumentError(
        absl::StrCat(call.token_ids.size(), " token ids are more than a sequence may have: ",
                     options.max_tokens_per_sequence, " (max_tokens_per_sequence)"));
  SequencePtr like;  // a sequence as it would be, which is nowhere
  uint64_t seed = 0;
  {
    CacheLock lock(core_);
    KVTIDE_ASSIGN_OR_RETURN(like, lock->sequences.Build(call.model, asked));
    seed = PrefixIndex::Seed(*like);
    like->recency = {};
  }
  PrefixReport report;
  std::vector<BlockKey> keys;
  if (!asked.seal_at_once) keys = TokenChain::Keys(seed, call.token_ids);
  CacheLock lock(core_);
  lock->keyed.ExpireLeases(options.clock());
  Found found;
  KVTIDE_ASSIGN_OR_RETURN(PrefixSpacePtr best, Best(lock, *like, keys, context, &found));
  RemoteExchange::Fetched fetched;
  if (!call.peek && options.remote != nullptr && found.blocks < static_cast<int64_t>(keys.size())) {
    if (best != nullptr) like->home = best->home;
    fetched = remote_.FetchPrefix(lock, *like, keys, context);
    KVTIDE_ASSIGN_OR_RETURN(best, Best(lock, *like, keys, context, &found));
  }
  const int64_t blocks = found.blocks;
  report.tokens = blocks * kBlockTokens;
  const bool wants_lease = call.lease > absl::ZeroDuration() && !call.peek && blocks > 0;
  if (wants_lease && lock->keyed.leases() >= options.max_leases) {
    lock->counters.exhausted++;
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(absl::StrCat(
                       lock->keyed.leases(),
                       " leases are held, which is the limit (max_leases); release some (ReleaseLease)")));
  }
  if (blocks > 0) {
    std::vector<int> tiers(static_cast<size_t>(blocks), 0);
    for (const Block* block : found.all) {
      int& tier = tiers[static_cast<size_t>(block->index)];
      tier = std::max<int>(tier, block->place->tier);
    }
    for (const int tier : tiers) {
      if (report.tiers.empty() || report.tiers.back().tier != tier) report.tiers.push_back({tier, 0});
      report.tiers.back().tokens += kBlockTokens;
    }
  }
  if (call.peek) return report;
  Trace(options, TraceVerb::kLookup, *like, seed, keys, blocks);
  lock->counters.prefix_lookups++;
  lock->counters.prefix_miss_tokens += call.token_ids.size() - static_cast<uint64_t>(report.tokens);
  for (const PrefixReport::Run& run : report.tiers)
    lock->store.tier(run.tier).prefix_hit_tokens += static_cast<uint64_t>(run.tokens);
  if (blocks == 0) return report;
  // What no sequence has goes by one record from now on.
  const absl::Time now = options.clock();
  PriorityRecords records(lock->store, now);
  lock->prefixes.Order(found.all, &records);
  RecordSlot touched = kNoSlot;
  for (const Block* block : found.all) {
    if (block->record == kNoSlot || block->record == touched || records.Has(*block)) continue;
    touched = block->record;
    lock->store.Touch(*block, now);
  }
  if (!wants_lease) return report;
  std::vector<HeldBlock> held;
  held.reserve(found.all.size());
  for (Block* const block : found.all) held.emplace_back(lock->store, block);
  keys.resize(static_cast<size_t>(blocks));
  auto hold = std::make_shared<PrefixHold>(PrefixHold{best, std::move(keys), asked.name_space});
  report.lease = KeyedStore::NewLeaseId(*lock);
  lock->keyed.Grant(report.lease, std::move(hold), now + call.lease, std::move(held));
  lock->counters.leases_granted++;
  return report;
}

absl::StatusOr<SequencePtr> PrefixReuse::Begin(CacheLock& lock, ModelId model, const SequenceOptions& asked,
                                               LeaseId id, const CallContext& context) {
  lock->keyed.ExpireLeases(core_.options().clock());
  const KeyedLease* const lease = lock->keyed.FindLease(id);
  if (lease == nullptr || !context.identity->MaySee(lease->tenant()))
    return absl::NotFoundError(
        absl::StrCat("lease ", id, " is unknown or over; look the prefix up again (LookupPrefix)"));
  if (lease->prefix == nullptr)
    return absl::FailedPreconditionError(
        absl::StrCat("lease ", id, " is of blocks of a namespace: they are loaded (LoadBlocks)"));
  const std::shared_ptr<const PrefixHold> hold = lease->prefix;
  SequenceOptions options = asked;
  const std::string& device = lock->store.tier(hold->space->home).device;
  if (options.device.empty()) options.device = device;
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr like, lock->sequences.Build(model, options));
  if (like->home != hold->space->home)
    return absl::FailedPreconditionError(absl::StrCat("the prefix lies on device '", device, "', not on '",
                                                      options.device,
                                                      "'; name that device in LookupPrefix too, or none"));
  if (options.seal_at_once || PrefixIndex::Identity(*like) != hold->space->identity)
    return absl::FailedPreconditionError(
        "the prefix is of another model, tenant, pair, exact window, key profile or salt; ask LookupPrefix "
        "for what "
        "the sequence is to be");
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Create(model, options));
  sequence->options.device = asked.device;
  // Leases keep blocks, but bytes that turned out to be damaged are lost all the same.
  const int64_t blocks = PrefixIndex::Longest(*hold->space, hold->keys).blocks;
  Trace(core_.options(), TraceVerb::kBegin, *sequence, hold->space->seed,
        std::span(hold->keys).first(static_cast<size_t>(blocks)));
  TakeOver(*lock, hold->space, hold->keys, blocks, *sequence);
  lock->keyed.Release(id);
  lock->changed.NotifyAll();
  return sequence;
}

void PrefixReuse::TakeOver(CacheState& state, const PrefixSpacePtr& space, std::span<const BlockKey> keys,
                           int64_t blocks, Sequence& sequence) {
  if (blocks == 0) return;
  const int64_t tokens = blocks * kBlockTokens;
  for (size_t g = 0; g < sequence.groups.size(); g++) {
    GroupTable& table = sequence.groups[g];
    const int64_t first = PrefixIndex::FirstBlock(*space, static_cast<int>(g), blocks);
    table.blocks->StartAt(first);
    for (int64_t index = first; index < blocks; index++) {
      Block* const block = state.prefixes.Get(*space, keys[static_cast<size_t>(index)], static_cast<int>(g));
      KVTIDE_CHECK(block != nullptr && block->index == index);
      table.blocks->PushBack(block, sequence.recency.own);
      sequence.recency.AddPrefix(state.store.RecordOf(*block));
      state.store.RaisePriority(state.store.RecordOf(*block), sequence.options.priority);
      // Further blocks are coded as these are.
      if (table.coding() && table.IsCoded(*block)) table.profile = block->profile();
    }
    table.sealed = blocks;
    for (size_t l = 0; l < table.layers(); l++) table.SetLayer(static_cast<int>(l), {tokens, -1, 0});
  }
  const std::span<const BlockKey> begin = keys.first(static_cast<size_t>(blocks));
  sequence.prefixes = space;
  sequence.chain.emplace(space->seed, std::vector<BlockKey>(begin.begin(), begin.end()));
  sequence.found_blocks = blocks;
  PrefixIndex::ForgetKeys(sequence);
  sequence.reused_tokens = tokens;
  sequence.changes++;
  state.sequences.NotEmptyAnyMore(sequence);
  state.sequences.CountHeld(sequence);
  state.counters.prefix_reused_tokens += static_cast<uint64_t>(tokens);
}

}  // namespace kvtide
