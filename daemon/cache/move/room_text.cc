#include "daemon/cache/move/room_text.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace kvtide {
namespace {

std::vector<uint64_t> BytesByTier(const CacheState& state, const Sequence& sequence) {
  std::vector<uint64_t> bytes(state.store.tiers());
  for (const GroupTable& table : sequence.groups)
    for (const Chunk* chunk : table.blocks->chunks())
      for (size_t t = 0; t < chunk->tiers.size(); t++) bytes[t] += chunk->tiers[t].bytes;
  return bytes;
}

// What pins hold, of the tenant and of others. Blocks that several pinned sequences share count for each.
struct Pinned {
  std::vector<uint64_t> own, others;  // bytes by tier
  uint64_t own_sequences = 0, other_sequences = 0;
  absl::Time own_end = absl::InfinitePast();
};

Pinned FindPinned(const CacheState& state, const TenantAccount* account, absl::Time now) {
  constexpr uint64_t kMost = 256;  // whose blocks are added up: the mutex is held
  Pinned pinned;
  pinned.own.resize(state.store.tiers());
  pinned.others.resize(state.store.tiers());
  uint64_t left = std::min(state.sequences.pins(), kMost);
  for (auto it = state.sequences.all().begin(); left > 0 && it != state.sequences.all().end(); ++it) {
    const Sequence& sequence = *it->second;
    if (sequence.pinned_until <= now) continue;
    left--;
    const bool own = sequence.account.get() == account;
    const std::vector<uint64_t> bytes = BytesByTier(state, sequence);
    for (size_t t = 0; t < bytes.size(); t++) (own ? pinned.own : pinned.others)[t] += bytes[t];
    (own ? pinned.own_sequences : pinned.other_sequences)++;
    if (own) pinned.own_end = std::max(pinned.own_end, sequence.pinned_until);
  }
  return pinned;
}

std::string Whole(absl::Duration time) {
  return absl::FormatDuration(std::max(absl::Seconds(1), absl::Ceil(time, absl::Seconds(1))));
}

// The tenant's open sequence that was not used for longest and is not pinned, by its coldest block.
struct Coldest {
  SequenceId id = 0;
  int tier = 0;
  uint64_t bytes = 0;  // in this tier
  absl::Time used;
};

std::optional<Coldest> FindColdest(const CacheState& state, const TenantAccount* account) {
  constexpr int kMostPeeks = 1024;
  std::optional<Coldest> coldest;
  if (account == nullptr) return coldest;
  for (int t = 0; t < static_cast<int>(state.store.tiers()); t++) {
    int peeks = 0;
    state.store.PeekIdle(t, ~uint64_t{0}, [&](const Block& block) {
      if (++peeks > kMostPeeks) return false;
      if (block.account() != account || !state.sequences.IsOpen(block.sequence)) return true;
      const absl::Time used = state.store.LastTouched(block);
      if (!coldest.has_value() || used < coldest->used) coldest = {block.sequence, t, 0, used};
      return false;
    });
  }
  if (!coldest.has_value()) return coldest;
  const auto found = state.sequences.all().find(coldest->id);
  if (found == state.sequences.all().end()) return std::nullopt;
  coldest->bytes = BytesByTier(state, *found->second)[static_cast<size_t>(coldest->tier)];
  return coldest;
}

// ". What frees room: ...", `last` the advice that is always good.
std::string Advice(const CacheState& state, const TenantAccount* account, const Pinned& pinned,
                   const std::string& last, absl::Time now) {
  std::vector<std::string> ways;
  if (pinned.own_sequences > 0)
    ways.push_back(absl::StrCat("ending pins (", pinned.own_sequences,
                                account != nullptr
                                    ? absl::StrCat(" sequences of tenant '", account->tenant, "'")
                                    : std::string(" sequences"),
                                ", the last pin ends in ", Whole(pinned.own_end - now), ")"));
  if (pinned.other_sequences > 0)
    ways.push_back(absl::StrCat("the end of others' pins (", pinned.other_sequences, " sequences)"));
  if (state.keyed.leases() > 0)
    ways.push_back(absl::StrCat("releasing leases of cached blocks (", state.keyed.leases(),
                                "), which end by themselves too"));
  const std::optional<Coldest> coldest = FindColdest(state, account);
  ways.push_back(coldest.has_value()
                     ? absl::StrCat("closing or truncating sequences: ", coldest->id, " of tenant '",
                                    account->tenant, "' was not used for ", Whole(now - coldest->used),
                                    " and has ", coldest->bytes, " bytes in tier '",
                                    state.store.tier(coldest->tier).name, "'")
                     : "closing or truncating sequences");
  ways.push_back(last);
  return absl::StrCat(". What frees room: ", absl::StrJoin(ways, "; "));
}

}  // namespace

std::string NoRoomText(const CacheState& state, size_t bytes, const TenantAccount* account, absl::Time now) {
  const Pinned pinned = FindPinned(state, account, now);
  std::string text = absl::StrCat("no room for ", bytes, " bytes:");
  for (size_t t = 0; t < state.store.tiers(); t++) {
    const Tier& tier = state.store.tier(static_cast<int>(t));
    absl::StrAppend(&text, t == 0 ? " " : "; ", "tier '", tier.name, "'",
                    state.store.homes() > 1 ? absl::StrCat(" on ", tier.device) : "", " has ",
                    tier.allocator.free_bytes(), " of ", tier.allocator.capacity_bytes(),
                    " bytes free, the largest extent is ", tier.allocator.LargestFreeExtent());
    if (pinned.own[t] > 0)
      absl::StrAppend(&text, ", ", pinned.own[t], " are pinned",
                      account != nullptr ? absl::StrCat(" by tenant '", account->tenant, "'") : "");
    if (pinned.others[t] > 0) absl::StrAppend(&text, ", ", pinned.others[t], " are pinned by others");
    if (tier.io != nullptr && !tier.io->Writable())
      absl::StrAppend(&text, " (it takes nothing now: ", tier.io->Stats().problem, ")");
  }
  return absl::StrCat(text,
                      Advice(state, account, pinned,
                             state.store.recodable_blocks() == 0
                                 ? "sequences whose cold blocks may be recoded to fewer bits (degrade); "
                                   "more memory for a tier"
                                 : "more memory for a tier",
                             now));
}

std::string OverQuotaText(const CacheState& state, size_t bytes, const TenantAccount& account,
                          absl::Time now) {
  Pinned pinned = FindPinned(state, &account, now);
  pinned.other_sequences = 0;  // which have nothing of this quota
  std::string text =
      absl::StrCat("no room for ", bytes, " bytes within the quota of tenant '", account.tenant, "': ");
  bool first = true;
  for (size_t t = 0; t < state.store.tiers(); t++) {
    const std::string& name = state.store.tier(static_cast<int>(t)).name;
    const uint64_t limit = account.limits.OfTier(name);
    if (limit == TenantLimits::kNone || (t > 0 && state.store.tier(static_cast<int>(t) - 1).name == name))
      continue;
    absl::StrAppend(&text, first ? "" : "; ", limit - state.store.QuotaLeft(account, static_cast<int>(t)),
                    " of ", limit, " bytes taken in tier '", name, "'");
    if (pinned.own[t] > 0) absl::StrAppend(&text, ", ", pinned.own[t], " of them pinned");
    first = false;
  }
  return absl::StrCat(text,
                      Advice(state, &account, pinned, "evicting some to a lower tier; a larger quota", now));
}

}  // namespace kvtide
