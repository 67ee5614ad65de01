// The names of a K type and a V type, written `q8_0/turbo4`. A model that caches one latent per token has no
// V: `f16/none`. Names are those of the engine; nothing here knows whether an engine has the type.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::planner {

struct TypePair {
  std::string k;
  std::string v;

  std::string Name() const { return k + "/" + v; }
  friend bool operator==(const TypePair&, const TypePair&) = default;
};

// "q8_0/turbo4", or "q8_0" for both sides.
absl::StatusOr<TypePair> ParsePair(const std::string& text);

// "f16/f16,q8_0/turbo4"; "all" gives an empty list, which a request takes as every pair of the engine.
absl::StatusOr<std::vector<TypePair>> ParsePairs(const std::string& text);

}  // namespace kvtide::planner
