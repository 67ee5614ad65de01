// Sequences whose rows are those of a model that computes them from token ids: the same for the same tokens
// before a position, different after the first other token.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {

using Tokens = std::vector<TokenId>;

// `count` ids, the same for the same seed.
Tokens SomeTokens(uint32_t seed, size_t count);
Tokens operator+(Tokens a, const Tokens& b);

class TokenClient {
 public:
  // An empty sequence.
  TokenClient(KvCache& cache, const ModelSpec& model, const SequenceOptions& options,
              const CallContext& context = {});

  SequenceId id() const { return id_; }
  const Tokens& tokens() const { return tokens_; }
  ModelId model() const { return model_id_; }

  absl::StatusOr<PrefixReport> Lookup(const Tokens& tokens, absl::Duration lease = absl::Seconds(30));
  // A sequence that begins with the longest cached prefix of the tokens, and appends the rest of them.
  // Returns how many were there.
  absl::StatusOr<int64_t> Begin(const Tokens& tokens);
  // All layers in one call; `say`: with their ids.
  absl::Status Append(const Tokens& tokens, bool say = true);
  // Layer by layer with AppendAttend; ids come with the first layer.
  absl::Status Step(const Tokens& tokens);
  // Every stored value from the first token that has not left a sliding window.
  std::vector<float> Read();
  absl::StatusOr<std::vector<float>> TryRead();
  // Attention of a query in every layer.
  std::vector<float> Attend();
  absl::Status Truncate(int64_t tokens);
  absl::Status Close();
  SequenceInfo info() const { return cache_->GetSequence(id_, context_).value(); }
  void Move(KvCache& cache) { cache_ = &cache; }

 private:
  NewRows Rows(int layer, const Tokens& next) const;

  KvCache* cache_;
  ModelSpec spec_;
  SequenceOptions options_;
  CallContext context_;
  ModelId model_id_ = 0;
  SequenceId id_ = 0;
  Tokens tokens_;
};

// What a sequence with these tokens holds that shares nothing, appended in the same way (all at once).
std::vector<float> ReadAlone(KvCache& cache, const ModelSpec& model, const SequenceOptions& options,
                             const Tokens& tokens);

}  // namespace kvtide::testing
