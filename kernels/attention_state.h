// An attention state: a partial attention output with its log-sum-exp. States over disjoint sets of tokens
// merge in any order to the state over their union, which is how runs, splits and tiers are joined.
// Log-sum-exp is natural, of the logits as they enter softmax (scaled, soft-capped). The empty state is lse =
// -inf, output 0.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/base/host_device.h"

namespace kvtide {

// Adds state b to state a, both over rows of `dim` values: a becomes the merged state.
KVTIDE_HD inline void MergeAttentionState(float* a_output, float* a_lse, const float* b_output, float b_lse,
                                          int dim) {
  if (b_lse == -INFINITY) return;
  if (*a_lse == -INFINITY) {
    for (int i = 0; i < dim; i++) a_output[i] = b_output[i];
    *a_lse = b_lse;
    return;
  }
  const float m = *a_lse > b_lse ? *a_lse : b_lse;
  const float wa = expf(*a_lse - m), wb = expf(b_lse - m), sum = wa + wb;
  for (int i = 0; i < dim; i++) a_output[i] = (a_output[i] * wa + b_output[i] * wb) / sum;
  *a_lse = m + logf(sum);
}

}  // namespace kvtide
