// How a sequence is stored: cache types, exact window, profile from its first block, and what may be dropped.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/model.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/exact_window.h"

namespace kvtide {

// K minus its mean over the sequence's first block (the first tokens of the first append with seal_at_once).
enum class Centre : uint8_t { kNone, kFirstBlock };
// One gain per K channel from the first block, so that all channels have equal energy. kTypeDefault: only for types that
// mix few channels in their rotation (none of today's).
enum class Equalise : uint8_t { kTypeDefault, kNone, kFirstBlock };

struct SequenceOptions {
  CachePair pair = ExactPair();
  std::vector<CachePair> group_pairs;  // by layer group; empty = `pair` for all
  ExactWindow exact_window;
  // Evaluation mode: every token is coded before anything attends over it, the tail too; the exact window counts as 0/0.
  // Such a sequence serves one call at a time (else Aborted).
  bool seal_at_once = false;
  Centre centre = Centre::kFirstBlock;
  Equalise equalise = Equalise::kTypeDefault;
  std::string name_space;   // tenant; shown in lists and stamped on blocks
  bool allow_drop = false;  // blocks may be dropped when the last tier is full; attending over them is DataLoss

  CachePair PairOfGroup(int group) const {
    return group_pairs.empty() ? pair : group_pairs[static_cast<size_t>(group)];
  }
  ExactWindow EffectiveWindow() const { return seal_at_once ? ExactWindow{0, 0} : exact_window; }
};

absl::Status CheckSequenceOptions(const SequenceOptions& options, const ModelSpec& model);

}  // namespace kvtide
