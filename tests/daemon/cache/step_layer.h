// One layer of one item of a step, as an engine does it that writes rows into the blocks that the step shows,
// and attends over them, by backends that reach their tiers.
#pragma once

#include <map>
#include <vector>

#include "daemon/cache/stepper.h"
#include "tests/daemon/cache/layer_call.h"

namespace kvtide::testing {

class StepLayer {
 public:
  // Borrows model and rows; the step stays open.
  StepLayer(const Step& step, size_t item, const ModelSpec& model, const NewRows& rows);

  // Whether every new token has a block, and that is an exact one.
  bool complete() const { return complete_; }
  // What is to be written, by tier.
  const std::map<int, std::vector<AppendPiece>>& pieces() const { return pieces_; }
  // The tier of all blocks; -1: there are several.
  int tier() const { return tier_; }
  // What the new tokens see, by a backend that reaches all blocks.
  absl::Status Attend(Backend& backend, const std::vector<float>& q, std::vector<float>* out,
                      std::vector<float>* lse) const;

 private:
  const LayerGroupSpec& group_;
  const int layer_;  // within the group
  const int64_t start_, tokens_;
  bool complete_ = false;
  std::map<int, std::vector<AppendPiece>> pieces_;
  std::vector<BlockRun> runs_;
  int tier_ = -1;
};

}  // namespace kvtide::testing
