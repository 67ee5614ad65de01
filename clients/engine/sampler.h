// Picks the next token from logits: the most likely one, or a random one among the most likely, by a seeded
// generator whose results do not depend on the standard library. One sampler per generated text.
#pragma once

#include <cstdint>
#include <span>

namespace kvtide::engine {

struct SamplerOptions {
  float temperature = 0;  // 0 = greedy
  int top_k = 40;         // of the most likely tokens; 0 = all
  uint64_t seed = 1;
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}
  int32_t Pick(std::span<const float> logits);

 private:
  double NextUniform();  // [0, 1)

  SamplerOptions options_;
  uint64_t state_;
};

// The lowest index of the largest value.
int32_t ArgMax(std::span<const float> logits);

}  // namespace kvtide::engine
