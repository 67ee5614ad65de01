// Cache bytes of DeepSeek V4's latents in vLLM 0.33 and SGLang 0.5.23: a window of single latents, behind it
// one latent per 4 or 128 tokens, keys of an indexer, and the state of what compresses. Both engines keep
// records of 584 bytes (448 FP8 values, 64 BF16, 7 scales, a pad byte) whatever --kv-cache-dtype says, on
// every GPU of a tensor-parallel group.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/engines/kv_sizer.h"

namespace kvtide::planner {

// True for models with one latent for several tokens.
bool HasCompressedLatents(const std::vector<LayerGroup>& groups);

// Tokens of a block of vLLM and of a page of SGLang, whatever their flags say.
constexpr int kCompressedLatentBlock = 256;

// The only pair that these engines have for such a model.
inline TypePair CompressedLatentPair() { return {"fp8", "none"}; }

// InvalidArgument for other pairs, and for engines other than vLLM and SGLang.
absl::StatusOr<std::unique_ptr<KvSizer>> MakeCompressedLatentSizer(const EngineOptions& options,
                                                                   const std::vector<LayerGroup>& groups,
                                                                   const TypePair& pair);

}  // namespace kvtide::planner
