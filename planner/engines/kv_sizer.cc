#include "planner/engines/kv_sizer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/format/catalogue.h"
#include "planner/engines/compressed_latents.h"
#include "planner/engines/kvtide_engine.h"
#include "planner/engines/llama_cpp.h"
#include "planner/engines/sglang.h"
#include "planner/engines/vllm.h"

namespace kvtide::planner {

void KvBytes::Add(LayerKind kind, int64_t bytes) {
  switch (kind) {
    case LayerKind::kFull:
      full = Sum(full, bytes);
      break;
    case LayerKind::kSliding:
      sliding = Sum(sliding, bytes);
      break;
    case LayerKind::kChunked:
      chunked = Sum(chunked, bytes);
      break;
    case LayerKind::kMla:
      latent = Sum(latent, bytes);
      break;
    case LayerKind::kRecurrent:
      recurrent = Sum(recurrent, bytes);
      break;
    case LayerKind::kShared:
    case LayerKind::kNone:
      break;
  }
}

int64_t KvSizer::ReadBytes(int64_t context) const {
  int64_t bytes = 0;
  for (const StoredGroup& stored : groups_) {
    if (stored.group.kind == LayerKind::kRecurrent) {
      bytes = Sum(bytes, Product(2, stored.group.state_bytes, stored.layers));  // read and written back
      continue;
    }
    const int64_t window = stored.group.window;
    bytes = Sum(bytes, Product(stored.token_bytes(), window > 0 ? std::min(context, window)
                                                                : CeilDiv(context, stored.group.compress)));
  }
  return bytes;
}

int64_t KvSizer::LiveValues(int64_t context) const {
  int64_t values = 0;
  for (const StoredGroup& stored : groups_) {
    const LayerGroup& group = stored.group;
    if (group.kind == LayerKind::kRecurrent) continue;
    const int64_t tokens =
        group.window > 0 ? std::min<int64_t>(context, group.window) : CeilDiv(context, group.compress);
    values =
        Sum(values, Product(tokens, stored.layers, group.n_kv_heads, group.head_dim_k + group.head_dim_v));
  }
  return values;
}

absl::StatusOr<std::unique_ptr<KvSizer>> MakeKvSizer(const EngineOptions& options, const ModelGeometry& model,
                                                     const std::vector<LayerGroup>& groups,
                                                     const TypePair& pair) {
  const bool compressed = HasCompressedLatents(groups);
  if (compressed && options.engine != Engine::kLlamaCpp)
    return MakeCompressedLatentSizer(options, groups, pair);
  switch (options.engine) {
    case Engine::kLlamaCpp:
      if (compressed) {  // one cache per sequence, also with -kvu
        EngineOptions separate = options;
        separate.unified = false;
        return MakeLlamaCppSizer(separate, model, groups, pair);
      }
      return MakeLlamaCppSizer(options, model, groups, pair);
    case Engine::kVllm:
      return MakeVllmSizer(options, groups, pair);
    case Engine::kSglang:
      return MakeSglangSizer(options, groups, pair);
    case Engine::kKvtide:
      return MakeKvtideSizer(options, groups, pair);
  }
  return absl::InvalidArgumentError("unknown engine");
}

std::vector<std::string> CacheTypeNames(Engine engine) {
  std::vector<std::string> names;
  const auto add = [&](const std::string& name) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  };
  switch (engine) {
    case Engine::kLlamaCpp:
      for (const GgmlType& type : GgmlTypes()) add(type.name);
      break;
    case Engine::kKvtide:
      for (CacheType type : AllCacheTypes()) add(std::string(Name(type)));
      for (CacheType type : CalibratedTypes()) add(std::string(Name(type)));
      break;
    case Engine::kVllm:
      for (const TypePair& pair : VllmPairs()) {
        add(pair.k);
        add(pair.v);
      }
      break;
    case Engine::kSglang:
      for (const TypePair& pair : SglangPairs()) add(pair.k);
      break;
  }
  return names;
}

TypePair InOwnWords(Engine engine, const TypePair& pair) {
  if ((engine != Engine::kVllm && engine != Engine::kSglang) || pair.k != pair.v) return pair;
  for (const TypePair& known : engine == Engine::kVllm ? VllmPairs() : SglangPairs()) {
    if ((engine == Engine::kVllm ? VllmCacheDtype(known) : SglangCacheDtype(known)) == pair.k) return known;
  }
  if (pair.k == "fp8_e4m3") return {"fp8", "fp8"};
  if (pair.k == "bfloat16") return {"bf16", "bf16"};
  if (pair.k == "float16") return {"f16", "f16"};
  return pair;
}

std::vector<TypePair> DefaultPairs(const EngineOptions& options, bool latent_only) {
  std::vector<TypePair> pairs;
  switch (options.engine) {
    case Engine::kLlamaCpp:
      for (const TypePair& pair : LlamaCppPairs(options.build != "newest")) {
        if (!ResolveTree(options.build, pair).empty()) pairs.push_back(pair);
      }
      break;
    case Engine::kVllm:
      pairs = VllmPairs();
      break;
    case Engine::kSglang:
      pairs = SglangPairs();
      break;
    case Engine::kKvtide:
      pairs = KvtidePairs(options);
      break;
  }
  if (!latent_only) return pairs;
  std::vector<TypePair> latent;
  for (const TypePair& pair : pairs) {
    TypePair key_only{pair.k, "none"};
    if (std::find(latent.begin(), latent.end(), key_only) == latent.end()) latent.push_back(key_only);
  }
  return latent;
}

}  // namespace kvtide::planner
