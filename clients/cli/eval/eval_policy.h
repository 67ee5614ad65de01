// What an evaluation keeps exact and what it knows of the keys beforehand: the choices of the command line as
// the cache understands them.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/exact_window.h"
#include "kernels/format/profile_maker.h"

namespace kvtide::cli {

// The exact window of a policy; seal_at_once for "none".
struct WindowPolicy {
  ExactWindow window;
  bool seal_at_once = false;

  // True if tokens of this block are attended as they are, in a sequence with `full` full blocks.
  bool IsExact(int64_t block, int64_t full) const {
    return !seal_at_once && (block >= full || IsExactBlock(block, full, window));
  }
  // Blocks of a sequence of `tokens` tokens.
  BlockCounts Count(int64_t tokens) const {
    if (seal_at_once) return {0, (tokens + kBlockTokens - 1) / kBlockTokens};
    return CountBlocks(tokens, window);
  }
};

// "default", "none" or FIRST+LAST; INVALID_ARGUMENT for other texts.
absl::StatusOr<WindowPolicy> ParseWindowPolicy(const std::string& text);

// How the cache would make the key profile of a sequence.
ProfileOptions KeyProfileOptions(CacheType key_type, const WindowPolicy& policy, client::KeyCentring centring,
                                 client::KeyEqualising equalising);

// "default", "none", "first-block" or "calibrated", as the flags say it.
const char* ChoiceName(client::KeyCentring centring);
const char* ChoiceName(client::KeyEqualising equalising);

}  // namespace kvtide::cli
