#include "kernels/format/profile.h"

#include <xxhash.h>

namespace kvtide {
namespace {

template <class T>
void Update(XXH3_state_t* state, const std::vector<T>& values) {
  const uint64_t count = values.size();
  XXH3_64bits_update(state, &count, sizeof(count));
  if (!values.empty()) XXH3_64bits_update(state, values.data(), values.size() * sizeof(T));
}

}  // namespace

uint64_t HashProfile(const Profile& profile) {
  XXH3_state_t* state = XXH3_createState();
  XXH3_64bits_reset(state);
  const int shape[4] = {profile.shape.layers, profile.shape.kv_heads, profile.shape.head_dim_k,
                        profile.shape.head_dim_v};
  XXH3_64bits_update(state, shape, sizeof(shape));
  for (const auto* side : {&profile.k, &profile.v}) {
    const uint64_t heads = side->size();
    XXH3_64bits_update(state, &heads, sizeof(heads));
    for (const HeadProfile& head : *side) {
      Update(state, head.mean);
      Update(state, head.gain);
      Update(state, head.transform);
      Update(state, head.widths);
    }
  }
  const uint64_t hash = XXH3_64bits_digest(state);
  XXH3_freeState(state);
  return hash == 0 ? 1 : hash;
}

}  // namespace kvtide
