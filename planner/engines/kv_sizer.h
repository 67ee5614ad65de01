// How many bytes the cache of one pair takes in one engine. A KvSizer is made once per (model, pair) and is
// then a cheap pure function of the load, so that a plan may ask it thousands of times. It borrows nothing;
// const calls may run in parallel.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/engines/engine.h"
#include "planner/model/geometry.h"
#include "planner/saturating.h"
#include "planner/type_pair.h"

namespace kvtide::planner {

struct KvLoad {
  int64_t context = 0;  // tokens per sequence
  int64_t sequences = 1;
  int64_t shared_prefix = 0;  // tokens that all sequences have in common, < context
};

struct KvBytes {
  int64_t full = 0;
  int64_t sliding = 0;
  int64_t chunked = 0;
  int64_t latent = 0;
  int64_t window_tail = 0;
  int64_t rounding = 0;
  int64_t recurrent = 0;

  int64_t Cache() const { return Sum(full, sliding, chunked, latent, window_tail, rounding); }
  void Add(LayerKind kind, int64_t bytes);
};

class KvSizer {
 public:
  virtual ~KvSizer() = default;

  virtual KvBytes Bytes(const KvLoad& load) const = 0;
  // f16 copies that the attention kernels need beside the cache, at their largest.
  virtual int64_t ScratchBytes(const KvLoad&) const { return 0; }
  // What a profile of the model's keys takes beside the cache, once for all sequences.
  virtual int64_t KeyProfileBytes() const { return 0; }
  // f16 copies written and read back in every decode step.
  virtual int64_t StepScratchBytes(int64_t /*context*/) const { return 0; }

  // The arithmetic of Bytes line by line, for a person with a pocket calculator.
  virtual std::vector<std::string> Explain(const KvLoad& load) const = 0;

  // Stored bytes that one sequence reads in one decode step.
  int64_t ReadBytes(int64_t context) const;
  // K and V values of one sequence that attention can still see: what bits per value are counted against.
  int64_t LiveValues(int64_t context) const;

  const TypePair& effective() const { return effective_; }
  // What the engine changed without being asked, one sentence each.
  const std::vector<std::string>& rewrites() const { return rewrites_; }

 protected:
  // One layer group as stored: bytes per token over all of its layers.
  struct StoredGroup {
    LayerGroup group;
    int64_t layers = 0;
    int64_t k_token_bytes = 0;
    int64_t v_token_bytes = 0;
    int64_t token_bytes() const { return k_token_bytes + v_token_bytes; }
  };

  std::vector<StoredGroup> groups_;
  TypePair effective_;
  std::vector<std::string> rewrites_;
};

// InvalidArgument when the engine does not know a type or cannot store a head dim in it.
absl::StatusOr<std::unique_ptr<KvSizer>> MakeKvSizer(const EngineOptions& options, const ModelGeometry& model,
                                                     const std::vector<LayerGroup>& groups,
                                                     const TypePair& pair);

// Pairs that are worth listing for an engine when the request names none; those of forks of llama.cpp only
// with the build "auto" or a fork's name.
std::vector<TypePair> DefaultPairs(const EngineOptions& options, bool latent_only);

// Every cache type of an engine.
std::vector<std::string> CacheTypeNames(Engine engine);

// A pair given in the engine's own words: vLLM's --kv-cache-dtype turboquant_k8v4 is fp8/tq4.
TypePair InOwnWords(Engine engine, const TypePair& pair);

// `value` rounded up to a multiple of `unit`, and divided by it.
inline int64_t CeilDiv(int64_t value, int64_t unit) { return value / unit + (value % unit > 0 ? 1 : 0); }
inline int64_t RoundUp(int64_t value, int64_t unit) { return Product(CeilDiv(value, unit), unit); }

}  // namespace kvtide::planner
