// How a sequence is stored: cache types, exact window, profile from its first block, and what may be dropped.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/tier/priority.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/exact_window.h"
#include "kernels/format/profile_maker.h"

namespace kvtide {

// K minus its mean over the sequence's first block (the first tokens of the first append with seal_at_once),
// or over the model's calibration text.
enum class Centre : uint8_t { kTypeDefault, kNone, kFirstBlock, kCalibrated };

// When a sequence is made durable by itself, beside KvCache::Persist.
enum class Persistence : uint8_t { kNone, kOnPark, kAll };  // kOnPark: with an Evict that names it

struct SequenceOptions {
  CachePair pair = ExactPair();
  std::vector<CachePair> group_pairs;  // by layer group; empty = `pair` for all
  // When its tier needs room, a coded block that was not used for a while is recoded as the first of these
  // that takes fewer bytes, then as the next one, before it is demoted; one that was, before it would be
  // dropped. Each takes fewer bits than the one before. Bits that went so do not come back. Empty: never.
  std::vector<CachePair> degrade;
  ExactWindow exact_window;
  // Evaluation mode: every token is coded before anything attends over it, the tail too; the exact window
  // counts as 0/0. Such a sequence serves one call at a time (else Aborted).
  bool seal_at_once = false;
  Centre centre = Centre::kTypeDefault;
  std::optional<Equalise>
      equalise;  // of K's channels, from the same tokens as the mean; unset = the type's default
  RopePairs rope_pairs = RopePairs::kHalves;
  // The tenant: nobody else sees the sequence. Stamped on its blocks. Empty = the caller's.
  std::string name_space;
  // What else K and V depend on beside model and token ids (adapters, images): sequences of different salts
  // have no prefix in common. Up to 256 bytes.
  std::string salt;
  std::string device;  // where the sequence is to live; empty = the device with the most room
  Persistence persistence = Persistence::kNone;
  // Among the tenant's own blocks. What the sequence leaves in the cache when it is closed keeps it; what
  // several have in common has the highest of theirs. Another one later: KvCache::SetPriority.
  Priority priority = Priority::kNormal;
  bool allow_drop =
      false;  // blocks may be dropped when the last tier is full; attending over them is DataLoss

  CachePair PairOfGroup(int group) const {
    return group_pairs.empty() ? pair : group_pairs[static_cast<size_t>(group)];
  }
  ExactWindow EffectiveWindow() const { return seal_at_once ? ExactWindow{0, 0} : exact_window; }
  // Of a layer group with so many tokens, at rest; `coding`: its pair is not the exact one.
  BlockCounts LiveBlocks(int64_t tokens, int64_t window, bool coding) const {
    BlockCounts counts = CountLiveBlocks(tokens, EffectiveWindow(), window);
    if (!coding) return {counts.exact + counts.coded, 0};
    // seal_at_once keeps the tail twice: f16, to append to, and coded, to attend over.
    if (seal_at_once && tokens % kBlockTokens != 0) counts.coded++;
    return counts;
  }
};

// What is made from the first block for a group whose keys are coded as `key_type`.
ProfileOptions ProfileOptionsFor(const SequenceOptions& options, CacheType key_type);

// Whether blocks that are coded as `pair` may be recoded as those of `degrade`, one after another.
// InvalidArgument with what is wrong.
absl::Status CheckLadder(const GroupShape& shape, CachePair pair, std::span<const CachePair> degrade);
absl::Status CheckSequenceOptions(const SequenceOptions& options, const ModelSpec& model);

}  // namespace kvtide
