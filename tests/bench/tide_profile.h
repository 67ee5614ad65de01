// A profile for the benchmarks of calibrated keys.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "kernels/format/profile.h"

namespace kvtide::bench {

// A profile for calibrated keys: RoPE of Llama unless they are coded after it, a transform near the unit
// matrix, and widths of groups: at head dim 128 those that `kvtide calibrate` gave the second KV head of the
// last layer of tidelm-7m.
inline Profile MakeProfile(int kv_heads, int dim, bool levels) {
  const std::vector<std::vector<uint8_t>> widths =
      dim == 128 ? std::vector<std::vector<uint8_t>>{{6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 4, 3, 3, 3, 2, 2},
                                                     {6, 5, 4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1},
                                                     {6, 4, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0},
                                                     {5, 3, 2, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
                 : std::vector<std::vector<uint8_t>>{{6, 6, 5, 5, 4, 3, 2, 1},
                                                     {5, 5, 4, 4, 3, 2, 1, 1},
                                                     {4, 4, 3, 2, 2, 1, 1, 0},
                                                     {3, 2, 1, 1, 0, 0, 0, 0}};
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  Profile profile;
  profile.shape = {1, kv_heads, dim, dim};
  for (int h = 0; h < kv_heads; h++) {
    HeadProfile& head = profile.k.emplace_back();
    for (int i = 0; i < dim / 2 && !levels; i++)
      head.rope.frequencies.push_back(
          std::pow(500000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(dim)));
    for (int i = 0; i < dim; i++) head.centre.push_back(normal(rng));
    for (int i = 0; i < dim * dim; i++)
      head.transform.push_back((i % (dim + 1) == 0 ? 1.0f : 0.0f) +
                               normal(rng) / static_cast<float>(2 * dim));
    for (const std::vector<uint8_t>& type : widths)
      head.widths.insert(head.widths.end(), type.begin(), type.end());
    const absl::Status status = CompleteTransform(dim, head);
    if (!status.ok()) {
      std::printf("%s\n", std::string(status.message()).c_str());
      std::exit(1);
    }
  }
  profile.hash = HashProfile(profile);
  return profile;
}

}  // namespace kvtide::bench
