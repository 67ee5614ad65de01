// The naive model of the cache: every sequence is plain rows of floats, as they are stored, and attention is
// a double loop over them. Rows are rounded to f16 on append; a block that the cache must have coded by now
// is encoded and decoded here by the definition of the format. With seal_at_once every row is coded as it
// comes (a row's code does not depend on its neighbours); such a sequence may be cut at block boundaries
// only. Knows no memory, tier or block table. A copy is cheap (shared_rows.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/call/sequence_options.h"
#include "kernels/format/profile.h"
#include "tests/daemon/cache/dense_attention.h"
#include "tests/daemon/cache/shared_rows.h"

namespace kvtide::testing {

// How a result differs from what is expected; empty if it does not: the relative L2 distance of all outputs
// is below `tolerance`, every log-sum-exp within it.
constexpr double kCloseEnough = 3e-3;
std::string Difference(const AttentionResult& expected, const std::vector<float>& out,
                       const std::vector<float>& lse, double tolerance = kCloseEnough);

class ShadowSequence {
 public:
  ShadowSequence(const ModelSpec& model, const SequenceOptions& options);

  bool calibrated() const { return Info(options_.pair.k).calibrated; }

  // New rows of one model layer, [tokens][kv_heads][dim]; what follows an append is done by Settle.
  void Append(int layer, const std::vector<float>& k, const std::vector<float>& v, int64_t tokens);
  // After all layers of a call are appended. Blocks of `deferred` stay exact until the next time: the cache
  // had no room to code them. `lost`: some block of the sequence was dropped. The cache makes a profile of
  // keys from the first block that it still has, which is not known here: from then on KnowsKeys is false.
  void Settle(std::span<const DeferredBlocks> deferred = {}, bool lost = false);
  // Blocks that the cache has recoded to fewer bits by now.
  void Degrade(std::span<const DegradedBlocks> degraded);
  void Truncate(int64_t tokens);

  // Rows of tokens [first, first + tokens) of a layer as they are stored.
  std::vector<float> Keys(int layer, int64_t first, int64_t tokens) const;
  std::vector<float> Values(int layer, int64_t first, int64_t tokens) const;
  // False: coded keys of the layer have another profile than they may have in the cache. Values are as there.
  bool KnowsKeys(int layer) const;
  int64_t LayerLength(int layer) const;
  int64_t Length() const;
  // First token that the cache still has to hold in the layer's group.
  int64_t FirstLiveToken(int layer) const;
  uint64_t BytesAtRest() const;
  uint64_t coded_blocks() const;

  AttentionResult Attend(int layer, const std::vector<float>& q, int64_t queries, int64_t first_position,
                         bool causal = true, int64_t window = 0, const float* sinks = nullptr) const;

 private:
  struct Layer {
    SharedRows k, v;
    int64_t tokens() const { return k.tokens(); }
  };
  struct Group {
    std::vector<Layer> layers;
    std::vector<bool> coded;                             // by block
    std::map<int64_t, std::vector<CachePair>> degraded;  // what a coded block has become, one after another
    std::shared_ptr<const Profile> profile, calibrated;
    std::vector<bool> profiled;  // by layer, with seal_at_once
    int64_t first_block = 0;
    bool other_profile = false;
  };
  const Layer& RowsOf(int layer) const;
  // Codes and decodes `tokens` of one block of one layer in place. `from`: what they were, null: exact; a
  // side that has that type already keeps its codes.
  void CodeRows(size_t group, size_t layer, CachePair pair, int64_t first_token, int64_t tokens,
                const CachePair* from = nullptr);

  std::shared_ptr<const ModelSpec> model_;
  SequenceOptions options_;
  std::vector<Group> groups_;
};

}  // namespace kvtide::testing
